"""Captures: what streams are told becomes a graph instead of running.

    with stream.capture() as capture:
        stream.copy(x, given)
        other.wait(stream.record())     # a fork: `other` is captured too
        other.launch(kernel, x, y)
        stream.wait(other.record())     # a join
    graph = capture.instantiate()
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from maia_rt.errors import CaptureError, InvalidType
from maia_rt.runtime import check
from maia_rt.runtime.buffer import Memory
from maia_rt.runtime.copy import CopyPath
from maia_rt.runtime.event import Event
from maia_rt.runtime.graph_builder import GraphBuilder
from maia_rt.runtime.graph_node import GraphNode
from maia_rt.runtime.semaphore import Semaphore

if TYPE_CHECKING:
    from maia_rt.runtime.graph import Graph
    from maia_rt.runtime.program import Kernel
    from maia_rt.runtime.stream import Stream


class Capture:
    """What :meth:`maia_rt.Stream.capture` returns: a context manager, and afterwards the graph that was captured.

    Attributes
    ----------
    builder : GraphBuilder
        The nodes. More can be added by hand, or it becomes another graph's child.
    """

    def __init__(self, stream: Stream) -> None:
        self.builder = GraphBuilder(stream.device)
        self._origin = stream
        self._lanes: list[CaptureLane] = []
        self._state = "not begun"

    def instantiate(self) -> Graph:
        """Make a graph that can be launched; as :meth:`maia_rt.GraphBuilder.instantiate`.

        Raises
        ------
        CaptureError
            The capture has not ended, or failed.
        """
        if self._state != "done":
            raise CaptureError(f"the capture is {self._state}", hint="instantiate it after the with block")
        return self.builder.instantiate()

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

    def __repr__(self) -> str:
        return f"<Capture of {self._origin.name}, {self._state}, {len(self.builder)} nodes>"


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
        self.front = [self._builder.copy(dst, src, after=self.front)]
        return CopyPath.DIRECT

    def fill(self, dst: Memory, value: int, width: int = 1) -> None:
        """A node."""
        self.front = [self._builder.fill(dst, value, width, after=self.front)]

    def multicast(self, dsts: Sequence[Memory], src: Memory) -> int:
        """As many nodes as there are destinations, side by side."""
        nodes = [self._builder.copy(dst, src, after=self.front) for dst in dsts]
        self.front = nodes or self.front
        return len(nodes)

    def launch(self, kernel: Kernel, *args: Any, clusters: int = 0) -> None:
        """A node."""
        self.front = [self._builder.launch(kernel, *args, clusters=clusters or self.stream.clusters, after=self.front)]

    def graph(self, graph: Graph) -> None:
        """A child."""
        self.front = [self._builder.child(graph._builder, after=self.front)]

    def write_value(self, memory: Memory, value: int) -> None:
        """A node."""
        self.front = [self._builder.write_value(memory, value, after=self.front)]

    def wait_value(self, memory: Memory, value: int, *, condition: str, mask: int) -> None:
        """A node."""
        self.front = [self._builder.wait_value(memory, value, condition=condition, mask=mask, after=self.front)]

    def signal(self, semaphore: Semaphore, value: int, *, op: str) -> None:
        """A node."""
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
            if what.device is not self.stream.device:
                raise self._abroad(what.device.name)
            if what._capture is None:
                raise CaptureError(f"{self.stream.name} is being captured and cannot wait for {what!r}",
                                   cause="that stream is not in the capture")
            if what._capture.capture is not self.capture:
                raise CaptureError(f"{self.stream.name} and {what.name} are in different captures")
            self._follow(what._capture.front)
            return
        if what.device is not self.stream.device:
            raise self._abroad(what.device.name)
        if what._captured is None:
            if what._queue is None:
                return  # never recorded: done
            raise CaptureError(f"{self.stream.name} is being captured and cannot wait for {what!r}",
                               cause="the event was recorded outside of the capture",
                               hint="have the stream wait before the capture, or before each launch of the graph")
        lane, front = what._captured
        if lane.capture is not self.capture:
            raise CaptureError("the event was recorded in another capture")
        self._follow(front)

    def _abroad(self, device: str) -> CaptureError:
        return CaptureError(f"{self.stream.name} is being captured and cannot wait for {device}",
                            cause="a graph runs on one device",
                            hint="capture a graph on each device; their streams wait for each other between launches")

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
        seen = set(origin.front)
        left = list(origin.front)
        while left:
            for node in left.pop().after:
                if node not in seen:
                    seen.add(node)
                    left.append(node)
        return seen.issuperset(self.front)

    @property
    def _builder(self) -> GraphBuilder:
        return self.capture.builder

    def _follow(self, front: list[GraphNode]) -> None:
        self.front = list(dict.fromkeys([*self.front, *front]))


def fork(stream: Stream, event: Event) -> None:
    """Have a stream that waits for an event of a capture be captured, too."""
    assert event._captured is not None
    lane, front = event._captured
    capture: Capture = lane.capture
    if lane.stream.device is not stream.device:
        raise CaptureError(f"{stream.name} cannot wait for a place in a graph of {lane.stream.device.name}",
                           cause="a graph runs on one device", hint="wait for the stream that launches the graph")
    if capture._state != "under way":
        raise CaptureError(f"{stream.name} cannot wait for an event that was recorded in a capture that has ended",
                           cause="it stands for a place in a graph, not for a moment",
                           hint="record it again after the launch of the graph")
    capture._join(stream, list(front))
