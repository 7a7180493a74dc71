"""``maia reg``: the registers of any PCI device by name, field or offset, read freely and written with care."""
