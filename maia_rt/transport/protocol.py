"""What every transport offers: the one interface that the layers above drive a PCI device through."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from maia_rt.errors import InvalidArgument, Unsupported
from maia_rt.transport import uapi


class Access(enum.IntFlag):
    """What the device may do with a piece of host memory."""

    READ = uapi.DMA_FLAG_READ
    WRITE = uapi.DMA_FLAG_WRITE


@dataclass(frozen=True)
class DeviceInfo:
    """What is at the other end.

    Attributes
    ----------
    name : str
        For people and error texts: a PCI address or a socket path.
    kind : str
        ``vfio-user``, ``vfio-group``, ``vfio-cdev`` or ``vfio-noiommu``.
    flags : int
        ``uapi.DEVICE_FLAG_*``.
    num_regions, num_irqs : int
    """

    name: str
    kind: str
    flags: int
    num_regions: int
    num_irqs: int

    @property
    def is_pci(self) -> bool:
        """Whether region and interrupt indexes are those of a PCI function."""
        return bool(self.flags & uapi.DEVICE_FLAG_PCI)

    @property
    def can_reset(self) -> bool:
        """Whether :meth:`Transport.reset` is supported."""
        return bool(self.flags & uapi.DEVICE_FLAG_RESET)


@dataclass(frozen=True)
class RegionInfo:
    """One region of the device: a BAR, the ROM, configuration space.

    Attributes
    ----------
    index, size : int
        `size` in bytes, 0 where the device has no such region.
    flags : int
        ``uapi.REGION_FLAG_*``.
    areas : tuple of (offset, size)
        What can be mapped, in bytes from the region's start, sorted; empty where nothing can.
    kind : (type, subtype), optional
        For device-specific regions.
    """

    index: int
    size: int
    flags: int
    areas: tuple[tuple[int, int], ...] = ()
    kind: tuple[int, int] | None = None

    @property
    def readable(self) -> bool:
        """Whether the region can be read."""
        return bool(self.flags & uapi.REGION_FLAG_READ)

    @property
    def writable(self) -> bool:
        """Whether the region can be written."""
        return bool(self.flags & uapi.REGION_FLAG_WRITE)

    @property
    def mappable(self) -> bool:
        """Whether at least a part of the region can be mapped."""
        return bool(self.areas)


@dataclass(frozen=True)
class IrqInfo:
    """One interrupt index: how many vectors it has, and ``uapi.IRQ_FLAG_*``."""

    index: int
    count: int
    flags: int


class DmaMemory(Protocol):
    """Host memory that can be shown to a device; ``maia_rt.memory.DmaRegion`` is one."""

    @property
    def fd(self) -> int:
        """The file behind the memory, or -1 where it has none."""

    @property
    def offset(self) -> int:
        """Where in the file the memory starts, in bytes."""

    @property
    def size(self) -> int:
        """Bytes, a multiple of the page size."""

    @property
    def address(self) -> int:
        """The memory's address in this process."""

    def view(self) -> memoryview:
        """Return the memory as bytes. A transport holds a view of what it has mapped, so the memory cannot go away."""


class Transport(Protocol):
    """A PCI device, whoever serves it.

    Any thread may call any method; one lock orders the calls. A child made by ``fork`` gets ForkedError from every call
    but :meth:`close`, and its copies of the device's descriptors are closed at once.

    Every call may raise ClosedError, ForkedError, DeviceLost (the device is gone), DeviceTimeout (it does not answer;
    the transport is then of no further use), ProtocolError (it answers nonsense; likewise) and TransportError (it
    refused, ``errno`` says why; all else goes on). InvalidArgument and Unsupported mean that nothing was sent.

    No finalizer may call a transport: the garbage collector may run it inside another call of the same thread. Such a
    call is refused with errno EDEADLK.
    """

    @property
    def name(self) -> str:
        """What error texts call the device."""

    @property
    def info(self) -> DeviceInfo:
        """The device's flags and counts."""

    @property
    def regions(self) -> Sequence[RegionInfo]:
        """Every region, by index; absent ones have size 0."""

    def region(self, index: int) -> RegionInfo:
        """Return one region; InvalidArgument where the device has none of that index."""

    @property
    def irqs(self) -> Sequence[IrqInfo]:
        """Every interrupt index; absent ones have count 0."""

    def read(self, region: int, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes, little endian, as one access."""

    def write(self, region: int, offset: int, size: int, value: int, *, posted: bool = False) -> None:
        """Write 1, 2, 4 or 8 bytes, little endian, as one access.

        With `posted` the call need not wait for the device, and an error of the write is not reported.
        """

    def read_bytes(self, region: int, offset: int, size: int) -> bytes:
        """Read a block; it may reach the device in several accesses."""

    def write_bytes(self, region: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write a block; it may reach the device in several accesses."""

    def map(self, region: int, offset: int = 0, size: int | None = None) -> memoryview:
        """Map a part of a region into this process.

        Parameters
        ----------
        region : int
        offset : int
            In bytes, a multiple of the page size.
        size : int, optional
            In bytes, by default to the end of the mappable area around `offset`.

        Returns
        -------
        memoryview
            Shared with the device, of bytes; read-only where the region is. Each mappable area is mapped once, views of
            it are slices. Release the views before :meth:`close`: a mapping ends with its last view.

        Raises
        ------
        Unsupported
            The range is not inside one mappable area: use :meth:`read` and :meth:`write`.
        """

    def region_file(self, region: int) -> tuple[int, int]:
        """Return the descriptor of the file that a region is mapped from, and where in it the region starts.

        (-1, 0) where there is none that another device's server could map: the kernel's VFIO has none. The transport
        keeps the descriptor; it ends with :meth:`close`.
        """

    def dma_map(self, iova: int, memory: DmaMemory, access: Access = Access.READ | Access.WRITE) -> None:
        """Let the device reach `memory` at the I/O virtual address `iova`. The transport keeps a reference to it."""

    def dma_unmap(self, iova: int, size: int) -> None:
        """Take back one mapping, exactly as it was made. When this returns the device no longer reaches the memory."""

    @property
    def iova_ranges(self) -> list[tuple[int, int]]:
        """The usable I/O virtual addresses, as inclusive (first, last)."""

    @property
    def page_sizes(self) -> int:
        """A bit mask of the page sizes that mappings may be made of."""

    @property
    def max_dma_maps(self) -> int:
        """How many mappings the device, or the host's IOMMU, takes."""

    @property
    def needs_pinning(self) -> bool:
        """Whether mapped memory is pinned on this process's account (RLIMIT_MEMLOCK)."""

    def irq_enable(self, index: int, start: int, eventfds: Sequence[int]) -> None:
        """Send vectors `start` ... of interrupt `index` to `eventfds`, replacing earlier ones."""

    def irq_disable(self, index: int) -> None:
        """Disable every vector of interrupt `index`."""

    def irq_mask(self, index: int, start: int = 0, count: int = 1) -> None:
        """Hold vectors back."""

    def irq_unmask(self, index: int, start: int = 0, count: int = 1) -> None:
        """Let vectors through again; needed after each INTx, which masks itself."""

    def irq_trigger(self, index: int, start: int = 0, count: int = 1) -> None:
        """Fire vectors as if the device had: a test of the way to the eventfds."""

    def reset(self) -> None:
        """Reset the function. DMA and interrupt mappings stay."""

    @property
    def liveness_fd(self) -> int | None:
        """A descriptor to poll, or None.

        Readable: the device wants something (call :meth:`service`), or an answer to another thread is on its way.
        Hung up (POLLHUP, POLLRDHUP): the device is gone. Do not read it.
        """

    def service(self) -> int:
        """Serve what the device asks of its host, without blocking; return how many requests there were.

        Raises
        ------
        DeviceLost
            The device is gone.
        TransportError
            PCI Express reported an uncorrectable error of the device or its link (EIO).
        """

    @property
    def release_requested(self) -> bool:
        """Whether the host wants the device back: it is being unplugged or given to another driver, which waits.

        Known once :meth:`service` has been called after :attr:`liveness_fd` became readable. Close the device soon.
        """

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""

    def close(self) -> None:
        """Let go of the device; idempotent, never raises for a device that is gone.

        In order: bus mastering off, interrupts off, DMA unmapped, region mappings dropped, descriptors closed. It does
        not reset: call :meth:`reset` first where the next user should find a clean device.
        """

    def __enter__(self) -> Transport:
        """Return the transport itself."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close it."""


def check_access(
    name: str, regions: Sequence[RegionInfo], region: int, *, offset: int, size: int, flag: int,
    sizes: tuple[int, ...] = (),
) -> None:
    """Raise unless `size` bytes at `offset` of `region` exist and allow what `flag` (REGION_FLAG_*) stands for.

    With `sizes` it is a register: one access, so its offset is a multiple of its size.

    Raises
    ------
    InvalidArgument
        They do not exist, are misaligned, or `sizes` is given and `size` is not among them.
    Unsupported
        The region cannot be read, or written.
    """
    if sizes and size not in sizes:
        raise InvalidArgument(f"{name}: a register access has 1, 2, 4 or 8 bytes, not {size}")
    if not 0 <= region < len(regions):
        raise InvalidArgument(f"{name}: there is no region {region}; the last is {len(regions) - 1}")
    info = regions[region]
    if offset < 0 or size < 0 or offset + size > info.size:
        raise InvalidArgument(f"{name}: {size} bytes at {offset:#x} are not within region {region}, which has "
                              f"{info.size:#x} bytes")
    if sizes and offset % size:
        raise InvalidArgument(f"{name}: {size} bytes at {offset:#x} of region {region} are not aligned",
                              cause="they would reach the device as several accesses",
                              hint="access registers at a multiple of their width, or in narrower pieces")
    if not info.flags & flag:
        verb = "read" if flag == uapi.REGION_FLAG_READ else "written"
        raise Unsupported(f"{name}: region {region} cannot be {verb}")


def check_irq(name: str, irqs: Sequence[IrqInfo], index: int, *, start: int, count: int, flag: int = 0) -> None:
    """Raise unless interrupt `index` has the vectors `start` ... `start + count - 1` and the capability `flag`.

    Raises
    ------
    InvalidArgument
        There are no such vectors.
    Unsupported
        The device has no such interrupt, or it cannot do what `flag` stands for.
    """
    if not 0 <= index < len(irqs) or not irqs[index].count:
        raise Unsupported(f"{name}: the device has no interrupt of index {index}")
    have = irqs[index].count
    if start < 0 or count < 1 or start + count > have:
        raise InvalidArgument(f"{name}: {count} vectors from {start} on are not within the {have} of interrupt index "
                              f"{index}")
    if flag & ~irqs[index].flags:
        verb = "be masked" if flag == uapi.IRQ_FLAG_MASKABLE else "signal an eventfd"
        raise Unsupported(f"{name}: interrupt index {index} cannot {verb}")
