"""What has been submitted and is not done: a copy of every queue's ring, taken to look for who holds whom up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from maia_rt.contract.commands import COMMAND, COMMAND_BYTES, INDIRECT, Opcode, PostOp
from maia_rt.errors import MaiaError
from maia_rt.queue import QueuePair

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device

Commands = npt.NDArray[np.void]
_NONE: Final = np.zeros(0, COMMAND)


@dataclass(frozen=True)
class Signaller:
    """A command that posts to a semaphore: where it stands, and in which place of its list if it stands in one."""

    queue: int
    sequence: int
    listed: int | None
    where: str


@dataclass(frozen=True)
class Outstanding:
    """One queue.

    Attributes
    ----------
    queue : QueuePair
    streams : tuple of str
        Who submits to it.
    progress, head : int
        The newest command that is done, and the newest one submitted.
    fault, failed : int
        Why the queue has stopped and at which command; zeros where it runs.
    commands : ndarray of COMMAND
        Those after `progress`.
    """

    queue: QueuePair
    streams: tuple[str, ...]
    progress: int
    head: int
    fault: int
    failed: int
    commands: Commands

    def where(self, sequence: int) -> str:
        """Which line submitted a command, empty where it is not known."""
        return self.queue.where(sequence)

    def raw(self, sequence: int) -> bytes:
        """The bytes of an outstanding command."""
        return bytes(self.commands[sequence - self.progress - 1])


def take(device: Device) -> dict[int, Outstanding]:
    """Look at every queue of a device."""
    streams: dict[int, list[str]] = {}
    for stream in device._open_streams():
        streams.setdefault(stream.queue.id, []).append(repr(stream).strip("<>"))
    found = {}
    for number, queue in sorted((queue.id, queue) for queue in device._queues):
        try:
            found[number] = look(queue, tuple(sorted(streams.get(number, ()))))
        except MaiaError:
            continue  # it was closed meanwhile
    return found


def look(queue: QueuePair, streams: tuple[str, ...] = ()) -> Outstanding:
    """Look at one queue; MaiaError where it has been closed."""
    ring = queue.ring
    state, fault, failed = ring.state
    progress, head = ring.poll(), ring.head
    slots = [ring.command_at(sequence) or bytes(COMMAND_BYTES) for sequence in range(progress + 1, head + 1)]
    commands = np.frombuffer(b"".join(slots), COMMAND) if slots else _NONE
    return Outstanding(queue, streams, progress, head, fault if state else 0, failed if state else 0, commands)


def listed(device: Device, command: bytes) -> Commands:
    """The commands of an INDIRECT list, empty for other commands and lists that do not lie in the driver's memory."""
    if command[0] != Opcode.INDIRECT:
        return _NONE
    row = np.frombuffer(command, INDIRECT)[0]
    view = device._pool.find(int(row["list"]), int(row["count"]) * COMMAND_BYTES)
    return _NONE if view is None else np.frombuffer(bytes(view), COMMAND)


def signallers(device: Device, queues: Iterable[Outstanding], semaphore: int) -> Iterator[Signaller]:
    """Every outstanding command that posts to a semaphore, those in lists too."""
    for one in queues:
        for at in np.flatnonzero(_posts_to(one.commands, semaphore) | (one.commands["opcode"] == Opcode.INDIRECT)):
            sequence = one.progress + 1 + int(at)
            if _posts_to(one.commands[at:at + 1], semaphore)[0]:
                yield Signaller(one.queue.id, sequence, None, one.where(sequence))
            for place in np.flatnonzero(_posts_to(listed(device, one.raw(sequence)), semaphore))[:1]:
                yield Signaller(one.queue.id, sequence, int(place), one.where(sequence))


def lost_signal(device: Device, semaphore: int) -> str:
    """Say which stream's fault a signal of a semaphore was lost to, empty where none was."""
    for stream in device._open_streams():
        for lost in stream._account.lost:
            if _posts_to(np.frombuffer(lost.raw, COMMAND), semaphore)[0]:
                return (f"{stream.name} would have signalled it, with a command that was lost when "
                        f"{stream._fault().what}")
    return ""


def _posts_to(commands: Commands, semaphore: int) -> npt.NDArray[Any]:
    post = commands["post"]
    found: npt.NDArray[Any] = ((post["op"] != PostOp.NONE) & (post["index"] == semaphore)).any(axis=1)
    return found
