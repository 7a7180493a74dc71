"""Validation at submit time: races between streams and certain deadlocks, found before anything is submitted.

Each stream has a vector clock: how many commands of every stream are certain to be done before its next one. Commands
of a stream are ordered, and so is what an event, a semaphore, or the host's own waiting puts in between; nothing else
is, whatever the device's timing makes of it today. What each byte of memory was last written by, and read by since, is
kept by address; a command that conflicts with one that its stream's clock does not know is a race.

A wait for a semaphore that nobody has signalled yet is open: what is submitted behind it is compared with nobody until
the signal that it needs has been submitted too.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any, Final

from maia_rt.contract.commands import Condition, PostOp, WaitOp
from maia_rt.runtime.accesses import SEGMENTS, Access, AccessHistory
from maia_rt.runtime.happens_before import Clock, Post, SemaphoreHistory, Wait, join, settle

if TYPE_CHECKING:
    from maia_rt.runtime.event import Event
    from maia_rt.runtime.stream import Stream

Range = tuple[int, int, Any]
"""Device address, bytes, and the memory for error texts."""


class Validator:
    """What a device's streams have been told so far. Made by ``maia_rt.open(..., validate=True)``.

    Any thread may call. The host counts as one: a thread's submission comes after what another one has waited for.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._numbers = 0
        self._streams: weakref.WeakKeyDictionary[Stream, _Timeline] = weakref.WeakKeyDictionary()
        self._events: weakref.WeakKeyDictionary[Event, Clock] = weakref.WeakKeyDictionary()
        self._semaphores: dict[Hashable, SemaphoreHistory] = {}
        self._host = Clock({}, frozenset())
        self._memory = AccessHistory()

    # --- what streams do ---------------------------------------------------------------------------------------------

    def command(self, stream: Stream, name: str, reads: Iterable[Range] = (), writes: Iterable[Range] = ()) -> None:
        """Take note of a command that is about to be submitted.

        Parameters
        ----------
        stream : Stream
        name : str
            Of the command, for error texts.
        reads, writes : iterable of (address, size, memory)
            What it touches.

        Raises
        ------
        RaceError
            A command of another stream touches the same bytes, one of the two writes, and nothing orders them.
        """
        with self._lock:
            line = self._timeline(stream)
            access = Access(line.number, line.count + 1, line.clock, f"{name} on {line.label}", _caller())
            reading, writing = [*reads], [*writes]
            for address, size, memory in reading:
                self._memory.check(access, address, size, False, memory)
            for address, size, memory in writing:
                self._memory.check(access, address, size, True, memory)
            line.count += 1
            for address, size, _ in reading:
                self._memory.read(access, address, size)
            for address, size, _ in writing:
                self._memory.write(access, address, size)
            if len(self._memory.starts) > SEGMENTS:
                self._memory.prune(self._host.counts)

    def record(self, stream: Stream, event: Event) -> None:
        """Take note that `event` stands for everything submitted to `stream` so far."""
        with self._lock:
            self._events[event] = self._timeline(stream).now()

    def wait(self, stream: Stream, event: Event) -> None:
        """Take note that what comes on `stream` waits for `event`."""
        with self._lock:
            clock = self._events.get(event)
            if clock is not None:
                line = self._timeline(stream)
                line.clock = join(line.clock, clock)

    def arrive(self, stream: Stream) -> None:
        """Take note that what comes on `stream` waits for another device, where order is not followed.

        All that has been submitted so far is taken to be done by then: races may go unseen, none is made up.
        """
        with self._lock:
            line = self._timeline(stream)
            line.clock = join(line.clock, self._everything())

    def signal_from_afar(self, semaphore: Hashable, name: str, op: int, value: int, where: str) -> None:
        """Take note that another device posts to a semaphore; of its order likewise."""
        with self._lock:
            found = self._semaphores.setdefault(semaphore, SemaphoreHistory(name))
            found.by_host = True
            found.post(Post(op, value, self._everything(), f"{where} signals {name}", _caller()), self._host.counts)

    def _everything(self) -> Clock:
        return Clock({line.number: line.count for line in self._streams.values()}, frozenset())

    # --- semaphores and memory words ---------------------------------------------------------------------------------

    def create_semaphore(self, semaphore: Hashable, name: str, value: int) -> None:
        """Take note of a new semaphore that holds `value`."""
        with self._lock:
            self._semaphores[semaphore] = SemaphoreHistory(name, value)

    def signal(self, stream: Stream, semaphore: Hashable, name: str, op: int, value: int) -> None:
        """Take note of a post.

        Parameters
        ----------
        stream : Stream
        semaphore : hashable
            What is posted to: the semaphore's index, or the address of a memory word.
        name : str
            Of the semaphore, for error texts.
        op : PostOp
        value : int

        Raises
        ------
        DeadlockError
            A wait for the semaphore needs this post, which waits behind it.
        """
        with self._lock:
            line = self._timeline(stream)
            found = self._semaphores.setdefault(semaphore, SemaphoreHistory(name))
            post = Post(op, value, line.now(1), f"{line.label} signals {name}", _caller())
            found.post(post, self._host.counts)
            line.count += 1

    def block(self, stream: Stream, semaphore: Hashable, name: str, op: int, value: int) -> None:
        """Take note of a wait for a semaphore or a memory word; `op` is a WaitOp. Parameters as for :meth:`signal`."""
        with self._lock:
            line = self._timeline(stream)
            found = self._semaphores.setdefault(semaphore, SemaphoreHistory(name))
            wait = Wait(op, value, f"{line.label} waits for {name} {_SIGNS.get(op, '?')} "
                         f"{value}", _caller())
            found.block(wait)
            line.clock = join(line.clock, Clock({}, frozenset((wait,))))

    def write_word(self, stream: Stream, address: int, memory: Any, value: int) -> None:
        """Take note of a command that writes a word of memory, for which others may wait.

        Raises
        ------
        RaceError
            As for :meth:`command`.
        """
        with self._lock:
            self.command(stream, "write of a value", writes=[(address, 4, memory)])
            self.signal(stream, ("word", address), f"the word at {address:#x}", PostOp.SET, value)

    def await_word(self, stream: Stream, address: int, value: int, condition: int, mask: int) -> None:
        """Take note of a wait for a word of memory; `condition` is a Condition."""
        op = {Condition.GE: WaitOp.GE, Condition.EQ: WaitOp.EQ}.get(Condition(condition))
        # Other comparisons are met by too many values: such a wait is open until the program has seen it done.
        plain = op is not None and mask == 0xFFFFFFFF
        key = ("word", address) if plain else ("word", address, object())
        name = f"the word at {address:#x}"
        with self._lock:
            if key not in self._semaphores:
                # What it holds is not known: nothing that the wait could count on.
                self._semaphores[key] = SemaphoreHistory(name, (value - _FAR) & 0xFFFFFFFF)
            # The program writes to memory without a word.
            self._semaphores[key].by_host = True
            self.block(stream, key, name, op or WaitOp.GE, value)
            if not plain:
                del self._semaphores[key]

    def host_wait(self, semaphore: Hashable, op: int, value: int) -> None:
        """Take note that the program has seen a semaphore reach a value."""
        with self._lock:
            found = self._semaphores.get(semaphore)
            clock = found.brings(op, value) if found is not None else None
            if clock is not None:
                self._see(clock)

    def host_signal(self, semaphore: Hashable, name: str, op: int, value: int) -> None:
        """Take note that the program itself set or added to a semaphore: from here on it may do so at any time."""
        with self._lock:
            found = self._semaphores.setdefault(semaphore, SemaphoreHistory(name))
            found.by_host = True
            found.post(Post(op, value, self._host, f"the program signals {name}", _caller()), self._host.counts)

    # --- the host ----------------------------------------------------------------------------------------------------

    def synchronized(self, stream: Stream) -> None:
        """Take note that the program has seen everything on a stream done."""
        with self._lock:
            line = self._streams.get(stream)
            if line is not None:
                self._see(line.now())

    def reached(self, event: Event) -> None:
        """Take note that the program has seen everything before an event done."""
        with self._lock:
            clock = self._events.get(event)
            if clock is not None:
                self._see(clock)

    def _see(self, clock: Clock) -> None:
        # What is done has got past its waits, whoever signalled them.
        for wait in settle(clock).waits:
            wait.clock = self._host
        self._host = join(self._host, clock)

    def forget(self, address: int, size: int) -> None:
        """Forget who used a piece of memory: it has been handed out anew, when its former users were done."""
        with self._lock:
            self._memory.clear(address, size)

    def clear(self) -> None:
        """Forget everything: the device has been reset."""
        with self._lock:
            self._streams.clear()
            self._events.clear()
            self._semaphores.clear()
            self._memory = AccessHistory()
            self._host = Clock({}, frozenset())

    def _timeline(self, stream: Stream) -> _Timeline:
        line = self._streams.get(stream)
        if line is None:
            self._numbers += 1
            line = self._streams[stream] = _Timeline(self._numbers, stream.name)
        # The program submits: what it has seen done is done before.
        line.clock = join(line.clock, self._host)
        return line


class _Timeline:
    """One stream: how many commands it has, and what is done before its next one, besides its own."""

    __slots__ = ("clock", "count", "label", "number")

    def __init__(self, number: int, label: str) -> None:
        self.number = number
        self.label = label
        self.count = 0
        self.clock = Clock({}, frozenset())

    def now(self, more: int = 0) -> Clock:
        """The clock of somebody who waits for all commands so far, and `more` that are about to come."""
        return Clock(self.clock.counts | {self.number: self.count + more}, self.clock.waits)


def _caller() -> str:
    """The line outside of this package that is submitting."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("maia_rt."):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


_FAR: Final = 1 << 30
_SIGNS: Final[dict[int, str]] = {WaitOp.GE: ">=", WaitOp.EQ: "==", WaitOp.ACQUIRE: ">=, to take"}
