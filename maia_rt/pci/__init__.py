"""PCI itself: addresses, what sysfs says, configuration space."""

from maia_rt.pci.address import PciAddress
from maia_rt.pci.sysfs import Function, functions, read_function

__all__ = ["Function", "PciAddress", "functions", "read_function"]
