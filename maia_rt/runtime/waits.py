"""What one command waits for, and who should bring it about."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from maia_rt.contract.commands import (
    COMMAND,
    INDIRECT,
    LAUNCH,
    Condition,
    Opcode,
    QueueStage,
    SemaphoreWriter,
    WaitOp,
    decode,
)
from maia_rt.errors import MaiaError
from maia_rt.runtime.outstanding import HangPlace, Outstanding, Scene, Signaller

if TYPE_CHECKING:
    from maia_rt.runtime.crossing import Crossing, Mark
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.stream import Stream


@dataclass(frozen=True)
class HangWait:
    """One thing that a command waits for.

    Attributes
    ----------
    text : str
        The whole of it, as a clause.
    places : tuple of HangPlace
        The queues that should bring it about, on whichever device; empty where nothing that is submitted will.
    semaphore, value, wanted : int or None
        For a semaphore or a word in memory: its number (None for a word), what it is, and what it is compared with.
    signallers : tuple of Signaller
        The commands that post to it, or write it.
    by_program : bool
        Whether the program itself is about to bring it about, not the device.
    """

    text: str
    places: tuple[HangPlace, ...] = ()
    semaphore: int | None = None
    value: int | None = None
    wanted: int | None = None
    signallers: tuple[Signaller, ...] = ()
    by_program: bool = False


def pre_waits(scene: Scene, raw: bytes) -> Iterator[HangWait]:
    """What a command's pre-operations still wait for."""
    for op in np.frombuffer(raw, COMMAND)[0]["pre"]:
        index, kind, wanted = int(op["index"]), int(op["op"]), int(op["value"])
        if kind == WaitOp.NONE:
            continue
        try:
            value = scene.semaphore(index)
        except MaiaError as error:
            yield HangWait(f"may wait for semaphore {index} {_SIGNS.get(kind, '?')} {wanted}, which cannot be read: "
                           f"{error.what}", by_program=True, semaphore=index, wanted=wanted)
            continue
        distance = _distance(value, wanted)
        if distance == 0 or (distance > 0 and kind != WaitOp.EQ):
            continue
        if index < scene.device.capabilities.max_queues:
            yield _mirror_wait(scene, index, kind, value, wanted)
        else:
            yield semaphore_wait(scene, index, kind, value, wanted)


def stage_waits(scene: Scene, one: Outstanding, row: Any) -> Iterator[HangWait]:
    """What a queue's oldest command waits for, by the device's own account of it: a QUEUE_LOG record."""
    stage = int(row["stage"])
    if stage == QueueStage.SEMAPHORE:
        yield from pre_waits(scene, bytes(row["command"]))
    elif stage == QueueStage.VALUE:
        yield _value_wait(scene, row)
    elif stage == QueueStage.TILES:
        holders = [number for number, other in scene.insight.queues.items()
                   if number != one.queue.id and other["in_flight"] and number in scene.queues]
        running = {number: bytes(scene.insight.queues[number]["command"]) for number in holders}
        names = " and ".join(f"{_kernel(scene.device, raw)} on queue {number}" for number, raw in running.items())
        names = names or "launches of its own queue"
        yield HangWait(f"waits for tiles, which are held by {names}",
                       tuple(HangPlace(scene.label, number) for number in holders), by_program=not holders)
    elif stage == QueueStage.REPORT_ROOM:
        count = (int(row["report_tail"]) - int(row["report_head"])) & 0xFFFFFFFF
        yield HangWait(f"waits for room in its report ring: the program has not taken {count} records", by_program=True)


def describe(device: Device, raw: bytes, row: Any) -> str:
    """What a command's 64 bytes do not say: its kernel's name, and the place in its list."""
    if row is not None and row["list_count"]:
        at, count = int(row["list_index"]), int(row["list_count"])
        node = device._explain_listed(int(np.frombuffer(raw, INDIRECT)[0]["list"]), at)
        return f"at {at} of its list of {count}: {decode(bytes(row['command']))}" + (f", {node}" if node else "")
    return _kernel(device, raw) if raw[0] == Opcode.LAUNCH else ""


def _kernel(device: Device, raw: bytes) -> str:
    if raw[0] != Opcode.LAUNCH:
        return decode(raw)
    handle = int(np.frombuffer(raw, LAUNCH)[0]["kernel"])
    names = [kernel.name for program in list(device._programs) for kernel in program.values()
             if not program.closed and kernel.handle == handle]
    return f"kernel {names[0]}" if names else f"kernel {handle}"


def _mirror_wait(scene: Scene, index: int, kind: int, value: int, wanted: int) -> HangWait:
    other = scene.queues.get(index)
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
    text += f"; that command, of {other.stream(command)}, was submitted" + (f" at {where}" if where else " before")
    return HangWait(text, (other.place,), **facts)


def semaphore_wait(scene: Scene, index: int, kind: int, value: int, wanted: int) -> HangWait:
    """What somebody waits for who waits for a semaphore; `kind` is a WaitOp."""
    for stream in scene.device._open_streams():
        if stream._calls is not None and stream._calls.semaphore.index == index:
            return HangWait(_call(scene.device, stream), (), index, value, wanted, by_program=True)
    for crossing in scene.device._crossings:
        if crossing.index == index and crossing.value == wanted:
            return _crossing_wait(scene, crossing, kind, value)
    posts, due = [*scene.others.signallers(scene, index)], False
    for other in scene.others.all:
        for relay in other.device._crossings.relays:
            if relay.device is scene.device and relay.index == index:
                signaller, held_up = _signaller(other, relay.mark)
                posts.append(signaller)
                due |= not held_up and not signaller.lost
    text = f"waits for semaphore {index} {_SIGNS.get(kind, '?')} {wanted}, which is {value}{_last_writer(scene, index)}"
    text += _who(scene, posts, "signal")
    if not _places(posts) and any(one.index == index and not one.closed for one in list(scene.device._semaphores)):
        text += "; the program can, for it holds the semaphore"
    return HangWait(text, _places(posts), index, value, wanted, tuple(posts), by_program=due)


def _crossing_wait(scene: Scene, crossing: Crossing, kind: int, value: int) -> HangWait:
    """What a wait for a command of another device stands at: for that command, or for its signal."""
    index, wanted = crossing.index, crossing.value
    text = (f"waits for {crossing}, by semaphore {index} {_SIGNS.get(kind, '?')} {wanted}, which is {value}"
            f"{_last_writer(scene, index)}")
    other = scene.others.of(crossing.device)
    if other is None:  # it has been closed, which the waiter is told
        return HangWait(text, (), index, value, wanted, by_program=True)
    signaller, held_up = _signaller(other, crossing.event)
    if crossing.pushed is not None and not held_up and not signaller.lost:
        signaller, held_up = _signaller(other, crossing.pushed)
        text += f"; {signaller.text(scene.label)} is to signal it"
    if signaller.lost:
        text += f"; it was {signaller.lost}"
    # The thread that looks after crossings does the rest.
    done = not held_up and not signaller.lost
    return HangWait(text, (signaller.place,) if held_up else (), index, value, wanted, (signaller,), by_program=done)


def _signaller(other: Scene, mark: Mark) -> tuple[Signaller, bool]:
    """A command of another device, and whether it is still to be done."""
    queue, sequence = mark
    name, where, lost, done = "no stream", "", "", True
    try:
        account = queue.accounts.get(queue.ring.owner(sequence))
        name, where = account.name if account is not None else name, queue.where(sequence)
        done = queue.done(sequence, waiting=True)
    except MaiaError as error:
        lost = f"lost: {error.what}"
    return Signaller(other.label, queue.id, name, sequence, None, where, lost), not done and not lost


def _call(device: Device, stream: Stream) -> str:
    """What a stream waits for that has called a function of the program."""
    dispatcher = device._dispatcher
    running = None if dispatcher is None else dispatcher._running
    if dispatcher is None or running is None:
        return "waits for a function that it called, which is about to run"
    frame = sys._current_frames().get(dispatcher._thread.ident or 0)
    while frame is not None and frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("maia_rt."):
        frame = frame.f_back
    at = "" if frame is None else f", at {frame.f_code.co_filename}:{frame.f_lineno}"
    if running is stream:
        return f"waits for a function that it called, which is running{at}"
    return f"waits for a function that it called, which runs after one that {running.name} called{at}"


def _value_wait(scene: Scene, row: Any) -> HangWait:
    address, value, wanted = int(row["address"]), int(row["value"]), int(row["wanted"])
    writers = tuple(scene.others.writers(scene, address))
    mask = f" & {int(row['mask']):#x}" if int(row["mask"]) != 0xFFFFFFFF else ""
    sign = _CONDITIONS.get(int(row["condition"]), "?")
    return HangWait(f"waits for the word at {address:#x}{mask} {sign} {wanted}, which is {value}"
                    + _who(scene, writers, "write"), _places(writers), None, value, wanted, writers)


def _who(scene: Scene, found: Sequence[Signaller], verb: str) -> str:
    text = ""
    for one in found[:3]:
        where = f", submitted at {one.where}" if one.where else ""
        text += f"; {one.text(scene.label)} " + (f"would have done so{where}, but was {one.lost}" if one.lost else
                               f"will {verb} it{where}")
    if len(found) > 3:
        text += f"; so will {len(found) - 3} more"
    if all(one.lost for one in found):
        text += f"; nobody that is submitted will ever {verb} it"
    return text


def _places(found: Sequence[Signaller]) -> tuple[HangPlace, ...]:
    return tuple(dict.fromkeys(one.place for one in found if not one.lost))


def _last_writer(scene: Scene, index: int) -> str:
    """Who wrote a semaphore last, as a clause; empty where the device does not say."""
    row = scene.insight.semaphores.get(index)
    if row is None:
        return ""
    if row["writer"] == SemaphoreWriter.QUEUE:
        queue, sequence = int(row["queue"]), int(row["sequence"])
        where = scene.queues[queue].where(sequence) if queue in scene.queues else ""
        return f", last written by command {sequence} of queue {queue}" + (f", submitted at {where}" if where else "")
    peers = scene.others.newest_signal(scene, index)
    if peers is not None:
        one, sequence = peers
        where = one.where(sequence)
        return (f", last signalled by command {sequence} of {one.place._text(scene.label)}"
                + (f", submitted at {where}" if where else ""))
    return ", last written by the host" if row["writer"] == SemaphoreWriter.HOST else ", never written"


def _distance(value: int, base: int) -> int:
    return (value - base + (1 << 31)) % (1 << 32) - (1 << 31)


_SIGNS: Final[dict[int, str]] = {WaitOp.GE: ">=", WaitOp.EQ: "==", WaitOp.ACQUIRE: ">= (to take)"}
_CONDITIONS: Final[dict[int, str]] = {Condition.GE: ">=", Condition.EQ: "==", Condition.NE: "!=", Condition.AND: "&"}
