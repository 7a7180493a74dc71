"""The direct algorithms: every rank reaches all others' memory, so two meetings and one step are enough."""

from __future__ import annotations

from collections.abc import Sequence

from maia_rt.collectives.call import Call
from maia_rt.collectives.group import Group, address


def all_reduce(group: Group, calls: Sequence[Call]) -> None:
    """Each rank combines its part of all sends, in the order of the ranks, and writes it to all recvs."""
    sends, recvs = address(calls, "send"), address(calls, "recv")
    group.meet(calls)
    for call, (start, end) in zip(calls, group.parts(calls[0].count), strict=True):
        offset, member = start * call.dtype.itemsize, group.members[call.rank]
        if end > start:
            peers = [(call.rank + step) % len(group) for step in range(1, len(group) + 1)]
            group.reduce(call, [member.at(rank, at + offset) for rank, at in enumerate(sends)],
                         [member.at(rank, recvs[rank] + offset) for rank in peers], end - start)
    group.meet(calls)


def reduce(group: Group, calls: Sequence[Call]) -> None:
    """Likewise, but only the root's recv is written."""
    root = calls[0].root
    sends, recv = address(calls, "send"), address(calls, "recv")[root]
    group.meet(calls)
    for call, (start, end) in zip(calls, group.parts(calls[0].count), strict=True):
        offset, member = start * call.dtype.itemsize, group.members[call.rank]
        if end > start:
            group.reduce(call, [member.at(rank, at + offset) for rank, at in enumerate(sends)],
                         [member.at(root, recv + offset)], end - start)
    group.meet(calls)


def reduce_scatter(group: Group, calls: Sequence[Call]) -> None:
    """Each rank combines its part of all sends into its own recv."""
    sends, recvs = address(calls, "send"), address(calls, "recv")
    group.meet(calls)
    for call in calls:
        offset, member = call.rank * call.nbytes, group.members[call.rank]
        if call.count:
            group.reduce(call, [member.at(rank, at + offset) for rank, at in enumerate(sends)], [recvs[call.rank]],
                         call.count)
    group.meet(calls)


def all_gather(group: Group, calls: Sequence[Call]) -> None:
    """Each rank writes its send to its place in all others' recvs, the next rank's first, and in its own meanwhile."""
    sends, recvs = address(calls, "send"), address(calls, "recv")
    group.meet(calls)
    for call in calls:
        rank, offset = call.rank, call.rank * call.nbytes
        group.members[rank].copy_beside(call.stream, recvs[rank] + offset, sends[rank], call.nbytes)
        for step in range(1, len(group)):
            peer = (rank + step) % len(group)
            group.copy(call, (peer, recvs[peer] + offset), (rank, sends[rank]), call.nbytes)
        group.members[rank].join(call.stream)
    group.meet(calls)


def broadcast(group: Group, calls: Sequence[Call]) -> None:
    """Every other rank reads the root's memory, all at the same time."""
    root = calls[0].root
    sends, recvs = address(calls, "send"), address(calls, "recv")
    group.meet(calls)
    for call in calls:
        group.copy(call, (call.rank, recvs[call.rank]), (root, sends[root]), call.nbytes)
    group.meet(calls)


def all_to_all(group: Group, calls: Sequence[Call]) -> None:
    """Each rank writes a part of its send to each recv, the next rank's first."""
    sends, recvs = address(calls, "send"), address(calls, "recv")
    group.meet(calls)
    for call in calls:
        rank = call.rank
        for step in range(1, len(group) + 1):
            peer = (rank + step) % len(group)
            group.copy(call, (peer, recvs[peer] + rank * call.nbytes), (rank, sends[rank] + peer * call.nbytes),
                       call.nbytes)
    group.meet(calls)


def barrier(group: Group, calls: Sequence[Call]) -> None:
    """Only meet."""
    group.meet(calls)


def send(group: Group, calls: Sequence[Call]) -> None:
    """Of two ranks: the receiver says that its memory is free, the sender writes there and says so."""
    source, target = calls
    assert source.send is not None and target.recv is not None
    sender, receiver = group.members[source.rank], group.members[target.rank]
    receiver.signal(target.stream, source.rank)
    sender.wait(source.stream, (target.rank,))
    group.copy(source, (target.rank, target.recv.address), (source.rank, source.send.address), source.nbytes)
    sender.signal(source.stream, target.rank)
    receiver.wait(target.stream, (source.rank,))
