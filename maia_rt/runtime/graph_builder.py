"""Graphs by hand: nodes, and what each comes after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from maia_rt.errors import InvalidArgument, InvalidType
from maia_rt.runtime import check
from maia_rt.runtime.buffer import Buffer, Memory
from maia_rt.runtime.graph_node import GraphNode, caller
from maia_rt.runtime.graph_operation import (
    ConditionOperation,
    CopyOperation,
    FillOperation,
    LaunchOperation,
    LoopOperation,
    Operation,
    SemaphoreWaitOperation,
    SignalOperation,
    WaitOperation,
    WriteOperation,
)
from maia_rt.runtime.graph_peer import PeerCopyOperation, PeerSignalOperation
from maia_rt.runtime.program import Kernel
from maia_rt.runtime.semaphore import WORD, Semaphore

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.graph import Graph



class GraphBuilder:
    """Nodes, and what each comes after; made by :meth:`maia_rt.Device.create_graph` or by a capture.

    Every node may come `after` others of the same graph: it starts when they are done. Nodes that do not come after
    each other may run side by side. Nothing runs until :meth:`instantiate` and :meth:`maia_rt.Graph.launch`.

    Attributes
    ----------
    device : Device
    nodes : list of GraphNode
        In the order in which they were made.
    """

    def __init__(self, device: Device, root: GraphBuilder | None = None) -> None:
        self.device = device
        self.nodes: list[GraphNode] = []
        self._root = root or self
        self._children: list[GraphBuilder] = []
        # Whether its nodes wait for those of other devices' builders, of the same capture.
        self._spans = False

    def copy(self, dst: Memory, src: Memory, *, after: Iterable[GraphNode] = ()) -> GraphNode:
        """Copy all of `src` to `dst`.

        Parameters
        ----------
        dst, src : Buffer or HostBuffer
            Contiguous, of the same number of bytes. One may be memory of a peer that the device reaches by itself.
        after : iterable of GraphNode
            Nodes of this graph.

        Raises
        ------
        InvalidArgument, InvalidType, ClosedError
            As :meth:`maia_rt.Stream.copy`; memory that only the host reaches is InvalidType.
        Unsupported
            A peer's memory that the device does not reach by itself.
        """
        own = [isinstance(memory, Buffer) and memory.device is self.device for memory in (dst, src)]
        foreign = [isinstance(memory, Buffer) and memory.device is not self.device for memory in (dst, src)]
        kind = PeerCopyOperation if any(own) and any(foreign) else CopyOperation
        return self._add(kind(self.device, dst, src), after)

    def fill(self, dst: Memory, value: int, width: int = 1, *, after: Iterable[GraphNode] = ()) -> GraphNode:
        """Fill memory with a pattern; as :meth:`maia_rt.Stream.fill`."""
        return self._add(FillOperation(self.device, dst, value, width), after)

    def launch(self, kernel: Kernel, *args: Any, clusters: int = 0, after: Iterable[GraphNode] = ()) -> GraphNode:
        """Launch a kernel; as :meth:`maia_rt.Stream.launch`."""
        return self._add(LaunchOperation(self.device, kernel, args, clusters), after)

    def write_value(self, memory: Memory, value: int, *, after: Iterable[GraphNode] = ()) -> GraphNode:
        """Write a 32-bit word at the start of `memory`."""
        return self._add(WriteOperation(self.device, memory, value), after)

    def wait_value(self, memory: Memory, value: int, *, condition: str = "ge", mask: int = WORD,
                   after: Iterable[GraphNode] = ()) -> GraphNode:
        """Wait until a 32-bit word at the start of `memory` meets a condition: 'ge', 'eq', 'ne' or 'and'.

        What comes behind it in the list is held up with it, whether it comes after this node or not. So what the wait
        waits for is written by the host, another stream or a node that this one comes after.
        """
        return self._add(WaitOperation(self.device, memory, value, condition, mask), after)

    def signal(self, semaphore: Semaphore, value: int = 1, *, op: str = "add", after: Iterable[GraphNode] = ()
               ) -> GraphNode:
        """Post to a semaphore, this device's or a peer's; as :meth:`maia_rt.Stream.signal`.

        Unsupported says that the device does not reach the peer by itself.
        """
        if isinstance(semaphore, Semaphore) and semaphore.device is not self.device:
            return self._add(PeerSignalOperation(self.device, semaphore, value, op), after)
        return self._add(SignalOperation(self.device, semaphore, value, op), after)

    def wait(self, semaphore: Semaphore, value: int | None, *, op: str = "ge", after: Iterable[GraphNode] = ()
             ) -> GraphNode:
        """Wait for a semaphore; as :meth:`maia_rt.Stream.wait`, and see :meth:`wait_value` for what is held up."""
        if value is None:
            raise InvalidArgument("a wait for a semaphore needs a value")
        return self._add(SemaphoreWaitOperation(self.device, semaphore, value, op), after)

    def join(self, *, after: Iterable[GraphNode]) -> GraphNode:
        """Return a node that does nothing: one name for several others."""
        return self._add(None, after)

    def child(self, graph: GraphBuilder, *, after: Iterable[GraphNode] = ()) -> GraphNode:
        """Put all of another graph here, as its nodes are when this one is instantiated.

        Raises
        ------
        InvalidArgument
            It belongs to another device, or this graph is part of it.
        """
        check.instance(graph, GraphBuilder, "a child", "make one with device.create_graph()")
        if graph.device is not self.device:
            raise InvalidArgument("the child graph belongs to another device")
        if graph._spans:
            raise InvalidArgument("a graph that spans devices is no child", hint="capture its commands again")
        if graph._root is self._root or graph._contains(self._root):
            raise InvalidArgument("a graph cannot be part of itself")
        node = self._add(None, after, graph)
        self._root._children.append(graph)
        return node

    def loop(self, count: int | None = None, *, while_: Memory | Semaphore | None = None, value: int = 0,
             condition: str = "ne", mask: int = WORD, after: Iterable[GraphNode] = ()) -> Body:
        """Repeat a body: ``with builder.loop(10) as body: body.copy(...)``.

        Parameters
        ----------
        count : int
            How often, at least once.
        while_ : Buffer, HostBuffer or Semaphore
            Instead: as long as the 32-bit word at its start, or the semaphore, meets the condition, which is looked at
            before each turn.
        value, condition, mask
            The condition, as for :meth:`wait_value`; by default, as long as the word is not 0.
        after : iterable of GraphNode

        Raises
        ------
        Unsupported
            The device's contract is older than 1.1.
        """
        if (count is None) is (while_ is None):
            raise InvalidArgument("a loop has a count, or a word while_ it runs: one of the two")
        if while_ is None:
            return self._open(LoopOperation(self.device, count or 0), after)
        return self._open(LoopOperation(self.device, 0, while_, value, condition, mask), after)

    def condition(self, memory: Memory | Semaphore, value: int = 0, *, condition: str = "ne", mask: int = WORD,
                  after: Iterable[GraphNode] = ()) -> Body:
        """Run a body only where a 32-bit word or a semaphore meets a condition.

        ``with builder.condition(flag) as body: ...``; parameters as for :meth:`loop`.
        """
        return self._open(ConditionOperation(self.device, memory, value, condition, mask), after)

    def instantiate(self) -> Graph:
        """Make a graph that can be launched of the nodes as they are now.

        Raises
        ------
        InvalidArgument
            It is empty, or too large.
        Unsupported
            The device runs no lists.
        ClosedError, OutOfMemory
        """
        from maia_rt.runtime.graph import Graph

        if self._root is not self:
            raise InvalidArgument("this is the body of a loop or condition", hint="instantiate the graph around it")
        if self._spans:
            raise InvalidArgument("these are the nodes of one device, of a capture of several",
                                  hint="instantiate all of it: capture.instantiate()")
        return Graph(self)

    # --- for what is built on builders -------------------------------------------------------------------------------

    def _add(self, operation: Operation | None, after: Iterable[GraphNode], body: GraphBuilder | None = None
             ) -> GraphNode:
        self.device._require_open()
        try:
            nodes = tuple(dict.fromkeys(after))
        except TypeError:
            raise InvalidType(f"after is {type(after).__name__}, not nodes", hint="after=[node]") from None
        for one in nodes:
            check.instance(one, GraphNode, "a node to come after")
            if one._builder is not self:
                raise InvalidArgument(f"{one!r} is no node of this graph",
                                      hint="nodes come after others of the same graph, loop or condition")
        node = GraphNode(self, operation, nodes, caller(), body)
        self.nodes.append(node)
        return node

    def _open(self, operation: Operation, after: Iterable[GraphNode]) -> Body:
        body = Body(self.device, self._root)
        body.node = self._add(operation, after, body)
        return body

    def _contains(self, other: GraphBuilder) -> bool:
        return any(child._root is other or child._contains(other) for child in self._children)

    def __iter__(self) -> Iterator[GraphNode]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self.nodes)} nodes for {self.device.name}>"


class Body(GraphBuilder):
    """What a loop repeats, or a condition guards; a context manager for the sake of the indentation.

    Attributes
    ----------
    node : GraphNode
        The loop or condition itself, in the graph around it.
    """

    node: GraphNode

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *_: object) -> None:
        pass
