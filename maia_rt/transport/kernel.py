"""A PCI function under the Linux kernel's VFIO.

Registers are read and written through the function's descriptor (``pread``/``pwrite``) or mapped; DMA memory is pinned
by the kernel and mapped by address; interrupts arrive on eventfds. Sources: ``linux/vfio.h``, ``linux/iommufd.h`` and
the kernel's Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

import array
import ctypes
import errno
import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

from maia_rt.errors import ClosedError, ForkedError, InvalidArgument, MaiaError, TransportError, Unsupported
from maia_rt.pci import sysfs
from maia_rt.pci.address import PciAddress
from maia_rt.pci.config import set_bus_master
from maia_rt.transport import fork, uapi, wire
from maia_rt.transport import kernel_uapi as k
from maia_rt.transport.dma_table import DmaTable
from maia_rt.transport.kernel_ioctl import call, refusal
from maia_rt.transport.kernel_iommu import Iommu, open_iommu
from maia_rt.transport.mapping import RegionMaps, region_info
from maia_rt.transport.protocol import (
    Access,
    DeviceInfo,
    DmaMemory,
    IrqInfo,
    RegionInfo,
    check_access,
    check_irq,
)

_log = logging.getLogger(__name__)
_SIZES: Final = (1, 2, 4, 8)
_MAX_REGION_INFO = 1 << 16


class KernelDevice:
    """A function that the kernel's VFIO gives us; a :class:`maia_rt.transport.protocol.Transport`.

    Made by :meth:`open`. Methods that the protocol describes are described there.
    """

    def __init__(self, name: str, iommu: Iommu) -> None:
        self._name = name
        self._iommu = iommu
        self._fd = iommu.device_fd
        self._lock = threading.RLock()
        self._closed = self._forked = False
        self._dma = DmaTable(name, iommu.max_dma_maps, iommu.page_sizes & -iommu.page_sizes)
        self._maps = RegionMaps(name)
        self._bases: list[int] = []
        self._vectors: dict[int, list[int]] = {}
        fork.follow(self)
        try:
            self._discover()
        except BaseException:
            self._closed = True
            iommu.close()
            raise

    @classmethod
    def open(cls, address: PciAddress | str, *, interface: Literal["group", "cdev"] | None = None,
             no_iommu: bool = False, dev: Path = Path("/dev"), root: Path = sysfs.ROOT) -> KernelDevice:
        """Open a PCI function that is bound to vfio-pci.

        Parameters
        ----------
        address : PciAddress or str
            As ``lspci -D`` writes it.
        interface : {'group', 'cdev'}, optional
            The group in a container (``/dev/vfio/N``), or the function's own node in an iommufd
            (``/dev/vfio/devices/vfioN`` and ``/dev/iommu``); by default the latter where the host has both its ends.
        no_iommu : bool
            Open the function without an IOMMU, which lets it reach all memory of the host. Never the default.
        dev, root : Path
            Where the device nodes and sysfs are.

        Raises
        ------
        DeviceNotFound
            There is no such function, no VFIO on this host, or the function is not bound to vfio-pci.
        DeviceBusy
            Another process, or a kernel driver, holds it or a function of its IOMMU group.
        DevicePermission
            This user may not open its node.
        Unsupported
            No IOMMU protects the host from it.
        TransportError
            The kernel refused; ``errno`` says why.
        """
        if isinstance(address, str):
            address = PciAddress.parse(address)
        return cls(str(address), open_iommu(address, interface=interface, no_iommu=no_iommu, dev=dev, root=root))

    # --- what the device is ------------------------------------------------------------------------------------------

    def _discover(self) -> None:
        info = k.VfioDeviceInfo(argsz=ctypes.sizeof(k.VfioDeviceInfo))
        self._call(k.VFIO_DEVICE_GET_INFO, info, "VFIO_DEVICE_GET_INFO")
        self._info = DeviceInfo(self._name, self._iommu.kind, info.flags, info.num_regions, info.num_irqs)
        self._regions = tuple(self._ask_region(index) for index in range(info.num_regions))
        self._irqs = tuple(self._ask_irq(index) for index in range(info.num_irqs))

    def _ask_region(self, index: int) -> RegionInfo:
        room = ctypes.sizeof(k.VfioRegionInfo)
        for _ in range(2):
            buffer = bytearray(room)
            info = k.VfioRegionInfo.from_buffer(buffer)
            info.argsz, info.index = room, index
            try:
                self._call(k.VFIO_DEVICE_GET_REGION_INFO, buffer, f"VFIO_DEVICE_GET_REGION_INFO of region {index}")
            except TransportError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._bases.append(0)  # a region that this device has not: VGA
                return RegionInfo(index, 0, 0)
            if info.argsz <= room or info.argsz > _MAX_REGION_INFO:
                break
            room = info.argsz
        areas, kind = None, None
        if info.flags & uapi.REGION_FLAG_CAPS and info.cap_offset:
            areas, kind = wire.unpack_region_caps(buffer, info.cap_offset)
        self._bases.append(info.offset)
        return region_info(index, info.flags, info.size, areas=areas, kind=kind, mappable=True)

    def _ask_irq(self, index: int) -> IrqInfo:
        info = k.VfioIrqInfo(argsz=ctypes.sizeof(k.VfioIrqInfo), index=index)
        try:
            self._call(k.VFIO_DEVICE_GET_IRQ_INFO, info, f"VFIO_DEVICE_GET_IRQ_INFO of index {index}")
        except TransportError as error:
            if error.errno != errno.EINVAL:
                raise
            return IrqInfo(index, 0, 0)  # ERR on a conventional device
        return IrqInfo(index, info.count, info.flags)

    @property
    def name(self) -> str:
        """The PCI address."""
        return self._name

    @property
    def info(self) -> DeviceInfo:
        """The device's flags and counts."""
        return self._info

    @property
    def regions(self) -> Sequence[RegionInfo]:
        """Every region, by index."""
        return self._regions

    def region(self, index: int) -> RegionInfo:
        """Return one region."""
        if not 0 <= index < len(self._regions):
            raise InvalidArgument(f"{self._name}: there is no region {index}; the last is {len(self._regions) - 1}")
        return self._regions[index]

    @property
    def irqs(self) -> Sequence[IrqInfo]:
        """Every interrupt index."""
        return self._irqs

    # --- register access ---------------------------------------------------------------------------------------------

    def read(self, region: int, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes."""
        self._check(region, offset, size, uapi.REGION_FLAG_READ)
        return int.from_bytes(self._pread(region, offset, size), "little")

    def write(self, region: int, offset: int, size: int, value: int, *, posted: bool = False) -> None:
        """Write 1, 2, 4 or 8 bytes; the kernel posts nothing, so `posted` changes nothing."""
        self._check(region, offset, size, uapi.REGION_FLAG_WRITE)
        try:
            data = value.to_bytes(size, "little")
        except OverflowError:
            raise InvalidArgument(f"{self._name}: {value!r} does not fit into {size} bytes") from None
        self._pwrite(region, offset, data)

    def read_bytes(self, region: int, offset: int, size: int) -> bytes:
        """Read a block."""
        self._check(region, offset, size, uapi.REGION_FLAG_READ, block=True)
        return self._pread(region, offset, size)

    def write_bytes(self, region: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write a block."""
        view = memoryview(data).cast("B")
        self._check(region, offset, len(view), uapi.REGION_FLAG_WRITE, block=True)
        self._pwrite(region, offset, view)

    def _check(self, region: int, offset: int, size: int, flag: int, *, block: bool = False) -> None:
        self._check_open()
        check_access(self._name, self._regions, region, offset=offset, size=size, flag=flag,
                     sizes=() if block else _SIZES)

    def _pread(self, region: int, offset: int, size: int) -> bytes:
        parts: list[bytes] = []
        with self._lock:
            self._check_open()
            done = 0
            while done < size:
                try:
                    part = os.pread(self._fd, size - done, self._bases[region] + offset + done)
                except OSError as error:
                    what = f"reading {size} bytes at {offset:#x} of region {region}"
                    raise refusal(error, f"{self._name}: {what}") from None
                if not part:
                    raise TransportError(f"{self._name}: only {done} of {size} bytes at {offset:#x} of region {region} "
                                         "could be read", errno=errno.EIO)
                parts.append(part)
                done += len(part)
        return b"".join(parts)

    def _pwrite(self, region: int, offset: int, data: bytes | memoryview) -> None:
        with self._lock:
            self._check_open()
            done = 0
            while done < len(data):
                try:
                    count = os.pwrite(self._fd, data[done:], self._bases[region] + offset + done)
                except OSError as error:
                    what = f"writing {len(data)} bytes at {offset:#x} of region {region}"
                    raise refusal(error, f"{self._name}: {what}") from None
                if not count:
                    raise TransportError(f"{self._name}: only {done} of {len(data)} bytes at {offset:#x} of region "
                                         f"{region} could be written", errno=errno.EIO)
                done += count

    def map(self, region: int, offset: int = 0, size: int | None = None) -> memoryview:
        """Map a part of a region."""
        info = self.region(region)
        with self._lock:
            self._check_open()
            return self._maps.map(info, self._fd, self._bases[region], offset, size)

    # --- DMA ---------------------------------------------------------------------------------------------------------

    def dma_map(self, iova: int, memory: DmaMemory, access: Access = Access.READ | Access.WRITE) -> None:
        """Pin `memory` and map it."""
        with self._lock:
            self._check_open()
            if not self._iommu.iova_ranges:
                raise Unsupported(f"{self._name}: without an IOMMU no I/O virtual address can be given to memory",
                                  hint="turn the IOMMU on: intel_iommu=on or amd_iommu=on on the kernel's command line")
            self._dma.check(iova, memory)
            if not any(first <= iova and iova + memory.size - 1 <= last for first, last in self._iommu.iova_ranges):
                usable = ", ".join(f"{first:#x} to {last:#x}" for first, last in self._iommu.iova_ranges) or "none"
                raise InvalidArgument(f"{self._name}: {memory.size:#x} bytes at iova {iova:#x} are not usable",
                                      cause=f"usable are: {usable}")
            self._iommu.dma_map(iova, memory.address, memory.size, access)
            self._dma.add(iova, memory, access)

    def dma_unmap(self, iova: int, size: int) -> None:
        """Take one mapping back."""
        with self._lock:
            self._check_open()
            self._dma.require(iova, size)
            self._iommu.dma_unmap(iova, size)
            self._dma.remove(iova)

    @property
    def iova_ranges(self) -> list[tuple[int, int]]:
        """What the IOMMU translates and the platform has not reserved."""
        return list(self._iommu.iova_ranges)

    @property
    def page_sizes(self) -> int:
        """The IOMMU's page sizes, from the host's own upwards."""
        return self._iommu.page_sizes

    @property
    def max_dma_maps(self) -> int:
        """How many mappings were left when the device was opened."""
        return self._iommu.max_dma_maps

    @property
    def needs_pinning(self) -> bool:
        """True: the kernel charges mapped memory to RLIMIT_MEMLOCK."""
        return True

    # --- interrupts --------------------------------------------------------------------------------------------------

    def irq_enable(self, index: int, start: int, eventfds: Sequence[int]) -> None:
        """Send vectors to eventfds."""
        check_irq(self._name, self._irqs, index, start=start, count=len(eventfds), flag=uapi.IRQ_FLAG_EVENTFD)
        with self._lock:
            self._check_open()
            before = self._vectors.get(index, [])
            after = before + [-1] * (start + len(eventfds) - len(before))
            after[start:start + len(eventfds)] = eventfds
            if before and len(after) > len(before) and self._irqs[index].flags & uapi.IRQ_FLAG_NORESIZE:
                # The kernel cannot add vectors to an enabled set: disable it, then enable the larger one.
                self._trigger_action(index, uapi.IRQ_SET_DATA_NONE, 0, ())
                self._vectors.pop(index)
                self._trigger_action(index, uapi.IRQ_SET_DATA_EVENTFD, 0, after)
            else:
                self._trigger_action(index, uapi.IRQ_SET_DATA_EVENTFD, start, eventfds)
            self._vectors[index] = after

    def irq_disable(self, index: int) -> None:
        """Disable every vector of an interrupt index."""
        check_irq(self._name, self._irqs, index, start=0, count=1)
        with self._lock:
            self._check_open()
            self._trigger_action(index, uapi.IRQ_SET_DATA_NONE, 0, ())
            self._vectors.pop(index, None)

    def irq_mask(self, index: int, start: int = 0, count: int = 1) -> None:
        """Hold vectors back."""
        check_irq(self._name, self._irqs, index, start=start, count=count, flag=uapi.IRQ_FLAG_MASKABLE)
        self._set_irqs(uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_MASK, index, start, count)

    def irq_unmask(self, index: int, start: int = 0, count: int = 1) -> None:
        """Let vectors through again."""
        check_irq(self._name, self._irqs, index, start=start, count=count, flag=uapi.IRQ_FLAG_MASKABLE)
        self._set_irqs(uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_UNMASK, index, start, count)

    def irq_trigger(self, index: int, start: int = 0, count: int = 1) -> None:
        """Fire vectors as if the device had."""
        check_irq(self._name, self._irqs, index, start=start, count=count)
        self._set_irqs(uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_TRIGGER, index, start, count)

    def _trigger_action(self, index: int, data: int, start: int, fds: Sequence[int]) -> None:
        self._set_irqs(data | uapi.IRQ_SET_ACTION_TRIGGER, index, start, len(fds), array.array("i", fds).tobytes())

    def _set_irqs(self, flags: int, index: int, start: int, count: int, data: bytes = b"") -> None:
        size = ctypes.sizeof(k.VfioIrqSet) + len(data)
        request = bytearray(k.VfioIrqSet(size, flags, index, start, count)) + data
        with self._lock:
            self._check_open()
            self._call(k.VFIO_DEVICE_SET_IRQS, request,
                       f"VFIO_DEVICE_SET_IRQS of {count} vectors from {start} on of index {index}")

    # --- life --------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Reset the function."""
        if not self._info.can_reset:
            raise Unsupported(f"{self._name}: the device has no reset")
        with self._lock:
            self._check_open()
            self._call(k.VFIO_DEVICE_RESET, 0, "VFIO_DEVICE_RESET")

    @property
    def liveness_fd(self) -> int | None:
        """None: the kernel asks nothing of its user."""
        return None

    def service(self) -> int:
        """Nothing to serve."""
        with self._lock:
            self._check_open()
            return 0

    @property
    def closed(self) -> bool:
        """Whether close has been called."""
        return self._closed

    def close(self) -> None:
        """Let go of the device in the order that the protocol describes."""
        if self._forked:
            return
        with self._lock:
            if self._closed:
                return
            for step in self._last_steps():
                try:
                    step()
                except MaiaError as error:
                    _log.warning("%s: closing goes on after %s", self._name, error.what)
            self._closed = True
            held = self._maps.close()
            self._dma.clear()
            self._iommu.close()
        if held:
            # The kernel gives the function to its next user when the last mapping has gone.
            _log.warning("%s: closed while views of %d mapped areas are held; they are unmapped with their last view",
                         self._name, held)

    def _last_steps(self) -> list[Callable[[], Any]]:
        """Return what stops the device: bus mastering off, interrupts off, DMA unmapped."""
        steps: list[Callable[[], Any]] = []
        config = uapi.PciRegion.CONFIG
        if len(self._regions) > config and self._regions[config].size:
            steps.append(functools.partial(set_bus_master, functools.partial(self.read, config),
                                           functools.partial(self.write, config), False))
        steps += [functools.partial(self.irq_disable, index) for index in sorted(self._vectors)]
        steps += [functools.partial(self.dma_unmap, iova, size) for iova, size in self._dma]
        return steps

    def _check_open(self) -> None:
        """Raise what the state calls for; under the lock, so that no descriptor closes before its use."""
        if self._forked:
            raise ForkedError(f"{self._name}: the device was opened before fork", hint="open it anew in the child")
        if self._closed:
            raise ClosedError(f"{self._name}: the device has been closed")

    def _call(self, request: int, argument: int | bytearray | ctypes.Structure, what: str) -> int:
        return call(self._fd, request, argument, f"{self._name}: {what}")

    def _after_fork(self) -> None:
        # The child's copies would keep the function from being given to anybody else when the parent closes it.
        self._forked = True
        self._lock = threading.RLock()
        self._iommu.close()

    def __enter__(self) -> KernelDevice:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not self._forked:
            self._closed = True
            warnings.warn(f"{self._name}: the device was not closed", ResourceWarning, stacklevel=2)
            self._iommu.close()

    def __repr__(self) -> str:
        return f"<KernelDevice {self._name}>"
