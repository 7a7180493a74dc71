"""A function by its own character device, in an iommufd: VFIO's second interface, since Linux 6.6.

    /dev/vfio/devices/vfioN    the function; it answers once it is bound to an iommufd
    /dev/iommu                 an iommufd: address spaces (IOAS), to which functions are attached

Source: ``linux/vfio.h``, ``linux/iommufd.h``; Linux 6.12, drivers/vfio/device_cdev.c, drivers/iommu/iommufd/ioas.c and
device.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from maia_rt.errors import DeviceBusy, MaiaError, TransportError, Unsupported
from maia_rt.pci.address import PciAddress
from maia_rt.pci.iommu import is_vfio
from maia_rt.pci.sysfs import group_members, read_function
from maia_rt.transport import kernel_uapi as k
from maia_rt.transport.kernel_ioctl import call, open_node
from maia_rt.transport.kernel_iommu import LOAD, UNLIMITED, holder, mapping_refusal, not_viable
from maia_rt.transport.mapping import PAGE_SIZE
from maia_rt.transport.protocol import Access


class IommufdIommu:
    """A function attached to an address space of its own in an iommufd of its own.

    Parameters
    ----------
    address : PciAddress
    node : Path
        The function's character device.
    dev, root : Path
        ``/dev`` and ``/sys/bus/pci``.
    """

    kind = "vfio-cdev"
    group: tuple[int, int] | None = None
    dma_limit = "the host's memory"

    def __init__(self, address: PciAddress, node: Path, *, dev: Path, root: Path) -> None:
        self._name = str(address)
        self.device_fd = self._iommufd = -1
        try:
            self.device_fd = open_node(node, self._name, hint=LOAD)
            self._iommufd = open_node(dev / "iommu", self._name, hint="load the module: modprobe iommufd")
            self._bind(address, node, dev, root)
            space = k.IommuIoasAlloc(ctypes.sizeof(k.IommuIoasAlloc), 0, 0)
            self._call(self._iommufd, k.IOMMU_IOAS_ALLOC, space, "IOMMU_IOAS_ALLOC")
            self._ioas: int = space.out_ioas_id
            attach = k.VfioDeviceAttachIommufdPt(ctypes.sizeof(k.VfioDeviceAttachIommufdPt), 0, self._ioas)
            self._call(self.device_fd, k.VFIO_DEVICE_ATTACH_IOMMUFD_PT, attach, "VFIO_DEVICE_ATTACH_IOMMUFD_PT")
            self._learn()
        except BaseException:
            self.close()
            raise

    def _bind(self, address: PciAddress, node: Path, dev: Path, root: Path) -> None:
        bind = k.VfioDeviceBindIommufd(ctypes.sizeof(k.VfioDeviceBindIommufd), 0, self._iommufd, 0)
        what = "VFIO_DEVICE_BIND_IOMMUFD"
        hint = f"find it with: fuser -v {node} /dev/vfio/*"
        try:
            self._call(self.device_fd, k.VFIO_DEVICE_BIND_IOMMUFD, bind, what)
        except DeviceBusy:
            raise DeviceBusy(f"{self._name}: in use through its IOMMU group", cause=holder(address, dev, root),
                             hint=hint) from None
        except TransportError as error:
            # The kernel lets one process open a function's device, and tells a second one EINVAL.
            if error.errno == errno.EINVAL:
                raise DeviceBusy(f"{self._name}: {node} is in use", cause=holder(address, dev, root),
                                 hint=hint) from None
            if error.errno != errno.EPERM:
                raise
            raise not_viable(address, root) or self._not_owned(address, hint, dev, root) from None

    def _not_owned(self, address: PciAddress, hint: str, dev: Path, root: Path) -> MaiaError:
        others = [one for one in group_members(address, root=root) if one != address]
        if any(is_vfio(read_function(one, root=root).driver) for one in others):
            return DeviceBusy(f"{self._name}: its IOMMU group is in use", cause=holder(address, dev, root),
                              hint=f"{hint}; functions of one group are opened one at a time")
        return TransportError(f"{self._name}: VFIO_DEVICE_BIND_IOMMUFD: {os.strerror(errno.EPERM)}", errno=errno.EPERM,
                              cause="the platform does not remap interrupts",
                              hint="where the device is trusted: iommufd.allow_unsafe_interrupts=1 on the kernel's "
                                   "command line")

    def _call(self, fd: int, request: int, argument: int | bytearray | ctypes.Structure, what: str) -> int:
        return call(fd, request, argument, f"{self._name}: {what}")

    def _learn(self) -> None:
        # Attaching narrows the ranges to what the function's IOMMU translates, so they are asked for afterwards.
        self.max_dma_maps = UNLIMITED
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
        what = f"mapping {size:#x} bytes at iova {iova:#x}"
        try:
            self._call(self._iommufd, k.IOMMU_IOAS_MAP, request, what)
        except MaiaError as error:
            if isinstance(error, TransportError) and error.errno == errno.EFAULT:
                raise Unsupported(f"{self._name}: {what}: an iommufd maps ordinary memory only",
                                  cause="it is another device's BAR, or not this process's memory",
                                  hint="open the device with interface='group', whose type1 maps BARs too") from None
            raise mapping_refusal(error, f"{self._name}: {what}", limit=self.dma_limit,
                                  account="this user, in all processes,") from None

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
