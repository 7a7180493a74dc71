"""Configuration space as registers: ``config.command.bus_master``, ``config.msix.control.enable``."""

from __future__ import annotations

from maia_rt.pci.config import Capability, CapabilityId, ReadConfig, capabilities, extended_capabilities, read_header
from maia_tools.reg import pci_capabilities as standard
from maia_tools.reg import pci_extended as extended
from maia_tools.reg import pci_header
from maia_tools.reg.layout import parse
from maia_tools.reg.model import Register

CONFIG = "config"
_PORTS_WITH_SLOT = (4, 6)
_INTEGRATED = (9, 10)


def registers(read: ReadConfig, size: int) -> list[Register]:
    """The registers of a device's configuration space of `size` bytes, in the order of their offsets.

    Raises
    ------
    DeviceLost
        It reads as all ones.
    """
    header = read_header(read)
    layout = pci_header.ENDPOINT if header.header_type == 0 else pci_header.BRIDGE
    found = parse(layout, CONFIG) + _bars(header.bars)
    names: dict[str, int] = {}
    for cap in capabilities(read):
        found += _standard(cap, read, names)
    if size > 0x100:
        for cap in extended_capabilities(read, size):
            found += _extended(cap, names)
    return sorted((r for r in found if r.offset + r.size <= size), key=lambda r: r.offset)


def generic() -> list[Register]:
    """The header of an endpoint and every known capability, without a device to say where those stand."""
    found = parse(pci_header.ENDPOINT, CONFIG)
    found += [r for index in range(6) for r in parse(pci_header.MEMORY_BAR.format(index=index, offset=0x10 + 4 * index),
                                                     CONFIG)]
    found.sort(key=lambda r: r.offset)
    more = {"msi": _msi(1 << 7 | 1 << 8), "pcie": standard.PCIE_LINK + standard.PCIE_SLOT + standard.PCIE_2}
    for name, layout in standard.LAYOUTS.values():
        found += parse(standard.HEADER + layout + more.get(name, ""), CONFIG, name, relative_to=name)
    for name, layout in extended.LAYOUTS.values():
        found += parse(extended.HEADER + layout, CONFIG, name, relative_to=name)
    return found


def _bars(bars: tuple[int, ...]) -> list[Register]:
    found: list[Register] = []
    upper = False
    for index, raw in enumerate(bars):
        layout = pci_header.UPPER_BAR if upper else pci_header.IO_BAR if raw & 1 else pci_header.MEMORY_BAR
        found += parse(layout.format(index=index, offset=0x10 + 4 * index), CONFIG)
        upper = not upper and raw & 7 == 4
    return found


def _standard(cap: Capability, read: ReadConfig, names: dict[str, int]) -> list[Register]:
    name, layout = standard.LAYOUTS.get(cap.id, (standard.NAMES.get(cap.id, f"cap_{cap.id:02x}"), ""))
    if cap.id == CapabilityId.MSI:
        layout += _msi(read(cap.offset + 2, 2))
    elif cap.id == CapabilityId.PCIE:
        flags = read(cap.offset + 2, 2)
        version, port = flags & 0xF, flags >> 4 & 0xF
        if port not in _INTEGRATED:
            layout += standard.PCIE_LINK
        if port in _PORTS_WITH_SLOT and flags & 1 << 8:
            layout += standard.PCIE_SLOT
        if version >= 2:
            layout += standard.PCIE_2
    elif cap.id == CapabilityId.VENDOR:
        length = read(cap.offset + 2, 1)
        layout += "".join(f"0x{at:02x} 1 byte{at} Byte {at} of the vendor's own\n" for at in range(3, length))
    return parse(standard.HEADER + layout, CONFIG, _numbered(name, names), base=cap.offset)


def _msi(control: int) -> str:
    # Address, upper half, data, mask and pending bits follow each other; two of them are optional (PCIe 6.0, 7.7.1).
    wide, maskable = control & 1 << 7, control & 1 << 8
    at = 0xC if wide else 0x8
    text = (standard.MSI_UPPER if wide else "") + standard.MSI_DATA.format(at=at)
    return text + (standard.MSI_MASK.format(mask=at + 4, pending=at + 8) if maskable else "")


def _extended(cap: Capability, names: dict[str, int]) -> list[Register]:
    name, layout = extended.LAYOUTS.get(cap.id, (extended.NAMES.get(cap.id, f"ext_{cap.id:04x}"), ""))
    return parse(extended.HEADER + layout, CONFIG, _numbered(name, names), base=cap.offset)


def _numbered(name: str, names: dict[str, int]) -> str:
    """The second capability of a kind is ``vendor2``."""
    names[name] = names.get(name, 0) + 1
    return name if names[name] == 1 else f"{name}{names[name]}"
