"""Graphs that are ready: one list in pinned memory, one command and one doorbell for a replay."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from maia_rt._fast.lane import Replay
from maia_rt._fast.ring import Account
from maia_rt.contract.commands import COMMAND_BYTES, LISTED_TIMES, ListOption, Opcode
from maia_rt.errors import ClosedError, InvalidArgument, InvalidType, MaiaError, Unsupported
from maia_rt.memory import PinnedBlock
from maia_rt.queue import QueuePair
from maia_rt.runtime import check
from maia_rt.runtime.event import Event
from maia_rt.runtime.graph_builder import GraphBuilder
from maia_rt.runtime.graph_layout import Layout, Step
from maia_rt.runtime.graph_node import GraphNode
from maia_rt.runtime.graph_operation import LoopOperation, Operation, require_same_room

if TYPE_CHECKING:
    from maia_rt.runtime.buffer import Buffer, Memory
    from maia_rt.runtime.program import Program
    from maia_rt.runtime.stream import Stream

_INDIRECT: Final = int(Opcode.INDIRECT)
_REMEMBERED: Final = 1024


@dataclass(frozen=True)
class NodeTime:
    """When a node ran in a replay, in nanoseconds of device time.

    Attributes
    ----------
    node : GraphNode
    start_ns, end_ns : int
        Of a loop or condition: from its first command to its last. Of a node in a loop: its last turn. Both 0 for a
        node that a condition passed over.
    """

    node: GraphNode
    start_ns: int
    end_ns: int

    @property
    def duration_ns(self) -> int:
        """How long it took."""
        return self.end_ns - self.start_ns


class Graph:
    """Commands that lie ready in pinned memory and run again and again with one command; see :meth:`launch`.

    Made by :meth:`maia_rt.GraphBuilder.instantiate` or ``capture.instantiate()``. It keeps the buffers that its nodes
    use alive, but not open. Any thread may call.

    Attributes
    ----------
    device : Device
    nodes : tuple of GraphNode
        In the order of the list; those of child graphs, loops and conditions too.
    count : int
        Commands of the list.
    """

    def __init__(self, builder: GraphBuilder, bind: Callable[[Operation], Operation] | None = None) -> None:
        # `bind` gives a graph of its own, among those of one builder, what its nodes need of their own.
        self._closed = True
        device = builder.device
        device._require_open()
        capabilities = device.capabilities
        if not capabilities.indirect:
            raise Unsupported(f"{device.name}: the device runs no lists of commands")
        self.device = device
        self._builder = builder
        self._lock = threading.Lock()
        self._layout = layout = Layout(builder)
        if bind is not None:
            for step in layout.steps:
                step.operation = bind(step.operation)
        self.nodes: tuple[GraphNode, ...] = tuple(dict.fromkeys(step.node for step in layout.steps))
        self.count = layout.count
        self._unbounded = any(step.operation._waits or (isinstance(step.operation, LoopOperation)
                                                        and step.operation.memory is not None)
                              for step in layout.steps)
        self._timed = capabilities.list_options
        self._options = ListOption.CONCURRENT if self._timed else 0
        self._programs: tuple[Program, ...] = ()
        # By number of the stream: the newest replays on others than the last one's that may still run.
        self._others: dict[int, tuple[QueuePair, int]] = {}
        self._runs: deque[tuple[QueuePair, int, int]] = deque(maxlen=_REMEMBERED)
        self._replay = Replay(self._lock.locked, self._runs.append)
        self._accesses: tuple[list[Any], list[Any]] | None = None
        self._book, self._validator = device._addresses, device._validator
        # Of this device's; where nodes need other devices it is never up to date, and each launch compares `_all_seen`.
        self._seen = -1
        self._all_seen = self._note_needs()
        self._require_open_memory()
        self._counters: Buffer | None = None
        self._times: PinnedBlock | None = None
        self._list: PinnedBlock | None = None
        # Older copies of the list that replays in flight still read: for the texts of faults.
        self._former: list[int] = []
        try:
            if layout.counters:
                self._counters = device.allocate(layout.counters, np.uint32)
            if self._timed:
                self._times = device._pool.allocate(2 * layout.count * LISTED_TIMES.itemsize)
                np.frombuffer(self._times.view(), np.uint8)[:] = 0
            self._list = device._pool.allocate(layout.count * COMMAND_BYTES + layout.pointed_bytes)
            layout.encode(self._list.view(), self._list.iova, self._counters_at)
        except BaseException:
            self._free()
            raise
        self._closed = False
        self._set_payloads()
        device._graphs.add(self)

    # --- use ---------------------------------------------------------------------------------------------------------

    def launch(self, stream: Stream) -> None:
        """Run all of it as one command of a stream: one INDIRECT, one doorbell.

        A graph may be launched again while it is in flight: its replays run one after the other, on whichever streams
        they were launched. In a capture it becomes a child of the graph captured.

        Parameters
        ----------
        stream : Stream

        Raises
        ------
        ClosedError
            The graph, or a buffer or program that a node uses, has been closed; the text names both.
        InvalidArgument, InvalidType, QueueFull, DeviceFault, DeviceLost, OutOfQueues
        """
        try:
            account = stream._account
        except AttributeError:
            raise InvalidType(f"a graph is launched on a Stream, not {type(stream).__name__}") from None
        # What is the same at most launches is one comparison each; the device counts what was closed.
        if (stream.device is not self.device or stream._capture is not None or self._closed
                or self._seen != self._book.closings or self._validator is not None) and not self._prepare(stream):
            return
        if stream._launch_again(self._replay):
            return
        with self._lock:
            self._require_open()  # it may have been closed meanwhile
            replay = self._replay
            if account is not replay.account or self._others:
                self._follow(stream, account)
            slot = replay.slot
            stream._submit(_INDIRECT, payload=replay.payload(), unbounded=self._unbounded)
            replay.slot = slot ^ 1
            self._runs.append((*stream._mark(), slot))

    def update(self, node: GraphNode, **changes: Any) -> None:
        """Give a node other arguments, under their names in the builder's method; what is not named stays.

        It holds for launches from here on. Replays in flight keep what they were launched with: the list is copied for
        them, nobody waits. The builder, and other graphs made from it, keep what they had.

        Parameters
        ----------
        node : GraphNode
            Wherever it is in the graph; a node of a child graph that is used twice is updated twice.
        **changes
            ``dst``, ``src``; ``value``, ``width``; ``kernel``, ``args`` (a tuple of all), ``clusters``; ``memory``,
            ``condition``, ``mask``; ``count``.

        Raises
        ------
        InvalidArgument, InvalidType, ClosedError
            As where the node was made; the graph is as it was.
        """
        check.instance(node, GraphNode, "a node")
        with self._lock:
            self._require_open()
            steps = [step for step in self._layout.steps if step.node is node]
            if not steps:
                raise InvalidArgument(f"{node!r} is no node of {self!r}")
            operations = [step.operation.changed(**changes) for step in steps]
            for step, operation in zip(steps, operations, strict=True):
                require_same_room(step.operation, operation)
            if not self._quiet():
                self._copy_list()
            assert self._list is not None
            self._accesses = None
            for step, operation in zip(steps, operations, strict=True):
                step.operation = operation
                self._layout.encode_step(step, self._list.view(), self._list.iova, self._counters_at)
            self._note_needs()
            # Another buffer may have been closed before; have the next launch look.
            self._seen = self._all_seen = -1

    def times(self) -> list[NodeTime]:
        """When each node ran in the newest replay that has finished; always on.

        Returns
        -------
        list of NodeTime
            In the order of :attr:`nodes`; a node of a child graph that is used twice is there twice.

        Raises
        ------
        InvalidArgument
            No replay has finished.
        Unsupported
            The device's contract is older than 1.1.
        """
        self._require_open()
        if not self._timed or self._times is None:
            raise Unsupported(f"{self.device.name}: the device takes no times in lists")
        while True:
            runs = list(self._runs)
            done = next((i for i in reversed(range(len(runs))) if _succeeded(*runs[i][:2])), None)
            if done is None:
                raise InvalidArgument(f"no replay of {self!r} has finished", hint="launch it and wait for the stream")
            slot = runs[done][2]
            size = self.count * LISTED_TIMES.itemsize
            found = np.frombuffer(bytes(self._times.view()[slot * size:(slot + 1) * size]), LISTED_TIMES)
            # The one after the next writes to the same place; it runs only when the next is done.
            if done + 1 == len(runs) or not runs[done + 1][0].quiet(runs[done + 1][1]):
                return self._in_words(found)

    def _in_words(self, found: Any) -> list[NodeTime]:
        starts, ends = found["start_ns"], found["end_ns"]
        # The first command runs in every replay, and first. What is older is of an earlier one.
        ran = (starts >= starts[0]) & (starts > 0)
        times = []
        for step in self._layout.steps:
            own = ran[step.first:step.end]
            if not own.any():
                times.append(NodeTime(step.node, 0, 0))
                continue
            first, last = starts[step.first:step.end][own], ends[step.first:step.end][own]
            times.append(NodeTime(step.node, int(first.min()), int(last.max())))
        return times

    def save(self, path: str | Path, buffers: dict[str, Memory] | None = None) -> None:
        """Save it to a file: nodes, and the programs they launch. :meth:`maia_rt.Device.load_graph` loads it.

        Parameters
        ----------
        path : str or Path
        buffers : dict of str to Buffer or HostBuffer, optional
            Names for the memory that nodes use; what has none is called ``buffer0`` and so on, by first use.

        Raises
        ------
        InvalidArgument
            Two names for one buffer, or one that no node uses.
        ClosedError, OSError
        """
        from maia_rt.runtime.graph_file import save

        self._require_open()
        save(self, path, buffers or {})

    # --- life --------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it has been closed, by itself or with its device."""
        return self._closed

    def close(self) -> None:
        """Give its memory back once replays in flight are done; idempotent. Buffers stay open."""
        with self._lock:
            if self._closed:
                return
            self._closed, self._replay.plain = True, False
            self.device._graphs.discard(self)
            if not self.device._forked:
                self._free()

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            self._closed = True
            if not self.device.closed:
                warnings.warn("a graph was not closed", ResourceWarning, stacklevel=2, source=self)
                for block in (self._list, self._times):
                    if block is not None:
                        self.device._reclaimer.abandon(block.free)

    def __iter__(self) -> Iterator[GraphNode]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        return f"<Graph of {len(self.nodes)} nodes on {self.device.name}{', closed' if self._closed else ''}>"

    # --- inside ------------------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self!r} has been closed")
        self.device._require_open()

    def _require_open_memory(self) -> None:
        for step in self._layout.steps if any(one.closed for one in self._needs) else self._asked:
            try:
                step.operation._require_open()
            except ClosedError as error:
                raise ClosedError(f"{step.operation._text}, a node made at {step.node.where}: {error.what}",
                                  cause=error.cause, hint=error.hint) from None

    def _prepare(self, stream: Stream) -> bool:
        """Make the checks of a launch; say whether it is to be submitted."""
        if self._closed:
            raise ClosedError(f"{self!r} has been closed")
        if stream.device is not self.device:
            raise InvalidArgument("the stream belongs to another device than the graph")
        self._require_launchable()
        if stream._capture is not None:
            stream._capture.graph(self)
            return False
        if self._validator is not None:
            self._validate(stream)
        return True

    def _require_launchable(self) -> None:
        """Raise ClosedError where something that a node needs has been closed."""
        closings = self._closings()
        if self._all_seen != closings:
            self._require_open_memory()
            self._all_seen = closings
        self._seen = -1 if self._peers else closings

    def _note_needs(self) -> int:
        """Remember what nodes need, and of which other devices; return what has been closed on all of them so far."""
        steps = self._layout.steps
        self._asked = [step for step in steps if step.operation._is_asked]
        # Thousands of nodes often share a few buffers.
        self._needs = list({id(one): one for step in steps for one in step.operation._needs()}.values())
        self._peers = tuple(dict.fromkeys(peer for step in steps for peer in step.operation._peers()))
        return self._closings()

    def _closings(self) -> int:
        return self._book.closings + sum(peer._addresses.closings for peer in self._peers)

    def _follow(self, stream: Stream, account: Account) -> None:
        """Have a stream wait for the replays on others, until they are done."""
        last = self._replay.account
        if last is not None and last is not account and self._runs:
            self._others[last.number] = self._runs[-1][:2]
        self._replay.account = account
        for number, (queue, sequence) in list(self._others.items()):
            if number == account.number or queue.quiet(sequence):
                del self._others[number]
            else:
                event = Event(self.device)
                event._queue, event._sequence = queue, sequence
                stream.wait(event)
        self._replay.plain = not self._others and not self._unbounded

    def _quiet(self) -> bool:
        marks = [*self._others.values(), *(run[:2] for run in list(self._runs)[-1:])]
        return all(queue.quiet(sequence) for queue, sequence in marks)

    def _copy_list(self) -> None:
        """Go on with a copy of the list; the old one goes when the replays in flight are done."""
        assert self._list is not None
        old, new = self._list, self.device._pool.allocate(self._list.size)
        new.view()[:] = old.view()
        self._layout.relocate(new.view(), new.iova - old.iova)
        self._list = new
        self._former.append(old.iova)
        self._set_payloads()

        def free() -> None:
            self._former.remove(old.iova)
            old.free()

        self.device._reclaimer.give_up(free)

    def _set_payloads(self) -> None:
        assert self._list is not None
        times = [0, 0] if self._times is None else [
            self._times.iova + slot * self.count * LISTED_TIMES.itemsize for slot in (0, 1)]
        self._replay.set([(self._list.iova, self.count | self._options << 32, at) for at in times])

    @property
    def _counters_at(self) -> int:
        return 0 if self._counters is None else self._counters.address

    def _free(self) -> None:
        for block in (self._list, self._times):
            if block is not None:
                self.device._reclaimer.give_up(block.free)
        for owned in (*self._programs, self._counters):
            if owned is not None:
                getattr(owned, "_hand_over", owned.close)()

    def _stopped(self) -> None:
        """Close with a device that no longer runs."""
        self._closed, self._replay.plain = True, False
        for block in (self._list, self._times):
            if block is not None:
                block.free()

    def _validate(self, stream: Stream) -> None:
        assert self._validator is not None
        if self._accesses is None:
            each = [step.operation._accesses() for step in self._layout.steps]
            self._accesses = ([one for reads, _ in each for one in reads],
                              [one for _, writes in each for one in writes])
        self._validator.command(stream, f"launch of a graph of {len(self.nodes)} nodes", *self._accesses)

    def _explain(self, address: int, index: int) -> str:
        """Say which node a command of a list is, empty where it is another's list."""
        if self._list is None or (address != self._list.iova and address not in self._former):
            return ""
        if not 0 <= index < self.count:
            return ""
        step: Step = self._layout.owners[index]
        used = ", ".join(f"{name}={memory!r}" for name, memory in step.operation._uses())
        return f"in node {step.operation._text}, made at {step.node.where}" + (f", with {used}" if used else "")


def _succeeded(queue: QueuePair, sequence: int) -> bool:
    try:
        return queue.done(sequence)
    except MaiaError:
        return False
