"""Userspace driver and runtime for a MAIA-like PCIe AI accelerator."""
