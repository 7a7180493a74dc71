"""PCI itself: addresses, what sysfs says, configuration space, and giving functions to userspace and back."""

from maia_rt.pci.address import PciAddress
from maia_rt.pci.binding import Binding, bind, release
from maia_rt.pci.sysfs import Function, functions, read_function

__all__ = ["Binding", "Function", "PciAddress", "bind", "functions", "read_function", "release"]
