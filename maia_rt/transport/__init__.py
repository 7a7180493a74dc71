"""Access to a PCI device, whoever serves it: the kernel's VFIO or a vfio-user server."""

from maia_rt._fast.words import SharedWords
from maia_rt.transport.bar import Bar
from maia_rt.transport.config_space import ConfigSpace
from maia_rt.transport.interrupts import Interrupts
from maia_rt.transport.opening import open_device
from maia_rt.transport.polling import poll_until
from maia_rt.transport.protocol import Access, DeviceInfo, DmaMemory, IrqInfo, RegionInfo, Transport
from maia_rt.transport.uapi import PciIrq, PciRegion

__all__ = [
    "Access",
    "Bar",
    "ConfigSpace",
    "DeviceInfo",
    "DmaMemory",
    "Interrupts",
    "IrqInfo",
    "PciIrq",
    "PciRegion",
    "RegionInfo",
    "SharedWords",
    "Transport",
    "open_device",
    "poll_until",
]
