"""The emulated device: a vfio-user server, a PCI function, its firmware, and the engines that do the work."""
