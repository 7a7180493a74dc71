"""Pools: device memory handed out and taken back in the order of streams."""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final

import numpy.typing as npt

from maia_rt.errors import ClosedError, InvalidArgument, MaiaError, OutOfMemory
from maia_rt.memory import AddressSpace
from maia_rt.memory.space import Space
from maia_rt.runtime import allocation
from maia_rt.runtime.buffer import Buffer, Memory, Shape, measure
from maia_rt.runtime.check import instance
from maia_rt.runtime.reclaim import passed

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.event import Event
    from maia_rt.runtime.stream import Stream

_GRANULE: Final = 256
CHUNK_BYTES: Final = 2 << 20
"""What a pool takes from the device at least, where its limit lets it."""
_NAMED: Final = 3
_left = itertools.count()


@dataclass(frozen=True)
class PoolStatistics:
    """How full a pool is, and was; sizes in bytes.

    Attributes
    ----------
    used, peak_used : int
        In buffers, now and at most.
    allocations, peak_allocations : int
        Buffers.
    total_bytes, total_allocations : int
        All that was ever handed out.
    reserved, peak_reserved : int
        What the pool holds of the device's memory, used or not.
    waiting : int
        Freed in the order of a stream that has not got there yet: that stream may have it again, others not.
    max_bytes : int or None
        The limit of `reserved`.
    """

    used: int
    peak_used: int
    allocations: int
    peak_allocations: int
    total_bytes: int
    total_allocations: int
    reserved: int
    peak_reserved: int
    waiting: int
    max_bytes: int | None


class _Chunk:
    """A piece of the device's memory that the pool deals out."""

    def __init__(self, base: int, size: int) -> None:
        self.base = base
        self.size = size
        self.space = AddressSpace([(base, base + size - 1)], granule=_GRANULE, name="a pool's memory")


class _Freed:
    """A range that was freed, and the moment after which anybody may have it."""

    __slots__ = ("address", "chunk", "event", "size")

    def __init__(self, chunk: _Chunk, address: int, size: int, event: Event) -> None:
        self.chunk = chunk
        self.address = address
        self.size = size
        self.event = event


class _Lane:
    """What one stream freed and has not passed yet."""

    __slots__ = ("freed", "stream")

    def __init__(self, stream: Stream) -> None:
        self.stream = weakref.ref(stream)
        self.freed: list[_Freed] = []


class MemoryPool:
    """Device memory for :meth:`maia_rt.Stream.allocate`; made by :meth:`maia_rt.Device.create_pool`.

    What a stream frees, the same stream may have again at once: its commands run in order. Other streams get it when
    the first one has got that far; where nothing else is left, their next command waits for it on the device. Any
    thread may call.

    Attributes
    ----------
    device : Device
    max_bytes : int or None
        How much of the device's memory the pool holds at most.
    release_threshold : int
        How much it holds on to when its memory is not used, in bytes. The rest goes back to the device.
    """

    def __init__(self, device: Device, max_bytes: int | None = None, release_threshold: int = 0) -> None:
        self.device = device
        self.max_bytes = max_bytes
        self.release_threshold = release_threshold
        self._lock = threading.RLock()
        self._closed = False
        self._heap = device._spaces.hbm
        self._chunks: list[_Chunk] = []
        self._freed: dict[int, _Lane] = {}
        # What buffers give back that were closed: finalizers and the reclaimer append, which takes no lock.
        self._returned: deque[int] = deque()
        self._used: dict[int, tuple[_Chunk, int, weakref.ref[Buffer] | None]] = {}
        self._bytes = self._reserved = 0
        self._peaks = [0, 0, 0]
        self._totals = [0, 0]

    # --- allocating --------------------------------------------------------------------------------------------------

    def allocate(self, stream: Stream, shape: Shape, dtype: npt.DTypeLike | None = None) -> Buffer:
        """Allocate in the order of a stream: see :meth:`maia_rt.Stream.allocate`."""
        self.device._require_stream(stream)
        kind, dims, nbytes = measure(shape, dtype)
        size = max(-(-nbytes // _GRANULE) * _GRANULE, _GRANULE)
        with self._lock:
            self._require_open()
            chunk, address = self._take(stream, size)
            self._used[address] = chunk, size, None
            self._bytes += size
            self._totals[0] += size
            self._totals[1] += 1
            self._peaks[0] = max(self._peaks[0], self._bytes)
            self._peaks[1] = max(self._peaks[1], len(self._used))
            try:
                buffer = Buffer(self.device, address, nbytes, kind, dims, None, home=self)
            except BaseException:
                self._returned.append(address)
                raise
            self._used[address] = chunk, size, weakref.ref(buffer)
        self.device._memories.add(buffer)
        return buffer

    def _take(self, stream: Stream, size: int) -> tuple[_Chunk, int]:
        self._take_back()
        lane = self._freed.get(id(stream))
        mine = lane.freed if lane is not None and lane.stream() is stream else None
        if mine:
            found = self._reuse(mine, size)
            if found is not None:
                return found
        self._collect(release=False)
        for chunk in self._chunks:
            try:
                return chunk, chunk.space.allocate(size)
            except OutOfMemory:
                continue
        grown = self._grow(size)
        if grown is not None:
            return grown, grown.space.allocate(size)
        # What others freed and have not passed yet: the stream waits for it, on the device.
        for theirs in self._freed.values():
            for one in sorted(theirs.freed, key=lambda freed: freed.size):
                if one.size >= size:
                    stream.wait(one.event)
                    return self._part(theirs.freed, one, size)
        found_all = self._take_after_all(size)
        if found_all is not None:
            return found_all
        raise self._no_room(size)

    def _take_after_all(self, size: int) -> tuple[_Chunk, int] | None:
        """Wait, on the host, for everything that was freed; joined together it may do."""
        self._wait_for_all()
        self._shrink(0)
        for chunk in self._chunks:
            try:
                return chunk, chunk.space.allocate(size)
            except OutOfMemory:
                continue
        grown = self._grow(size)
        return None if grown is None else (grown, grown.space.allocate(size))

    def _wait_for_all(self) -> None:
        for one in [freed for lane in self._freed.values() for freed in lane.freed]:
            with contextlib.suppress(MaiaError):
                one.event.synchronize()
        self._collect(release=False)

    def _reuse(self, mine: list[_Freed], size: int) -> tuple[_Chunk, int] | None:
        best = None
        for one in reversed(mine):
            if one.size == size:
                best = one
                break
            if one.size > size and (best is None or one.size < best.size):
                best = one
        return None if best is None else self._part(mine, best, size)

    @staticmethod
    def _part(freed: list[_Freed], one: _Freed, size: int) -> tuple[_Chunk, int]:
        """Take `size` bytes of a freed range; the rest stays freed."""
        address = one.address
        if one.size == size:
            freed.remove(one)
        else:
            one.chunk.space.split(address, size)
            one.address += size
            one.size -= size
        return one.chunk, address

    def _grow(self, size: int) -> _Chunk | None:
        left = None if self.max_bytes is None else self.max_bytes - self._reserved
        if left is not None and size > left:
            return None
        most = max(size, CHUNK_BYTES) if left is None else max(size, min(CHUNK_BYTES, left // _GRANULE * _GRANULE))
        for want in (most, size):
            try:
                base = allocation.take(self.device, Space.hbm(), want, _GRANULE, wait=want == size)
            except OutOfMemory:
                continue
            chunk = _Chunk(base, want)
            self._chunks.append(chunk)
            self._reserved += want
            self._peaks[2] = max(self._peaks[2], self._reserved)
            return chunk
        return None

    def _no_room(self, size: int) -> OutOfMemory:
        limit = "the device has no more" if self.max_bytes is None else f"its limit is {self.max_bytes}"
        return OutOfMemory(
            f"{self.device.name}: a pool has no room for {size} bytes: it holds {self._reserved} bytes, {self._bytes} "
            f"of them in {len(self._used)} buffers, and {limit}", cause=self._largest() or "the limit is too low",
            hint="free buffers in the order of the stream that used them last, or raise the limit")

    def _largest(self) -> str:
        used = sorted(self._used.values(), key=lambda one: -one[1])[:_NAMED]
        named = [self._describe(nbytes, ref() if ref is not None else None) for _, nbytes, ref in used]
        return "the largest buffers are: " + "; ".join(named) if named else ""

    @staticmethod
    def _describe(nbytes: int, buffer: Buffer | None) -> str:
        if buffer is None:
            return f"{nbytes} bytes that nobody holds any more"
        what = f"{buffer.nbytes} bytes" + (f" of {buffer.dtype} {buffer.shape}" if buffer.dtype is not None else "")
        return what + (f" from {buffer._made}" if buffer._made else "")

    # --- freeing -----------------------------------------------------------------------------------------------------

    def free(self, address: int) -> None:
        """Take back what nothing uses any more: the way of buffers that are closed. Finalizers may call this."""
        self._returned.append(address)

    def _take_back(self) -> None:
        while self._returned:
            address = self._returned.popleft()
            found = self._used.pop(address, None)
            if found is not None:
                self._bytes -= found[1]
                found[0].space.free(address)

    def _free_after(self, stream: Stream, address: int) -> None:
        """Take back what the commands submitted to `stream` so far may still use."""
        with self._lock:
            found = self._used.pop(address, None)
            if found is None or self._closed:
                return
            chunk, size, _ = found
            self._bytes -= size
            lane = self._freed.get(id(stream))
            if lane is None or lane.stream() is not stream:
                if lane is not None:
                    # Another stream had this identity; what it left is anybody's once it is passed.
                    self._freed[-1 - next(_left)] = lane
                lane = self._freed[id(stream)] = _Lane(stream)
            mine = lane.freed
            event = stream.record()
            # Neighbours of the same chunk grow together, so that a larger allocation finds room.
            for one in mine:
                if one.chunk is chunk and one.address + one.size == address:
                    chunk.space.join(one.address, address)
                    one.size += size
                    one.event = event
                    return
            mine.append(_Freed(chunk, address, size, event))

    def _collect(self, *, release: bool = True) -> None:
        """Give back to the chunks what streams have passed."""
        self._take_back()
        for key, lane in list(self._freed.items()):
            for one in [freed for freed in lane.freed if passed(freed.event)]:
                lane.freed.remove(one)
                one.chunk.space.free(one.address)
            if not lane.freed and lane.stream() is None:
                del self._freed[key]
        if release and self._reserved > self.release_threshold:
            self._shrink(self.release_threshold)

    def _shrink(self, least: int) -> int:
        before = self._reserved
        for chunk in sorted(self._chunks, key=lambda one: -one.size):
            if self._reserved - chunk.size >= least and not chunk.space.statistics().allocations:
                self._chunks.remove(chunk)
                self._reserved -= chunk.size
                if self._heap is self.device._spaces.hbm:
                    self._heap.free(chunk.base)
        return before - self._reserved

    def trim(self, min_bytes: int = 0) -> int:
        """Give memory that is not used back to the device, down to `min_bytes`; return how many bytes went.

        What was freed in the order of a stream that has not passed it yet stays.
        """
        if isinstance(min_bytes, bool) or not isinstance(min_bytes, int) or min_bytes < 0:
            raise InvalidArgument(f"min_bytes is a number of bytes, not {min_bytes!r}")
        with self._lock:
            self._require_open()
            before = self._reserved
            self._collect()
            self._shrink(min_bytes)
            return before - self._reserved

    # --- what it is --------------------------------------------------------------------------------------------------

    def statistics(self) -> PoolStatistics:
        """Return the figures of this moment."""
        with self._lock:
            if not self._closed:
                self._collect()
            waiting = sum(one.size for lane in self._freed.values() for one in lane.freed)
            used, allocations, reserved = self._peaks
            total_bytes, total = self._totals
            return PoolStatistics(self._bytes, used, len(self._used), allocations, total_bytes, total, self._reserved,
                                  reserved, waiting, self.max_bytes)

    def reset_peaks(self) -> None:
        """Let the peaks start anew at what is used now."""
        with self._lock:
            self._peaks = [self._bytes, len(self._used), self._reserved]

    @property
    def closed(self) -> bool:
        """Whether the pool has been closed, by itself or with its device."""
        return self._closed or self.device.closed

    def close(self) -> None:
        """Give everything back to the device; idempotent. Waits for streams that have not passed a free.

        Raises
        ------
        InvalidArgument
            Buffers of the pool are open; the text names the largest.
        """
        if not self.closed:
            self.device._reclaimer.collect()
        with self._lock:
            if self.closed:
                self._closed = True
                return
            self._take_back()
            if self._used:
                raise InvalidArgument(f"the pool has {len(self._used)} buffers that are not freed",
                                      cause=self._largest(), hint="close or free them first")
            self._wait_for_all()
            self._shrink(0)
            self._closed = True

    def _forget(self) -> None:
        """Start anew: the device was reset, or is closed, and nothing in its memory is anybody's."""
        with self._lock:
            self._heap = self.device._spaces.hbm
            self._chunks.clear()
            self._used.clear()
            self._freed.clear()
            self._returned.clear()
            self._bytes = self._reserved = 0

    def _require_open(self) -> None:
        self.device._require_open()
        if self._closed:
            raise ClosedError("the pool has been closed")

    def __enter__(self) -> MemoryPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def __repr__(self) -> str:
        return (f"<MemoryPool {self._bytes} of {self._reserved} bytes in {len(self._used)} buffers"
                f"{', closed' if self.closed else ''}>")


def allocate(stream: Stream, shape: Shape, dtype: npt.DTypeLike | None, pool: MemoryPool | None) -> Buffer:
    """Serve :meth:`maia_rt.Stream.allocate`."""
    stream._require_open()
    if pool is None:
        pool = stream.device.default_pool
    return instance(pool, MemoryPool, "pool", "make one with device.create_pool()").allocate(stream, shape, dtype)


def free(stream: Stream, memory: Memory) -> None:
    """Serve :meth:`maia_rt.Stream.free`."""
    stream._require_own(memory, "what is freed")
    stream._require_open()
    if memory._parent is not None:
        raise InvalidArgument(f"{memory!r} is a view, which is not freed", hint="free the buffer that it is a view of")
    address = memory.address  # raises where it was freed before
    if stream.device._validator is not None:
        # For others it is as good as written: they may find somebody else's bytes there.
        stream.device._validator.command(stream, "free", writes=[(address, memory.nbytes, memory)])
    memory._free_after(stream)
