"""From a graph's nodes to the list of commands that an INDIRECT runs.

Nodes go by level: one level holds those whose dependencies are all in earlier ones. The device may run the commands of
a level side by side; the first one of each carries BARRIER. A loop or a condition stands by itself, with its body laid
out in the same way between its branches:

    a loop of n            a loop while              a condition
    counter = 0            to body if true           to body if true
    body: ...              to end                    to end
    counter += 1           body: ...                 body: ...
    to body if not n       to body if true           end:
    end:                   end:
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from maia_rt.contract.commands import (
    COMMAND_BYTES,
    MAX_INDIRECT,
    BranchSource,
    CommandFlag,
    Condition,
    Opcode,
    PostOp,
)
from maia_rt.errors import InvalidArgument
from maia_rt.runtime.buffer import Memory
from maia_rt.runtime.graph_builder import GraphBuilder
from maia_rt.runtime.graph_node import GraphNode
from maia_rt.runtime.graph_operation import (
    CONDITIONS,
    CommandOperation,
    ConditionOperation,
    Listed,
    LoopOperation,
    Operation,
)
from maia_rt.runtime.semaphore import Semaphore

_COMMAND: Final = struct.Struct("<BBHIHBxI8xHBxI8xQQQ")
assert _COMMAND.size == COMMAND_BYTES
_ALIGNMENT: Final = 64
MAX_DEPTH: Final = 32
"""How deep loops, conditions and child graphs nest."""


class Step:
    """A node in its place in a graph; a child graph that is used twice has two for each of its nodes.

    Attributes
    ----------
    node : GraphNode
    operation : Operation
        As of now: updates replace it.
    after : list of Step
    body : list of Step
    first, end : int
        Its commands in the list, its body's included.
    counter : int
        Which loop counter it has.
    """

    __slots__ = ("after", "body", "counter", "end", "first", "level", "node", "operation")

    def __init__(self, node: GraphNode, operation: Operation, after: list[Step]) -> None:
        self.node = node
        self.operation = operation
        self.after = after
        self.body: list[Step] = []
        self.level: int = 1 + max((step.level for step in after), default=-1)
        self.first = self.end = self.counter = 0


class Layout:
    """A graph's list: which command belongs to which node.

    Parameters
    ----------
    builder : GraphBuilder

    Attributes
    ----------
    steps : list of Step
        In the order of the list, loops and conditions before what is in them.
    roots : list of Step
        Those that stand in no body; what they come after stands before them.
    count, counters, pointed_bytes : int
        Commands; loops that count; pinned memory besides the list.

    Raises
    ------
    InvalidArgument
        The graph is empty, nests too deep, or has more commands than a list may.
    """

    def __init__(self, builder: GraphBuilder) -> None:
        self.steps: list[Step] = []
        self.counters = 0
        self._listed: list[tuple[Step, Listed]] = []
        self._barriers: list[bool] = []
        self.roots = _steps(builder)
        self._place_all(self.roots)
        self.count = len(self._listed)
        if not self.count:
            raise InvalidArgument("the graph is empty", hint="add a node first")
        self._at: list[int] = []
        room = 0
        for _, listed in self._listed:
            self._at.append(room)
            room += -(-len(listed.pointed) // _ALIGNMENT) * _ALIGNMENT
        self.pointed_bytes = room
        self.owners = [step for step, _ in self._listed]

    # --- places ------------------------------------------------------------------------------------------------------

    def _place_all(self, steps: Iterable[Step]) -> None:
        # Those that wait come last in their level, for they hold up what is behind them.
        order = sorted(steps, key=lambda step: (step.level, 1 if step.operation._waits else 2 * isinstance(
            step.operation, LoopOperation | ConditionOperation)))
        level = -1
        for step in order:
            self.steps.append(step)
            step.first = len(self._listed)
            if isinstance(step.operation, CommandOperation):
                self._add(step, step.operation._listed(), step.level != level)
                level = step.level
            else:
                self._place_branches(step, step.operation)
                level = -1  # what comes next waits for the body
            step.end = len(self._listed)

    def _place_branches(self, step: Step, operation: LoopOperation | ConditionOperation) -> None:
        if isinstance(operation, LoopOperation) and operation.memory is None:
            step.counter, self.counters = self.counters, self.counters + 1
            head, tail = 1, 2
        else:
            head, tail = 2, int(isinstance(operation, LoopOperation))
        nothing = Listed(Opcode.NOP, 0, (0, 0, 0))
        for _ in range(head):
            self._add(step, nothing, True)
        self._place_all(step.body)
        for _ in range(tail):
            self._add(step, nothing, True)

    def _add(self, step: Step, listed: Listed, barrier: bool) -> None:
        if len(self._listed) == MAX_INDIRECT:
            raise InvalidArgument(f"the graph has more than {MAX_INDIRECT:,} commands",
                                  hint="launch several graphs one after the other")
        self._listed.append((step, listed))
        self._barriers.append(barrier)

    # --- commands ----------------------------------------------------------------------------------------------------

    def encode(self, memory: memoryview, address: int, counters: int) -> None:
        """Write the list and what it points at.

        Parameters
        ----------
        memory : memoryview
            `count` times 64 bytes and `pointed_bytes` more.
        address, counters : int
            Where the device finds it, and the loop counters.
        """
        for step in self.steps:
            self.encode_step(step, memory, address, counters)

    def encode_step(self, step: Step, memory: memoryview, address: int, counters: int) -> None:
        """Write one node's own commands; those of its body are others'."""
        operation = step.operation
        if isinstance(operation, CommandOperation):
            self._write(step.first, operation._listed(), memory, address)
            return
        first, end = step.first, step.end
        if operation.memory is not None:
            word, value, mask, condition = operation.memory, operation.value, operation.mask, operation.condition
            commands = {first: _branch(word, value, mask, condition, first + 2), first + 1: _jump(end)}
            if isinstance(operation, LoopOperation):
                commands[end - 1] = _branch(word, value, mask, condition, first + 2)
        else:
            assert isinstance(operation, LoopOperation)
            word_at = counters + 4 * step.counter
            commands = {
                first: Listed(Opcode.WRITE_IMM, 4, (word_at, 0, 0)),
                end - 2: Listed(Opcode.SIGNAL_REMOTE, 0, (word_at, PostOp.ADD | 1 << 32, 0)),
                end - 1: Listed(Opcode.BRANCH, 0, (word_at, operation.count | 0xFFFFFFFF << 32,
                                                   first + 1 | Condition.NE << 32 | 1 << 48)),
            }
        for index, listed in commands.items():
            self._write(index, listed, memory, address)

    def _write(self, index: int, listed: Listed, memory: memoryview, address: int) -> None:
        payload = list(listed.payload)
        if listed.pointed:
            at = self.count * COMMAND_BYTES + self._at[index]
            memory[at:at + len(listed.pointed)] = listed.pointed
            payload[listed.word] = address + at
        flags = CommandFlag.BARRIER if self._barriers[index] else 0
        _COMMAND.pack_into(memory, index * COMMAND_BYTES, listed.opcode, flags, 0, listed.units,
                           *listed.pre, *listed.post, *payload)

    def relocate(self, memory: memoryview, by: int) -> None:
        """Mend a copy of the list that lies `by` bytes further on."""
        for index, (_, listed) in enumerate(self._listed):
            if listed.pointed:
                at = index * COMMAND_BYTES + 40 + 8 * listed.word
                found = int.from_bytes(memory[at:at + 8], "little")
                memory[at:at + 8] = (found + by).to_bytes(8, "little")


def _steps(builder: GraphBuilder, depth: int = 0) -> list[Step]:
    """The steps of a graph, child graphs in place of the nodes that stand for them."""
    found: list[Step] = []
    _expand(builder, [], found, depth)
    return found


def _expand(builder: GraphBuilder, entry: list[Step], found: list[Step], depth: int) -> list[Step]:
    """Append the steps of a graph whose roots come after `entry`; return those that its successors come after."""
    if depth > MAX_DEPTH:
        raise InvalidArgument(f"loops, conditions and child graphs nest deeper than {MAX_DEPTH}",
                              cause="or a graph is its own child")
    ends: dict[GraphNode, list[Step]] = {}
    followed: set[GraphNode] = set()
    for node in builder.nodes:
        after: list[Step] = []
        for one in node.after:
            followed.add(one)
            after += ends[one]
        # A node that comes first in its graph comes after all that the graph comes after.
        after = list(dict.fromkeys(after)) if node.after else entry
        if node._operation is None:
            ends[node] = after if node._body is None else _expand(node._body, after, found, depth + 1)
            continue
        step = Step(node, node._operation, after)
        if node._body is not None:
            step.body = _steps(node._body, depth + 1)
        found.append(step)
        if len(found) > MAX_INDIRECT:
            raise InvalidArgument(f"the graph has more than {MAX_INDIRECT:,} commands")
        ends[node] = [step]
    last = [step for node in builder.nodes if node not in followed for step in ends[node]]
    return list(dict.fromkeys(last)) if builder.nodes else entry


def _branch(at: Memory | Semaphore, value: int, mask: int, condition: str, target: int) -> Listed:
    """A BRANCH on a word or a semaphore."""
    where, source = (at.index, BranchSource.SEMAPHORE) if isinstance(at, Semaphore) else (
        at.address, BranchSource.MEMORY)
    return Listed(Opcode.BRANCH, 0, (where, value | mask << 32, target | CONDITIONS[condition] << 32 | source << 48))


def _jump(target: int) -> Listed:
    """A BRANCH that is always taken."""
    return Listed(Opcode.BRANCH, 0, (0, 0, target | Condition.EQ << 32 | BranchSource.SEMAPHORE << 48))
