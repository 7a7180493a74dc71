"""PCI configuration space of the function: 4096 bytes, and which of their bits a write may change."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

CONFIG_BYTES: Final = 4096

COMMAND: Final = 0x04
BARS: Final = 0x10
PM_CAPABILITY: Final = 0x40
MSIX_CAPABILITY: Final = 0x50
PCIE_CAPABILITY: Final = 0x60
SERIAL_CAPABILITY: Final = 0x100

DEVICE_CONTROL: Final = PCIE_CAPABILITY + 8
"""Bit 15, Initiate Function Level Reset, lies in the byte after this one."""

BAR_64BIT: Final = 0x4
BAR_PREFETCHABLE: Final = 0x8


class ConfigSpace:
    """Configuration space of a type 0 function with PM, MSI-X, PCI Express (FLR) and serial number capabilities.

    Parameters
    ----------
    vendor_id, device_id : int
        Also used as subsystem ids.
    serial : int
        64 bits, for the extended capability.
    link_speed : int
        PCIe generation of the link, 8 lanes wide.
    bars : dict of int to (bytes, flags)
        64-bit memory BARs by their first index; the size is a power of two, flags are BAR_PREFETCHABLE or 0.
    vectors, msix_bar, msix_table, msix_pba : int
        MSI-X: count, BAR, byte offsets of table and pending bits.
    bus_master : callable
        Told of each change of Bus Master Enable.
    flr : callable
        Called when software writes 1 to Initiate Function Level Reset.
    """

    def __init__(
        self, *, vendor_id: int, device_id: int, serial: int, link_speed: int, bars: dict[int, tuple[int, int]],
        vectors: int, msix_bar: int, msix_table: int, msix_pba: int,
        bus_master: Callable[[bool], None], flr: Callable[[], None],
    ) -> None:
        self._bus_master = bus_master
        self._flr = flr
        self._bytes = bytearray(CONFIG_BYTES)
        self._mask = bytearray(CONFIG_BYTES)
        self._header(vendor_id, device_id, bars)
        self._pm()
        self._msix(vectors, msix_bar, msix_table, msix_pba)
        self._pcie(link_speed)
        self._serial(serial)
        self._reset_image = bytes(self._bytes)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`; the caller has checked the bounds."""
        return bytes(self._bytes[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """Change the writable bits of the bytes that `data` covers, then act on them."""
        mastered = self.bus_master
        for at, byte in enumerate(data, offset):
            mask = self._mask[at]
            if at == PM_CAPABILITY + 4 and byte & 3 in (1, 2):
                # D1 and D2 are not supported: the write of the field is discarded (PCI PM 1.2, 3.2.4).
                mask &= ~3
            self._bytes[at] = self._bytes[at] & ~mask & 0xFF | byte & mask
        if self.bus_master != mastered:
            self._bus_master(self.bus_master)
        flr = DEVICE_CONTROL + 1
        if offset <= flr < offset + len(data) and data[flr - offset] & 0x80:
            self._flr()

    def reset(self) -> None:
        """Return every byte to its value after power-on, as FLR does (PCIe 6.0, 6.6.2)."""
        self._bytes[:] = self._reset_image
        self._bus_master(False)

    @property
    def bus_master(self) -> bool:
        """Command register, Bus Master Enable."""
        return bool(self._bytes[COMMAND] & 4)

    @property
    def intx_disabled(self) -> bool:
        """Command register, Interrupt Disable."""
        return bool(self._bytes[COMMAND + 1] & 4)

    def _put(self, offset: int, layout: str, value: int, writable: int = 0) -> None:
        struct.pack_into("<" + layout, self._bytes, offset, value)
        struct.pack_into("<" + layout, self._mask, offset, writable)

    # Type 0 header (PCIe 6.0, 7.5.1)
    #
    #        31            16 15             0
    #  0x00 |  device id     |  vendor id     |
    #  0x04 |  status        |  command       |
    #  0x08 |  class code 120000     | rev    |
    #  0x0c | bist | type 0  | latency | line |
    #  0x10 |  BAR 0 .. BAR 5                 |
    #  0x2c |  subsystem     |  subsys vendor |
    #  0x34 |                |        | caps  |
    #  0x3c |  -     -       |  pin   | line  |

    def _header(self, vendor_id: int, device_id: int, bars: dict[int, tuple[int, int]]) -> None:
        self._put(0x00, "H", vendor_id)
        self._put(0x02, "H", device_id)
        # Memory, bus master, parity response, SERR#, interrupt disable. There is no I/O BAR.
        self._put(COMMAND, "H", 0, 0x0546)
        self._put(0x06, "H", 1 << 4)  # a capability list
        self._put(0x08, "B", 1)
        self._put(0x0A, "H", 0x1200)  # processing accelerator
        self._put(0x0C, "B", 0, 0xFF)
        for index, (size, flags) in bars.items():
            low = BARS + 4 * index
            writable = ~(size - 1) & (1 << 64) - 1
            self._put(low, "Q", flags | BAR_64BIT, writable)
        self._put(0x2C, "H", vendor_id)
        self._put(0x2E, "H", device_id)
        self._put(0x34, "B", PM_CAPABILITY)
        self._put(0x3C, "B", 0, 0xFF)
        self._put(0x3D, "B", 1)  # INTA#

    # Power management (PCI PM 1.2, 3.2)
    #
    #  +0 |  capabilities: version 3 | next | id 01 |
    #  +4 |  PMCSR: no soft reset, D0 and D3hot     |

    def _pm(self) -> None:
        self._put(PM_CAPABILITY, "H", MSIX_CAPABILITY << 8 | 0x01)
        self._put(PM_CAPABILITY + 2, "H", 3)
        self._put(PM_CAPABILITY + 4, "H", 1 << 3, 3)

    # MSI-X (PCIe 6.0, 7.7.2)
    #
    #  +0 | enable, mask, table size - 1 | next | id 11 |
    #  +4 | table offset                          | BIR |
    #  +8 | PBA offset                            | BIR |

    def _msix(self, vectors: int, bar: int, table: int, pba: int) -> None:
        self._put(MSIX_CAPABILITY, "H", PCIE_CAPABILITY << 8 | 0x11)
        self._put(MSIX_CAPABILITY + 2, "H", vectors - 1, 0xC000)
        self._put(MSIX_CAPABILITY + 4, "I", table | bar)
        self._put(MSIX_CAPABILITY + 8, "I", pba | bar)

    # PCI Express (PCIe 6.0, 7.5.3)
    #
    #  +00 | capabilities: endpoint, version 2 | next | id 10 |
    #  +04 | device capabilities: FLR (28), role-based errors |
    #  +08 | device status       | device control             |
    #  +0c | link capabilities                                |
    #  +10 | link status         | link control               |
    #  +24 | device capabilities 2 ...                        |
    #  +2c | link capabilities 2: speeds                      |

    def _pcie(self, speed: int) -> None:
        at = PCIE_CAPABILITY
        self._put(at, "H", 0x10)
        self._put(at + 2, "H", 2)
        self._put(at + 0x04, "I", 1 << 28 | 1 << 15 | 1)  # payloads of 256 bytes
        # Error reporting, relaxed ordering, payload size, no snoop, read request size: what the capabilities do not
        # offer reads as 0. So does bit 15, which starts an FLR.
        self._put(DEVICE_CONTROL, "H", 0x2810, 0x78FF)
        self._put(at + 0x0C, "I", 8 << 4 | speed)
        self._put(at + 0x10, "H", 0, 0x00C3)
        self._put(at + 0x12, "H", 8 << 4 | speed)
        self._put(at + 0x24, "I", 1 << 4)  # completion timeout can be disabled, as every endpoint's must
        self._put(at + 0x28, "H", 0, 1 << 4)
        self._put(at + 0x2C, "I", ((1 << speed) - 1) << 1)
        self._put(at + 0x30, "H", speed, 0x000F)

    # Device serial number (PCIe 6.0, 7.9.3)
    #
    #  +0 | next 000 | version 1 | id 0003 |
    #  +4 | low half     +8 | high half    |

    def _serial(self, serial: int) -> None:
        self._put(SERIAL_CAPABILITY, "I", 1 << 16 | 0x0003)
        self._put(SERIAL_CAPABILITY + 4, "Q", serial)
