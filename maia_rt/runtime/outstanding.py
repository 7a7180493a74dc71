"""What has been submitted and is not done: a copy of every queue's ring, taken to look for who holds whom up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from maia_rt.contract.commands import (
    COMMAND,
    COMMAND_BYTES,
    COPY,
    FILL,
    INDIRECT,
    WRITE_IMM,
    Opcode,
    PostOp,
)
from maia_rt.errors import MaiaError
from maia_rt.queue import QueuePair
from maia_rt.runtime.insight import Insight, look_inside

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device

Commands = npt.NDArray[np.void]
_NONE: Final = np.zeros(0, COMMAND)


@dataclass(frozen=True)
class Signaller:
    """A command that posts to a semaphore, or writes to a word of memory.

    Attributes
    ----------
    queue, stream, sequence : int, str, int
        Which command.
    listed : int or None
        Its place in a list, where it stands in one; `sequence` is the list's then.
    where : str
        The line that submitted it.
    lost : str
        Why it will never run, empty where it will.
    """

    queue: int
    stream: str
    sequence: int
    listed: int | None
    where: str
    lost: str = ""

    def __str__(self) -> str:
        return (f"command {self.sequence} of queue {self.queue} ({self.stream})"
                + (f", at {self.listed} of its list," if self.listed is not None else ""))


@dataclass(frozen=True)
class Outstanding:
    """One queue.

    Attributes
    ----------
    queue : QueuePair
    progress, head : int
        The newest command that is done, and the newest one submitted.
    commands : ndarray of COMMAND
        Those after `progress`.
    """

    queue: QueuePair
    progress: int
    head: int
    commands: Commands

    def where(self, sequence: int) -> str:
        """Which line submitted a command, empty where it is not known."""
        return self.queue.where(sequence)

    def stream(self, sequence: int) -> str:
        """Which stream submitted a command."""
        account = self.queue.accounts.get(self.queue.ring.owner(sequence))
        return account.name if account is not None else "no stream"

    def raw(self, sequence: int) -> bytes:
        """The bytes of an outstanding command."""
        return bytes(self.commands[sequence - self.progress - 1])

    def by(self, sequence: int, listed: int | None = None) -> Signaller:
        """One of its commands as a signaller."""
        return Signaller(self.queue.id, self.stream(sequence), sequence, listed, self.where(sequence))


class Scene:
    """A device at one moment: what it says itself, and what the driver knows.

    Attributes
    ----------
    device : Device
    insight : Insight
        What the device says.
    queues : dict
        Outstanding, by the queue's number.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.insight: Insight = look_inside(device._firmware)
        self.queues: dict[int, Outstanding] = {}
        for queue in sorted(device._queues, key=lambda queue: queue.id):
            try:
                self.queues[queue.id] = look(queue)
            except MaiaError:
                continue  # it was closed meanwhile

    def semaphore(self, index: int) -> int:
        """Return what a semaphore is now; that of a queue is its progress, all of it."""
        if index in self.queues:
            return self.queues[index].progress
        return self.device._firmware.semaphore(index)

    def signallers(self, semaphore: int) -> Iterator[Signaller]:
        """Every command that posts to a semaphore: the outstanding ones, those in lists too, and those that were lost.
        """
        for one in self.queues.values():
            for at in np.flatnonzero(_posts_to(one.commands, semaphore) | (one.commands["opcode"] == Opcode.INDIRECT)):
                sequence = one.progress + 1 + int(at)
                if _posts_to(one.commands[at:at + 1], semaphore)[0]:
                    yield one.by(sequence)
                for place in np.flatnonzero(_posts_to(self.listed(one.raw(sequence)), semaphore))[:1]:
                    yield one.by(sequence, int(place))
        for queue in self.queues.values():
            for account in list(queue.queue.accounts.values()):
                for lost in list(account.lost):
                    if _posts_to(np.frombuffer(lost.raw, COMMAND), semaphore)[0]:
                        why = (account.failure or {}).get("command", "")
                        yield Signaller(queue.queue.id, account.name, lost.sequence, None, lost.where,
                                        f"lost, for {account.name} has failed" + (f" in {why}" if why else ""))

    def writers(self, address: int) -> Iterator[Signaller]:
        """Every outstanding COPY, FILL and WRITE_IMM that writes to a byte of device memory."""
        for one in self.queues.values():
            for at in range(len(one.commands)):
                start, size = _target(bytes(one.commands[at]))
                if start <= address < start + size:
                    yield one.by(one.progress + 1 + at)

    def listed(self, command: bytes) -> Commands:
        """The commands of an INDIRECT list, none for other commands and lists outside of the driver's memory."""
        if command[0] != Opcode.INDIRECT:
            return _NONE
        row = np.frombuffer(command, INDIRECT)[0]
        view = self.device._pool.find(int(row["list"]), int(row["count"]) * COMMAND_BYTES)
        return _NONE if view is None else np.frombuffer(bytes(view), COMMAND)


def look(queue: QueuePair) -> Outstanding:
    """Look at one queue; MaiaError where it has been closed."""
    ring = queue.ring
    progress, head = ring.poll(), ring.head
    slots = [ring.command_at(sequence) or bytes(COMMAND_BYTES) for sequence in range(progress + 1, head + 1)]
    return Outstanding(queue, progress, head, np.frombuffer(b"".join(slots), COMMAND) if slots else _NONE)


def _posts_to(commands: Commands, semaphore: int) -> npt.NDArray[Any]:
    post = commands["post"]
    found: npt.NDArray[Any] = ((post["op"] != PostOp.NONE) & (post["index"] == semaphore)).any(axis=1)
    return found


def _target(raw: bytes) -> tuple[int, int]:
    """What a command writes: address and bytes; none where that is not known."""
    if raw[0] == Opcode.COPY:
        row = np.frombuffer(raw, COPY)[0]
        return int(row["dst"]), int(row["size"])
    if raw[0] == Opcode.FILL:
        row = np.frombuffer(raw, FILL)[0]
        return int(row["dst"]), int(row["size"])
    if raw[0] == Opcode.WRITE_IMM:
        row = np.frombuffer(raw, WRITE_IMM)[0]
        return int(row["dst"]), int(row["units"])
    return 0, 0
