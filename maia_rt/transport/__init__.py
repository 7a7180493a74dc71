"""Access to a PCI device, whoever serves it: the kernel's VFIO or a vfio-user server."""

from maia_rt.transport.opening import open_device
from maia_rt.transport.protocol import Access, DeviceInfo, DmaMemory, IrqInfo, RegionInfo, Transport

__all__ = ["Access", "DeviceInfo", "DmaMemory", "IrqInfo", "RegionInfo", "Transport", "open_device"]
