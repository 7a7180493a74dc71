"""Which commands touched which memory last: for validation."""

from __future__ import annotations

import bisect
from typing import Any, Final

from maia_rt.errors import RaceError
from maia_rt.runtime.happens_before import Clock, settle

SEGMENTS: Final = 1 << 14
"""Pieces of memory with a history of their own; beyond that the oldest are forgotten."""


class Access:
    """A command, as one that touches memory."""

    __slots__ = ("clock", "count", "number", "what", "where")

    def __init__(self, number: int, count: int, clock: Clock, what: str, where: str) -> None:
        self.number = number
        self.count = count
        self.clock = clock
        self.what = what
        self.where = where


class AccessHistory:
    """Who wrote each piece of memory last, and who has read it since. Pieces do not overlap."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self._pieces: list[tuple[int, Access | None, dict[int, Access]]] = []  # end, writer, readers

    def check(self, access: Access, address: int, size: int, writes: bool, memory: Any) -> None:
        """Raise where `access` conflicts with one that is not ordered before it."""
        low, high = self._overlap(address, size)
        for index in range(low, high):
            _, writer, readers = self._pieces[index]
            if writer is not None:
                _require_order(writer, access, True, writes, max(address, self.starts[index]), memory)
            if writes:
                for reader in readers.values():
                    _require_order(reader, access, False, True, max(address, self.starts[index]), memory)

    def write(self, access: Access, address: int, size: int) -> None:
        """Let `access` be the last writer: whoever is ordered after it is so after all before it."""
        if size > 0:
            self.clear(address, size)
            self._insert(address, address + size, access, {})

    def read(self, access: Access, address: int, size: int) -> None:
        """Add a reader."""
        if size <= 0:
            return
        self._split(address)
        self._split(address + size)
        low, high = self._overlap(address, size)
        at, end, fresh = address, address + size, []
        for index in range(low, high):
            start, (until, _, readers) = self.starts[index], self._pieces[index]
            if at < start:
                fresh.append((at, start))
            readers[access.number] = access
            at = until
        if at < end:
            fresh.append((at, end))
        for start, until in fresh:
            self._insert(start, until, None, {access.number: access})

    def clear(self, address: int, size: int) -> None:
        """Forget a range."""
        self._split(address)
        self._split(address + size)
        low, high = self._overlap(address, size)
        del self.starts[low:high], self._pieces[low:high]

    def prune(self, known: dict[int, int]) -> None:
        """Forget what the host has seen done; where that is not enough, half of the rest."""
        kept = [(start, piece) for start, piece in zip(self.starts, self._pieces, strict=True)
                if any(known.get(a.number, 0) < a.count for a in (piece[1], *piece[2].values()) if a is not None)]
        if len(kept) > SEGMENTS // 2:
            kept = kept[len(kept) // 2:]
        self.starts = [start for start, _ in kept]
        self._pieces = [piece for _, piece in kept]

    def _overlap(self, address: int, size: int) -> tuple[int, int]:
        low = bisect.bisect_right(self.starts, address) - 1
        if low < 0 or self._pieces[low][0] <= address:
            low += 1
        return low, max(low, bisect.bisect_left(self.starts, address + size))

    def _split(self, address: int) -> None:
        index = bisect.bisect_left(self.starts, address) - 1
        if index >= 0 and self._pieces[index][0] > address:
            end, writer, readers = self._pieces[index]
            self._pieces[index] = (address, writer, readers)
            self._insert(address, end, writer, dict(readers))

    def _insert(self, start: int, end: int, writer: Access | None, readers: dict[int, Access]) -> None:
        index = bisect.bisect_left(self.starts, start)
        self.starts.insert(index, start)
        self._pieces.insert(index, (end, writer, readers))


def _require_order(old: Access, new: Access, old_writes: bool, new_writes: bool, address: int, memory: Any) -> None:
    if old.number == new.number:
        return
    now = settle(new.clock)
    if now.counts.get(old.number, 0) >= old.count or now.waits or settle(old.clock).waits:
        return
    verbs = ["writes" if writes else "reads" for writes in (old_writes, new_writes)]
    raise RaceError(
        f"{new.what} {verbs[1]} {memory!r} from {address:#x} on, submitted at {new.where}; {old.what} {verbs[0]} it, "
        f"submitted at {old.where}, and nothing orders the two",
        cause="they are on two streams, without an event, a semaphore or a synchronize between them",
        hint="let one stream wait for an event that the other one records after its command",
        where=(old.where, new.where))
