"""A device's configuration space: :mod:`maia_rt.pci.config` over a transport."""

from __future__ import annotations

from maia_rt.errors import Unsupported
from maia_rt.pci import config
from maia_rt.transport.protocol import Transport
from maia_rt.transport.uapi import PciRegion


class ConfigSpace:
    """Configuration space of a device: identity, capabilities, and the switches that every driver turns.

    Parameters
    ----------
    transport : Transport

    Raises
    ------
    Unsupported
        The device is no PCI function.

    Examples
    --------
    >>> space = ConfigSpace(device)                                                         # doctest: +SKIP
    >>> space.header.vendor, space.msix.vectors                                             # doctest: +SKIP
    (6966, 65)
    >>> space.enable()                                                                      # doctest: +SKIP
    """

    def __init__(self, transport: Transport) -> None:
        if not transport.info.is_pci:
            raise Unsupported(f"{transport.name}: the device is no PCI function and has no configuration space")
        self._transport = transport
        self.size = transport.region(PciRegion.CONFIG).size
        """In bytes: 256, or 4096 where there are extended capabilities."""

    def read(self, offset: int, size: int = 4) -> int:
        """Read 1, 2 or 4 bytes."""
        return self._transport.read(PciRegion.CONFIG, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 bytes. The kernel's VFIO keeps what belongs to it, such as BARs and MSI, to itself."""
        self._transport.write(PciRegion.CONFIG, offset, size, value)

    @property
    def header(self) -> config.Header:
        """The first 64 bytes; DeviceLost where they read as all ones."""
        return config.read_header(self.read)

    @property
    def capabilities(self) -> tuple[config.Capability, ...]:
        """The standard capabilities, in the chain's order."""
        return config.capabilities(self.read)

    @property
    def extended_capabilities(self) -> tuple[config.Capability, ...]:
        """The extended capabilities, in the chain's order."""
        return config.extended_capabilities(self.read, self.size)

    @property
    def msi(self) -> config.Msi | None:
        """The MSI capability, None where there is none; likewise below."""
        return config.msi(self.read)

    @property
    def msix(self) -> config.MsiX | None:
        """The MSI-X capability."""
        return config.msix(self.read)

    @property
    def pci_express(self) -> config.PciExpress | None:
        """The PCI Express capability."""
        return config.pci_express(self.read)

    @property
    def power_management(self) -> config.PowerManagement | None:
        """The power management capability."""
        return config.power_management(self.read)

    @property
    def serial_number(self) -> int | None:
        """The 64-bit serial number."""
        return config.serial_number(self.read, self.size)

    def enable(self, *, memory: bool = True, bus_master: bool = True) -> None:
        """Let the function answer on its memory BARs, and let it reach host memory, which interrupts need too.

        Turn bus mastering on only when the device is quiet (after a reset): what the last user started would go on. The
        transport turns it off when it closes.
        """
        config.set_memory_space(self.read, self.write, memory)
        config.set_bus_master(self.read, self.write, bus_master)
