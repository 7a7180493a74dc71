"""The kernel's structures and numbers are the kernel's own: its headers are compiled and compared."""

import ctypes
import shutil
import subprocess
from pathlib import Path

from maia_rt.transport import kernel_uapi as k
from maia_rt.transport import uapi, wire

VFIO_HEADER = Path("/usr/include/linux/vfio.h")
IOMMUFD_HEADER = Path("/usr/include/linux/iommufd.h")

VFIO_STRUCTURES = {
    "vfio_group_status": k.VfioGroupStatus, "vfio_device_info": k.VfioDeviceInfo,
    "vfio_region_info": k.VfioRegionInfo, "vfio_irq_info": k.VfioIrqInfo, "vfio_irq_set": k.VfioIrqSet,
    "vfio_pci_dependent_device": k.VfioPciDependentDevice, "vfio_pci_hot_reset_info": k.VfioPciHotResetInfo,
    "vfio_pci_hot_reset": k.VfioPciHotReset,
    "vfio_iommu_type1_info": k.VfioIommuType1Info, "vfio_info_cap_header": k.VfioInfoCapHeader,
    "vfio_iommu_type1_dma_map": k.VfioIommuType1DmaMap, "vfio_iommu_type1_dma_unmap": k.VfioIommuType1DmaUnmap,
}
IOMMUFD_STRUCTURES = {
    "iommu_ioas_alloc": k.IommuIoasAlloc, "iommu_iova_range": k.IommuIovaRange,
    "iommu_ioas_iova_ranges": k.IommuIoasIovaRanges, "iommu_ioas_map": k.IommuIoasMap,
    "iommu_ioas_unmap": k.IommuIoasUnmap,
}
CDEV_STRUCTURES = {
    "vfio_device_bind_iommufd": k.VfioDeviceBindIommufd, "vfio_device_attach_iommufd_pt": k.VfioDeviceAttachIommufdPt,
}
GROWN = {"vfio_device_info", "vfio_iommu_type1_info"}
"""Newer kernels spelled out the padding at the end of these."""

SHARED = {
    "VFIO_DEVICE_FLAGS_RESET": uapi.DEVICE_FLAG_RESET, "VFIO_DEVICE_FLAGS_PCI": uapi.DEVICE_FLAG_PCI,
    "VFIO_DEVICE_FLAGS_CAPS": uapi.DEVICE_FLAG_CAPS,
    "VFIO_REGION_INFO_FLAG_READ": uapi.REGION_FLAG_READ, "VFIO_REGION_INFO_FLAG_WRITE": uapi.REGION_FLAG_WRITE,
    "VFIO_REGION_INFO_FLAG_MMAP": uapi.REGION_FLAG_MMAP, "VFIO_REGION_INFO_FLAG_CAPS": uapi.REGION_FLAG_CAPS,
    "VFIO_REGION_INFO_CAP_SPARSE_MMAP": uapi.REGION_CAP_SPARSE_MMAP,
    "VFIO_REGION_INFO_CAP_TYPE": uapi.REGION_CAP_TYPE,
    "VFIO_REGION_INFO_CAP_MSIX_MAPPABLE": uapi.REGION_CAP_MSIX_MAPPABLE,
    "VFIO_IRQ_INFO_EVENTFD": uapi.IRQ_FLAG_EVENTFD, "VFIO_IRQ_INFO_MASKABLE": uapi.IRQ_FLAG_MASKABLE,
    "VFIO_IRQ_INFO_AUTOMASKED": uapi.IRQ_FLAG_AUTOMASKED, "VFIO_IRQ_INFO_NORESIZE": uapi.IRQ_FLAG_NORESIZE,
    "VFIO_IRQ_SET_DATA_NONE": uapi.IRQ_SET_DATA_NONE, "VFIO_IRQ_SET_DATA_BOOL": uapi.IRQ_SET_DATA_BOOL,
    "VFIO_IRQ_SET_DATA_EVENTFD": uapi.IRQ_SET_DATA_EVENTFD, "VFIO_IRQ_SET_ACTION_MASK": uapi.IRQ_SET_ACTION_MASK,
    "VFIO_IRQ_SET_ACTION_UNMASK": uapi.IRQ_SET_ACTION_UNMASK,
    "VFIO_IRQ_SET_ACTION_TRIGGER": uapi.IRQ_SET_ACTION_TRIGGER,
    "VFIO_IRQ_SET_DATA_TYPE_MASK": uapi.IRQ_SET_DATA_MASK,
    "VFIO_IRQ_SET_ACTION_TYPE_MASK": uapi.IRQ_SET_ACTION_MASK_ALL,
    "VFIO_DMA_MAP_FLAG_READ": uapi.DMA_FLAG_READ, "VFIO_DMA_MAP_FLAG_WRITE": uapi.DMA_FLAG_WRITE,
    "VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP": uapi.DMA_UNMAP_FLAG_GET_DIRTY,
    "VFIO_DMA_UNMAP_FLAG_ALL": uapi.DMA_UNMAP_FLAG_ALL,
    "VFIO_PCI_NUM_REGIONS": uapi.PCI_NUM_REGIONS, "VFIO_PCI_NUM_IRQS": uapi.PCI_NUM_IRQS,
} | {f"VFIO_PCI_{region.name}_REGION_INDEX": int(region) for region in uapi.PciRegion} | {
    f"VFIO_PCI_{irq.name}_IRQ_INDEX": int(irq) for irq in uapi.PciIrq}


def numbers(*prefixes):
    return {name: value for name, value in vars(k).items() if name.startswith(prefixes)}


VFIO_NUMBERS = {name: value for name, value in numbers("VFIO_").items()
                if not any(word in name for word in ("IOMMUFD", "DEV_ID", "DEVID"))}
IOMMUFD_NUMBERS = numbers("IOMMU_")

IOMMUFD_LAYOUTS = {
    # include/uapi/linux/iommufd.h and vfio.h of Linux 6.7, laid out by hand: size, then (offset, size) of each field.
    "iommu_ioas_alloc": (12, [(0, 4), (4, 4), (8, 4)]),
    "iommu_iova_range": (16, [(0, 8), (8, 8)]),
    "iommu_ioas_iova_ranges": (32, [(0, 4), (4, 4), (8, 4), (12, 4), (16, 8), (24, 8)]),
    "iommu_ioas_map": (40, [(0, 4), (4, 4), (8, 4), (12, 4), (16, 8), (24, 8), (32, 8)]),
    "iommu_ioas_unmap": (24, [(0, 4), (4, 4), (8, 8), (16, 8)]),
    "vfio_device_bind_iommufd": (16, [(0, 4), (4, 4), (8, 4), (12, 4)]),
    "vfio_device_attach_iommufd_pt": (12, [(0, 4), (4, 4), (8, 4)]),
}
IOMMUFD_EXPECTED = {
    # The same headers: IOMMUFD_CMD_BASE is 0x80 of type ';' (0x3b); VFIO's own numbers follow its base of 100.
    "IOMMU_IOAS_ALLOC": 0x3B81, "IOMMU_IOAS_IOVA_RANGES": 0x3B84, "IOMMU_IOAS_MAP": 0x3B85,
    "IOMMU_IOAS_UNMAP": 0x3B86, "IOMMU_IOAS_MAP_FIXED_IOVA": 1, "IOMMU_IOAS_MAP_WRITEABLE": 2,
    "IOMMU_IOAS_MAP_READABLE": 4,
}


def ask_compiler(tmp_path, headers, structures, constants):
    """Compile a C program against the system's headers; return {"struct.field": (offset, size)} and {name: value}."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "a C compiler is needed to build the package and to run this test"
    lines = ["#include <stddef.h>", "#include <stdio.h>", *(f"#include <{header}>" for header in headers),
             "int main(void) {"]
    for name, structure in structures.items():
        lines.append(f'printf("{name} 0 %zu\\n", sizeof(struct {name}));')
        for field in structure._fields_:
            if field[0] != "pad":
                lines.append(f'printf("{name}.{field[0]} %zu %zu\\n", offsetof(struct {name}, {field[0]}), '
                             f'sizeof(((struct {name} *)0)->{field[0]}));')
    lines += [f'printf("{name} %lld 0\\n", (long long)({name}));' for name in constants]
    source, program = tmp_path / "ask.c", tmp_path / "ask"
    source.write_text("\n".join([*lines, "return 0; }", ""]))
    subprocess.run([compiler, "-o", program, source], check=True, capture_output=True, text=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    rows = {name: (int(a), int(b)) for name, a, b in (line.split() for line in output.splitlines())}
    return ({name: row for name, row in rows.items() if name not in constants},
            {name: rows[name][0] for name in constants})


def ours(structures):
    rows = {}
    for name, structure in structures.items():
        rows[name] = (0, ctypes.sizeof(structure))
        for field in structure._fields_:
            if field[0] != "pad":
                descriptor = getattr(structure, field[0])
                rows[f"{name}.{field[0]}"] = (descriptor.offset, descriptor.size)
    return rows


def test_vfio_matches_the_systems_header(tmp_path):
    assert VFIO_HEADER.exists(), "the kernel's headers are missing: install linux-libc-dev"
    theirs, values = ask_compiler(tmp_path, ["linux/vfio.h"], VFIO_STRUCTURES, VFIO_NUMBERS | SHARED)
    for name, row in ours(VFIO_STRUCTURES).items():
        if name in GROWN:
            assert theirs[name][1] <= row[1] <= theirs[name][1] + 4
        else:
            assert theirs[name] == row, name
    assert values == VFIO_NUMBERS | SHARED


def test_iommufd_matches_its_committed_layout_and_the_systems_header_where_it_has_one(tmp_path):
    structures = IOMMUFD_STRUCTURES | CDEV_STRUCTURES
    for name, (size, fields) in IOMMUFD_LAYOUTS.items():
        structure = structures[name]
        assert ctypes.sizeof(structure) == size
        got = [(getattr(structure, field[0]).offset, getattr(structure, field[0]).size) for field in structure._fields_]
        assert got == fields
    assert IOMMUFD_NUMBERS == IOMMUFD_EXPECTED
    assert (k.VFIO_PCI_HOT_RESET_FLAG_DEV_ID, k.VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED) == (1, 2)
    assert ctypes.c_int32(k.VFIO_PCI_DEVID_NOT_OWNED).value == -1
    assert (k.VFIO_DEVICE_BIND_IOMMUFD, k.VFIO_DEVICE_ATTACH_IOMMUFD_PT) == (0x3B64 + 18, 0x3B64 + 19)
    if IOMMUFD_HEADER.exists():
        theirs, values = ask_compiler(tmp_path, ["linux/iommufd.h"], IOMMUFD_STRUCTURES, IOMMUFD_NUMBERS)
        assert theirs == ours(IOMMUFD_STRUCTURES)
        assert values == IOMMUFD_NUMBERS
    if "VFIO_DEVICE_BIND_IOMMUFD" in VFIO_HEADER.read_text():
        names = numbers("VFIO_DEVICE_BIND_IOMMUFD", "VFIO_DEVICE_ATTACH_IOMMUFD_PT")
        theirs, values = ask_compiler(tmp_path, ["linux/vfio.h"], CDEV_STRUCTURES, names)
        grown = theirs["vfio_device_bind_iommufd"][1]  # newer kernels add a token at its end
        assert grown >= ctypes.sizeof(k.VfioDeviceBindIommufd)
        assert values == names


def test_vfio_user_uses_the_kernels_region_and_interrupt_layout():
    assert wire.REGION_INFO.size == ctypes.sizeof(k.VfioRegionInfo)
    assert wire.IRQ_INFO.size == ctypes.sizeof(k.VfioIrqInfo)
    assert wire.IRQ_SET.size == ctypes.sizeof(k.VfioIrqSet)
    assert wire.CAP_HEADER.size == ctypes.sizeof(k.VfioInfoCapHeader)
