"""A pool of host memory that one device has mapped: rings, staging buffers, argument blocks."""

from __future__ import annotations

import contextlib
import threading
import warnings
from types import TracebackType

from maia_rt.errors import ClosedError, InvalidArgument, MaiaError, OutOfMemory
from maia_rt.memory.address_space import AddressSpace, SpaceStatistics
from maia_rt.memory.iova import IovaAllocator
from maia_rt.memory.limits import check_memlock
from maia_rt.memory.regions import DmaRegion
from maia_rt.transport.protocol import Access, DmaMemory, Transport

GRANULE = 64
"""Every block is a multiple of a cache line, so no two blocks share one."""


class PinnedBlock:
    """A piece of a pool's memory.

    Attributes
    ----------
    iova, address, size : int
        Where the device finds it, where this process finds it, and bytes.
    """

    __slots__ = ("_freed", "_mapped", "address", "iova", "size")

    def __init__(self, mapped: _MappedRegion, iova: int, size: int) -> None:
        self._mapped = mapped
        self._freed = False
        self.iova = iova
        self.size = size
        self.address = mapped.region.address + iova - mapped.iova

    def view(self) -> memoryview:
        """Return the block as writable bytes. Do not use it after :meth:`free`: it may then be another's memory."""
        if self._freed:
            raise ClosedError("the block of pinned memory has been freed")
        start = self.iova - self._mapped.iova
        return self._mapped.region.view()[start:start + self.size]

    def free(self) -> None:
        """Give the block back; idempotent. The device must be done with it. Finalizers may call this."""
        if not self._freed:
            self._freed = True
            self._mapped.space.free(self.iova)

    def __enter__(self) -> PinnedBlock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.free()

    def __del__(self) -> None:
        # With the pool it has gone all the same: an array over it outlived its device.
        if not getattr(self, "_freed", True) and not self._mapped.region.closed:
            warnings.warn(f"a block of {self.size} bytes of pinned memory was not freed", ResourceWarning, stacklevel=2)
            self.free()

    def __repr__(self) -> str:
        return f"<PinnedBlock {self.size} bytes at iova {self.iova:#x}{', freed' if self._freed else ''}>"


class _MappedRegion:
    """One region, where the device has it, and which parts of it are free."""

    def __init__(self, region: DmaRegion, iova: int) -> None:
        self.region = region
        self.iova = iova
        self.space = AddressSpace([(iova, iova + region.size - 1)], granule=GRANULE, name="pinned memory")

    @property
    def empty(self) -> bool:
        return not self.space.statistics().allocations


class PinnedPool:
    """Maps DMA regions into a transport as they are needed and hands out pieces of them.

    Freed blocks go back to their region; an empty region is unmapped when room for a new one is needed, at :meth:`trim`
    and at :meth:`close`. Any thread may call.

    Parameters
    ----------
    transport : Transport
    region_size : int
        The size of a region, in bytes; a larger block gets a region of its own.
    address_bits : int
        How many address bits the device drives.
    window : (first, last)
        The addresses that this program may use, inclusive; a last one of 0 is all.
    """

    def __init__(self, transport: Transport, *, region_size: int = 4 << 20, address_bits: int = 64,
                 window: tuple[int, int] = (0, 0)) -> None:
        if region_size <= 0:
            raise InvalidArgument(f"the region size must be positive, not {region_size}")
        self._transport = transport
        self._region_size = region_size
        ranges = transport.iova_ranges
        if window[1]:
            ranges = [(max(first, window[0]), min(last, window[1])) for first, last in ranges]
        self._iovas = IovaAllocator(ranges, transport.page_sizes, address_bits=address_bits)
        self._lock = threading.RLock()
        self._mapped: list[_MappedRegion] = []
        self._others: dict[int, int] = {}
        self._closed = False

    def allocate(self, size: int, alignment: int = GRANULE) -> PinnedBlock:
        """Return a block of at least `size` bytes.

        Parameters
        ----------
        size : int
            In bytes.
        alignment : int
            Of the iova, a power of two in bytes, at most the region's page size for the host address too.

        Raises
        ------
        OutOfMemory
            The host has not so much memory.
        MemlockLimit
            It may not be pinned, or the device has no mapping left.
        """
        if size <= 0:
            raise InvalidArgument(f"the size must be positive, not {size}")
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self._transport.name}: the pool has been closed")
            for mapped in reversed(self._mapped):
                try:
                    return PinnedBlock(mapped, mapped.space.allocate(size, alignment), size)
                except OutOfMemory:
                    continue
            self.trim()
            mapped = self._map(max(self._region_size, size), alignment)
            return PinnedBlock(mapped, mapped.space.allocate(size, alignment), size)

    def _map(self, size: int, alignment: int) -> _MappedRegion:
        transport = self._transport
        if transport.needs_pinning:
            check_memlock(size)
        region = DmaRegion(size)
        try:
            iova = self._iovas.allocate(region.size, max(alignment, region.page_size))
            try:
                transport.dma_map(iova, region)
            except BaseException:
                self._iovas.free(iova)
                raise
        except BaseException:
            region.release()
            raise
        mapped = _MappedRegion(region, iova)
        self._mapped.append(mapped)
        return mapped

    def find(self, iova: int, size: int) -> memoryview | None:
        """Return `size` bytes at an address of the device, None where they do not lie in the pool."""
        with self._lock:
            for mapped in self._mapped:
                start = iova - mapped.iova
                if start >= 0 and start + size <= mapped.region.size:
                    return mapped.region.view()[start:start + size]
        return None

    def map(self, memory: DmaMemory, access: Access = Access.READ | Access.WRITE, *, pinned: bool = True) -> int:
        """Let the device reach memory that is not the pool's; return its iova. It ends with :meth:`unmap`.

        Parameters
        ----------
        memory : DmaMemory
        access : Access
        pinned : bool
            False for memory that the kernel need not pin: another device's.

        Raises
        ------
        MemlockLimit
            It may not be pinned, or the device has no mapping left.
        TransportError
            The kernel or the server refused.
        """
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self._transport.name}: the pool has been closed")
            if pinned and self._transport.needs_pinning:
                check_memlock(memory.size)
            iova = self._iovas.allocate(memory.size)
            try:
                self._transport.dma_map(iova, memory, access)
            except BaseException:
                self._iovas.free(iova)
                raise
            self._others[iova] = memory.size
            return iova

    def unmap(self, iova: int) -> None:
        """Take back what :meth:`map` gave; idempotent. The device no longer reaches the memory when this returns."""
        with self._lock:
            size = self._others.get(iova)
            if size is None:
                return
            self._transport.dma_unmap(iova, size)
            del self._others[iova]
            self._iovas.free(iova)

    def trim(self) -> int:
        """Unmap the regions that are wholly free; return how many bytes they had."""
        freed = 0
        with self._lock:
            for mapped in [one for one in self._mapped if one.empty]:
                size = mapped.region.size
                self._transport.dma_unmap(mapped.iova, size)
                self._mapped.remove(mapped)
                self._iovas.free(mapped.iova)
                mapped.region.release()
                freed += size
        return freed

    def statistics(self) -> SpaceStatistics:
        """Return the figures of all regions together."""
        with self._lock:
            each = [mapped.space.statistics() for mapped in self._mapped]
        return SpaceStatistics(
            size=sum(s.size for s in each), used=sum(s.used for s in each), free=sum(s.free for s in each),
            largest_free=max((s.largest_free for s in each), default=0), peak=sum(s.peak for s in each),
            allocations=sum(s.allocations for s in each))

    def close(self) -> None:
        """Unmap everything; idempotent, also where the device is gone.

        Memory of which somebody still holds a view goes with the last of them, no longer reached by the device.
        """
        with self._lock:
            self._closed = True
            while self._others:
                iova, size = self._others.popitem()
                with contextlib.suppress(MaiaError):
                    self._transport.dma_unmap(iova, size)
            while self._mapped:
                mapped = self._mapped.pop()
                # Where the device is gone or refuses, closing the transport takes the mapping away for good.
                with contextlib.suppress(MaiaError):
                    self._transport.dma_unmap(mapped.iova, mapped.region.size)
                mapped.region.release()

    def __enter__(self) -> PinnedPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
