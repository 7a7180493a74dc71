"""The ring algorithms: a rank writes to the next one only, piece by piece; every link carries as little as can be.

A rank has two semaphores beside that of meetings: the previous rank counts in one what it has written here (data), the
next rank in the other what it can take (credits). Reductions pass on partial results, through a few slots of
scratch memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from maia_rt.collectives.call import Call
from maia_rt.collectives.group import Group, address

DATA, CREDIT, LANES = 1, 2, 3
"""The semaphores that a rank has for a peer; 0 is that of meetings."""
SLOTS: Final = 2
SLOT_BYTES: Final = 2 << 20
_PIECE: Final = 1 << 20
_ROW: Final = 64

Region = Callable[[int], tuple[int, int]]
"""From a part to its offset in a buffer and its length, in bytes."""


def pays(group: Group, calls: Sequence[Call]) -> bool:
    """Whether a call that leaves the choice open goes round: where a launch does not take all ranks' buffers."""
    capabilities = calls[0].stream.device.capabilities.program
    return bool(calls[0].operation) and 2 * len(group) > capabilities.max_args


def all_reduce(group: Group, calls: Sequence[Call]) -> None:
    """Each part goes round once to be combined and, from the rank it belongs to, once more to be known."""
    size, count = calls[0].dtype.itemsize, calls[0].count
    recvs = address(calls, "recv")
    stride = len(group) * (SLOT_BYTES // size // _ROW * _ROW)
    ring = _Ring(group, calls)
    ring.open()
    for start in range(0, count, stride):
        parts = group.parts(min(stride, count - start))

        def region(part: int, parts: list[tuple[int, int]] = parts, start: int = start) -> tuple[int, int]:
            first, last = parts[part]
            return (start + first) * size, (last - first) * size

        ring.reduce(region, lambda rank, offset: [(rank, recvs[rank] + offset),
                                                  ((rank + 1) % len(group), recvs[(rank + 1) % len(group)] + offset)])
        ring.pass_on(region, recvs)
    ring.close()


def reduce_scatter(group: Group, calls: Sequence[Call]) -> None:
    """Each part goes round once, and ends where it belongs."""
    size, nbytes = calls[0].dtype.itemsize, calls[0].nbytes
    recvs = address(calls, "recv")
    stride = SLOT_BYTES // size * size
    ring = _Ring(group, calls)
    ring.open()
    for start in range(0, nbytes, stride):
        length = min(stride, nbytes - start)
        ring.reduce(lambda part, start=start, length=length: (part * nbytes + start, length),  # type: ignore[misc]
                    lambda rank, offset: [(rank, recvs[rank] + offset - rank * nbytes)])
    ring.close()


def all_gather(group: Group, calls: Sequence[Call]) -> None:
    """Each part goes round, and every rank keeps a copy."""
    sends, recvs, nbytes = address(calls, "send"), address(calls, "recv"), calls[0].nbytes
    ring = _Ring(group, calls)
    ring.open()
    for call in calls:
        rank = call.rank
        offset = rank * nbytes
        group.copy(call, (ring.next(rank), recvs[ring.next(rank)] + offset), (rank, sends[rank]), nbytes)
        ring.sent(call)
        group.copy(call, (rank, recvs[rank] + offset), (rank, sends[rank]), nbytes)
    ring.pass_on(lambda part: (part * nbytes, nbytes), recvs)
    ring.close()


def broadcast(group: Group, calls: Sequence[Call]) -> None:
    """Pieces follow each other from the root on; a rank passes on one while the next one comes in."""
    root, nbytes, recvs = calls[0].root, calls[0].nbytes, address(calls, "recv")
    ring = _Ring(group, calls)
    ring.open()
    places = [(root + place) % len(group) for place in range(len(group))]
    pieces = range(0, nbytes, _PIECE)
    for wave in range(len(pieces) + len(group) - 1):
        for place, rank in enumerate(places):
            if 0 <= wave - place < len(pieces):
                start = pieces[wave - place]
                if place:
                    ring.receive(calls[rank])
                if place < len(places) - 1:
                    to = ring.next(rank)
                    group.copy(calls[rank], (to, recvs[to] + start), (rank, recvs[rank] + start),
                               min(_PIECE, nbytes - start))
                    ring.sent(calls[rank])
    ring.close()


class _Ring:
    """One collective on its way round. Every command that waits is submitted after what it waits for.

    Parameters
    ----------
    group : Group
    calls : sequence of Call
        By rank.
    """

    def __init__(self, group: Group, calls: Sequence[Call]) -> None:
        self._group = group
        self._calls = calls
        self._written = 0
        reduces = bool(calls[0].operation)
        self._scratch = [group.members[call.rank].scratch(SLOTS * SLOT_BYTES) if reduces else 0 for call in calls]

    def next(self, rank: int) -> int:
        """The rank that this one writes to."""
        return (rank + 1) % len(self._group)

    def open(self) -> None:
        """Have nobody written to before it is here."""
        for call in self._calls:
            self._taken(call)
        for call in self._calls:
            self._await_credit(call)

    def close(self) -> None:
        """Take back the credits that are left."""
        for _ in range(min(self._written, SLOTS)):
            for call in self._calls:
                self._await_credit(call)

    def reduce(self, region: Region, targets: Callable[[int, int], list[tuple[int, int]]]) -> None:
        """Combine parts of the sends; the one of a rank's own number ends there, at the places `targets`."""
        group, ranks, size = self._group, len(self._group), self._calls[0].dtype.itemsize
        sends = address(self._calls, "send")
        for step in range(ranks):
            last = step == ranks - 1
            if not last and self._written + 1 > SLOTS:
                for call in self._calls:
                    self._await_credit(call)
            for call in self._calls:
                rank, to = call.rank, self.next(call.rank)
                offset, length = region((rank - 1 - step) % ranks)
                mine = sends[rank] + offset
                slot = (to, self._scratch[to] + self._written % SLOTS * SLOT_BYTES)
                if step:
                    self.receive(call)
                    held = self._scratch[rank] + (self._written - 1) % SLOTS * SLOT_BYTES
                    places = targets(rank, offset) if last else [slot]
                    if length:
                        group.reduce(call, [held, mine], [group.members[rank].at(*place) for place in places],
                                     length // size)
                    self._taken(call)
                else:
                    group.copy(call, slot, (rank, mine), length)
                if not last or len(targets(rank, offset)) > 1:
                    self.sent(call)
            self._written += not last

    def pass_on(self, region: Region, recvs: Sequence[int]) -> None:
        """Pass parts on that lie in the recvs; each rank has its own, and has given it to the next."""
        ranks = len(self._group)
        for step in range(1, ranks):
            for call in self._calls:
                rank, to = call.rank, self.next(call.rank)
                self.receive(call)
                if step < ranks - 1:
                    offset, length = region((rank - step) % ranks)
                    self._group.copy(call, (to, recvs[to] + offset), (rank, recvs[rank] + offset), length)
                    self.sent(call)

    def receive(self, call: Call) -> None:
        """Wait for the previous rank's next message."""
        self._group.members[call.rank].wait(call.stream, ((call.rank - 1) % len(self._group),), DATA)

    def sent(self, call: Call) -> None:
        """Tell the next rank of a message."""
        self._group.members[call.rank].signal(call.stream, self.next(call.rank), DATA)

    def _taken(self, call: Call) -> None:
        self._group.members[call.rank].signal(call.stream, (call.rank - 1) % len(self._group), CREDIT)

    def _await_credit(self, call: Call) -> None:
        self._group.members[call.rank].wait(call.stream, (self.next(call.rank),), CREDIT)
