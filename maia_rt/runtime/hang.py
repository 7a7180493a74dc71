"""Hang reports: who waits for whom, followed to the root."""

from __future__ import annotations

import dataclasses
import enum
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from maia_rt.contract.commands import QueueStage, decode
from maia_rt.errors import MaiaError
from maia_rt.observe import live
from maia_rt.runtime.outstanding import HangPlace, Outstanding, Scene
from maia_rt.runtime.scenes import Scenes, groups, know, linked
from maia_rt.runtime.waits import HangWait, describe, pre_waits, semaphore_wait, stage_waits

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device

__all__ = ["HangLink", "HangPlace", "HangReport", "HangVerdict", "HangWait", "examine", "go_live", "on_timeout"]

SCHEMA: Final = 2
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
    """Queues wait for each other in a circle, of one device or of several."""
    FIRMWARE = "firmware"
    """The device's firmware does not answer, or that of a device which it waits for."""


@dataclass(frozen=True)
class HangLink:
    """One queue with outstanding commands: a link of the chain.

    Attributes
    ----------
    device, queue, stream : str, int, str
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

    device: str
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

    @property
    def place(self) -> HangPlace:
        """Where the command is."""
        return HangPlace(self.device, self.queue)

    def __str__(self) -> str:
        return self._text(self.device)

    def _text(self, home: str) -> str:
        """Tell it, as seen from a device; from another one than its own, that is named."""
        at = f", submitted at {self.where}" if self.where else ""
        time = "" if self.seconds is None else f" for {self.seconds:.3g} s"
        behind = f"; {self.outstanding - 1} more behind it" if self.outstanding > 1 else ""
        parts = [self.detail, *(wait.text for wait in self.waits)]
        return (f"{self.place._text(home)} ({self.stream}): command {self.sequence} {self.state}{time}: "
                f"{self.command}{at}" + "".join(f"; {part}" for part in parts if part) + behind)


@dataclass(frozen=True)
class HangReport:
    """Who waits for whom on a device, and on those it has to do with; see :meth:`maia_rt.Device.hang_report`.

    ``str`` of it is for people.

    Attributes
    ----------
    device : str
    verdict : HangVerdict
    sentence : str
        The verdict with its reason.
    links : tuple of HangLink
        The queues with outstanding commands: first who waits, then whom it waits for, down to the root. Other devices'
        queues are among them where one of this device waits for them, over any number of links, or they for it.
    cycle : tuple of HangPlace
        The queues of a deadlock, in the order in which they wait for each other.
    firmware : str
        Why the device itself could not be asked; empty where it could.
    """

    device: str
    verdict: HangVerdict
    sentence: str
    links: tuple[HangLink, ...] = ()
    cycle: tuple[HangPlace, ...] = ()
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
        home = "" if any(link.device != self.device for link in self.links) else self.device
        return "\n".join([*lines, *(f"  {link._text(home)}" for link in self.links)])


Links = dict[HangPlace, HangLink]
_FINAL: Final = frozenset({HangVerdict.UNSIGNALLED, HangVerdict.FAULT, HangVerdict.DEADLOCK})
_TURNS: Final = 3
"""So often at most is it looked, where queues move under the eyes."""


def examine(device: Device, focus: int | None = None) -> HangReport:
    """Look at a device now.

    Parameters
    ----------
    device : Device
    focus : int, optional
        A queue: the report is about it and those it waits for. None: about all.
    """
    return _settled(linked(device), lambda scenes, links: _picture(scenes, links, focus))


def examine_process() -> list[HangReport]:
    """Look at all devices of the process: a report for each set of devices that have to do with each other."""
    return [_settled(devices, lambda scenes, links: _report(scenes, scenes.all, links, _starts(links)))
            for devices in groups()]


def examine_semaphore(device: Device, index: int, kind: int, value: int, wanted: int) -> HangReport:
    """Look at who should signal a semaphore that the program waits for; `kind` is a WaitOp."""
    return _settled(linked(device), lambda scenes, links: _for_program(scenes, links, (index, kind, value, wanted)))


def _settled(devices: Sequence[Device], judge: Callable[[Scenes, Links], HangReport]) -> HangReport:
    """Judge devices at one moment; anew where what looked stuck has moved since, for one is asked after the other."""
    for _ in range(_TURNS):
        scenes = Scenes(devices)
        links = {one.place: _link(scene, one) for scene in scenes.all for one in scene.queues.values()
                 if len(one.commands)}
        report = judge(scenes, links)
        if report.verdict not in _FINAL or not _moved(scenes, report):
            return report
    return dataclasses.replace(report, verdict=HangVerdict.WAITING, cycle=())


def _moved(scenes: Scenes, report: HangReport) -> bool:
    """Whether a queue of a report has done something since it was looked at."""
    places = {link.place for link in report.links}
    for scene in scenes.all:
        for one in scene.queues.values():
            try:
                if one.place in places and one.queue.ring.poll() != one.progress:
                    return True
            except MaiaError:
                continue  # it has been closed
    return False


def _picture(scenes: Scenes, links: Links, focus: int | None) -> HangReport:
    """The first device's report: its queues, whom they wait for, and who waits for them."""
    scene = scenes.all[0]
    if focus is not None:
        starts = [HangPlace(scene.label, focus)]
    else:
        starts = [one for one in _starts(links)
                  if any(place.device == scene.label for place in _chain(links, [one]))]
    return _report(scenes, [scene], links, starts)


def _for_program(scenes: Scenes, links: Links, facts: tuple[int, int, int, int]) -> HangReport:
    """The report for a wait of the program for the first device's semaphore: index, WaitOp, value, what it wants."""
    scene = scenes.all[0]
    wait = semaphore_wait(scene, *facts)
    report = _report(scenes, [scene], links, wait.places)
    if wait.places:
        verdict = report.verdict if report.hangs else HangVerdict.WAITING
        return dataclasses.replace(report, verdict=verdict, sentence=f"the program {wait.text}; {report.sentence}")
    verdict = report.verdict if report.firmware else HangVerdict.UNSIGNALLED
    return dataclasses.replace(report, verdict=verdict, sentence=f"the program {wait.text}")


def _report(scenes: Scenes, own: Sequence[Scene], links: Links, starts: Sequence[HangPlace]) -> HangReport:
    """Judge what can be reached from `starts`; the report is of the devices `own`."""
    order = list(_chain(links, starts))
    names = {scene.label for scene in own}
    home = own[0].label if len(names) == 1 and all(place.device in names for place in order) else ""
    failed = "".join(f"; {stream.name} stands still after a fault" for scene in own
                     for stream in scene.device._open_streams() if stream.failed)
    verdict, sentence, cycle = _judge({place: links[place] for place in order},
                                      sum(len(scene.queues) for scene in own), home)
    if verdict is HangVerdict.IDLE:
        sentence += failed
    involved = names | {place.device for place in order}
    silent = [scene for scene in scenes.all if scene.label in involved and scene.insight.ailment]
    if silent:
        who = "the device" if len(own) == 1 and silent == list(own) else " and ".join(one.label for one in silent)
        verdict, sentence = HangVerdict.FIRMWARE, f"{who} does not answer; {sentence}"
    return HangReport(" and ".join(scene.label for scene in own), verdict, sentence,
                      tuple(links[place] for place in order), cycle,
                      "; ".join(dict.fromkeys(scene.insight.ailment for scene in silent)))


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
    return HangLink(one.device, one.queue.id, one.stream(sequence), "waits" if waits else "runs", sequence,
                    one.head - one.progress, decode(raw), one.where(sequence), waits, seconds,
                    describe(scene.device, raw, row))


# --- all of them -----------------------------------------------------------------------------------------------------


def _starts(links: Links) -> list[HangPlace]:
    """Where chains start: with those that wait and nobody waits for; then the rest, waiting ones first."""
    awaited = {place for one in links.values() for wait in one.waits for place in wait.places}
    return sorted(links, key=lambda place: (not links[place].waits, place in awaited, place))


def _chain(links: Links, starts: Sequence[HangPlace]) -> Iterator[HangPlace]:
    """The queues from `starts` on, each before those it waits for, none twice."""
    seen: set[HangPlace] = set()
    left = [place for place in reversed(starts) if place in links]
    while left:
        place = left.pop()
        if place not in seen:
            seen.add(place)
            yield place
            left += [other for wait in reversed(links[place].waits) for other in reversed(wait.places)
                     if other in links]


def _moving(links: Links) -> set[HangPlace]:
    """The queues that go on by themselves: those that run, and those each of whose waits such a one can end."""
    moving = {place for place, one in links.items() if one.state == "runs"}
    found = True
    while found:
        more = {place for place, one in links.items() if place not in moving and all(
            wait.by_program or moving.intersection(wait.places) for wait in one.waits)}
        moving |= more
        found = bool(more)
    return moving


def _judge(links: Links, count: int, home: str) -> tuple[HangVerdict, str, tuple[HangPlace, ...]]:
    moving = _moving(links)
    stuck = {place: one for place, one in links.items() if place not in moving}
    for one in stuck.values():
        for wait in one.waits:
            if not wait.places and not wait.by_program:
                lost = any(signaller.lost for signaller in wait.signallers)
                return (HangVerdict.FAULT if lost else HangVerdict.UNSIGNALLED,
                        f"{_name(one, home)} {wait.text}", ())
    cycle = _cycle(stuck)
    if cycle:
        names = [_name(links[place], home) for place in cycle]
        ring = ", which waits for ".join([*names[1:], names[0]])
        alone = "itself: what it waits for is behind it"
        return HangVerdict.DEADLOCK, f"{names[0]} waits for {alone if len(cycle) == 1 else ring}", cycle
    waiting = next((one for one in links.values() if one.state == "waits"), None)
    running = next((one for one in links.values() if one.state == "runs"), None)
    under_way = "" if running is None else (
        f"{_name(running, home)} is at command {running.sequence}: {running.command}")
    if waiting is not None:
        end = f"; {under_way}" if running is not None else ""
        return HangVerdict.WAITING, f"{_name(waiting, home)} {waiting.waits[0].text}{end}", ()
    if running is not None:
        return HangVerdict.RUNNING, under_way, ()
    return HangVerdict.IDLE, f"nothing is outstanding on {count} queues", ()


def _name(link: HangLink, home: str) -> str:
    """A queue and its stream; with the device, unless it is `home`."""
    return f"{link.place._text(home)} ({link.stream})"


def _cycle(stuck: Links) -> tuple[HangPlace, ...]:
    """Follow, from any of those that are stuck, one that it waits for, until a queue comes again."""
    for first in stuck:
        path: list[HangPlace] = []
        at: HangPlace | None = first
        while at is not None and at not in path:
            path.append(at)
            at = next((place for wait in stuck[at].waits for place in wait.places if place in stuck), None)
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
    """Let ``maia hang`` ask for the device's report from outside of the process, and other devices' reports know of it.
    """
    know(device)
    reference = weakref.ref(device)

    def hang() -> dict[str, Any]:
        alive = reference()
        if alive is None or alive.closed:
            return {"schema": SCHEMA, "verdict": HangVerdict.IDLE.value, "sentence": "the device has just been closed",
                    "hangs": False, "text": "the device has just been closed"}
        return _told(examine(alive))

    return live.attach(device.name, device.transport.info.kind, {"hang": hang},
                       {"hang": lambda: [_told(report) for report in examine_process()]})


def _told(report: HangReport) -> dict[str, Any]:
    return {**report.to_json(), "hangs": report.hangs, "text": str(report)}
