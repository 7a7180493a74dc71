"""What a device may reach of this process's memory: the mappings made, sorted by I/O virtual address."""

from __future__ import annotations

import bisect
import errno
import os
from collections.abc import Iterator

from maia_rt.errors import InvalidArgument, MemlockLimit
from maia_rt.transport.protocol import Access, DmaMemory


class DmaTable:
    """The mappings of one device. It holds a view of each memory, which cannot be unmapped before the device let go.

    Not locked: the transport that owns it is.

    Parameters
    ----------
    name : str
        For error texts.
    max_maps : int
        How many mappings the device takes.
    page_size : int
        The smallest page, in bytes.
    limit : str
        What sets `max_maps`, for error texts.
    """

    def __init__(self, name: str, max_maps: int, page_size: int, *, limit: str = "the server") -> None:
        self._name = name
        self._max_maps = max_maps
        self._page_size = page_size
        self._limit = limit
        self._starts: list[int] = []
        self._entries: list[tuple[int, memoryview, Access]] = []

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (iova, size) in order."""
        return iter([(start, entry[0]) for start, entry in zip(self._starts, self._entries, strict=True)])

    def check(self, iova: int, memory: DmaMemory) -> None:
        """Raise unless `memory` may be mapped at `iova`: alignment, overlap, the number of maps."""
        size, page = memory.size, self._page_size
        if size <= 0 or iova < 0 or iova + size > 1 << 64:
            raise InvalidArgument(f"{self._name}: {size} bytes at iova {iova:#x} are not within 64 bits")
        if iova % page or size % page or memory.offset % page or memory.address % page:
            raise InvalidArgument(
                f"{self._name}: iova {iova:#x}, size {size:#x}, file offset {memory.offset:#x} and address "
                f"{memory.address:#x} must be multiples of the page size {page:#x}")
        if len(self._starts) >= self._max_maps:
            raise MemlockLimit(f"{self._name}: all {self._max_maps} DMA mappings are in use",
                               cause=f"the limit is set by {self._limit}", hint="map fewer, larger regions")
        at = bisect.bisect_left(self._starts, iova + size)
        if at and self._starts[at - 1] + self._entries[at - 1][0] > iova:
            raise InvalidArgument(
                f"{self._name}: {size:#x} bytes at iova {iova:#x} overlap the mapping of "
                f"{self._entries[at - 1][0]:#x} bytes at {self._starts[at - 1]:#x}")

    def add(self, iova: int, memory: DmaMemory, access: Access) -> None:
        """Record a mapping that :meth:`check` let through."""
        at = bisect.bisect_left(self._starts, iova)
        self._starts.insert(at, iova)
        self._entries.insert(at, (memory.size, memory.view(), access))

    def require(self, iova: int, size: int) -> None:
        """Raise InvalidArgument unless exactly this mapping exists."""
        at = bisect.bisect_left(self._starts, iova)
        if at == len(self._starts) or self._starts[at] != iova or self._entries[at][0] != size:
            raise InvalidArgument(f"{self._name}: there is no mapping of {size:#x} bytes at iova {iova:#x}",
                                  hint="unmap exactly what was mapped")

    def remove(self, iova: int) -> None:
        """Forget the mapping at `iova`."""
        at = bisect.bisect_left(self._starts, iova)
        del self._starts[at], self._entries[at]

    def clear(self) -> None:
        """Forget every mapping."""
        self._starts.clear()
        self._entries.clear()

    def pieces(self, address: int, count: int, access: Access) -> list[memoryview]:
        """Return the host memory behind `count` bytes at the I/O address `address`, which may span several maps.

        Raises
        ------
        OSError
            EFAULT where a byte is not mapped, EPERM where a map does not allow `access`.
        """
        views: list[memoryview] = []
        at = bisect.bisect_right(self._starts, address) - 1
        while count > 0:
            if not 0 <= at < len(self._starts):
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
            start, (size, view, allowed) = self._starts[at], self._entries[at]
            inside = address - start
            if not 0 <= inside < size:
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
            if not allowed & access:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            take = min(count, size - inside)
            views.append(view[inside:inside + take])
            address += take
            count -= take
            at += 1
        return views
