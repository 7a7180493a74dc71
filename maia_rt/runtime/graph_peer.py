"""What nodes of graphs do on other devices: copies, signals, and the order between the parts of one that spans some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from maia_rt.contract.commands import Opcode, PostOp, WaitOp
from maia_rt.errors import ClosedError, InvalidArgument, InvalidType
from maia_rt.runtime import check
from maia_rt.runtime.buffer import Buffer, Memory
from maia_rt.runtime.graph_operation import CommandOperation, Listed, Range, require_writable
from maia_rt.runtime.semaphore import MOST_ADDED, POSTS, WORD, Semaphore

if TYPE_CHECKING:
    from typing_extensions import Self

    from maia_rt.runtime.device import Device

_ADD_ONE: Final = PostOp.ADD | 1 << 32


@dataclass(frozen=True, eq=False)
class PeerCopyOperation(CommandOperation):
    """All of `src` to `dst`, one of them in a peer's memory; the device reaches it by itself."""

    dst: Memory
    src: Memory
    _is_asked = True

    def __post_init__(self) -> None:
        pull = isinstance(self.src, Memory) and self.src.device is not self.device
        near, far = (self.dst, self.src) if pull else (self.src, self.dst)
        self._own(near, "dst" if pull else "src")
        what = "src" if pull else "dst"
        if not isinstance(far, Buffer):
            raise InvalidType(f"{what} is {type(far).__name__}, not a Buffer of a peer") if not isinstance(
                far, Memory) else InvalidArgument(f"{what} belongs to another device: it is pinned for "
                                                  f"{far.device.name}")
        if far.closed:
            raise ClosedError(f"{what} has been closed")
        if not far.contiguous:
            raise InvalidArgument(f"{what} is a strided view", hint="copy it to memory that is contiguous first")
        require_writable(self.dst, "dst")
        if self.dst.nbytes != self.src.nbytes:
            raise InvalidArgument(f"dst has {self.dst.nbytes} bytes, src {self.src.nbytes}", hint="copy a slice")
        self._address(far)

    def _address(self, memory: Memory) -> int:
        """Where the device sees it; Unsupported where it does not reach it."""
        return memory.address if memory.device is self.device else self.device.peer(memory.device).address(memory)

    def _listed(self) -> Listed:
        return Listed(Opcode.COPY, 0, (self._address(self.src), self._address(self.dst), self.dst.nbytes))

    def _require_open(self) -> None:
        super()._require_open()
        for memory in (self.src, self.dst):
            self._address(memory)

    def _peers(self) -> tuple[Device, ...]:
        return tuple(memory.device for memory in (self.dst, self.src) if memory.device is not self.device)

    def _uses(self) -> list[tuple[str, Memory]]:
        return [("dst", self.dst), ("src", self.src)]

    def _accesses(self) -> tuple[list[Range], list[Range]]:
        reads, writes = ([(memory.address, memory.nbytes, memory)] if memory.device is self.device else []
                         for memory in (self.src, self.dst))
        return reads, writes

    @property
    def noun(self) -> str:
        """For texts."""
        return "copy between devices"

    @property
    def _text(self) -> str:
        return f"copy of {self.dst.nbytes} bytes between devices"


@dataclass(frozen=True, eq=False)
class PeerSignalOperation(CommandOperation):
    """A post to a semaphore of a peer."""

    semaphore: Semaphore
    value: int = 1
    op: str = "add"
    _is_asked = True

    def __post_init__(self) -> None:
        check.instance(self.semaphore, Semaphore, "a semaphore", "make one with device.create_semaphore()")
        if not isinstance(self.op, str) or self.op not in POSTS:
            raise InvalidArgument(f"an operation is one of {', '.join(map(repr, POSTS))}, not {self.op!r:.40}")
        check.integer(self.value, "a semaphore's value", 0, MOST_ADDED if self.op == "add" else WORD)
        self.semaphore._require_open()
        self.device.peer(self.semaphore.device).semaphore(self.semaphore)

    def _listed(self) -> Listed:
        address = self.device.peer(self.semaphore.device).semaphore(self.semaphore)
        return Listed(Opcode.SIGNAL_REMOTE, 0, (address, POSTS[self.op] | self.value << 32, 0))

    def _require_open(self) -> None:
        self.semaphore._require_open()
        self.device.peer(self.semaphore.device).semaphore(self.semaphore)

    def _peers(self) -> tuple[Device, ...]:
        return (self.semaphore.device,)

    @property
    def noun(self) -> str:
        """For texts."""
        return "signal to another device"

    @property
    def _text(self) -> str:
        return f"signal of {self.semaphore.name} of {self.semaphore.device.name}"


class Edge:
    """One node of a capture on one device comes after another's; each graph made of it has a semaphore for it.

    Parameters
    ----------
    source, target : Device
        Who signals, and who waits.
    """

    def __init__(self, source: Device, target: Device) -> None:
        self.source = source
        self.target = target


@dataclass(frozen=True, eq=False)
class _EdgeOperation(CommandOperation):
    edge: Edge
    semaphore: Semaphore | None = None
    _is_asked = True

    def changed(self, **_: Any) -> Self:
        """Refused."""
        raise InvalidArgument(f"a {self.noun} cannot be changed", hint="capture the order anew")

    def _require_open(self) -> None:
        if self.semaphore is not None:
            self.semaphore._require_open()

    @property
    def noun(self) -> str:
        """For texts."""
        return "step to another device"


@dataclass(frozen=True, eq=False)
class EdgeSignal(_EdgeOperation):
    """Counts one more in the edge's semaphore."""

    def _listed(self) -> Listed:
        address = 0 if self.semaphore is None else self.device.peer(self.edge.target).semaphore(self.semaphore)
        return Listed(Opcode.SIGNAL_REMOTE, 0, (address, _ADD_ONE, 0))

    def _require_open(self) -> None:
        super()._require_open()
        if self.semaphore is not None:
            self.device.peer(self.edge.target).semaphore(self.semaphore)

    def _peers(self) -> tuple[Device, ...]:
        return (self.edge.target,)

    @property
    def _text(self) -> str:
        return f"signal to {self.edge.target.name}"


@dataclass(frozen=True, eq=False)
class EdgeWait(_EdgeOperation):
    """Waits for one in the edge's semaphore, and takes it: so it is right for every replay, in flight or not."""

    _waits = True

    def _listed(self) -> Listed:
        index = 0 if self.semaphore is None else self.semaphore.index
        return Listed(Opcode.NOP, 0, (0, 0, 0), pre=(index, WaitOp.ACQUIRE, 1))

    @property
    def _text(self) -> str:
        return f"wait for {self.edge.source.name}"
