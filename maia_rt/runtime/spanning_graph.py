"""Graphs that span devices: a part for each, one command and one doorbell a device and replay."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from maia_rt.contract.commands import PostOp
from maia_rt.errors import CaptureError, ClosedError, InvalidArgument, InvalidType, MaiaError, Unsupported
from maia_rt.runtime import check
from maia_rt.runtime.graph import Graph, NodeTime
from maia_rt.runtime.graph_builder import GraphBuilder
from maia_rt.runtime.graph_node import GraphNode
from maia_rt.runtime.graph_operation import Operation
from maia_rt.runtime.graph_peer import Edge, EdgeSignal, EdgeWait
from maia_rt.runtime.replays import Part, Replays

if TYPE_CHECKING:
    from maia_rt.runtime.buffer import Memory
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.semaphore import Semaphore
    from maia_rt.runtime.stream import Stream


class SpanningGraph:
    """A graph over several devices; made by ``capture.instantiate()`` where streams of several were captured.

    It has the methods of :class:`maia_rt.Graph`. The first part is that of the stream whose capture it was. The other
    parts run on streams of the graph's own; they start after nodes of the first part, and that ends after theirs. So
    all of a replay stands where it was launched, as a graph of one device does. Any thread may call.

    Attributes
    ----------
    device : Device
        That of the first part.
    parts : tuple of Graph
        One a device. They are launched together, by this graph only.
    nodes : tuple of GraphNode
        Those of all parts.
    count : int
        Commands of all parts.
    """

    def __init__(self, builders: Sequence[GraphBuilder]) -> None:
        self._closed = True
        self._lock = threading.RLock()
        self._replays = Replays()
        self._semaphores: dict[Edge, Semaphore] = {}
        self._streams: list[Stream] = []
        self.device: Device = builders[0].device
        made: list[Graph] = []
        try:
            for builder in builders:
                made.append(Graph(builder, self._bind))
            for builder in builders[1:]:
                self._streams.append(builder.device.create_stream())
        except BaseException:
            self._free(made)
            raise
        self.parts = tuple(made)
        self.nodes: tuple[GraphNode, ...] = tuple(node for part in made for node in part.nodes)
        self.count = sum(part.count for part in made)
        self._closed = False

    # --- use ---------------------------------------------------------------------------------------------------------

    def launch(self, stream: Stream) -> None:
        """Run all of it: one command and one doorbell on each device.

        A graph may be launched again while it is in flight: its replays run one after the other. Where a part fails,
        the others fail with PeerFault within a second; when `stream` has recovered the graph can be launched again.

        Parameters
        ----------
        stream : Stream
            Of the first part's device.

        Raises
        ------
        ClosedError
            The graph, a device, or a buffer or program that a node uses has been closed; the text names them.
        InvalidArgument, InvalidType, CaptureError, QueueFull, DeviceFault, DeviceLost, OutOfQueues
        """
        if not hasattr(stream, "_account"):
            raise InvalidType(f"a graph is launched on a Stream, not {type(stream).__name__}")
        if stream.device is not self.device:
            raise InvalidArgument(f"the stream belongs to {stream.device.name}, not to the device of the graph's first "
                                  f"part, {self.device.name}", hint="launch it on the stream it was captured from")
        if stream._capture is not None:
            raise CaptureError(f"{stream.name} is being captured and cannot launch a graph that spans devices",
                               hint="capture its commands again, in this capture")
        with self._lock:
            self._require_open()
            self._replays.look(alive=False)
            if self._replays.broken:
                self._mend(stream.timeout)
            for part in self.parts:
                part._require_launchable()
            launched: list[Part] = []
            at = self.device
            try:
                # The first one last: the others wait for it, and can be given up without harm to the caller's stream.
                for part, used in zip((*self.parts[1:], self.parts[0]), (*self._streams, stream), strict=True):
                    at = part.device
                    if at._validator is not None:
                        at._validator.arrive(used)
                    part.launch(used)
                    launched.append(Part(used))
            except MaiaError as error:
                if launched:
                    self._replays.give_up(launched, error, at)
                raise
            self._replays.add(launched)
            for part in self.parts:
                part.device._crossings.watch(self._replays)

    def update(self, node: GraphNode, **changes: Any) -> None:
        """Give a node other arguments; as :meth:`maia_rt.Graph.update`. Nodes that order the parts have none."""
        check.instance(node, GraphNode, "a node")
        with self._lock:
            self._require_open()
            part = next((part for part in self.parts if node in part.nodes), None)
            if part is None:
                raise InvalidArgument(f"{node!r} is no node of {self!r}")
            part.update(node, **changes)

    def times(self) -> dict[Device, list[NodeTime]]:
        """When each node ran in the newest replay that has finished, by device: devices have no common clock.

        Raises
        ------
        InvalidArgument
            No replay has finished.
        Unsupported
            A device's contract is older than 1.1.
        """
        self._require_open()
        return {part.device: part.times() for part in self.parts}

    def save(self, path: str | Path, buffers: dict[str, Memory] | None = None) -> None:
        """Refused.

        Raises
        ------
        Unsupported
        """
        self._require_open()
        raise Unsupported("a graph that spans devices is not saved", cause="a file holds the nodes of one device",
                          hint="capture it anew where it is used, or save a graph for each device")

    # --- life --------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it, or one of its parts' devices, has been closed."""
        return self._closed or any(part.closed for part in self.parts)

    def close(self) -> None:
        """Give everything back once replays in flight are done; idempotent. Buffers stay open."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._free(self.parts)

    def __enter__(self) -> SpanningGraph:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[GraphNode]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        names = ", ".join(part.device.name for part in self.parts)
        return f"<SpanningGraph of {len(self.nodes)} nodes on {names}{', closed' if self.closed else ''}>"

    # --- inside ------------------------------------------------------------------------------------------------------

    def _bind(self, operation: Operation) -> Operation:
        """Give the ends of an edge their semaphore."""
        if not isinstance(operation, EdgeSignal | EdgeWait):
            return operation
        edge = operation.edge
        if edge not in self._semaphores:
            self._semaphores[edge] = edge.target.create_semaphore()
        return type(operation)(operation.device, edge, self._semaphores[edge])

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self!r} has been closed")
        for part in self.parts:
            part.device._require_open()
            if part.closed:
                raise ClosedError(f"{self!r}: its part on {part.device.name} has been closed",
                                  cause="the device was reset", hint="capture the graph anew")

    def _mend(self, seconds: float) -> None:
        """Put everything in order after a replay that failed: nothing of it runs, and every count is 0."""
        self._replays.settle(seconds)
        for stream in self._streams:
            if stream.failed:
                stream.recover()
        for edge, semaphore in self._semaphores.items():
            edge.target._firmware.post_semaphore(semaphore.index, PostOp.SET, 0)
        self._replays.broken = False

    def _free(self, parts: Sequence[Graph]) -> None:
        for part in parts:
            part.close()
        for stream in self._streams:
            if not stream.closed and not stream.device.closed:
                stream._abandon()
        for semaphore in self._semaphores.values():
            if not semaphore.closed:
                with contextlib.suppress(MaiaError):
                    semaphore.device._reclaimer.give_up(semaphore.close)
