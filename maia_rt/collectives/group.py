"""The ranks of a communicator, and the steps that algorithms are written in.

Every algorithm submits, for all ranks at once, in an order in which a command waits only for what was submitted before
it: first what signals, then what waits for it. So no ring that is full, no shared queue and no launch that waits for
tiles can hold up what it waits for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from maia_rt.collectives.call import DTYPES, Call
from maia_rt.collectives.member import Member
from maia_rt.kernels.blocking import Span, shares
from maia_rt.kernels.reduction import reduction
from maia_rt.runtime.program import Kernel

MOST_IN_A_LAUNCH = 1 << 22
"""Elements; longer arrays take several launches of one kernel."""
_FEW = 1 << 13
"""Elements up to which one tile is enough."""
_ROW = 64


class Group:
    """The members, and what they do together.

    Attributes
    ----------
    members : list of Member
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)

    def __len__(self) -> int:
        return len(self.members)

    def others(self, rank: int) -> list[int]:
        """Every rank but this one."""
        return [other for other in range(len(self.members)) if other != rank]

    def meet(self, calls: Sequence[Call]) -> None:
        """Have every rank go on only when all are here."""
        for call in calls:
            for peer in self.others(call.rank):
                self.members[call.rank].signal(call.stream, peer)
        for call in calls:
            self.members[call.rank].wait(call.stream, self.others(call.rank))

    def gather_at(self, calls: Sequence[Call], root: int) -> None:
        """Have the root go on only when all are here."""
        for call in calls:
            if call.rank != root:
                self.members[call.rank].signal(call.stream, root)
        self.members[root].wait(calls[root].stream, self.others(root))

    def release_from(self, calls: Sequence[Call], root: int) -> None:
        """Have all others go on only when the root is here."""
        for peer in self.others(root):
            self.members[root].signal(calls[root].stream, peer)
        for call in calls:
            if call.rank != root:
                self.members[call.rank].wait(call.stream, (root,))

    def parts(self, count: int) -> list[Span]:
        """Cut elements into one part a rank; few elements are not cut at all, the last ranks have nothing then."""
        cut = shares(count, len(self), _ROW)
        return cut + [(count, count)] * (len(self) - len(cut))

    def reduce(self, call: Call, sources: Sequence[int], targets: Sequence[int], count: int) -> None:
        """Launch what combines `count` elements at the addresses `sources`, in their order, into all of `targets`."""
        member, size = self.members[call.rank], call.dtype.itemsize
        for start in range(0, count, MOST_IN_A_LAUNCH):
            piece = min(MOST_IN_A_LAUNCH, count - start)
            kernel = self._reduction(call, len(sources), len(targets), piece)
            member.launch(call.stream, kernel, tuple(at + start * size for at in (*sources, *targets)))

    def _reduction(self, call: Call, sources: int, targets: int, count: int) -> Kernel:
        capabilities = call.stream.device.capabilities
        clusters = call.stream.clusters.bit_count() if call.stream.clusters else capabilities.clusters
        tiles = 1 if count <= _FEW else clusters * capabilities.tiles_per_cluster
        key = call.operation, call.dtype, sources, targets, count, tiles
        return self.members[call.rank].kernel(key, lambda: reduction(
            capabilities.program, count, sources=sources, targets=targets, operation=call.operation,
            dtype=DTYPES[call.dtype], tiles=tiles))

    def copy(self, call: Call, to: tuple[int, int], at: tuple[int, int], nbytes: int) -> None:
        """Have a rank copy between two places, each a rank and an address there."""
        member = self.members[call.rank]
        member.copy(call.stream, member.at(*to), member.at(*at), nbytes)


def address(calls: Iterable[Call], what: str) -> list[int]:
    """The addresses of every rank's buffer; 0 where it has none."""
    found = (getattr(call, what) for call in calls)
    return [0 if memory is None else memory.address for memory in found]
