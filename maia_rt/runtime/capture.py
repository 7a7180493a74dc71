"""Captures: what streams are told becomes a graph instead of running.

    with stream.capture() as capture:
        stream.copy(x, given)
        other.wait(stream.record())     # a fork: `other` is captured too
        other.launch(kernel, x, y)
        stream.wait(other.record())     # a join
    graph = capture.instantiate()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from maia_rt.errors import CaptureError, InvalidType, Unsupported
from maia_rt.runtime import check
from maia_rt.runtime.buffer import Memory
from maia_rt.runtime.copy import CopyPath
from maia_rt.runtime.event import Event
from maia_rt.runtime.graph_builder import GraphBuilder
from maia_rt.runtime.graph_node import GraphNode
from maia_rt.runtime.graph_peer import Edge, EdgeSignal, EdgeWait
from maia_rt.runtime.semaphore import Semaphore

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.graph import Graph
    from maia_rt.runtime.program import Kernel
    from maia_rt.runtime.spanning_graph import SpanningGraph
    from maia_rt.runtime.stream import Stream


class Capture:
    """What :meth:`maia_rt.Stream.capture` returns: a context manager, and afterwards the graph that was captured.

    Attributes
    ----------
    builder : GraphBuilder
        The nodes. More can be added by hand, or it becomes another graph's child. Of a capture of several devices,
        those of the first one.
    """

    def __init__(self, stream: Stream) -> None:
        self.builder = GraphBuilder(stream.device)
        self._builders = {stream.device: self.builder}
        # The way from nodes to another device: the wait there; and what such a wait waits for.
        self._edges: dict[tuple[tuple[GraphNode, ...], Device], GraphNode] = {}
        self._signals: dict[GraphNode, GraphNode] = {}
        self._origin = stream
        self._lanes: list[CaptureLane] = []
        self._state = "not begun"

    def instantiate(self) -> Graph | SpanningGraph:
        """Make a graph that can be launched; as :meth:`maia_rt.GraphBuilder.instantiate`.

        Returns
        -------
        Graph or SpanningGraph
            The latter where streams of several devices were captured.

        Raises
        ------
        CaptureError
            The capture has not ended, or failed.
        """
        if self._state != "done":
            raise CaptureError(f"the capture is {self._state}", hint="instantiate it after the with block")
        if len(self._builders) == 1:
            return self.builder.instantiate()
        from maia_rt.runtime.spanning_graph import SpanningGraph

        return SpanningGraph(list(self._builders.values()))

    def __enter__(self) -> Capture:
        if self._state != "not begun":
            raise CaptureError(f"the capture is {self._state}", hint="begin another one: stream.capture()")
        self._origin._require_open()
        if self._origin._capture is not None:
            raise CaptureError(f"{self._origin.name} is being captured already", hint="end that capture first")
        self._state = "under way"
        self._join(self._origin, [])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        lanes = self._lanes
        self._end("failed")
        if kind is not None:
            return
        apart = [lane for lane in lanes[1:] if not lane.joined_by(lanes[0])]
        if apart:
            names = ", ".join(lane.stream.name for lane in apart)
            raise CaptureError(f"the capture of {self._origin.name} ended while {names} had not come back to it",
                               cause=f"{names} waited for an event of the capture, and nobody waited for {names}",
                               hint=f"before the end, {self._origin.name} waits for an event that the other records")
        self._state = "done"

    def _end(self, state: str) -> None:
        self._state = state
        for lane in self._lanes:
            lane.stream._capture = None

    def _join(self, stream: Stream, front: list[GraphNode]) -> CaptureLane:
        lane = CaptureLane(self, stream, front)
        self._lanes.append(lane)
        stream._capture = lane
        return lane

    def _cross(self, source: Device, front: list[GraphNode], target: Stream) -> GraphNode:
        """Have a node of another device stand for places of one: a signal there, and a wait here."""
        key = tuple(front), target.device
        if key not in self._edges:
            try:
                source.peer(target.device).semaphore(0)
            except Unsupported as error:
                raise CaptureError(f"{target.name} of {target.device.name} cannot wait in a graph for {source.name}",
                                   cause=f"there is no direct path between the two: {error.cause or error.what}",
                                   hint="capture a graph on each; their streams wait for each other between launches"
                                   ) from None
            builder = self._builders.setdefault(target.device, GraphBuilder(target.device))
            for one in self._builders.values():
                one._spans = True
            edge = Edge(source, target.device)
            signal = self._builders[source]._add(EdgeSignal(source, edge), front)
            # A wait holds up what comes behind it in the list. As it comes after all that was captured before, no list
            # ever stands at a wait for what comes later than itself: so lists do not wait for each other in a circle.
            followed = {node for one in builder.nodes for node in one.after}
            before = [node for node in builder.nodes if node not in followed]
            self._edges[key] = wait = builder._add(EdgeWait(target.device, edge), before)
            self._signals[wait] = signal
        return self._edges[key]

    def __repr__(self) -> str:
        return f"<Capture of {self._origin.name}, {self._state}, {sum(map(len, self._builders.values()))} nodes>"


class CaptureLane:
    """One stream in a capture: takes its commands, and knows what its next one comes after.

    Attributes
    ----------
    capture : Capture
    stream : Stream
    front : list of GraphNode
    """

    def __init__(self, capture: Capture, stream: Stream, front: list[GraphNode]) -> None:
        self.capture = capture
        self.stream = stream
        self.front = front

    # --- commands, with the arguments of the stream's ----------------------------------------------------------------

    def copy(self, dst: Any, src: Any, *, checksum: bool = False) -> CopyPath:
        """A node."""
        if checksum:
            raise CaptureError("a copy with a checksum cannot be captured", hint="check what arrived after the replay")
        with self._reaching("a copy that goes through the host"):
            self.front = [self._builder.copy(dst, src, after=self.front)]
        return CopyPath.DIRECT

    def fill(self, dst: Memory, value: int, width: int = 1) -> None:
        """A node."""
        self.front = [self._builder.fill(dst, value, width, after=self.front)]

    def multicast(self, dsts: Sequence[Memory], src: Memory) -> int:
        """As many nodes as there are destinations, side by side."""
        with self._reaching("a copy that goes through the host"):
            nodes = [self._builder.copy(dst, src, after=self.front) for dst in dsts]
        self.front = nodes or self.front
        return len(nodes)

    def launch(self, kernel: Kernel, *args: Any, clusters: int = 0) -> None:
        """A node."""
        self.front = [self._builder.launch(kernel, *args, clusters=clusters or self.stream.clusters, after=self.front)]

    def graph(self, graph: Graph) -> None:
        """A child, of the same device."""
        self.front = [self._builder.child(graph._builder, after=self.front)]

    def write_value(self, memory: Memory, value: int) -> None:
        """A node."""
        self.front = [self._builder.write_value(memory, value, after=self.front)]

    def wait_value(self, memory: Memory, value: int, *, condition: str, mask: int) -> None:
        """A node."""
        self.front = [self._builder.wait_value(memory, value, condition=condition, mask=mask, after=self.front)]

    def signal(self, semaphore: Semaphore, value: int, *, op: str) -> None:
        """A node."""
        with self._reaching("a signal that goes through the host"):
            self.front = [self._builder.signal(semaphore, value, op=op, after=self.front)]

    # --- order -------------------------------------------------------------------------------------------------------

    def record(self, event: Event | None, timing: bool) -> Event:
        """Have an event stand for a place in the graph."""
        if timing:
            raise CaptureError("a timed event cannot be captured", hint="graph.times() has the times of every node")
        event = Event(self.stream.device) if event is None else check.instance(event, Event, "an event")
        if event.timing:
            raise CaptureError("a timed event cannot be captured", hint="graph.times() has the times of every node")
        event._captured = self, list(self.front)
        return event

    def wait(self, what: Any, value: int | None = None, *, op: str = "ge") -> None:
        """Come after a place of the capture, or wait for a semaphore in every replay."""
        if isinstance(what, Semaphore):
            self.front = [self._builder.wait(what, value, op=op, after=self.front)]
            return
        if not isinstance(what, Event):
            if not hasattr(what, "_capture"):
                raise InvalidType(f"what a stream waits for is {type(what).__name__}, not an Event",
                                  hint="pass an event, a stream or a semaphore")
            if what._capture is None:
                raise CaptureError(f"{self.stream.name} is being captured and cannot wait for {what!r}",
                                   cause="that stream is not in the capture")
            if what._capture.capture is not self.capture:
                raise CaptureError(f"{self.stream.name} and {what.name} are in different captures")
            self._follow(what._capture, what._capture.front)
            return
        if what._captured is None:
            if what._queue is None:
                return  # never recorded: done
            raise CaptureError(f"{self.stream.name} is being captured and cannot wait for {what!r}",
                               cause="the event was recorded outside of the capture",
                               hint="have the stream wait before the capture, or before each launch of the graph")
        lane, front = what._captured
        if lane.capture is not self.capture:
            raise CaptureError("the event was recorded in another capture")
        self._follow(lane, front)

    def refuse(self, call: str, hint: str) -> CaptureError:
        """What a call that cannot be captured raises."""
        return CaptureError(f"{self.stream.name} is being captured: {call}() is not possible", hint=hint)

    def allocate(self, *_: Any, **__: Any) -> Any:
        """Refused."""
        raise self.refuse("allocate", "allocate before the capture: a graph's buffers live as long as it is used")

    def free(self, *_: Any) -> None:
        """Refused."""
        raise self.refuse("free", "free the buffer when the graph is no longer launched")

    def call(self, *_: Any) -> None:
        """Refused."""
        raise self.refuse("call", "call the function after the launch of the graph: graph.launch(s); s.call(...)")

    def joined_by(self, origin: CaptureLane) -> bool:
        """Say whether all that this stream did comes before the origin's end."""
        signals = self.capture._signals
        seen = set(origin.front)
        left = list(origin.front)
        while left:
            at = left.pop()
            for node in (*at.after, *([signals[at]] if at in signals else [])):
                if node not in seen:
                    seen.add(node)
                    left.append(node)
        return seen.issuperset(self.front)

    @property
    def _builder(self) -> GraphBuilder:
        return self.capture._builders[self.stream.device]

    @contextlib.contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        """Say what cannot be captured where a peer is not reached directly."""
        try:
            yield
        except Unsupported as error:
            raise CaptureError(f"{self.stream.name} is being captured: {what} cannot be", cause=error.what,
                               hint="make it before or after the launch of the graph") from None

    def _follow(self, lane: CaptureLane, front: list[GraphNode]) -> None:
        if lane.stream.device is not self.stream.device:
            front = [self.capture._cross(lane.stream.device, front, self.stream)]
        self.front = list(dict.fromkeys([*self.front, *front]))


def fork(stream: Stream, event: Event) -> None:
    """Have a stream that waits for an event of a capture be captured, too."""
    assert event._captured is not None
    lane, front = event._captured
    capture: Capture = lane.capture
    if capture._state != "under way":
        raise CaptureError(f"{stream.name} cannot wait for an event that was recorded in a capture that has ended",
                           cause="it stands for a place in a graph, not for a moment",
                           hint="record it again after the launch of the graph")
    if lane.stream.device is not stream.device:
        front = [capture._cross(lane.stream.device, front, stream)]
    capture._join(stream, list(front))
