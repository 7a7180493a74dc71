"""What nodes of graphs do. Each checks what it is given as the stream's command does, and becomes a listed command."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from maia_rt.contract.commands import Condition, Opcode
from maia_rt.errors import ClosedError, InvalidArgument, InvalidType, Unsupported
from maia_rt.runtime import check
from maia_rt.runtime.buffer import Memory
from maia_rt.runtime.program import Kernel
from maia_rt.runtime.semaphore import MOST_ADDED, POSTS, WAITS, WORD, Semaphore

if TYPE_CHECKING:
    from typing_extensions import Self

    from maia_rt.runtime.device import Device

CONDITIONS: Final = {one.name.lower(): one for one in Condition}
_WIDTHS: Final = (1, 2, 4)
Range = tuple[int, int, Memory]


class Listed(NamedTuple):
    """One listed command, before it is known where the list lies.

    Attributes
    ----------
    opcode, units : int
    payload : three ints
    pointed, word : bytes, int
        What else the command needs in pinned memory, and the payload's word that receives its address.
    pre, post : three ints
        Semaphore, operation and value of what it waits for and of what it posts; the operation is 0 for none.
    """

    opcode: int
    units: int
    payload: tuple[int, int, int]
    pointed: bytes = b""
    word: int = 0
    pre: tuple[int, int, int] = (0, 0, 0)
    post: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, eq=False)
class NodeOperation:
    """What a node does; immutable. ``changed(dst=...)`` makes another one, checked anew."""

    device: Device
    _waits: ClassVar[bool] = False
    """Whether it may wait as long as it likes, for others than the graph's own nodes."""
    _is_asked: ClassVar[bool] = False
    """Whether it alone knows what it needs: `_require_open` is asked each time something has been closed."""

    def _peers(self) -> tuple[Device, ...]:
        """The other devices whose memory or semaphores it needs."""
        return ()

    def _uses(self) -> list[tuple[str, Memory]]:
        """Its memory, by the name of the argument."""
        return []

    def _needs(self) -> list[Any]:
        """What must be open, each with an attribute `closed`."""
        return [memory for _, memory in self._uses()]

    def _accesses(self) -> tuple[list[Range], list[Range]]:
        """What it reads and what it writes."""
        return [], []

    def _require_open(self) -> None:
        """Raise ClosedError where something it needs has been closed; the text names it."""
        for name, memory in self._uses():
            if memory.closed:
                raise ClosedError(f"{name}, {memory!r}, has been closed", cause="the graph would use its old address",
                                  hint=f"graph.update(node, ...) gives the node other memory for {name}")

    def changed(self, **changes: Any) -> Self:
        """The same with other arguments."""
        names = [name for name in self.__dataclass_fields__ if name != "device"]
        for name in changes:
            if name not in names:
                raise InvalidArgument(f"a {self.noun} has no {name!r}",
                                      hint=f"it has {', '.join(names)}" if names else "there is nothing to change")
        return replace(self, **changes)

    @property
    def noun(self) -> str:
        """``copy``, ``fill``, ..."""
        return _NOUNS[type(self)]

    @property
    def _text(self) -> str:
        """For people, such as ``copy of 4096 bytes``."""
        return self.noun

    def _own(self, memory: Any, what: str) -> None:
        if not isinstance(memory, Memory):
            raise InvalidType(f"{what} is {type(memory).__name__}, not a Buffer or HostBuffer",
                              cause="a replay can only read and write memory that the device reaches by itself",
                              hint="allocate a HostBuffer with device.allocate_host() and copy through that")
        if memory.device is not self.device:
            raise InvalidArgument(f"{what} belongs to another device")
        if memory.closed:
            raise ClosedError(f"{what} has been closed")
        if getattr(memory, "_strides", None) is not None:
            raise InvalidArgument(f"{what} is a strided view", hint="copy it to memory that is contiguous first")

    def _word(self, memory: Any) -> None:
        self._own(memory, "the word's memory")
        if memory.nbytes < 4 or memory.address % 4:
            raise InvalidArgument(f"a word has 4 bytes at a multiple of 4, not {memory.nbytes} at {memory.address:#x}")


def require_writable(memory: Memory, what: str) -> None:
    """Raise InvalidArgument where memory is read-only."""
    if getattr(memory, "readonly", False):
        raise InvalidArgument(f"{what} is read-only")


class CommandOperation(NodeOperation, ABC):
    """One listed command."""

    @abstractmethod
    def _listed(self) -> Listed:
        """The command."""


@dataclass(frozen=True, eq=False)
class CopyOperation(CommandOperation):
    """All of `src` to `dst`."""

    dst: Memory
    src: Memory

    def __post_init__(self) -> None:
        self._own(self.dst, "dst")
        self._own(self.src, "src")
        require_writable(self.dst, "dst")
        if self.dst.nbytes != self.src.nbytes:
            raise InvalidArgument(f"dst has {self.dst.nbytes} bytes, src {self.src.nbytes}", hint="copy a slice")

    def _listed(self) -> Listed:
        return Listed(Opcode.COPY, 0, (self.src.address, self.dst.address, self.dst.nbytes))

    def _uses(self) -> list[tuple[str, Memory]]:
        return [("dst", self.dst), ("src", self.src)]

    def _accesses(self) -> tuple[list[Range], list[Range]]:
        return [_range(self.src)], [_range(self.dst)]

    @property
    def _text(self) -> str:
        return f"copy of {self.dst.nbytes} bytes"


@dataclass(frozen=True, eq=False)
class FillOperation(CommandOperation):
    """`dst` with the low `width` bytes of `value`."""

    dst: Memory
    value: int
    width: int = 1

    def __post_init__(self) -> None:
        self._own(self.dst, "dst")
        require_writable(self.dst, "dst")
        if self.width not in _WIDTHS:
            raise InvalidArgument(f"a pattern has 1, 2 or 4 bytes, not {self.width}")
        if self.dst.nbytes % self.width or self.dst.address % self.width:
            raise InvalidArgument(f"{self.dst.nbytes} bytes at {self.dst.address:#x} are not aligned to the pattern's "
                                  f"{self.width}")
        check.integer(self.value, f"a pattern of {self.width} bytes", -(1 << 8 * self.width - 1),
                      (1 << 8 * self.width) - 1)

    def _listed(self) -> Listed:
        pattern = int(self.value) & (1 << 8 * self.width) - 1
        return Listed(Opcode.FILL, 0, (self.dst.address, self.dst.nbytes, pattern | self.width << 32))

    def _uses(self) -> list[tuple[str, Memory]]:
        return [("dst", self.dst)]

    def _accesses(self) -> tuple[list[Range], list[Range]]:
        return [], [_range(self.dst)]

    @property
    def _text(self) -> str:
        return f"fill of {self.dst.nbytes} bytes"


@dataclass(frozen=True, eq=False)
class LaunchOperation(CommandOperation):
    """A kernel with its arguments."""

    kernel: Kernel
    args: tuple[Any, ...]
    clusters: int = 0

    def __post_init__(self) -> None:
        check.instance(self.kernel, Kernel, "what is launched", "take it from a program: program['name']")
        if not isinstance(self.args, tuple):
            raise InvalidType(f"args is {type(self.args).__name__}, not a tuple", hint="give all of them")
        if self.kernel.program.device is not self.device:
            raise InvalidArgument(f"kernel {self.kernel.name!r} is loaded on another device")
        check.integer(self.clusters, "a mask of clusters", 0, (1 << self.device.capabilities.clusters) - 1)
        self.kernel.encode(self.args)
        spaces = getattr(self.device, "_spaces", None)
        if spaces is not None and spaces.tiles:
            spaces.check_launch(self.kernel, self.clusters, self.device._settle)

    def _listed(self) -> Listed:
        words = [struct.pack("<f4x", word) if isinstance(word, float) else word.to_bytes(8, "little")
                 for word in self.kernel.encode(self.args)]
        return Listed(Opcode.LAUNCH, self.clusters, (self.kernel.handle | len(words) << 32, 0, 0), b"".join(words), 1)

    def _uses(self) -> list[tuple[str, Memory]]:
        return [(f"argument {arg.name!r} of kernel {self.kernel.name!r}", memory)
                for arg, memory in zip(self.kernel.args, self.args, strict=True) if isinstance(memory, Memory)]

    def _needs(self) -> list[Any]:
        return [self.kernel.program, *super()._needs()]

    def _accesses(self) -> tuple[list[Range], list[Range]]:
        return self.kernel.accesses(self.args)

    def _require_open(self) -> None:
        if self.kernel.program.closed:
            raise ClosedError(f"kernel {self.kernel.name!r}: its program has been closed",
                              hint="keep the program open as long as the graph is launched")
        super()._require_open()

    @property
    def _text(self) -> str:
        return f"launch of {self.kernel.name}"


@dataclass(frozen=True, eq=False)
class WriteOperation(CommandOperation):
    """A 32-bit word."""

    memory: Memory
    value: int

    def __post_init__(self) -> None:
        self._word(self.memory)
        require_writable(self.memory, "the word's memory")
        check.integer(self.value, "a word", 0, WORD)

    def _listed(self) -> Listed:
        return Listed(Opcode.WRITE_IMM, 4, (self.memory.address, self.value, 0))

    def _uses(self) -> list[tuple[str, Memory]]:
        return [("memory", self.memory)]

    def _accesses(self) -> tuple[list[Range], list[Range]]:
        return [], [(self.memory.address, 4, self.memory)]

    @property
    def _text(self) -> str:
        return f"write of {self.value}"


@dataclass(frozen=True, eq=False)
class WaitOperation(CommandOperation):
    """Until a 32-bit word meets a condition."""

    memory: Memory
    value: int
    condition: str = "ge"
    mask: int = WORD
    _waits = True

    def __post_init__(self) -> None:
        self._word(self.memory)
        _check_condition(self.value, self.condition, self.mask)
        if not self.device.capabilities.wait_value:
            raise Unsupported(f"{self.device.name}: the device cannot wait for values in memory")

    def _listed(self) -> Listed:
        return Listed(Opcode.WAIT_VALUE, 0, (self.memory.address, self.value | self.mask << 32,
                                             CONDITIONS[self.condition]))

    def _uses(self) -> list[tuple[str, Memory]]:
        return [("memory", self.memory)]

    @property
    def _text(self) -> str:
        return f"wait until a word is {self.condition} {self.value}"


@dataclass(frozen=True, eq=False)
class SemaphoreOperation(CommandOperation):
    """What is done to a semaphore, or waited for."""

    semaphore: Semaphore

    def _needs(self) -> list[Any]:
        return [self.semaphore]

    def _require_open(self) -> None:
        self.semaphore._require_open()


@dataclass(frozen=True, eq=False)
class SignalOperation(SemaphoreOperation):
    """A post to a semaphore."""

    value: int = 1
    op: str = "add"

    def __post_init__(self) -> None:
        _check_semaphore(self.device, self.semaphore, self.op, POSTS)
        check.integer(self.value, "a semaphore's value", 0, MOST_ADDED if self.op == "add" else WORD)

    def _listed(self) -> Listed:
        return Listed(Opcode.NOP, 0, (0, 0, 0), post=(self.semaphore.index, POSTS[self.op], self.value))

    @property
    def _text(self) -> str:
        return f"signal of {self.semaphore.name}"


@dataclass(frozen=True, eq=False)
class SemaphoreWaitOperation(SemaphoreOperation):
    """Until a semaphore meets a value."""

    value: int
    op: str = "ge"
    _waits = True

    def __post_init__(self) -> None:
        _check_semaphore(self.device, self.semaphore, self.op, WAITS)
        check.integer(self.value, "a semaphore's value", 0, WORD)

    def _listed(self) -> Listed:
        return Listed(Opcode.NOP, 0, (0, 0, 0), pre=(self.semaphore.index, WAITS[self.op], self.value))

    @property
    def _text(self) -> str:
        return f"wait for {self.semaphore.name}"


@dataclass(frozen=True, eq=False)
class LoopOperation(NodeOperation):
    """Its body, so many times, or as long as a word or semaphore meets a condition."""

    count: int = 0
    memory: Memory | Semaphore | None = None
    value: int = 0
    condition: str = "ne"
    mask: int = WORD

    def __post_init__(self) -> None:
        _require_branch(self.device)
        if self.memory is None:
            check.integer(self.count, "the count of a loop", 1, WORD)
        else:
            _check_source(self, self.memory)
            _check_condition(self.value, self.condition, self.mask)

    def _needs(self) -> list[Any]:
        return [] if self.memory is None else [self.memory]

    def _require_open(self) -> None:
        super()._require_open()
        if isinstance(self.memory, Semaphore):
            self.memory._require_open()

    def changed(self, **changes: Any) -> Self:
        """A loop keeps its kind: with a count, or with a condition."""
        for name in changes:
            if (name == "count") is not (self.memory is None):
                raise InvalidArgument(f"this loop has no {name!r}",
                                      hint="make another graph for a loop of the other kind")
        return super().changed(**changes)

    def _uses(self) -> list[tuple[str, Memory]]:
        return [("while_", self.memory)] if isinstance(self.memory, Memory) else []

    @property
    def _text(self) -> str:
        return f"loop of {self.count}" if self.memory is None else f"loop while {self.condition} {self.value}"


@dataclass(frozen=True, eq=False)
class ConditionOperation(NodeOperation):
    """Its body, where a word or semaphore meets a condition."""

    memory: Memory | Semaphore
    value: int = 0
    condition: str = "ne"
    mask: int = WORD

    def __post_init__(self) -> None:
        _require_branch(self.device)
        _check_source(self, self.memory)
        _check_condition(self.value, self.condition, self.mask)

    def _needs(self) -> list[Any]:
        return [] if self.memory is None else [self.memory]

    def _require_open(self) -> None:
        super()._require_open()
        if isinstance(self.memory, Semaphore):
            self.memory._require_open()

    def _uses(self) -> list[tuple[str, Memory]]:
        return [("memory", self.memory)] if isinstance(self.memory, Memory) else []

    @property
    def _text(self) -> str:
        return f"if {self.condition} {self.value}"


Operation = CommandOperation | LoopOperation | ConditionOperation


def _check_condition(value: Any, condition: Any, mask: Any) -> None:
    if not isinstance(condition, str) or condition not in CONDITIONS:
        raise InvalidArgument(f"a condition is one of {', '.join(map(repr, CONDITIONS))}, not {condition!r:.40}")
    check.integer(value, "a word", 0, WORD)
    check.integer(mask, "a mask", 0, WORD)


def _check_semaphore(device: Device, semaphore: Any, op: Any, ops: Mapping[str, int]) -> None:
    check.instance(semaphore, Semaphore, "a semaphore", "make one with device.create_semaphore()")
    if semaphore.device is not device:
        raise InvalidArgument(f"{semaphore.name} belongs to another device")
    semaphore._require_open()
    if not isinstance(op, str) or op not in ops:
        raise InvalidArgument(f"an operation is one of {', '.join(map(repr, ops))}, not {op!r:.40}")


def _check_source(operation: NodeOperation, source: Any) -> None:
    if isinstance(source, Semaphore):
        _check_semaphore(operation.device, source, "ge", WAITS)
    else:
        operation._word(source)


def _require_branch(device: Device) -> None:
    if not device.capabilities.branch:
        raise Unsupported(f"{device.name}: the device has no branches in lists",
                          cause="its firmware is older than contract 1.1")


def _range(memory: Memory) -> Range:
    return memory.address, memory.nbytes, memory


_NOUNS: Final[dict[type, str]] = {
    CopyOperation: "copy", FillOperation: "fill", LaunchOperation: "launch", WriteOperation: "write",
    WaitOperation: "wait", SignalOperation: "signal", SemaphoreWaitOperation: "wait",
    LoopOperation: "loop", ConditionOperation: "condition",
}
SAVED: Final = frozenset(_NOUNS.values())
"""The nouns that a graph's file knows."""


def require_same_room(old: Operation, new: Operation) -> None:
    """Refuse to put an operation in the place of one that needs less or more room in the list."""
    if (isinstance(old, LaunchOperation) and isinstance(new, LaunchOperation)
            and len(old._listed().pointed) != len(new._listed().pointed)):
        raise InvalidArgument("another kernel of the node has to take as many arguments",
                              hint="instantiate the graph anew")
