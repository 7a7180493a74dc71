"""The structures and ioctl numbers of ``linux/vfio.h`` and ``linux/iommufd.h``, as far as they are used here.

Every ioctl has the plain form ``_IO(';', n)``: the structures carry their own size in their first field and grow at the
end, so the sizes here may exceed those of an older kernel. ``tests/unit/test_kernel_uapi.py`` compiles the system's
headers and compares.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_uint32, c_uint64
from typing import Final

_TYPE: Final = ord(";") << 8
_VFIO: Final = _TYPE + 100

VFIO_API_VERSION: Final = 0
VFIO_TYPE1v2_IOMMU: Final = 3
VFIO_NOIOMMU_IOMMU: Final = 8

VFIO_GET_API_VERSION: Final = _VFIO + 0
VFIO_CHECK_EXTENSION: Final = _VFIO + 1
VFIO_SET_IOMMU: Final = _VFIO + 2
VFIO_GROUP_GET_STATUS: Final = _VFIO + 3
VFIO_GROUP_SET_CONTAINER: Final = _VFIO + 4
VFIO_GROUP_GET_DEVICE_FD: Final = _VFIO + 6
VFIO_DEVICE_GET_INFO: Final = _VFIO + 7
VFIO_DEVICE_GET_REGION_INFO: Final = _VFIO + 8
VFIO_DEVICE_GET_IRQ_INFO: Final = _VFIO + 9
VFIO_DEVICE_SET_IRQS: Final = _VFIO + 10
VFIO_DEVICE_RESET: Final = _VFIO + 11
VFIO_IOMMU_GET_INFO: Final = _VFIO + 12
VFIO_IOMMU_MAP_DMA: Final = _VFIO + 13
VFIO_IOMMU_UNMAP_DMA: Final = _VFIO + 14
VFIO_DEVICE_GET_PCI_HOT_RESET_INFO: Final = _VFIO + 12
VFIO_DEVICE_PCI_HOT_RESET: Final = _VFIO + 13
VFIO_DEVICE_BIND_IOMMUFD: Final = _VFIO + 18
VFIO_DEVICE_ATTACH_IOMMUFD_PT: Final = _VFIO + 19

VFIO_GROUP_FLAGS_VIABLE: Final = 1 << 0

VFIO_PCI_HOT_RESET_FLAG_DEV_ID: Final = 1 << 0
VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED: Final = 1 << 1
VFIO_PCI_DEVID_NOT_OWNED: Final = 0xFFFFFFFF

VFIO_IOMMU_INFO_PGSIZES: Final = 1 << 0
VFIO_IOMMU_INFO_CAPS: Final = 1 << 1
VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE: Final = 1
VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL: Final = 3

IOMMU_IOAS_ALLOC: Final = _TYPE + 0x81
IOMMU_IOAS_IOVA_RANGES: Final = _TYPE + 0x84
IOMMU_IOAS_MAP: Final = _TYPE + 0x85
IOMMU_IOAS_UNMAP: Final = _TYPE + 0x86

IOMMU_IOAS_MAP_FIXED_IOVA: Final = 1 << 0
IOMMU_IOAS_MAP_WRITEABLE: Final = 1 << 1
IOMMU_IOAS_MAP_READABLE: Final = 1 << 2


class VfioGroupStatus(ctypes.Structure):
    """``struct vfio_group_status``."""

    _fields_ = (("argsz", c_uint32), ("flags", c_uint32))


class VfioDeviceInfo(ctypes.Structure):
    """``struct vfio_device_info``."""

    _fields_ = (
        ("argsz", c_uint32), ("flags", c_uint32), ("num_regions", c_uint32), ("num_irqs", c_uint32),
        ("cap_offset", c_uint32), ("pad", c_uint32),
    )


class VfioRegionInfo(ctypes.Structure):
    """``struct vfio_region_info``; vfio-user's is the same."""

    _fields_ = (
        ("argsz", c_uint32), ("flags", c_uint32), ("index", c_uint32), ("cap_offset", c_uint32),
        ("size", c_uint64), ("offset", c_uint64),
    )


class VfioIrqInfo(ctypes.Structure):
    """``struct vfio_irq_info``."""

    _fields_ = (("argsz", c_uint32), ("flags", c_uint32), ("index", c_uint32), ("count", c_uint32))


class VfioIrqSet(ctypes.Structure):
    """``struct vfio_irq_set`` without its data."""

    _fields_ = (
        ("argsz", c_uint32), ("flags", c_uint32), ("index", c_uint32), ("start", c_uint32), ("count", c_uint32),
    )


class VfioPciDependentDevice(ctypes.Structure):
    """``struct vfio_pci_dependent_device``; in an iommufd `group_id` is ``devid``."""

    _fields_ = (
        ("group_id", c_uint32), ("segment", ctypes.c_uint16), ("bus", ctypes.c_uint8), ("devfn", ctypes.c_uint8),
    )


class VfioPciHotResetInfo(ctypes.Structure):
    """``struct vfio_pci_hot_reset_info`` without its devices."""

    _fields_ = (("argsz", c_uint32), ("flags", c_uint32), ("count", c_uint32))


class VfioPciHotReset(ctypes.Structure):
    """``struct vfio_pci_hot_reset`` without its groups."""

    _fields_ = (("argsz", c_uint32), ("flags", c_uint32), ("count", c_uint32))


class VfioIommuType1Info(ctypes.Structure):
    """``struct vfio_iommu_type1_info``."""

    _fields_ = (
        ("argsz", c_uint32), ("flags", c_uint32), ("iova_pgsizes", c_uint64), ("cap_offset", c_uint32),
        ("pad", c_uint32),
    )


class VfioInfoCapHeader(ctypes.Structure):
    """``struct vfio_info_cap_header``."""

    _fields_ = (("id", ctypes.c_uint16), ("version", ctypes.c_uint16), ("next", c_uint32))


class VfioIommuType1DmaMap(ctypes.Structure):
    """``struct vfio_iommu_type1_dma_map``."""

    _fields_ = (
        ("argsz", c_uint32), ("flags", c_uint32), ("vaddr", c_uint64), ("iova", c_uint64), ("size", c_uint64),
    )


class VfioIommuType1DmaUnmap(ctypes.Structure):
    """``struct vfio_iommu_type1_dma_unmap`` without its data; `size` comes back as what was unmapped."""

    _fields_ = (("argsz", c_uint32), ("flags", c_uint32), ("iova", c_uint64), ("size", c_uint64))


class VfioDeviceBindIommufd(ctypes.Structure):
    """``struct vfio_device_bind_iommufd``."""

    _fields_ = (("argsz", c_uint32), ("flags", c_uint32), ("iommufd", c_int32), ("out_devid", c_uint32))


class VfioDeviceAttachIommufdPt(ctypes.Structure):
    """``struct vfio_device_attach_iommufd_pt``."""

    _fields_ = (("argsz", c_uint32), ("flags", c_uint32), ("pt_id", c_uint32))


class IommuIoasAlloc(ctypes.Structure):
    """``struct iommu_ioas_alloc``."""

    _fields_ = (("size", c_uint32), ("flags", c_uint32), ("out_ioas_id", c_uint32))


class IommuIovaRange(ctypes.Structure):
    """``struct iommu_iova_range``, both ends inclusive; ``struct vfio_iova_range`` is the same."""

    _fields_ = (("start", c_uint64), ("last", c_uint64))


class IommuIoasIovaRanges(ctypes.Structure):
    """``struct iommu_ioas_iova_ranges``."""

    _fields_ = (
        ("size", c_uint32), ("ioas_id", c_uint32), ("num_iovas", c_uint32), ("__reserved", c_uint32),
        ("allowed_iovas", c_uint64), ("out_iova_alignment", c_uint64),
    )


class IommuIoasMap(ctypes.Structure):
    """``struct iommu_ioas_map``."""

    _fields_ = (
        ("size", c_uint32), ("flags", c_uint32), ("ioas_id", c_uint32), ("__reserved", c_uint32),
        ("user_va", c_uint64), ("length", c_uint64), ("iova", c_uint64),
    )


class IommuIoasUnmap(ctypes.Structure):
    """``struct iommu_ioas_unmap``; `length` comes back as what was unmapped."""

    _fields_ = (("size", c_uint32), ("ioas_id", c_uint32), ("iova", c_uint64), ("length", c_uint64))
