"""What has been submitted and is not done: a copy of every queue's ring, taken to look for who holds whom up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    SIGNAL_REMOTE,
    WRITE_IMM,
    Opcode,
    PostOp,
)
from maia_rt.errors import MaiaError
from maia_rt.queue import QueuePair
from maia_rt.runtime.insight import Insight

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.scenes import Scenes

Commands = npt.NDArray[np.void]
_NONE: Final = np.zeros(0, COMMAND)
_REMEMBERED: Final = 256


@dataclass(frozen=True, order=True)
class HangPlace:
    """A queue of a device.

    Attributes
    ----------
    device : str
    queue : int
    """

    device: str
    queue: int

    def _text(self, home: str) -> str:
        """Name it, as seen from a device."""
        return f"queue {self.queue}" + (f" of {self.device}" if self.device != home else "")


@dataclass(frozen=True)
class Signaller:
    """A command that posts to a semaphore, or writes to a word of memory.

    Attributes
    ----------
    device, queue, stream, sequence : str, int, str, int
        Which command.
    listed : int or None
        Its place in a list, where it stands in one; `sequence` is the list's then.
    where : str
        The line that submitted it.
    lost : str
        Why it will never run, empty where it will.
    """

    device: str
    queue: int
    stream: str
    sequence: int
    listed: int | None
    where: str
    lost: str = ""

    @property
    def place(self) -> HangPlace:
        """The queue it was submitted to."""
        return HangPlace(self.device, self.queue)

    def text(self, home: str) -> str:
        """Name it, as seen from a device."""
        return (f"command {self.sequence} of {self.place._text(home)} ({self.stream})"
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
    device : str
        Whose it is, for people.
    """

    queue: QueuePair
    progress: int
    head: int
    commands: Commands
    device: str = ""

    @property
    def place(self) -> HangPlace:
        """Which one."""
        return HangPlace(self.device, self.queue.id)

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
        return Signaller(self.device, self.queue.id, self.stream(sequence), sequence, listed, self.where(sequence))


class Scene:
    """A device at one moment: what it says itself, and what the driver knows.

    Attributes
    ----------
    device : Device
    label : str
        Its name, which no other one has.
    insight : Insight
        What the device says.
    others : Scenes
        It and the devices that it may wait for.
    queues : dict
        Outstanding, by the queue's number.
    """

    def __init__(self, device: Device, label: str, insight: Insight, others: Scenes) -> None:
        self.device = device
        self.label = label
        self.insight = insight
        self.others = others
        self.queues: dict[int, Outstanding] = {}
        for queue in sorted(device._queues, key=lambda queue: queue.id):
            try:
                self.queues[queue.id] = look(queue, label)
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
        yield from self._commands(lambda commands: _posts_to(commands, semaphore))

    def remote_signallers(self, address: int) -> Iterator[Signaller]:
        """Every command that posts to a semaphore of another device, at an address as this device sees it."""
        yield from self._commands(lambda commands: _signals_to(commands, address))

    def newest_signal(self, address: int) -> tuple[Outstanding, int] | None:
        """Find the newest command that has posted to a semaphore of another device, as far as the rings remember."""
        for one in self.queues.values():
            for sequence in range(one.progress, max(one.progress - _REMEMBERED, 0), -1):
                raw = one.queue.ring.command_at(sequence)
                if raw is None:
                    break
                if _signals_to(np.frombuffer(raw, COMMAND), address)[0]:
                    return one, sequence
        return None

    def _commands(self, posts: Callable[[Commands], npt.NDArray[Any]]) -> Iterator[Signaller]:
        for one in self.queues.values():
            for at in np.flatnonzero(posts(one.commands) | (one.commands["opcode"] == Opcode.INDIRECT)):
                sequence = one.progress + 1 + int(at)
                if posts(one.commands[at:at + 1])[0]:
                    yield one.by(sequence)
                for place in np.flatnonzero(posts(self.listed(one.raw(sequence))))[:1]:
                    yield one.by(sequence, int(place))
        for one in self.queues.values():
            for account in list(one.queue.accounts.values()):
                for lost in list(account.lost):
                    if posts(np.frombuffer(lost.raw, COMMAND))[0]:
                        why = (account.failure or {}).get("command", "")
                        yield Signaller(self.label, one.queue.id, account.name, lost.sequence, None, lost.where,
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


def label(device: Device) -> str:
    """A device's name, which several embedded ones share."""
    return device.name + (f" (process {device.emulator_pid})" if device.emulator_pid else "")


def look(queue: QueuePair, device: str = "") -> Outstanding:
    """Look at one queue of a device; MaiaError where it has been closed."""
    ring = queue.ring
    progress, head = ring.poll(), ring.head
    slots = [ring.command_at(sequence) or bytes(COMMAND_BYTES) for sequence in range(progress + 1, head + 1)]
    return Outstanding(queue, progress, head, np.frombuffer(b"".join(slots), COMMAND) if slots else _NONE, device)


def _posts_to(commands: Commands, semaphore: int) -> npt.NDArray[Any]:
    post = commands["post"]
    found: npt.NDArray[Any] = ((post["op"] != PostOp.NONE) & (post["index"] == semaphore)).any(axis=1)
    return found


def _signals_to(commands: Commands, address: int) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = (commands["opcode"] == Opcode.SIGNAL_REMOTE) & (
        commands.view(SIGNAL_REMOTE)["address"] == address)
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
