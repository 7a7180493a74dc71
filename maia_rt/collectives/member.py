"""One rank inside a communicator: what it signals, waits for and launches."""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from maia_rt.collectives.node import RankOperation
from maia_rt.contract.commands import Opcode, PostOp, WaitOp
from maia_rt.contract.program import KernelImage, write
from maia_rt.errors import DeviceFault, OutOfQueues
from maia_rt.queue import FAILED
from maia_rt.runtime.graph_operation import Listed

if TYPE_CHECKING:
    from maia_rt.collectives.path import Path
    from maia_rt.queue import QueuePair
    from maia_rt.runtime.buffer import Buffer
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.event import Event
    from maia_rt.runtime.program import Kernel, Program
    from maia_rt.runtime.semaphore import Semaphore
    from maia_rt.runtime.stream import Stream

_LAUNCH: Final = int(Opcode.LAUNCH)
_COPY: Final = int(Opcode.COPY)
_NOP: Final = int(Opcode.NOP)
_SIGNAL: Final = int(Opcode.SIGNAL_REMOTE)
_ADD_ONE: Final = PostOp.ADD | 1 << 32
_ACQUIRE: Final = WaitOp.ACQUIRE
_KERNELS: Final = 64
_WORTH_A_STREAM: Final = 1 << 20
"""Bytes that are copied beside a stream, and not in their turn."""


class Member:
    """A rank: its device, its semaphores, and its peers as it sees them.

    Attributes
    ----------
    rank : int
    device : Device
    paths : dict of int to Path
        By peer.
    last : Event or None
        The end of the rank's newest collective.
    beside : (Stream, mark, Event) or None
        What the collective at hand does beside its stream: where, what was there before, and its end.
    closed : bool
    """

    def __init__(self, rank: int, device: Device) -> None:
        self.rank = rank
        self.device = device
        self.paths: dict[int, Path] = {}
        self.last: Event | None = None
        self.beside: tuple[Stream, tuple[QueuePair, int], Event] | None = None
        self._stream: Stream | None = None
        self._side: Stream | None = None
        self._scratch: Buffer | None = None
        # By peer and lane: what that peer posts to.
        self.semaphores: dict[tuple[int, int], Semaphore] = {}
        self._kept: set[Program] = set()
        self.closed = False
        self._words: dict[tuple[int, int], int] = {}
        self._programs: OrderedDict[tuple[object, ...], tuple[Program, Kernel]] = OrderedDict()

    def connect(self, peers: Sequence[Member], lanes: int) -> None:
        """Learn where the peers' semaphores are, once all of them have theirs."""
        for peer in peers:
            if peer is not self:
                for lane in range(lanes):
                    index = peer.semaphores[self.rank, lane].index
                    self._words[peer.rank, lane] = self.paths[peer.rank].semaphore(index)

    # --- commands ----------------------------------------------------------------------------------------------------

    def begin(self, stream: Stream) -> None:
        """Come after the rank's collective before, on whatever stream that was."""
        self.beside = None
        if self._stream is not stream:
            if self.last is not None:
                stream.wait(self.last)
            self._stream = stream

    def signal(self, stream: Stream, peer: int, lane: int = 0) -> None:
        """Count one more in the peer's semaphore for this rank, when all before is done."""
        payload = self._words[peer, lane], _ADD_ONE, 0
        if stream._capture is not None:
            self._add(stream, Listed(_SIGNAL, 0, payload), f"signal to rank {peer}")
        else:
            stream._submit(_SIGNAL, payload=payload)

    def wait(self, stream: Stream, peers: Iterable[int], lane: int = 0) -> None:
        """Wait for one signal of each of the peers, and take it."""
        if stream._capture is not None:
            for peer in peers:
                stream._capture.wait(self.semaphores[peer, lane], 1, op="acquire")
            return
        pending = iter(peers)
        while pair := tuple(itertools.islice(pending, 2)):
            stream._submit(_NOP, pre=tuple((self.semaphores[peer, lane].index, _ACQUIRE, 1) for peer in pair),
                           unbounded=True)

    def copy(self, stream: Stream, dst: int, src: int, nbytes: int) -> None:
        """Copy between addresses as this rank's device sees them."""
        if not nbytes or dst == src:
            return
        if stream._capture is not None:
            self._add(stream, Listed(_COPY, 0, (src, dst, nbytes)), f"copy of {nbytes} bytes between ranks")
        else:
            stream._submit(_COPY, payload=(src, dst, nbytes))

    def copy_beside(self, stream: Stream, dst: int, src: int, nbytes: int) -> None:
        """Copy within the rank's own memory while its stream goes on, up to :meth:`join`; a little, in its turn."""
        if nbytes < _WORTH_A_STREAM or dst == src or stream._capture is not None or not self._has_side():
            self.beside = None
            self.copy(stream, dst, src, nbytes)
            return
        side = self._side
        assert side is not None
        before = side._mark()
        side.wait(stream.record())
        side._submit(_COPY, payload=(src, dst, nbytes))
        self.beside = side, before, side.record()

    def join(self, stream: Stream) -> None:
        """Go on when what is copied beside the stream is there."""
        if self.beside is not None:
            stream.wait(self.beside[2])

    def _has_side(self) -> bool:
        if self._side is None:
            with contextlib.suppress(OutOfQueues):
                self._side = self.device.create_stream()
        return self._side is not None

    def launch(self, stream: Stream, kernel: Kernel, addresses: tuple[int, ...]) -> None:
        """Launch a kernel on addresses as this rank's device sees them."""
        if stream._capture is None:
            stream._launch(kernel.handle, stream.clusters, addresses)
            return
        self._kept.add(kernel.program)
        args = b"".join(word.to_bytes(8, "little") for word in addresses)
        self._add(stream, Listed(_LAUNCH, stream.clusters, (kernel.handle | len(addresses) << 32, 0, 0), args, 1),
                  f"launch of {kernel.name} over ranks")

    def _add(self, stream: Stream, listed: Listed, text: str) -> None:
        lane = stream._capture
        lane.front = [lane._builder._add(RankOperation(self.device, self, listed, text), lane.front)]

    def at(self, rank: int, address: int) -> int:
        """Where this rank's device sees an address in the memory of another, or its own."""
        return address if rank == self.rank else self.paths[rank].address(address)

    # --- kernels -----------------------------------------------------------------------------------------------------

    def kernel(self, key: tuple[object, ...], build: Callable[[], KernelImage]) -> Kernel:
        """Return a loaded kernel; those used least lately go when there are too many."""
        found = self._programs.get(key)
        if found is None:
            image = build()
            program = self.device.load(write([image]))
            found = self._programs[key] = program, program[image.name]
            free = [old for old, (one, _) in self._programs.items() if one not in self._kept]
            if len(free) > _KERNELS:
                self._programs.pop(free[0])[0].close()
        else:
            self._programs.move_to_end(key)
        return found[1]

    def scratch(self, nbytes: int) -> int:
        """The address of memory of the rank's own, for partial results; made at its first use."""
        if self._scratch is None:
            self._scratch = self.device.allocate(nbytes)
        return self._scratch.address

    # --- state -------------------------------------------------------------------------------------------------------

    def require_ready(self, stream: Stream) -> None:
        """Raise what is wrong with the rank, where its part could not run."""
        for path in self.paths.values():
            path.require_direct()
        stream._require_open()
        if stream._account.stopped & FAILED:
            fault: DeviceFault = stream._fault()
            raise fault

    def close(self) -> None:
        """Give everything back that lies on the device."""
        self.closed = True
        for program, _ in self._programs.values():
            program.close()
        self._programs.clear()
        if self._scratch is not None:
            self._scratch._hand_over()
        if self._side is not None:
            self._side.close()
        for semaphore in self.semaphores.values():
            semaphore.close()
        self.paths.clear()
