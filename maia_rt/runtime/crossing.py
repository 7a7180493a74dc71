"""Order between streams of several devices.

A stream that waits for an event of another device waits for a semaphore of its own device. The event's stream sets it,
by a command behind all that it has (:mod:`maia_rt.runtime.timeline`): then no host is in the path. A thread of the
waiting device takes over where that cannot be: no direct path between the two, or behind the event stands a wait that
may take as long as it likes, perhaps for this very stream; a signal behind it could be a deadlock.

The same thread looks, five times a second, whether what is waited for can still come.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from maia_rt.contract.commands import COMMAND, Opcode, PostOp, WaitOp
from maia_rt.errors import ClosedError, FaultCode, MaiaError, OutOfSemaphores, PeerFault
from maia_rt.queue import FAILED, QueuePair
from maia_rt.runtime.outstanding import label
from maia_rt.runtime.queue_watch import QueueWatch
from maia_rt.runtime.semaphore import WORD
from maia_rt.runtime.timeline import Timeline

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.event import Event
    from maia_rt.runtime.replays import Replays
    from maia_rt.runtime.stream import Stream

_NOP: Final = int(Opcode.NOP)
_LOOK_SECONDS: Final = 0.2
_JOIN_SECONDS: Final = 2.0
Mark = tuple[QueuePair, int]


class Crossing:
    """One wait of a stream for a command of another device.

    Attributes
    ----------
    waiter : Stream
    index, value : int
        The semaphore of the waiter's device, and what it is compared with.
    device : Device
        The other one.
    event : (QueuePair, int)
        The command that is waited for.
    timeline : Timeline or None
        None where a thread posts.
    pushed : (QueuePair, int) or None
        The command that signals.
    wait : (QueuePair, int)
        The command that waits.
    """

    def __init__(self, waiter: Stream, index: int, value: int, device: Device, event: Mark,
                 timeline: Timeline | None = None, pushed: Mark | None = None) -> None:
        self.waiter = waiter
        self.index = index
        self.value = value
        self.device = device
        self.event = event
        self.timeline = timeline
        self.pushed = pushed
        self.wait: Mark = waiter._mark()
        self.settled = False

    @property
    def over(self) -> bool:
        """Whether nothing waits any more."""
        return self.wait[0].quiet(self.wait[1])

    def __str__(self) -> str:
        queue, sequence = self.event
        where = queue.where(sequence)
        return (f"command {sequence} of queue {queue.id} of {label(self.device)}"
                + (f", submitted at {where}" if where else ""))

    def look(self, gone: MaiaError | None) -> None:
        """Post where only the signal was lost; fail the waiter where what it waits for was. `gone`: the device is."""
        if self.settled:
            return
        try:
            if self.event[0].done(self.event[1], waiting=True):
                if self.pushed is not None and not self._is_signalled(gone):
                    self.post()
            elif gone is not None:
                self.fail(gone)
        except MaiaError as error:
            self.fail(error)

    def _is_signalled(self, gone: MaiaError | None) -> bool:
        """Whether the signal was given or will be."""
        try:
            return self.pushed is None or self.pushed[0].done(self.pushed[1], waiting=True) or gone is None
        except MaiaError:
            return False

    def post(self) -> None:
        """Let the waiter go on."""
        self.settled = True
        with contextlib.suppress(MaiaError):
            self.waiter.device._firmware.post_semaphore(self.index, PostOp.SET, self.value)

    def fail(self, error: MaiaError) -> None:
        """Have the command that waits fail with PeerFault, whose cause is `error`."""
        self.settled = True
        number = self.waiter.number
        with contextlib.suppress(MaiaError):
            for queue in list(self.waiter._account.queues):
                for sequence in queue.ring.outstanding(number):
                    if self._is_wait(queue.ring.command_at(sequence)):
                        queue.abort(sequence, number, error, peer=label(self.device))

    def _is_wait(self, raw: bytes | None) -> bool:
        if raw is None:
            return False
        pre = np.frombuffer(raw, COMMAND)[0]["pre"][0]
        return bool(pre["op"] == WaitOp.GE and pre["index"] == self.index and pre["value"] == self.value)


@dataclass(frozen=True, eq=False)
class Relay:
    """A post of a stream to a semaphore of another device, made by a thread.

    Attributes
    ----------
    device : Device
        Whose semaphore it is.
    index : int
    mark : (QueuePair, int)
        The command behind which it is made.
    """

    device: Device
    index: int
    mark: Mark


class Crossings:
    """What the streams of a device wait for on other devices; and what they signal there through the host.

    Parameters
    ----------
    device : Device
    """

    def __init__(self, device: Device) -> None:
        self._device = weakref.ref(device)
        self._lock = threading.Lock()
        self._timelines: weakref.WeakKeyDictionary[Stream, Timeline] = weakref.WeakKeyDictionary()
        self._all: list[Timeline] = []
        self._open: list[Crossing] = []
        self._relays: list[Relay] = []
        self._replays: list[Replays] = []
        self._incoming: deque[tuple[Mark, Callable[[MaiaError | None], None]]] = deque()
        self._thread: threading.Thread | None = None
        self._rope = -1
        self._ending = False

    def __iter__(self) -> Iterator[Crossing]:
        """Those that are not over, as far as anybody has looked."""
        return iter(list(self._open))

    @property
    def relays(self) -> list[Relay]:
        """What is still to be signalled through the host."""
        return list(self._relays)

    def wait(self, waiter: Stream, event: Event) -> None:
        """Let a stream of the device wait for an event of another one.

        Raises
        ------
        PeerFault
            What the event stands for is lost already. Nothing was submitted then.
        OutOfSemaphores, OutOfQueues, ClosedError, QueueFull, DeviceFault, DeviceLost
        """
        other, queue, sequence = event.device, event._queue, event._sequence
        if queue is None:
            return
        with self._blame(waiter, other):
            if queue.done(sequence, waiting=True):
                return
        unbounded = other._queues.waits_behind(queue, sequence)
        crossing = self._push(waiter, event.stream, other, (queue, sequence))
        if crossing is None:
            index = self._take()
            waiter.device._firmware.post_semaphore(index, PostOp.SET, 0)
            crossing = Crossing(waiter, index, 1, other, (queue, sequence))
        try:
            number = waiter._submit(_NOP, pre=((crossing.index, WaitOp.GE, crossing.value),), unbounded=unbounded)
        except BaseException:
            self._let_go(crossing)
            raise
        crossing.wait = waiter._queue, number
        with self._lock:
            self._open.append(crossing)
        if crossing.timeline is None:
            self._incoming.append(((queue, sequence), lambda error: crossing.post() if error is None else
                                   crossing.fail(error)))
        self._start()

    def relay(self, stream: Stream, device: Device, index: int, op: PostOp, value: int) -> None:
        """Signal a semaphore of another device when all that a stream has submitted is done."""
        relay = Relay(device, index, stream._mark())

        def heard(error: MaiaError | None) -> None:
            if error is None:
                with contextlib.suppress(MaiaError):
                    device._firmware.post_semaphore(index, op, value)
            self._relays.remove(relay)

        self._relays.append(relay)
        self._incoming.append((relay.mark, heard))
        self._start()

    def watch(self, replays: Replays) -> None:
        """Look after a graph's replays, too, until they are over."""
        with self._lock:
            if replays in self._replays:
                return
            self._replays.append(replays)
        self._start()

    def forsake(self, source: Stream) -> None:
        """Tell those who wait for a stream that has failed, before it goes on; what it pushes then is another's."""
        with self._lock:
            self._timelines.pop(source, None)
        for crossing in list(self._open):
            if crossing.device is source.device:
                crossing.look(None)

    def withdraw(self) -> None:
        """Begin anew: the device has been reset. Semaphores that may still be pushed to are not dealt out."""
        with self._lock:
            self._open.clear()
            self._timelines = weakref.WeakKeyDictionary()
            for timeline in self._all:
                timeline.users = 0
        device = self._device()
        if device is not None:
            for timeline in self._all:
                device._free_semaphores.withhold(timeline.index)

    def close(self) -> None:
        """End the thread; idempotent."""
        self.end()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_SECONDS)

    def end(self) -> None:
        """Have the thread end, without waiting for it; idempotent."""
        with self._lock:
            self._ending = True
            rope, self._rope = self._rope, -1
        if rope >= 0:
            os.close(rope)

    # --- semaphores --------------------------------------------------------------------------------------------------

    def _push(self, waiter: Stream, source: Stream | None, other: Device, event: Mark) -> Crossing | None:
        """Have an event's stream signal; None where a thread must post instead."""
        timeline = None if source is None else self._pushing(source, event)
        if source is None or timeline is None:
            return None
        crossing = None
        try:
            with self._blame(waiter, other):
                value, queue, sequence = timeline.push(source, *event)
            # Another thread may have got a wait in between.
            if _stands_free(source, event, sequence if queue is event[0] else None):
                crossing = Crossing(waiter, timeline.index, value, other, event, timeline, (queue, sequence))
            return crossing
        finally:
            if crossing is None:
                with self._lock:
                    timeline.users -= 1

    def _pushing(self, source: Stream, event: Mark) -> Timeline | None:
        """Return what a stream pushes with, one user more; None where it cannot."""
        device = self._device()
        if device is None or source.closed or source._account.stopped & FAILED or not _stands_free(source, event):
            return None
        with self._lock:
            timeline = self._timelines.get(source)
            if timeline is not None:
                timeline.users += 1
                return timeline
        index = self._take()
        try:
            address = source.device.peer(device).semaphore(index)
            start = source._ring.initial & WORD
            device._firmware.post_semaphore(index, PostOp.SET, start)
        except MaiaError:
            device._free_semaphores.give_back(index)
            return None
        with self._lock:
            timeline = Timeline(source, index, address, start)
            timeline.users = 1
            self._all.append(timeline)
            self._timelines.setdefault(source, timeline)
        source._pushes.add(self)
        return timeline

    def _take(self) -> int:
        device = self._device()
        self._collect()
        if device is None:
            raise OutOfSemaphores("the device is gone")
        device._reclaimer.collect()
        return device._free_semaphores.take()

    def _collect(self) -> None:
        """Give back what nobody waits for any more."""
        with self._lock:
            over = [crossing for crossing in self._open if crossing.over]
            self._open = [crossing for crossing in self._open if crossing not in over]
        for crossing in over:
            self._let_go(crossing)
        device = self._device()
        with self._lock:
            used = list(self._timelines.values())
            ended = [one for one in self._all if one.ended or (one not in used and not one.users and one.quiet)]
            self._all = [one for one in self._all if one not in ended]
        for timeline in ended:
            if device is not None:
                device._free_semaphores.give_back(timeline.index)

    def _let_go(self, crossing: Crossing) -> None:
        device = self._device()
        if crossing.timeline is not None:
            with self._lock:
                crossing.timeline.users -= 1
        elif device is not None:
            pool = device._free_semaphores
            device._reclaimer.abandon(lambda: pool.give_back(crossing.index))

    @contextlib.contextmanager
    def _blame(self, waiter: Stream, other: Device) -> Iterator[None]:
        try:
            yield
        except MaiaError as error:
            raise PeerFault(error, label(other), code=FaultCode.ABORTED, device=waiter.device.name,
                            stream=waiter.name, queue=waiter._queue.id, sequence=waiter._account.last) from error

    # --- the thread --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._lock:
            if self._ending:
                return
            if self._thread is None:
                bell, self._rope = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                self._thread = threading.Thread(target=self._run, args=(bell,), name="maia-peers", daemon=True)
                self._thread.start()
            # A pipe that is full has been rung enough.
            with contextlib.suppress(OSError):
                os.write(self._rope, b"\0")

    def _run(self, bell: int) -> None:
        poll = select.poll()
        poll.register(bell, select.POLLIN)
        watches: dict[QueuePair, QueueWatch] = {}
        next_look = time.monotonic() + _LOOK_SECONDS
        try:
            while not self._ending:
                busy = bool(watches or self._open or self._replays)
                poll.poll(int(max(next_look - time.monotonic(), 0) * 1000) + 1 if busy else None)
                with contextlib.suppress(BlockingIOError):
                    os.read(bell, 4096)
                while self._incoming:
                    (queue, sequence), heard = self._incoming.popleft()
                    try:
                        if queue not in watches:
                            watches[queue] = _watch(queue, poll)
                        watches[queue].add(sequence, heard)
                    except (MaiaError, OSError) as error:  # it has been closed
                        heard(error if isinstance(error, MaiaError) else ClosedError(f"queue {queue.id} was closed"))
                looks = time.monotonic() >= next_look
                for watch in list(watches.values()):
                    if looks:
                        watch.check()
                    else:
                        watch.look()
                if looks:
                    self._look()
                    next_look = time.monotonic() + _LOOK_SECONDS
                for queue, watch in list(watches.items()):
                    if not watch:
                        _unwatch(watches.pop(queue), poll)
        finally:
            os.close(bell)
            for watch in watches.values():
                watch.close()
            self._incoming.clear()
            self._relays.clear()

    def _look(self) -> None:
        gone: dict[Device, MaiaError | None] = {}
        for crossing in list(self._open):
            other = crossing.device
            if other not in gone:
                gone[other] = None
                try:
                    other._firmware.check_alive()
                except MaiaError as error:
                    gone[other] = error
            crossing.look(gone[other])
        for replays in list(self._replays):
            replays.look()
            with self._lock:
                if replays.over:
                    self._replays.remove(replays)
        self._collect()


def _stands_free(source: Stream, event: Mark, until: int | None = None) -> bool:
    """Say whether no wait that may take as long as it likes stands between an event and a stream's next command.

    Or between it and the command `until` of the event's queue.
    """
    table = source.device._queues
    if table.waits_after(*event, until):
        return False
    return source._queue is event[0] or not table.waits_after(source._queue, 0)


def _watch(queue: QueuePair, poll: select.poll) -> QueueWatch:
    watch = QueueWatch(queue)
    for fd in watch.fds:
        poll.register(fd, select.POLLIN)
    return watch


def _unwatch(watch: QueueWatch, poll: select.poll) -> None:
    for fd in watch.fds:
        poll.unregister(fd)
    watch.close()
