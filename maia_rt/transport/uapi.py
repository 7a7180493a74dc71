"""Constants of ``linux/vfio.h`` that the kernel and vfio-user share.

vfio-user took over the kernel's region, interrupt and capability numbers unchanged, so they stand here once for both.
They are compared with the kernel's own headers in ``tests/unit/test_kernel_uapi.py``.
"""

from __future__ import annotations

import enum
from typing import Final

DEVICE_FLAG_RESET: Final = 1 << 0
DEVICE_FLAG_PCI: Final = 1 << 1
DEVICE_FLAG_CAPS: Final = 1 << 7

REGION_FLAG_READ: Final = 1 << 0
REGION_FLAG_WRITE: Final = 1 << 1
REGION_FLAG_MMAP: Final = 1 << 2
REGION_FLAG_CAPS: Final = 1 << 3

REGION_CAP_SPARSE_MMAP: Final = 1
REGION_CAP_TYPE: Final = 2
REGION_CAP_MSIX_MAPPABLE: Final = 3

IRQ_FLAG_EVENTFD: Final = 1 << 0
IRQ_FLAG_MASKABLE: Final = 1 << 1
IRQ_FLAG_AUTOMASKED: Final = 1 << 2
IRQ_FLAG_NORESIZE: Final = 1 << 3

IRQ_SET_DATA_NONE: Final = 1 << 0
IRQ_SET_DATA_BOOL: Final = 1 << 1
IRQ_SET_DATA_EVENTFD: Final = 1 << 2
IRQ_SET_ACTION_MASK: Final = 1 << 3
IRQ_SET_ACTION_UNMASK: Final = 1 << 4
IRQ_SET_ACTION_TRIGGER: Final = 1 << 5
IRQ_SET_DATA_MASK: Final = IRQ_SET_DATA_NONE | IRQ_SET_DATA_BOOL | IRQ_SET_DATA_EVENTFD
IRQ_SET_ACTION_MASK_ALL: Final = IRQ_SET_ACTION_MASK | IRQ_SET_ACTION_UNMASK | IRQ_SET_ACTION_TRIGGER

DMA_FLAG_READ: Final = 1 << 0
DMA_FLAG_WRITE: Final = 1 << 1
DMA_UNMAP_FLAG_GET_DIRTY: Final = 1 << 0
DMA_UNMAP_FLAG_ALL: Final = 1 << 1


class PciRegion(enum.IntEnum):
    """Region indexes of a PCI function (``VFIO_PCI_*_REGION_INDEX``)."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


PCI_NUM_REGIONS: Final = 9


class PciIrq(enum.IntEnum):
    """Interrupt indexes of a PCI function (``VFIO_PCI_*_IRQ_INDEX``)."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


PCI_NUM_IRQS: Final = 5
