"""Hang reports: who waits for whom, followed to the root."""

from __future__ import annotations

import dataclasses
import enum
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from maia_rt.contract.commands import COMMAND, LAUNCH, Opcode, WaitOp, decode
from maia_rt.errors import FaultCode, MaiaError
from maia_rt.observe import live
from maia_rt.runtime.outstanding import Outstanding, Signaller, signallers, take

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device

SCHEMA: Final = 1
"""Version of :meth:`HangReport.to_json`; grows when a key changes its meaning or goes."""


class HangVerdict(enum.Enum):
    """What a device is at, in one word."""

    IDLE = "idle"
    """Nothing is outstanding."""
    RUNNING = "running"
    """Commands run; none waits for another queue."""
    WAITING = "waiting"
    """Somebody waits, and what it waits for can still come."""
    FAULT = "fault"
    """Somebody waits for a queue that has stopped at a fault."""
    UNSIGNALLED = "unsignalled"
    """Somebody waits for what nothing that is submitted will ever signal."""
    DEADLOCK = "deadlock"
    """Queues wait for each other in a circle."""
    FIRMWARE = "firmware"
    """The device's firmware does not answer."""


@dataclass(frozen=True)
class HangWait:
    """One thing that a command waits for.

    Attributes
    ----------
    text : str
        The whole of it, as a clause.
    queues : tuple of int
        The queues that should bring it about; empty where nothing that is submitted will.
    semaphore, value, wanted : int or None
        For a semaphore: its number, what it is, and what it is compared with.
    signallers : tuple of Signaller
        The outstanding commands that post to it.
    by_program : bool
        Whether the program itself may signal it: it holds the semaphore, or has a callback to run.
    """

    text: str
    queues: tuple[int, ...] = ()
    semaphore: int | None = None
    value: int | None = None
    wanted: int | None = None
    signallers: tuple[Signaller, ...] = ()
    by_program: bool = False


@dataclass(frozen=True)
class HangLink:
    """One queue with outstanding commands: a link of the chain.

    Attributes
    ----------
    queue : int
    streams : tuple of str
        Who submits to it.
    state : str
        ``runs``, ``waits`` or ``stopped``.
    sequence : int
        The oldest command that is not done.
    outstanding : int
        How many are not.
    command : str
        That command, decoded.
    where : str
        The line that submitted it, ``file:line``; empty where that is not known.
    waits : tuple of HangWait
        What is not there yet.
    detail : str
        What else is known, such as the fault of a queue that has stopped.
    """

    queue: int
    streams: tuple[str, ...]
    state: str
    sequence: int
    outstanding: int
    command: str
    where: str
    waits: tuple[HangWait, ...] = ()
    detail: str = ""

    def __str__(self) -> str:
        who = f"queue {self.queue}" + (f" ({', '.join(self.streams)})" if self.streams else "")
        at = f", submitted at {self.where}" if self.where else ""
        verb = {"runs": "is under way", "waits": "waits", "stopped": "failed"}[self.state]
        more = "" if self.outstanding == 1 else f" ({self.outstanding - 1} more behind it)"
        text = f"{who}: command {self.sequence} {verb}{more}: {self.command}{at}"
        for part in (*(wait.text for wait in self.waits), self.detail):
            text += f"; {part}" if part else ""
        return text


@dataclass(frozen=True)
class HangReport:
    """Who waits for whom on a device; see :meth:`maia_rt.Device.hang_report`. ``str`` of it is for people.

    Attributes
    ----------
    device : str
    verdict : HangVerdict
    sentence : str
        The verdict with its reason.
    links : tuple of HangLink
        The queues with outstanding commands: first who waits, then whom it waits for, down to the root.
    cycle : tuple of int
        The queues of a deadlock, in the order in which they wait for each other.
    firmware : str
        Why the device itself could not be asked; empty where it could.
    """

    device: str
    verdict: HangVerdict
    sentence: str
    links: tuple[HangLink, ...] = ()
    cycle: tuple[int, ...] = ()
    firmware: str = ""

    @property
    def hangs(self) -> bool:
        """Whether somebody waits: the verdict is neither idle nor running."""
        return self.verdict not in (HangVerdict.IDLE, HangVerdict.RUNNING)

    def to_json(self) -> dict[str, Any]:
        """Return the report as what JSON knows, with its ``schema``."""
        return {"schema": SCHEMA, **dataclasses.asdict(self), "verdict": self.verdict.value}

    def __str__(self) -> str:
        lines = [f"{self.device}: {self.verdict.value}: {self.sentence}"]
        if self.firmware:
            lines.append(f"  the device could not be asked, this is what the driver knows: {self.firmware}")
        return "\n".join([*lines, *(f"  {link}" for link in self.links)])


def examine(device: Device, focus: int | None = None) -> HangReport:
    """Look at a device now.

    Parameters
    ----------
    device : Device
    focus : int, optional
        A queue: the report is about it and those it waits for. None: about all.
    """
    firmware = device._firmware.ailment()
    queues = take(device)
    links = {number: _link(device, queues, one) for number, one in queues.items() if len(one.commands) or one.fault}
    order = list(_chain(links, [focus] if focus is not None else _starts(links)))
    verdict, sentence, cycle = _judge({number: links[number] for number in order}, queues)
    if firmware:
        verdict, sentence = HangVerdict.FIRMWARE, f"the device does not answer; {sentence}"
    return HangReport(device.name, verdict, sentence, tuple(links[number] for number in order), cycle, firmware)


# --- one queue -------------------------------------------------------------------------------------------------------


def _link(device: Device, queues: dict[int, Outstanding], one: Outstanding) -> HangLink:
    sequence = one.failed or one.progress + 1
    raw = one.queue.ring.command_at(sequence) or b""
    waits = () if one.fault else tuple(_waits(device, queues, raw))
    detail = ""
    if one.fault:
        fault = FaultCode(one.fault).name if one.fault in set(FaultCode) else str(one.fault)
        detail = f"the queue has stopped with {fault} until its stream recovers"
    elif raw and raw[0] == Opcode.LAUNCH:
        detail = _kernel(device, raw)
    return HangLink(one.queue.id, one.streams, "stopped" if one.fault else "waits" if waits else "runs", sequence,
                    max(one.head - one.progress, 1), decode(raw), one.where(sequence), waits, detail)


def _kernel(device: Device, raw: bytes) -> str:
    handle = int(np.frombuffer(raw, LAUNCH)[0]["kernel"])
    names = [kernel.name for program in list(device._programs) for kernel in program.values()
             if not program.closed and kernel.handle == handle]
    return f"kernel {handle} is {names[0]}" if names else ""


def _waits(device: Device, queues: dict[int, Outstanding], raw: bytes) -> Iterator[HangWait]:
    """What a command waits for before it starts, as far as that is not there."""
    for op in np.frombuffer(raw, COMMAND)[0]["pre"]:
        index, kind, wanted = int(op["index"]), int(op["op"]), int(op["value"])
        if kind == WaitOp.NONE:
            continue
        if index in queues:
            value = queues[index].progress
        else:
            try:
                value = device._firmware.semaphore(index)
            except MaiaError as error:
                yield HangWait(f"may wait for semaphore {index} {_SIGNS.get(kind, '?')} {wanted}, which cannot be "
                               f"read: {error.what}", by_program=True, semaphore=index, wanted=wanted)
                continue
        if not _holds(kind, value, wanted):
            if index < device.capabilities.max_queues:
                yield _mirror_wait(queues, index, kind, value, wanted)
            else:
                yield _semaphore_wait(device, queues, index, kind, value, wanted)


def _holds(kind: int, value: int, wanted: int) -> bool:
    distance = _distance(value, wanted)
    return distance == 0 if kind == WaitOp.EQ else distance >= 0


def _mirror_wait(queues: dict[int, Outstanding], index: int, kind: int, value: int, wanted: int) -> HangWait:
    other = queues.get(index)
    facts: dict[str, Any] = {"semaphore": index, "value": value & 0xFFFFFFFF, "wanted": wanted}
    if other is None:
        return HangWait(f"waits for queue {index}, which there is none of", **facts)
    command = value - _distance(value, wanted)
    text = f"waits for command {command} of queue {index}, which has done {value}"
    if kind == WaitOp.EQ and command < value:
        return HangWait(f"{text} and will not come back to it", **facts)
    if command > other.head:
        return HangWait(f"{text}; only {other.head} were submitted to it", **facts)
    where = other.where(command)
    return HangWait(text + (f"; that command was submitted at {where}" if where else ""), (index,), **facts)


def _semaphore_wait(device: Device, queues: dict[int, Outstanding], index: int, kind: int, value: int,
                    wanted: int) -> HangWait:
    posts = tuple(signallers(device, queues.values(), index))
    text = f"waits for semaphore {index} {_SIGNS.get(kind, '?')} {wanted}, which is {value}"
    for post in posts[:3]:
        text += (f"; command {post.sequence} of queue {post.queue} will signal it"
                 + (f", at {post.listed} of its list" if post.listed is not None else "")
                 + (f", submitted at {post.where}" if post.where else ""))
    if len(posts) > 3:
        text += f"; so will {len(posts) - 3} more"
    if not posts:
        text += f"; {_NOBODY}"
    return HangWait(text, tuple(dict.fromkeys(post.queue for post in posts)), index, value, wanted, posts)


_SIGNS: Final[dict[int, str]] = {WaitOp.GE: ">=", WaitOp.EQ: "==", WaitOp.ACQUIRE: ">= (to take)"}
_NOBODY: Final = "nobody that is submitted will ever signal it"


# --- all of them -----------------------------------------------------------------------------------------------------


def _starts(links: dict[int, HangLink]) -> list[int]:
    """Where chains start: with those that wait and nobody waits for; then the rest, waiting ones first."""
    awaited = {queue for link in links.values() for wait in link.waits for queue in wait.queues}
    return sorted(links, key=lambda number: (not links[number].waits, number in awaited, number))


def _chain(links: dict[int, HangLink], starts: Sequence[int]) -> Iterator[int]:
    """The queues from `starts` on, each before those it waits for, none twice."""
    seen: set[int] = set()
    left = [number for number in reversed(starts) if number in links]
    while left:
        number = left.pop()
        if number not in seen:
            seen.add(number)
            yield number
            left += [queue for wait in reversed(links[number].waits) for queue in reversed(wait.queues)
                     if queue in links]


@dataclass
class _Standing:
    """What can still go on, found by starting from what runs."""

    links: dict[int, HangLink]
    moving: set[int] = field(default_factory=set)

    def settle(self) -> None:
        """A queue goes on if each of its waits can be met by one that does."""
        self.moving = {number for number, link in self.links.items() if link.state == "runs"}
        found = True
        while found:
            found = False
            for number, link in self.links.items():
                if number not in self.moving and link.state == "waits" and all(
                        wait.by_program or self.moving.intersection(wait.queues) for wait in link.waits):
                    self.moving.add(number)
                    found = True


def _judge(links: dict[int, HangLink], queues: dict[int, Outstanding]) -> tuple[HangVerdict, str, tuple[int, ...]]:
    standing = _Standing(links)
    standing.settle()
    stuck = {number: link for number, link in links.items()
             if link.state == "waits" and number not in standing.moving}
    for link in stuck.values():
        for wait in link.waits:
            if not wait.queues and not wait.by_program:
                return HangVerdict.UNSIGNALLED, f"queue {link.queue} {wait.text}", ()
    for link in stuck.values():
        for wait in link.waits:
            for queue in wait.queues:
                if queue in links and links[queue].state == "stopped":
                    return (HangVerdict.FAULT, f"queue {link.queue} waits for queue {queue}, which failed at command "
                            f"{links[queue].sequence}; {links[queue].detail}", ())
    cycle = _cycle(stuck)
    if cycle:
        ring = ", which waits for ".join(f"queue {number}" for number in (*cycle[1:], cycle[0]))
        alone = "itself: what it waits for is behind it" if len(cycle) == 1 else ring
        return HangVerdict.DEADLOCK, f"queue {cycle[0]} waits for {alone}", cycle
    waiting = [link for link in links.values() if link.state == "waits"]
    if waiting:
        root = next((link for link in links.values() if link.state == "runs"), None)
        end = (f"; in the end for queue {root.queue}, where command {root.sequence} is under way: {root.command}"
               if root else "")
        return HangVerdict.WAITING, f"queue {waiting[0].queue} {waiting[0].waits[0].text}{end}", ()
    for link in links.values():
        if link.state == "runs":
            return HangVerdict.RUNNING, f"queue {link.queue} is at command {link.sequence}: {link.command}", ()
    stopped = ", ".join(str(number) for number in links)
    if stopped:
        return HangVerdict.IDLE, f"nothing runs; stopped at a fault: queue {stopped}", ()
    return HangVerdict.IDLE, f"nothing is outstanding on {len(queues)} queues", ()


def _cycle(stuck: dict[int, HangLink]) -> tuple[int, ...]:
    """Follow, from any of those that are stuck, one that it waits for, until a queue comes again."""
    for first in stuck:
        path: list[int] = []
        at: int | None = first
        while at is not None and at not in path:
            path.append(at)
            at = next((queue for wait in stuck[at].waits for queue in wait.queues if queue in stuck), None)
        if at is not None:
            return tuple(path[path.index(at):])
    return ()


def _distance(value: int, base: int) -> int:
    return (value - base + (1 << 31)) % (1 << 32) - (1 << 31)


# --- for whom it is made ---------------------------------------------------------------------------------------------


def on_timeout(device: Device) -> Callable[[int], HangReport | None]:
    """What a queue whose wait timed out calls with its number, to have that explained."""
    reference = weakref.ref(device)

    def explain(queue: int) -> HangReport | None:
        alive = reference()
        # While it closes, waits are short and nobody reads why they ended.
        return None if alive is None or alive.closed else examine(alive, queue)

    return explain


def go_live(device: Device) -> live.Attachment | None:
    """Let ``maia hang`` ask for the device's report from outside of the process."""
    reference = weakref.ref(device)

    def hang() -> dict[str, Any]:
        alive = reference()
        if alive is None or alive.closed:
            return {"schema": SCHEMA, "verdict": HangVerdict.IDLE.value, "sentence": "the device has just been closed",
                    "hangs": False, "text": "the device has just been closed"}
        report = examine(alive)
        return {**report.to_json(), "hangs": report.hangs, "text": str(report)}

    return live.attach(device.name, device.transport.info.kind, {"hang": hang})
