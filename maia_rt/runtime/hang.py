"""Hang reports: who waits for whom, followed to the root."""

from __future__ import annotations

import dataclasses
import enum
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from maia_rt.contract.commands import QueueStage, decode
from maia_rt.observe import live
from maia_rt.runtime.outstanding import Outstanding, Scene
from maia_rt.runtime.waits import HangWait, describe, pre_waits, semaphore_wait, stage_waits

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device

__all__ = ["HangLink", "HangReport", "HangVerdict", "HangWait", "examine", "go_live", "on_timeout"]

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
    """Somebody waits for what was lost when another stream failed."""
    UNSIGNALLED = "unsignalled"
    """Somebody waits for what nothing that is submitted will ever signal."""
    DEADLOCK = "deadlock"
    """Queues wait for each other in a circle."""
    FIRMWARE = "firmware"
    """The device's firmware does not answer."""


@dataclass(frozen=True)
class HangLink:
    """One queue with outstanding commands: a link of the chain.

    Attributes
    ----------
    queue, stream : int, str
        Where the command is, and whose it is.
    state : str
        ``runs`` or ``waits``.
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
    seconds : float or None
        How long it has been at that, where the device says so.
    detail : str
        What else is known: the kernel's name, the place in a list.
    """

    queue: int
    stream: str
    state: str
    sequence: int
    outstanding: int
    command: str
    where: str
    waits: tuple[HangWait, ...] = ()
    seconds: float | None = None
    detail: str = ""

    def __str__(self) -> str:
        at = f", submitted at {self.where}" if self.where else ""
        time = "" if self.seconds is None else f" for {self.seconds:.3g} s"
        behind = f"; {self.outstanding - 1} more behind it" if self.outstanding > 1 else ""
        parts = [self.detail, *(wait.text for wait in self.waits)]
        return (f"queue {self.queue} ({self.stream}): command {self.sequence} {self.state}{time}: {self.command}{at}"
                + "".join(f"; {part}" for part in parts if part) + behind)


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
    scene = Scene(device)
    links = _links(scene)
    return _report(scene, links, [focus] if focus is not None else _starts(links))


def examine_semaphore(device: Device, index: int, kind: int, value: int, wanted: int) -> HangReport:
    """Look at who should signal a semaphore that the program waits for; `kind` is a WaitOp."""
    scene = Scene(device)
    wait = semaphore_wait(scene, index, kind, value, wanted)
    report = _report(scene, _links(scene), wait.queues)
    if wait.queues:
        verdict = report.verdict if report.hangs else HangVerdict.WAITING
        return dataclasses.replace(report, verdict=verdict, sentence=f"the program {wait.text}; {report.sentence}")
    verdict = report.verdict if report.firmware else HangVerdict.UNSIGNALLED
    return dataclasses.replace(report, verdict=verdict, sentence=f"the program {wait.text}")


def _links(scene: Scene) -> dict[int, HangLink]:
    return {number: _link(scene, one) for number, one in scene.queues.items() if len(one.commands)}


def _report(scene: Scene, links: dict[int, HangLink], starts: Sequence[int]) -> HangReport:
    device, order = scene.device, list(_chain(links, starts))
    failed = "".join(f"; {stream.name} stands still after a fault" for stream in device._open_streams()
                     if stream.failed)
    verdict, sentence, cycle = _judge({number: links[number] for number in order}, len(scene.queues))
    if verdict is HangVerdict.IDLE:
        sentence += failed
    if scene.insight.ailment:
        verdict, sentence = HangVerdict.FIRMWARE, f"the device does not answer; {sentence}"
    return HangReport(device.name, verdict, sentence, tuple(links[number] for number in order), cycle,
                      scene.insight.ailment)


# --- one queue -------------------------------------------------------------------------------------------------------


def _link(scene: Scene, one: Outstanding) -> HangLink:
    sequence, row = one.progress + 1, scene.insight.queues.get(one.queue.id)
    raw = one.raw(sequence)
    if row is not None and (row["retired"] != one.progress or row["stage"] == QueueStage.IDLE):
        row = None  # it was about another moment
    waits: tuple[HangWait, ...]
    if row is None or row["sequence"] != sequence:
        # What the device says, if it does, is about a later command; it starts before this one is done.
        waits = () if row is not None else tuple(pre_waits(scene, raw))
    else:
        waits = tuple(stage_waits(scene, one, row))
    seconds = None if row is None or not row["since_ns"] else max(int(row["time_ns"]) - int(row["since_ns"]), 0) / 1e9
    return HangLink(one.queue.id, one.stream(sequence), "waits" if waits else "runs", sequence,
                    one.head - one.progress, decode(raw), one.where(sequence), waits, seconds,
                    describe(scene.device, raw, row))


# --- all of them -----------------------------------------------------------------------------------------------------


def _starts(links: dict[int, HangLink]) -> list[int]:
    """Where chains start: with those that wait and nobody waits for; then the rest, waiting ones first."""
    awaited = {queue for one in links.values() for wait in one.waits for queue in wait.queues}
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


def _moving(links: dict[int, HangLink]) -> set[int]:
    """The queues that go on by themselves: those that run, and those each of whose waits such a one can end."""
    moving = {number for number, one in links.items() if one.state == "runs"}
    found = True
    while found:
        more = {number for number, one in links.items() if number not in moving and all(
            wait.by_program or moving.intersection(wait.queues) for wait in one.waits)}
        moving |= more
        found = bool(more)
    return moving


def _judge(links: dict[int, HangLink], count: int) -> tuple[HangVerdict, str, tuple[int, ...]]:
    moving = _moving(links)
    stuck = {number: one for number, one in links.items() if number not in moving}
    for one in stuck.values():
        for wait in one.waits:
            if not wait.queues and not wait.by_program:
                lost = any(signaller.lost for signaller in wait.signallers)
                return (HangVerdict.FAULT if lost else HangVerdict.UNSIGNALLED,
                        f"queue {one.queue} ({one.stream}) {wait.text}", ())
    cycle = _cycle(stuck)
    if cycle:
        names = [f"queue {number} ({links[number].stream})" for number in cycle]
        ring = ", which waits for ".join([*names[1:], names[0]])
        alone = "itself: what it waits for is behind it"
        return HangVerdict.DEADLOCK, f"{names[0]} waits for {alone if len(cycle) == 1 else ring}", cycle
    waiting = next((one for one in links.values() if one.state == "waits"), None)
    running = next((one for one in links.values() if one.state == "runs"), None)
    under_way = "" if running is None else (
        f"queue {running.queue} ({running.stream}) is at command {running.sequence}: {running.command}")
    if waiting is not None:
        end = f"; {under_way}" if running is not None else ""
        return HangVerdict.WAITING, f"queue {waiting.queue} ({waiting.stream}) {waiting.waits[0].text}{end}", ()
    if running is not None:
        return HangVerdict.RUNNING, under_way, ()
    return HangVerdict.IDLE, f"nothing is outstanding on {count} queues", ()


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
