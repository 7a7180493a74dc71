"""Names of PCI classes, and the classes that no userspace driver can have. Source: PCI Code and ID Assignment 1.11."""

from __future__ import annotations

from typing import Final

_BASES: Final = {
    0x00: "unclassified", 0x01: "storage", 0x02: "network", 0x03: "display", 0x04: "multimedia", 0x05: "memory",
    0x06: "bridge", 0x07: "communication", 0x08: "system", 0x09: "input", 0x0A: "docking station", 0x0B: "processor",
    0x0C: "serial bus", 0x0D: "wireless", 0x0E: "intelligent I/O", 0x0F: "satellite", 0x10: "encryption",
    0x11: "signal processing", 0x12: "processing accelerator", 0x13: "instrumentation", 0xFF: "vendor's own",
}
_SUBCLASSES: Final = {
    0x0100: "SCSI", 0x0101: "IDE", 0x0104: "RAID", 0x0106: "SATA", 0x0107: "SAS", 0x0108: "NVMe", 0x0200: "Ethernet",
    0x0207: "InfiniBand", 0x0208: "fabric", 0x0300: "VGA", 0x0302: "3D controller", 0x0401: "audio", 0x0403: "HD audio",
    0x0500: "RAM", 0x0502: "CXL memory", 0x0600: "host bridge", 0x0601: "ISA bridge", 0x0602: "EISA bridge",
    0x0604: "PCI bridge", 0x0607: "CardBus bridge", 0x0609: "PCI bridge", 0x0700: "serial port", 0x0800: "PIC",
    0x0801: "DMA controller", 0x0805: "SD host", 0x0806: "IOMMU", 0x0807: "root complex event collector",
    0x0880: "system", 0x0C00: "FireWire", 0x0C03: "USB", 0x0C05: "SMBus",
}
_BRIDGES: Final = {0x0604, 0x0607, 0x0609}
_OF_THE_PLATFORM: Final = {0x0600, 0x0601, 0x0602, 0x0800, 0x0806, 0x0807}


def class_name(class_code: int) -> str:
    """Name a 24-bit class code.

    Examples
    --------
    >>> class_name(0x010802)
    'NVMe'
    >>> class_name(0x120000)
    'processing accelerator'
    """
    return _SUBCLASSES.get(class_code >> 8) or _BASES.get(class_code >> 16) or f"class {class_code:06x}"


def is_bridge(class_code: int) -> bool:
    """Whether other functions are behind it: VFIO leaves it where it is and gives away what is behind it."""
    return class_code >> 8 in _BRIDGES


def is_endpoint(class_code: int) -> bool:
    """Whether it is a device that a driver in userspace could have: no bridge and no part of the platform itself."""
    return class_code >> 8 not in _BRIDGES | _OF_THE_PLATFORM
