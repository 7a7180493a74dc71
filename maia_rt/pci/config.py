"""PCI configuration space: the header, the capability chains, and what the common capabilities say.

Everything here is a function of a reader, ``read(offset, size) -> int``, so it works on any transport, on a sysfs file
and on bytes. Sources: PCI Local Bus 3.0 chapter 6; PCI Express Base 6.0 section 7.5 (header, PM, PCIe), 7.7 (MSI,
MSI-X), 7.9 (serial number, vendor specific); ``linux/pci_regs.h``.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from maia_rt.errors import DeviceLost

_log = logging.getLogger(__name__)

ReadConfig = Callable[[int, int], int]
"""``read(offset, size) -> int``, `size` 1, 2 or 4 bytes."""
WriteConfig = Callable[[int, int, int], object]
"""``write(offset, size, value)``."""

COMMAND: Final = 0x04
COMMAND_IO: Final = 1 << 0
COMMAND_MEMORY: Final = 1 << 1
COMMAND_BUS_MASTER: Final = 1 << 2
COMMAND_INTX_DISABLE: Final = 1 << 10
_STATUS_CAPABILITIES = 1 << 4

_FIRST_CAPABILITY, _END = 0x40, 0x100
_FIRST_EXTENDED, _EXTENDED_END = 0x100, 0x1000


class CapabilityId(enum.IntEnum):
    """Standard capabilities (PCI Code and ID Assignment)."""

    PM = 0x01
    MSI = 0x05
    VENDOR = 0x09
    PCIE = 0x10
    MSIX = 0x11


class ExtendedId(enum.IntEnum):
    """Extended capabilities, at 0x100 and above."""

    AER = 0x0001
    SERIAL = 0x0003
    VENDOR = 0x000B
    ACS = 0x000D
    ATS = 0x000F
    SRIOV = 0x0010


@dataclass(frozen=True)
class Header:
    """The first 64 bytes.

    Attributes
    ----------
    class_code : int
        24 bits: class, subclass, programming interface.
    bars : tuple of int
        The raw BAR registers, 6 of an endpoint, 2 of a bridge.
    """

    vendor: int
    device: int
    command: int
    status: int
    revision: int
    class_code: int
    header_type: int
    multifunction: bool
    subsystem_vendor: int
    subsystem: int
    interrupt_pin: int
    bars: tuple[int, ...]


@dataclass(frozen=True)
class Capability:
    """One link of a chain: where it stands, in bytes, and its version (extended ones only, else 0)."""

    id: int
    offset: int
    version: int = 0


@dataclass(frozen=True)
class Msi:
    """MSI: how many vectors the device can use (a power of two), and whether it is on."""

    offset: int
    vectors: int
    enabled: bool
    is_64bit: bool
    maskable: bool


@dataclass(frozen=True)
class MsiX:
    """MSI-X: the number of vectors, and in which BAR its table and pending bits stand, offsets in bytes."""

    offset: int
    vectors: int
    enabled: bool
    masked: bool
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int


@dataclass(frozen=True)
class PowerManagement:
    """Power management: the device's state, 0 (D0, running) to 3 (D3hot)."""

    offset: int
    version: int
    state: int
    no_soft_reset: bool


@dataclass(frozen=True)
class PciExpress:
    """PCI Express.

    Attributes
    ----------
    port_type : int
        0 endpoint, 1 legacy endpoint, 4 root port, 9 root complex integrated endpoint.
    can_flr : bool
        Whether function level reset exists.
    max_payload, max_payload_supported, max_read_request : int
        In bytes.
    link_speed, max_link_speed : int
        The generation: 1 is 2.5 GT/s, 5 is 32 GT/s.
    link_width, max_link_width : int
        Lanes.
    """

    offset: int
    version: int
    port_type: int
    can_flr: bool
    max_payload: int
    max_payload_supported: int
    max_read_request: int
    link_speed: int
    link_width: int
    max_link_speed: int
    max_link_width: int


def read_header(read: ReadConfig) -> Header:
    """Decode the header.

    Raises
    ------
    DeviceLost
        It reads as all ones.
    """
    vendor = read(0x00, 2)
    if vendor == 0xFFFF:
        raise DeviceLost("configuration space reads as all ones", cause="the link is down or the device is in reset",
                         hint="reset the device or look at the slot's power")
    header_type = read(0x0E, 1)
    endpoint = header_type & 0x7F == 0
    return Header(
        vendor=vendor,
        device=read(0x02, 2),
        command=read(COMMAND, 2),
        status=read(0x06, 2),
        revision=read(0x08, 1),
        class_code=read(0x08, 4) >> 8,
        header_type=header_type & 0x7F,
        multifunction=bool(header_type & 0x80),
        subsystem_vendor=read(0x2C, 2) if endpoint else 0,
        subsystem=read(0x2E, 2) if endpoint else 0,
        interrupt_pin=read(0x3D, 1),
        bars=tuple(read(0x10 + 4 * n, 4) for n in range(6 if endpoint else 2)),
    )


def capabilities(read: ReadConfig) -> tuple[Capability, ...]:
    """Walk the standard chain. A link that points back or into the header ends the walk, with a warning in the log."""
    if not read(0x06, 2) & _STATUS_CAPABILITIES:
        return ()
    found: list[Capability] = []
    seen: set[int] = set()
    at = read(0x34, 1) & 0xFC
    while at:
        if at < _FIRST_CAPABILITY or at in seen:
            _log.warning("the capability chain is broken: it leads to %#x", at)
            break
        seen.add(at)
        cap_id = read(at, 1)
        if cap_id == 0xFF:
            _log.warning("the capability chain is broken: %#x reads as all ones", at)
            break
        found.append(Capability(cap_id, at))
        at = read(at + 1, 1) & 0xFC
    return tuple(found)


def extended_capabilities(read: ReadConfig, size: int = _EXTENDED_END) -> tuple[Capability, ...]:
    """Walk the extended chain of a configuration space of `size` bytes (none in 256). Broken links end it likewise."""
    found: list[Capability] = []
    seen: set[int] = set()
    at = _FIRST_EXTENDED
    while at:
        if at in seen or not _FIRST_EXTENDED <= at <= size - 4:
            if size > _FIRST_EXTENDED:
                _log.warning("the extended capability chain is broken: it leads to %#x", at)
            break
        seen.add(at)
        word = read(at, 4)
        if word in (0, 0xFFFFFFFF):
            break
        # A null capability (id 0) may stand at 0x100 to carry nothing but the link.
        if word & 0xFFFF:
            found.append(Capability(word & 0xFFFF, at, word >> 16 & 0xF))
        at = word >> 20 & 0xFFC
    return tuple(found)


def find(read: ReadConfig, cap_id: int) -> int | None:
    """Return the offset of the first standard capability `cap_id`, or None."""
    return next((cap.offset for cap in capabilities(read) if cap.id == cap_id), None)


def find_extended(read: ReadConfig, cap_id: int, size: int = _EXTENDED_END) -> int | None:
    """Return the offset of the first extended capability `cap_id`, or None."""
    return next((cap.offset for cap in extended_capabilities(read, size) if cap.id == cap_id), None)


def power_management(read: ReadConfig) -> PowerManagement | None:
    """Decode the PM capability, None where there is none."""
    at = find(read, CapabilityId.PM)
    if at is None:
        return None
    control = read(at + 4, 2)
    return PowerManagement(at, read(at + 2, 2) & 7, control & 3, bool(control & 1 << 3))


def msi(read: ReadConfig) -> Msi | None:
    """Decode the MSI capability."""
    at = find(read, CapabilityId.MSI)
    if at is None:
        return None
    control = read(at + 2, 2)
    return Msi(at, 1 << (control >> 1 & 7), bool(control & 1), bool(control & 1 << 7), bool(control & 1 << 8))


def msix(read: ReadConfig) -> MsiX | None:
    """Decode the MSI-X capability."""
    #  +0 id, next, control: bits 0-10 table size - 1, 14 function mask, 15 enable
    #  +4 table:  bits 0-2 BAR, the rest the offset
    #  +8 pending bits: likewise
    at = find(read, CapabilityId.MSIX)
    if at is None:
        return None
    control, table, pba = read(at + 2, 2), read(at + 4, 4), read(at + 8, 4)
    return MsiX(at, (control & 0x7FF) + 1, bool(control & 1 << 15), bool(control & 1 << 14),
                table & 7, table & ~7, pba & 7, pba & ~7)


def pci_express(read: ReadConfig) -> PciExpress | None:
    """Decode the PCI Express capability."""
    at = find(read, CapabilityId.PCIE)
    if at is None:
        return None
    flags, device = read(at + 2, 2), read(at + 4, 4)
    control, link, status = read(at + 8, 2), read(at + 0xC, 4), read(at + 0x12, 2)
    return PciExpress(
        offset=at, version=flags & 0xF, port_type=flags >> 4 & 0xF, can_flr=bool(device & 1 << 28),
        max_payload=128 << (control >> 5 & 7), max_payload_supported=128 << (device & 7),
        max_read_request=128 << (control >> 12 & 7), link_speed=status & 0xF, link_width=status >> 4 & 0x3F,
        max_link_speed=link & 0xF, max_link_width=link >> 4 & 0x3F,
    )


def serial_number(read: ReadConfig, size: int = _EXTENDED_END) -> int | None:
    """Return the 64-bit device serial number, None where there is none."""
    at = find_extended(read, ExtendedId.SERIAL, size)
    return None if at is None else read(at + 4, 4) | read(at + 8, 4) << 32


def vendor_specific(read: ReadConfig) -> list[bytes]:
    """Return every standard vendor-specific capability, whole, from its id byte on."""
    found = []
    for cap in capabilities(read):
        if cap.id == CapabilityId.VENDOR:
            length = min(read(cap.offset + 2, 1), _END - cap.offset)
            found.append(bytes(read(cap.offset + n, 1) for n in range(length)))
    return found


def set_bus_master(read: ReadConfig, write: WriteConfig, on: bool) -> None:
    """Allow or forbid the function to reach host memory and to send MSI."""
    before = read(COMMAND, 2)
    after = before | COMMAND_BUS_MASTER if on else before & ~COMMAND_BUS_MASTER
    if after != before:
        write(COMMAND, 2, after)


def set_memory_space(read: ReadConfig, write: WriteConfig, on: bool) -> None:
    """Let the function answer, or not, to accesses of its memory BARs."""
    before = read(COMMAND, 2)
    after = before | COMMAND_MEMORY if on else before & ~COMMAND_MEMORY
    if after != before:
        write(COMMAND, 2, after)
