"""Handing out ranges of an address space: device memory, I/O virtual addresses, the inside of a pinned region."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from maia_rt.errors import InvalidArgument, OutOfMemory, ResourceExhausted

# Free ranges are kept in bins by size, as TLSF does (Masmano et al., 2004): 16 bins for each power of two, and a bit
# for each bin that is not empty. A range from a bin above the wanted size fits without a look at the others of the bin.
_SUB_BITS = 4
_SUB_BINS = 1 << _SUB_BITS


@dataclass(frozen=True)
class SpaceStatistics:
    """How full an address space is, in bytes.

    Attributes
    ----------
    size, used, free, largest_free, peak : int
        `largest_free` is the largest single free range; `peak` the most that was ever used.
    allocations : int
        How many ranges are handed out.
    """

    size: int
    used: int
    free: int
    largest_free: int
    peak: int
    allocations: int


class AddressSpace:
    """Hands out aligned ranges and joins what comes back.

    Any thread may call. :meth:`free` may be called from a finalizer, even one that runs inside :meth:`allocate`.

    Parameters
    ----------
    ranges : iterable of (first, last)
        Inclusive, in any order.
    granule : int
        A power of two, in bytes: every range starts at and has a size of a multiple of it.
    name : str
        What ran out, for error texts.
    hint : str
        What to do then.
    """

    exhausted: type[ResourceExhausted] = OutOfMemory
    """What :meth:`allocate` raises."""

    def __init__(self, ranges: Iterable[tuple[int, int]], *, granule: int, name: str, hint: str = "") -> None:
        if granule <= 0 or granule & (granule - 1):
            raise InvalidArgument(f"{name}: the granule must be a power of two, not {granule}")
        self.granule = granule
        self.name = name
        self._hint = hint
        self._lock = threading.Lock()
        self._free_by_start: dict[int, int] = {}
        self._free_by_end: dict[int, int] = {}
        self._bins: dict[int, dict[int, None]] = {}
        self._filled = 0
        self._allocated: dict[int, int] = {}
        self._returned: deque[tuple[int, int]] = deque()
        for start, end in _normalise(ranges, granule):
            self._insert(start, end - start)
        self.size = sum(self._free_by_start.values())
        self._used = self._peak = 0

    def allocate(self, size: int, alignment: int = 1) -> int:
        """Return the start of a free range.

        Parameters
        ----------
        size : int
            In bytes, rounded up to the granule.
        alignment : int
            A power of two, in bytes; the granule where it is smaller.

        Raises
        ------
        OutOfMemory, ResourceExhausted
            No free range is large enough; the text has the figures.
        """
        if size <= 0:
            raise InvalidArgument(f"{self.name}: the size must be positive, not {size}")
        if alignment <= 0 or alignment & (alignment - 1):
            raise InvalidArgument(f"{self.name}: the alignment must be a power of two, not {alignment}")
        rounded = -(-size // self.granule) * self.granule
        alignment = max(alignment, self.granule)
        try:
            with self._lock:
                self._take_back()
                start = self._find(rounded, alignment)
                if start is None:
                    raise self._no_room(size, alignment)
                address = -(-start // alignment) * alignment
                end = start + self._remove(start)
                if address > start:
                    self._insert(start, address - start)
                if end > address + rounded:
                    self._insert(address + rounded, end - address - rounded)
                self._allocated[address] = rounded
                self._used += rounded
                self._peak = max(self._peak, self._used)
        finally:
            self._settle()
        return address

    def free(self, address: int) -> None:
        """Take back the range that starts at `address`.

        Raises
        ------
        InvalidArgument
            Nothing handed out starts there.
        """
        size = self._allocated.pop(address, None)
        if size is None:
            raise InvalidArgument(f"{self.name}: nothing handed out starts at {address:#x}",
                                  cause="it was freed before, or is the middle of a range")
        self._returned.append((address, size))
        self._settle()

    def split(self, address: int, size: int) -> None:
        """Make two ranges of the one handed out at `address`: the first has `size` bytes, a multiple of the granule."""
        whole = self._allocated[address]
        if not 0 < size < whole or size % self.granule:
            raise InvalidArgument(f"{self.name}: a range of {whole} bytes cannot be split after {size}")
        self._allocated[address + size] = whole - size
        self._allocated[address] = size

    def join(self, address: int, following: int) -> None:
        """Make one range of two that were handed out and touch."""
        if address + self._allocated[address] != following:
            raise InvalidArgument(f"{self.name}: the ranges at {address:#x} and {following:#x} do not touch")
        self._allocated[address] += self._allocated.pop(following)

    def size_of(self, address: int) -> int | None:
        """Return the size of the range handed out at `address`, None where there is none."""
        return self._allocated.get(address)

    def statistics(self) -> SpaceStatistics:
        """Return the figures of this moment."""
        with self._lock:
            self._take_back()
            return SpaceStatistics(self.size, self._used, self.size - self._used, self._largest(), self._peak,
                                   len(self._allocated))

    # --- what came back ----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        # Whoever holds the lock takes back what others return meanwhile, hence the second look after each release.
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._take_back()
            finally:
                self._lock.release()

    def _take_back(self) -> None:
        while self._returned:
            start, size = self._returned.popleft()
            self._used -= size
            end = start + size
            before = self._free_by_end.get(start)
            if before is not None:
                self._remove(before)
                start = before
            if end in self._free_by_start:
                end += self._remove(end)
            self._insert(start, end - start)

    # --- free ranges -------------------------------------------------------------------------------------------------

    def _bin(self, size: int) -> int:
        granules = size // self.granule
        if granules < _SUB_BINS:
            return granules
        top = granules.bit_length() - 1
        return (top - _SUB_BITS + 1 << _SUB_BITS) + (granules >> top - _SUB_BITS & _SUB_BINS - 1)

    def _insert(self, start: int, size: int) -> None:
        self._free_by_start[start] = size
        self._free_by_end[start + size] = start
        index = self._bin(size)
        self._bins.setdefault(index, {})[start] = None
        self._filled |= 1 << index

    def _remove(self, start: int) -> int:
        size = self._free_by_start.pop(start)
        del self._free_by_end[start + size]
        index = self._bin(size)
        members = self._bins[index]
        del members[start]
        if not members:
            self._filled &= ~(1 << index)
        return size

    def _find(self, size: int, alignment: int) -> int | None:
        """Return the start of a free range that holds `size` bytes at `alignment`."""
        # In any bin above this one every range is large enough, wherever it starts.
        surely = self._bin(size + alignment - self.granule) + 1
        above = self._filled >> surely
        if above:
            return next(iter(self._bins[surely + _lowest(above)]))
        # Nearly full: look at each range that could do.
        perhaps = self._filled >> self._bin(size)
        index = self._bin(size)
        while perhaps:
            step = _lowest(perhaps)
            index += step
            for start in self._bins[index]:
                if -(-start // alignment) * alignment + size <= start + self._free_by_start[start]:
                    return start
            perhaps >>= step + 1
            index += 1
        return None

    def _largest(self) -> int:
        if not self._filled:
            return 0
        return max(self._free_by_start[start] for start in self._bins[self._filled.bit_length() - 1])

    def _no_room(self, size: int, alignment: int) -> ResourceExhausted:
        free, largest = self.size - self._used, self._largest()
        aligned = f" aligned to {alignment:#x}" if alignment > self.granule else ""
        cause = "it is fragmented" if free >= size else "too much is in use"
        return self.exhausted(
            f"{self.name}: no room for {size} bytes{aligned}: {free} of {self.size} bytes are free, the largest range "
            f"has {largest}, {len(self._allocated)} allocations hold the rest", cause=cause, hint=self._hint)


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _normalise(ranges: Iterable[tuple[int, int]], granule: int) -> list[tuple[int, int]]:
    """Return sorted, joined, granule-aligned (start, end), the end exclusive."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if first < 0 or last < first:
            raise InvalidArgument(f"{first:#x} to {last:#x} is not a range of addresses")
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last + 1))
        else:
            merged.append((first, last + 1))
    aligned = [(-(-start // granule) * granule, end // granule * granule) for start, end in merged]
    return [(start, end) for start, end in aligned if end > start]
