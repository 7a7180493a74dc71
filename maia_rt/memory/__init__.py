"""Memory that a device can reach: I/O addresses, pinned host memory, and the heap of device memory."""
