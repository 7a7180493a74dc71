"""A PCI function under the Linux kernel's VFIO.

Registers are read and written through the function's descriptor (``pread``/``pwrite``) or mapped; DMA memory is pinned
by the kernel and mapped by address; interrupts arrive on eventfds. Sources: ``linux/vfio.h``, ``linux/iommufd.h`` and
the kernel's Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from maia_rt.errors import InvalidArgument, MaiaError, TransportError, Unsupported
from maia_rt.pci import sysfs
from maia_rt.pci.address import PciAddress
from maia_rt.pci.config import COMMAND, COMMAND_MEMORY, set_bus_master
from maia_rt.transport import fork, uapi, wire
from maia_rt.transport import kernel_uapi as k
from maia_rt.transport.dma_table import DmaTable
from maia_rt.transport.kernel_interface import Interface, open_iommu
from maia_rt.transport.kernel_interrupts import KernelInterrupts
from maia_rt.transport.kernel_ioctl import call
from maia_rt.transport.kernel_iommu import TURN_ON, Iommu
from maia_rt.transport.kernel_notices import Notices
from maia_rt.transport.kernel_registers import KernelRegisters
from maia_rt.transport.kernel_reset import AffectedFunction, hot_reset, hot_reset_info
from maia_rt.transport.mapping import RegionMaps, region_info
from maia_rt.transport.protocol import Access, DeviceInfo, DmaMemory, IrqInfo, RegionInfo
from maia_rt.transport.uapi import PciIrq, PciRegion

_log = logging.getLogger(__name__)
_MAX_REGION_INFO = 1 << 16


class KernelDevice(KernelRegisters):
    """A function that the kernel's VFIO gives us; a :class:`maia_rt.transport.protocol.Transport`.

    Made by :meth:`open`. Methods that the protocol describes are described there.
    """

    def __init__(self, name: str, iommu: Iommu) -> None:
        super().__init__(name, iommu.device_fd)
        self._iommu = iommu
        self._release_requested = False
        self._dma = DmaTable(name, iommu.max_dma_maps, iommu.page_sizes & -iommu.page_sizes, limit=iommu.dma_limit)
        self._maps = RegionMaps(name)
        # Every descriptor, closed in the opposite order, here and in a forked child.
        self._descriptors = contextlib.ExitStack()
        self._descriptors.callback(iommu.close)
        fork.follow(self)
        try:
            self._discover()
            self._interrupts = KernelInterrupts(name, self._irqs, self._call)
            self._descriptors.callback(self._interrupts.close)
            self._notices = Notices(self._irqs, self._interrupts.notify)
            self._descriptors.callback(self._notices.close)
        except BaseException:
            self._closed = True
            self._descriptors.close()
            raise

    @classmethod
    def open(cls, address: PciAddress | str, *, interface: Interface | None = None,
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
            Open a function that no IOMMU guards, with a RuntimeWarning: it then reaches all memory of the host. No
            memory can be mapped for it; registers and interrupts work. Never the default.
        dev, root : Path
            Where the device nodes and sysfs are.

        Raises
        ------
        InvalidArgument
            It is not a PCI address.
        DeviceNotFound
            There is no such function, no VFIO on this host, or the function is not bound to vfio-pci.
        DeviceBusy
            A process, or a kernel driver, holds it or a function of its IOMMU group.
        DevicePermission
            This user may not open its node.
        Unsupported
            No IOMMU protects the host from it, or the kernel has not the interface asked for.
        TransportError
            The kernel refused; ``errno`` says why.
        """
        if isinstance(address, str):
            address = PciAddress.parse(address)
        if no_iommu:
            warnings.warn(f"{address} is opened without an IOMMU: it can read and write all of the host's memory",
                          RuntimeWarning, stacklevel=2)
        return cls(str(address), open_iommu(address, interface=interface, no_iommu=no_iommu, dev=dev, root=root))

    # --- what the device is ------------------------------------------------------------------------------------------

    def _discover(self) -> None:
        info = k.VfioDeviceInfo(argsz=ctypes.sizeof(k.VfioDeviceInfo))
        self._ioctl(k.VFIO_DEVICE_GET_INFO, info, "VFIO_DEVICE_GET_INFO")
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
                self._ioctl(k.VFIO_DEVICE_GET_REGION_INFO, buffer, f"VFIO_DEVICE_GET_REGION_INFO of region {index}")
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
            self._ioctl(k.VFIO_DEVICE_GET_IRQ_INFO, info, f"VFIO_DEVICE_GET_IRQ_INFO of index {index}")
        except TransportError as error:
            if error.errno != errno.EINVAL:
                raise
            return IrqInfo(index, 0, 0)  # ERR on a conventional device
        return IrqInfo(index, info.count, info.flags)

    def map(self, region: int, offset: int = 0, size: int | None = None) -> memoryview:
        """Map a part of a region."""
        info = self.region(region)
        with self._lock:
            self._check_open()
            if region < PciRegion.ROM and info.areas and not self._memory_is_on():
                raise Unsupported(f"{self._name}: the function's memory space is off",
                                  cause="its command register says so; touching a mapping would end this process",
                                  hint="turn it on: maia_rt.pci.config.set_memory_space")
            return self._maps.map(info, self._fd, self._bases[region], offset, size)

    def region_file(self, region: int) -> tuple[int, int]:
        """Return (-1, 0): the kernel takes a BAR for DMA by its address in this process."""
        self.region(region)
        return -1, 0

    def _memory_is_on(self) -> bool:
        return not self._info.is_pci or bool(self.read(PciRegion.CONFIG, COMMAND, 2) & COMMAND_MEMORY)

    # --- DMA ---------------------------------------------------------------------------------------------------------

    def dma_map(self, iova: int, memory: DmaMemory, access: Access = Access.READ | Access.WRITE) -> None:
        """Pin `memory` and map it."""
        with self._lock:
            self._check_open()
            if not self._iommu.iova_ranges:
                raise Unsupported(f"{self._name}: without an IOMMU no I/O virtual address can be given to memory",
                                  cause="the function was opened with no_iommu", hint=TURN_ON)
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
        """Send vectors to eventfds; -1 takes a vector away."""
        with self._lock:
            self._check_open()
            self._interrupts.enable(index, start, eventfds)

    def irq_disable(self, index: int) -> None:
        """Disable every vector of an interrupt index."""
        with self._lock:
            self._check_open()
            self._interrupts.disable(index)
            self._notices.listen(index)

    def irq_mask(self, index: int, start: int = 0, count: int = 1) -> None:
        """Hold vectors back; INTx only, MSI and MSI-X are masked in the device."""
        with self._lock:
            self._check_open()
            self._interrupts.mask(index, start, count)

    def irq_unmask(self, index: int, start: int = 0, count: int = 1) -> None:
        """Let vectors through again."""
        with self._lock:
            self._check_open()
            self._interrupts.unmask(index, start, count)

    def irq_unmask_by(self, index: int, eventfd: int) -> None:
        """Let INTx through again whenever `eventfd` is signalled, without a call of ours; -1 ends that.

        Raises
        ------
        InvalidArgument
            The interrupt is not enabled.
        Unsupported
            It cannot be masked.
        DeviceBusy
            Another eventfd has that task.
        """
        with self._lock:
            self._check_open()
            self._interrupts.unmask_by(index, eventfd)

    def irq_trigger(self, index: int, start: int = 0, count: int = 1) -> None:
        """Fire vectors as if the device had."""
        with self._lock:
            self._check_open()
            self._interrupts.trigger(index, start, count)

    # --- life --------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Reset the function alone: FLR, power management or its bus, as the kernel finds best."""
        if not self._info.can_reset:
            raise Unsupported(f"{self._name}: the device has no reset of its own",
                              cause="it has neither FLR nor a power state that resets it, and no bus to itself",
                              hint="hot_reset() resets its slot; or release the function and bind it again")
        with self._lock:
            self._check_open()
            self._ioctl(k.VFIO_DEVICE_RESET, 0, "VFIO_DEVICE_RESET")

    def hot_reset_info(self) -> list[AffectedFunction]:
        """List the functions that :meth:`hot_reset` would reset, this one among them.

        Raises
        ------
        Unsupported
            Neither the function's slot nor its bus can be reset.
        """
        with self._lock:
            self._check_open()
            return hot_reset_info(self._name, self._iommu.group and self._iommu.group[0], self._call)

    def hot_reset(self) -> None:
        """Reset the function's slot or bus, and so every function there. DMA and interrupt mappings stay.

        Raises
        ------
        Unsupported
            As :meth:`hot_reset_info`.
        DeviceBusy
            Functions would be reset that do not belong to this open device. Nothing was changed.
        """
        with self._lock:
            self._check_open()
            hot_reset(self._name, self._iommu.group and self._iommu.group[1], self.hot_reset_info(), self._call)

    @property
    def liveness_fd(self) -> int | None:
        """Readable when the kernel has something to tell: :meth:`service` takes it."""
        return None if self._closed or self._forked else self._notices.fd

    def service(self) -> int:
        """Take the kernel's notices; return how many there were."""
        with self._lock:
            self._check_open()
            notices = self._notices.take()
            if not notices:
                return 0
            self.check_present()
            if PciIrq.REQ in notices and not self._release_requested:
                self._release_requested = True
                _log.warning("%s: the host wants the device back and waits for it to be closed", self._name)
            if PciIrq.ERR in notices:
                raise TransportError(
                    f"{self._name}: PCI Express reported an uncorrectable error", errno=errno.EIO,
                    cause="the device or its link failed; the kernel's log has the details",
                    hint="reset() the device, or close it and open it anew")
            return sum(notices.values())

    @property
    def release_requested(self) -> bool:
        """Whether the host wants the device back."""
        return self._release_requested

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
            self._descriptors.close()
        if held:
            # The kernel gives the function to its next user when the last mapping has gone.
            _log.warning("%s: closed while views of %d mapped areas are held; they are unmapped with their last view",
                         self._name, held)

    def _last_steps(self) -> list[Callable[[], Any]]:
        """Return what stops the device: bus mastering off, interrupts off, DMA unmapped."""
        steps: list[Callable[[], Any]] = []
        config = PciRegion.CONFIG
        if len(self._regions) > config and self._regions[config].size:
            steps.append(functools.partial(set_bus_master, functools.partial(self.read, config),
                                           functools.partial(self.write, config), False))
        steps += [functools.partial(self.irq_disable, index) for index in self._interrupts.enabled]
        steps += [functools.partial(self.dma_unmap, iova, size) for iova, size in self._dma]
        return steps

    def _ioctl(self, request: int, argument: int | bytearray | ctypes.Structure, what: str) -> int:
        return call(self._fd, request, argument, f"{self._name}: {what}")

    def _call(self, request: int, argument: bytearray, what: str) -> int:
        return self._ioctl(request, argument, what)

    def _after_fork(self) -> None:
        # The child's copies would keep the function from being given to anybody else when the parent closes it.
        self._forked = True
        self._lock = threading.RLock()
        self._descriptors.close()

    def __enter__(self) -> KernelDevice:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not self._forked:
            self._closed = True
            warnings.warn(f"{self._name}: the device was not closed", ResourceWarning, stacklevel=2)
            self._descriptors.close()

    def __repr__(self) -> str:
        return f"<KernelDevice {self._name}>"
