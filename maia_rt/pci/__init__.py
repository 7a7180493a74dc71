"""PCI itself: addresses, what sysfs says, configuration space."""
