"""Which host addresses the device reaches, and how: so that arrays over host buffers are recognized."""

from __future__ import annotations

import bisect
import threading


class PinnedRanges:
    """The host buffers of a device, by host address. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._ranges: dict[int, tuple[int, int]] = {}

    def add(self, start: int, size: int, address: int) -> None:
        """Add `size` bytes at host address `start`, which the device sees at `address`."""
        with self._lock:
            bisect.insort(self._starts, start)
            self._ranges[start] = (start + size, address)

    def overlaps(self, start: int, size: int) -> bool:
        """Say whether one of `size` bytes at host address `start` is in a range."""
        with self._lock:
            at = bisect.bisect_left(self._starts, start + size)
            return at > 0 and self._ranges[self._starts[at - 1]][0] > start

    def remove(self, start: int) -> None:
        """Remove the range that starts at host address `start`."""
        with self._lock:
            del self._ranges[start]
            self._starts.remove(start)

    def find(self, start: int, size: int) -> int | None:
        """Return the device address of `size` bytes at host address `start`, None where they lie in no range."""
        if not self._starts or not size:
            return None
        with self._lock:
            at = bisect.bisect_right(self._starts, start) - 1
            if at < 0:
                return None
            base = self._starts[at]
            end, address = self._ranges[base]
        return address + start - base if start + size <= end else None
