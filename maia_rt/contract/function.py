"""The PCI function: what it is called on the bus unless it is told otherwise, and how its doorbells lie in BAR 2."""

from __future__ import annotations

from typing import Final

VENDOR_ID: Final = 0x1AF4
DEVICE_ID: Final = 0x10F0
"""The range that QEMU's list of PCI ids leaves for experiments."""
DOORBELL_STRIDE: Final = 4096
"""Bytes from one queue's doorbell page to the next."""
