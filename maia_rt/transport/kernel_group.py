"""A function by its IOMMU group, in a container of its own: VFIO's first interface, which every kernel with VFIO has.

    /dev/vfio/vfio      the container: an address space (type1, version 2)
    /dev/vfio/N         group N, which joins the container; /dev/vfio/noiommu-N without an IOMMU
    the function        a descriptor that the group gives out

Source: ``linux/vfio.h``; Linux 6.12, drivers/vfio/group.c, container.c and vfio_iommu_type1.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path

from maia_rt.errors import (
    DeviceBusy,
    DevicePermission,
    MaiaError,
    ProtocolError,
    TransportError,
    Unsupported,
)
from maia_rt.pci.address import PciAddress
from maia_rt.transport import kernel_uapi as k
from maia_rt.transport.kernel_ioctl import call, open_node
from maia_rt.transport.kernel_iommu import LOAD, holder, mapping_refusal, not_viable
from maia_rt.transport.mapping import PAGE_SIZE
from maia_rt.transport.protocol import Access

_INFO_ROOM = 64 << 10
_ENTRY_LIMIT = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
_ENTRY_LIMIT_DEFAULT = 65535


class GroupIommu:
    """An IOMMU group in a container of its own, or a function without an IOMMU.

    Parameters
    ----------
    address : PciAddress
    group : int or None
        The IOMMU group's number.
    node : Path
        Its node; ``noiommu-N`` opens it without protection: the device can then reach all of the host's memory.
    dev, root : Path
        ``/dev`` and ``/sys/bus/pci``.
    """

    def __init__(self, address: PciAddress, group: int | None, node: Path, *, dev: Path, root: Path) -> None:
        self._name = str(address)
        self._no_iommu = node.name.startswith("noiommu-")
        self.kind = "vfio-noiommu" if self._no_iommu else "vfio-group"
        self._container = self._group = self.device_fd = -1
        try:
            self._container = open_node(dev / "vfio/vfio", self._name, hint=LOAD)
            self._check_container()
            self._group = self._open_group(address, node, dev, root)
            self.group: tuple[int, int] | None = (-1 if group is None else group, self._group)
            self._join(address, root)
            self._set_iommu()
            self.device_fd = self._call(self._group, k.VFIO_GROUP_GET_DEVICE_FD,
                                        bytearray(self._name.encode() + b"\0"), "opening the function")
            os.set_inheritable(self.device_fd, False)
            self._learn()
        except BaseException:
            self.close()
            raise

    def _open_group(self, address: PciAddress, node: Path, dev: Path, root: Path) -> int:
        try:
            return open_node(node, self._name, hint="bind the function to vfio-pci")
        except DeviceBusy as error:
            raise DeviceBusy(error.what, cause=holder(address, dev, root),
                             hint=error.hint) from None
        except DevicePermission as error:
            if not self._no_iommu:
                raise
            raise DevicePermission(error.what, cause="without an IOMMU only CAP_SYS_RAWIO may open a function",
                                   hint="run as root") from None

    def _call(self, fd: int, request: int, argument: int | bytearray | ctypes.Structure, what: str) -> int:
        return call(fd, request, argument, f"{self._name}: {what}")

    def _check_container(self) -> None:
        version = self._call(self._container, k.VFIO_GET_API_VERSION, 0, "VFIO_GET_API_VERSION")
        if version != k.VFIO_API_VERSION:
            raise Unsupported(f"{self._name}: the kernel speaks version {version} of VFIO, not {k.VFIO_API_VERSION}")
        wanted = k.VFIO_NOIOMMU_IOMMU if self._no_iommu else k.VFIO_TYPE1v2_IOMMU
        if not self._call(self._container, k.VFIO_CHECK_EXTENSION, wanted, "VFIO_CHECK_EXTENSION"):
            raise Unsupported(
                f"{self._name}: the kernel offers no {'no-IOMMU mode' if self._no_iommu else 'type1v2 IOMMU'}",
                hint="set enable_unsafe_noiommu_mode=1 of the module vfio" if self._no_iommu else
                "load vfio_iommu_type1")

    def _join(self, address: PciAddress, root: Path) -> None:
        status = k.VfioGroupStatus(argsz=ctypes.sizeof(k.VfioGroupStatus))
        self._call(self._group, k.VFIO_GROUP_GET_STATUS, status, "VFIO_GROUP_GET_STATUS")
        if not status.flags & k.VFIO_GROUP_FLAGS_VIABLE:
            raise not_viable(address, root) or DeviceBusy(
                f"{self._name}: its IOMMU group cannot be given away", cause="another function of it is in use",
                hint="see maia ls")
        try:
            self._call(self._group, k.VFIO_GROUP_SET_CONTAINER, bytearray(ctypes.c_int32(self._container)), "joining")
        except MaiaError as error:
            # A driver of another member may have come in between.
            raise not_viable(address, root) or error from None

    def _set_iommu(self) -> None:
        try:
            self._call(self._container, k.VFIO_SET_IOMMU,
                       k.VFIO_NOIOMMU_IOMMU if self._no_iommu else k.VFIO_TYPE1v2_IOMMU, "VFIO_SET_IOMMU")
        except TransportError as error:
            if error.errno != errno.EPERM:
                raise
            raise TransportError(f"{self._name}: VFIO_SET_IOMMU: {os.strerror(errno.EPERM)}", errno=errno.EPERM,
                                 cause="the platform does not remap interrupts",
                                 hint="where the device is trusted: modprobe vfio_iommu_type1 "
                                      "allow_unsafe_interrupts=1") from error

    def _learn(self) -> None:
        self.page_sizes, self.max_dma_maps, self.iova_ranges = PAGE_SIZE, 0, []
        self.dma_limit = "dma_entry_limit of the module vfio_iommu_type1"
        if self._no_iommu:
            return
        buffer = bytearray(_INFO_ROOM)
        info = k.VfioIommuType1Info.from_buffer(buffer)
        info.argsz = _INFO_ROOM
        self._call(self._container, k.VFIO_IOMMU_GET_INFO, buffer, "VFIO_IOMMU_GET_INFO")
        if info.flags & k.VFIO_IOMMU_INFO_PGSIZES:
            # A bit below the host's page size promises what the host cannot pin.
            self.page_sizes = info.iova_pgsizes & -PAGE_SIZE or PAGE_SIZE
        self.iova_ranges = [(0, (1 << 64) - 1)]
        self.max_dma_maps = _entry_limit()
        at = info.cap_offset if info.flags & k.VFIO_IOMMU_INFO_CAPS else 0
        self.iova_ranges, self.max_dma_maps = parse_type1_caps(buffer, at, self.iova_ranges, self.max_dma_maps)

    def dma_map(self, iova: int, address: int, size: int, access: Access) -> None:
        """Map memory of this process."""
        request = k.VfioIommuType1DmaMap(ctypes.sizeof(k.VfioIommuType1DmaMap), int(access), address, iova, size)
        what = f"mapping {size:#x} bytes at iova {iova:#x}"
        try:
            self._call(self._container, k.VFIO_IOMMU_MAP_DMA, request, what)
        except MaiaError as error:
            raise mapping_refusal(error, f"{self._name}: {what}", limit=f"{self.dma_limit}, {_entry_limit()}",
                                  account="this process") from None

    def dma_unmap(self, iova: int, size: int) -> None:
        """Unmap exactly one mapping."""
        request = k.VfioIommuType1DmaUnmap(ctypes.sizeof(k.VfioIommuType1DmaUnmap), 0, iova, size)
        what = f"unmapping {size:#x} bytes at iova {iova:#x}"
        self._call(self._container, k.VFIO_IOMMU_UNMAP_DMA, request, what)
        if request.size != size:
            raise TransportError(f"{self._name}: {what}: the kernel unmapped {request.size:#x} bytes",
                                 errno=errno.EINVAL)

    def close(self) -> None:
        """Close the function, the group, then the container."""
        for fd in (self.device_fd, self._group, self._container):
            if fd >= 0:
                os.close(fd)
        self.device_fd = self._group = self._container = -1


def _entry_limit() -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(_ENTRY_LIMIT.read_text(encoding="ascii"))
    return _ENTRY_LIMIT_DEFAULT


def parse_type1_caps(
    info: bytearray, at: int, ranges: list[tuple[int, int]], max_maps: int
) -> tuple[list[tuple[int, int]], int]:
    """Walk the capabilities of VFIO_IOMMU_GET_INFO.

    Parameters
    ----------
    info : bytearray
        The structure with its capabilities.
    at : int
        The first one's offset, 0 for none.
    ranges, max_maps
        What holds where the capability is absent.

    Returns
    -------
    ranges : list of (first, last)
    max_maps : int

    Raises
    ------
    ProtocolError
        The chain leads back or outside.
    """
    floor = ctypes.sizeof(k.VfioIommuType1Info) - 4  # older kernels end the structure before the padding
    header_size = ctypes.sizeof(k.VfioInfoCapHeader)
    while at:
        if at < floor or at + header_size + 8 > len(info):
            raise ProtocolError(f"an IOMMU capability is said to stand at byte {at} of {len(info)}", errno=errno.EINVAL)
        header = k.VfioInfoCapHeader.from_buffer_copy(info, at)
        body = at + header_size
        count = ctypes.c_uint32.from_buffer_copy(info, body).value
        if header.id == k.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
            start, size = body + 8, ctypes.sizeof(k.IommuIovaRange)
            if start + count * size > len(info):
                raise ProtocolError(f"the IOMMU lists {count} ranges in too few bytes", errno=errno.EINVAL)
            found = [k.IommuIovaRange.from_buffer_copy(info, start + n * size) for n in range(count)]
            ranges = [(one.start, one.last) for one in found]
        elif header.id == k.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL:
            max_maps = count
        at, floor = header.next, body
    return ranges, max_maps
