"""Access to a PCI device, whoever serves it: the kernel's VFIO or a vfio-user server."""
