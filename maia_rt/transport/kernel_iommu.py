"""The two ways to a function's address space: group and container (type1), and character device with iommufd."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Literal, Protocol

from maia_rt.errors import DeviceBusy, DeviceNotFound, InvalidArgument, ProtocolError, TransportError, Unsupported
from maia_rt.pci import sysfs
from maia_rt.pci.address import PciAddress
from maia_rt.transport import kernel_uapi as k
from maia_rt.transport.kernel_ioctl import call, open_node
from maia_rt.transport.mapping import PAGE_SIZE
from maia_rt.transport.protocol import Access

_LOAD = "load the driver: modprobe vfio-pci; without hardware use the emulated device"
_INFO_ROOM = 64 << 10
_UNLIMITED = (1 << 31) - 1


class Iommu(Protocol):
    """An address space that one function has to itself, and the function's descriptor."""

    kind: str
    device_fd: int
    page_sizes: int
    max_dma_maps: int
    iova_ranges: list[tuple[int, int]]

    def dma_map(self, iova: int, address: int, size: int, access: Access) -> None:
        """Map memory of this process, pinning it."""

    def dma_unmap(self, iova: int, size: int) -> None:
        """Unmap exactly one mapping."""

    def close(self) -> None:
        """Close every descriptor."""


class GroupIommu:
    """An IOMMU group in a container of its own (``vfio_iommu_type1``, version 2), or without an IOMMU.

    Parameters
    ----------
    address : PciAddress
    group : int
        The IOMMU group's number.
    no_iommu : bool
        Open it without protection: the device can then reach all of the host's memory.
    dev, root : Path
        ``/dev`` and ``/sys/bus/pci``.
    """

    kind = "vfio-group"

    def __init__(self, address: PciAddress, group: int, *, no_iommu: bool, dev: Path, root: Path) -> None:
        self._name = str(address)
        self._no_iommu = no_iommu
        self._container = self._group = self.device_fd = -1
        try:
            self._container = open_node(dev / "vfio/vfio", self._name, hint=_LOAD)
            self._check_container()
            node = dev / "vfio" / (f"noiommu-{group}" if no_iommu else str(group))
            self._group = open_node(node, self._name, hint="bind the function to vfio-pci")
            self._check_viable(address, group, root)
            self._call(self._group, k.VFIO_GROUP_SET_CONTAINER, bytearray(ctypes.c_int32(self._container)), "joining")
            self._set_iommu()
            self.device_fd = self._call(self._group, k.VFIO_GROUP_GET_DEVICE_FD,
                                        bytearray(self._name.encode() + b"\0"), "opening the function")
            os.set_inheritable(self.device_fd, False)
            self._learn()
        except BaseException:
            self.close()
            raise

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

    def _check_viable(self, address: PciAddress, group: int, root: Path) -> None:
        status = k.VfioGroupStatus(argsz=ctypes.sizeof(k.VfioGroupStatus))
        self._call(self._group, k.VFIO_GROUP_GET_STATUS, status, "VFIO_GROUP_GET_STATUS")
        if not status.flags & k.VFIO_GROUP_FLAGS_VIABLE:
            others = []
            for member in sysfs.group_members(address, root=root):
                driver = sysfs.read_function(member, root=root).driver
                if driver not in (None, "vfio-pci", "pcieport"):
                    others.append(f"{member} ({driver})")
            raise DeviceBusy(f"{self._name}: IOMMU group {group} cannot be given away",
                             cause=f"of the same group the kernel drives {', '.join(others) or 'another function'}",
                             hint="bind every function of the group to vfio-pci")

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
        self.max_dma_maps = 65535  # the module's default, dma_entry_limit
        at = info.cap_offset if info.flags & k.VFIO_IOMMU_INFO_CAPS else 0
        self.iova_ranges, self.max_dma_maps = parse_type1_caps(buffer, at, self.iova_ranges, self.max_dma_maps)

    def dma_map(self, iova: int, address: int, size: int, access: Access) -> None:
        """Map memory of this process."""
        request = k.VfioIommuType1DmaMap(ctypes.sizeof(k.VfioIommuType1DmaMap), int(access), address, iova, size)
        self._call(self._container, k.VFIO_IOMMU_MAP_DMA, request, f"mapping {size:#x} bytes at iova {iova:#x}")

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


class IommufdIommu:
    """The function's own character device, attached to an address space of an iommufd.

    Parameters
    ----------
    address : PciAddress
    node : str
        The device's name under ``/dev/vfio/devices``.
    dev : Path
        ``/dev``.
    """

    kind = "vfio-cdev"

    def __init__(self, address: PciAddress, node: str, *, dev: Path) -> None:
        self._name = str(address)
        self.device_fd = self._iommufd = -1
        try:
            self.device_fd = open_node(dev / "vfio/devices" / node, self._name, hint=_LOAD)
            self._iommufd = open_node(dev / "iommu", self._name, hint="load the module iommufd")
            bind = k.VfioDeviceBindIommufd(ctypes.sizeof(k.VfioDeviceBindIommufd), 0, self._iommufd, 0)
            self._call(self.device_fd, k.VFIO_DEVICE_BIND_IOMMUFD, bind, "VFIO_DEVICE_BIND_IOMMUFD")
            space = k.IommuIoasAlloc(ctypes.sizeof(k.IommuIoasAlloc), 0, 0)
            self._call(self._iommufd, k.IOMMU_IOAS_ALLOC, space, "IOMMU_IOAS_ALLOC")
            self._ioas: int = space.out_ioas_id
            attach = k.VfioDeviceAttachIommufdPt(ctypes.sizeof(k.VfioDeviceAttachIommufdPt), 0, self._ioas)
            self._call(self.device_fd, k.VFIO_DEVICE_ATTACH_IOMMUFD_PT, attach, "VFIO_DEVICE_ATTACH_IOMMUFD_PT")
            self._learn()
        except BaseException:
            self.close()
            raise

    def _call(self, fd: int, request: int, argument: int | bytearray | ctypes.Structure, what: str) -> int:
        return call(fd, request, argument, f"{self._name}: {what}")

    def _learn(self) -> None:
        # Attaching narrows the ranges to what the function's IOMMU translates, so they are asked for afterwards.
        self.max_dma_maps = _UNLIMITED
        room = 64
        while True:
            ranges = (k.IommuIovaRange * room)()
            request = k.IommuIoasIovaRanges(size=ctypes.sizeof(k.IommuIoasIovaRanges), ioas_id=self._ioas,
                                            num_iovas=room, allowed_iovas=ctypes.addressof(ranges))
            try:
                self._call(self._iommufd, k.IOMMU_IOAS_IOVA_RANGES, request, "IOMMU_IOAS_IOVA_RANGES")
                break
            except TransportError as error:
                if error.errno != errno.EMSGSIZE or request.num_iovas <= room:
                    raise
                room = request.num_iovas
        self.iova_ranges = [(one.start, one.last) for one in ranges[:request.num_iovas]]
        # The alignment may be smaller than a page, but memory is pinned by the page.
        self.page_sizes = max(request.out_iova_alignment, PAGE_SIZE)

    def dma_map(self, iova: int, address: int, size: int, access: Access) -> None:
        """Map memory of this process."""
        flags = k.IOMMU_IOAS_MAP_FIXED_IOVA
        flags |= k.IOMMU_IOAS_MAP_READABLE if access & Access.READ else 0
        flags |= k.IOMMU_IOAS_MAP_WRITEABLE if access & Access.WRITE else 0
        request = k.IommuIoasMap(ctypes.sizeof(k.IommuIoasMap), flags, self._ioas, 0, address, size, iova)
        self._call(self._iommufd, k.IOMMU_IOAS_MAP, request, f"mapping {size:#x} bytes at iova {iova:#x}")

    def dma_unmap(self, iova: int, size: int) -> None:
        """Unmap exactly one mapping."""
        request = k.IommuIoasUnmap(ctypes.sizeof(k.IommuIoasUnmap), self._ioas, iova, size)
        what = f"unmapping {size:#x} bytes at iova {iova:#x}"
        self._call(self._iommufd, k.IOMMU_IOAS_UNMAP, request, what)
        if request.length != size:
            raise TransportError(f"{self._name}: {what}: the kernel unmapped {request.length:#x} bytes",
                                 errno=errno.EINVAL)

    def close(self) -> None:
        """Close the function, which detaches it, then the iommufd, which frees its address spaces."""
        for fd in (self.device_fd, self._iommufd):
            if fd >= 0:
                os.close(fd)
        self.device_fd = self._iommufd = -1


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


def open_iommu(address: PciAddress, *, interface: Literal["group", "cdev"] | None, no_iommu: bool, dev: Path,
               root: Path) -> Iommu:
    """Open a function by what the host has: iommufd where both ends of it exist, the group otherwise.

    Raises
    ------
    DeviceNotFound, DeviceBusy, DevicePermission, Unsupported, TransportError
        See :func:`maia_rt.transport.kernel.open_device`.
    """
    function = sysfs.read_function(address, root=root)
    if not (dev / "vfio").exists():
        raise DeviceNotFound(f"{address}: the host has no VFIO: there is no {dev / 'vfio'}", hint=_LOAD)
    if interface not in (None, "group", "cdev"):
        raise InvalidArgument(f"{address}: {interface!r} is not an interface of VFIO", hint="use 'group' or 'cdev'")
    if interface == "cdev" and no_iommu:
        raise Unsupported(f"{address}: without an IOMMU there is no cdev interface", hint="leave `interface` out")
    has_cdev = function.vfio_cdev is not None and (dev / "iommu").exists()
    if function.vfio_cdev is not None and not no_iommu and (interface == "cdev" or interface is None and has_cdev):
        return IommufdIommu(address, function.vfio_cdev, dev=dev)
    if function.iommu_group is None:
        raise Unsupported(f"{address}: no IOMMU protects the host from this function",
                          hint="turn the IOMMU on: intel_iommu=on or amd_iommu=on on the kernel's command line")
    if function.driver is None:
        raise DeviceNotFound(f"{address}: no driver holds the function", hint="bind it to vfio-pci")
    if not (dev / "vfio" / str(function.iommu_group)).exists() and not no_iommu and "vfio" not in function.driver:
        raise DeviceBusy(f"{address}: the kernel drives the function with {function.driver}",
                         hint="unbind it and bind vfio-pci")
    return GroupIommu(address, function.iommu_group, no_iommu=no_iommu, dev=dev, root=root)
