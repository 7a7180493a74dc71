"""Validation at submit time: races between streams and certain deadlocks, found before anything is submitted.

Each stream has a vector clock: how many commands of every stream are certain to be done before its next one. Commands
of a stream are ordered, and so is what an event, a semaphore, or the host's own waiting puts in between; nothing else
is, whatever the device's timing makes of it today. What each byte of memory was last written by, and read by since, is
kept by address; a command that conflicts with one that its stream's clock does not know is a race.

A wait for a semaphore that nobody has signalled yet is open: what is submitted behind it is compared with nobody until
the signal that it needs has been submitted too.
"""

from __future__ import annotations

import bisect
import sys
import threading
import weakref
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any, Final

from maia_rt.contract.commands import PostOp, WaitOp
from maia_rt.errors import DeadlockError, RaceError

if TYPE_CHECKING:
    from maia_rt.runtime.event import Event
    from maia_rt.runtime.stream import Stream

Range = tuple[int, int, Any]
"""Device address, bytes, and the memory for error texts."""

SEGMENTS: Final = 1 << 14
"""Pieces of memory with a history of their own; beyond that the oldest are forgotten."""
POSTS: Final = 256
"""Signals of one semaphore that are remembered one by one."""


class Validator:
    """What a device's streams have been told so far. Made by ``maia_rt.open(..., validate=True)``.

    Any thread may call. The host counts as one: a thread's submission comes after what another one has waited for.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._numbers = 0
        self._streams: weakref.WeakKeyDictionary[Stream, _Timeline] = weakref.WeakKeyDictionary()
        self._events: weakref.WeakKeyDictionary[Event, _Clock] = weakref.WeakKeyDictionary()
        self._semaphores: dict[Hashable, _Semaphore] = {}
        self._host = _Clock({}, frozenset())
        self._memory = _History()

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
            access = _Access(line.number, line.count + 1, line.clock, f"{name} on {line.label}", _caller())
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
                line.clock = _join(line.clock, clock)

    def follow(self, stream: Stream, other: Stream) -> None:
        """Take note that what comes on `stream` waits for everything submitted to `other` so far."""
        with self._lock:
            line = self._timeline(stream)
            line.clock = _join(line.clock, self._timeline(other).now())

    # --- semaphores and memory words ---------------------------------------------------------------------------------

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
            found = self._semaphores.setdefault(semaphore, _Semaphore(name))
            post = _Post(op, value, line.now(1), f"{line.label} signals {name}", _caller())
            found.post(post, self._host.counts)
            line.count += 1

    def block(self, stream: Stream, semaphore: Hashable, name: str, op: int, value: int) -> None:
        """Take note of a wait for a semaphore or a memory word; `op` is a WaitOp. Parameters as for :meth:`signal`."""
        with self._lock:
            line = self._timeline(stream)
            found = self._semaphores.setdefault(semaphore, _Semaphore(name))
            wait = _Wait(op, value, f"{line.label} waits for {name} {_SIGNS.get(op, '?')} "
                         f"{value}", _caller())
            found.block(wait)
            line.clock = _join(line.clock, _Clock({}, frozenset((wait,))))

    def host_signal(self, semaphore: Hashable, name: str, op: int, value: int) -> None:
        """Take note that the program itself set or added to a semaphore: from here on it may do so at any time."""
        with self._lock:
            found = self._semaphores.setdefault(semaphore, _Semaphore(name))
            found.by_host = True
            found.post(_Post(op, value, self._host, f"the program signals {name}", _caller()), self._host.counts)

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

    def _see(self, clock: _Clock) -> None:
        # What is done has got past its waits, whoever signalled them.
        for wait in _settle(clock).waits:
            wait.clock = self._host
        self._host = _join(self._host, clock)

    def forget(self, address: int, size: int) -> None:
        """Forget who used a piece of memory: it has been handed out anew, when its former users were done."""
        with self._lock:
            self._memory.clear(address, size)

    def forget_semaphore(self, semaphore: Hashable) -> None:
        """Forget a semaphore that was closed."""
        with self._lock:
            self._semaphores.pop(semaphore, None)

    def clear(self) -> None:
        """Forget everything: the device has been reset."""
        with self._lock:
            self._streams.clear()
            self._events.clear()
            self._semaphores.clear()
            self._memory = _History()
            self._host = _Clock({}, frozenset())

    def _timeline(self, stream: Stream) -> _Timeline:
        line = self._streams.get(stream)
        if line is None:
            self._numbers += 1
            line = self._streams[stream] = _Timeline(self._numbers, repr(stream).strip("<>"))
        # The program submits: what it has seen done is done before.
        line.clock = _join(line.clock, self._host)
        return line


class _Clock:
    """What is certain to be done: the first so many commands of each stream, and all before the open waits' signals."""

    __slots__ = ("counts", "waits")

    def __init__(self, counts: dict[int, int], waits: frozenset[_Wait]) -> None:
        self.counts = counts
        self.waits = waits


class _Timeline:
    """One stream: how many commands it has, and what is done before its next one, besides its own."""

    __slots__ = ("clock", "count", "label", "number")

    def __init__(self, number: int, label: str) -> None:
        self.number = number
        self.label = label
        self.count = 0
        self.clock = _Clock({}, frozenset())

    def now(self, more: int = 0) -> _Clock:
        """The clock of somebody who waits for all commands so far, and `more` that are about to come."""
        return _Clock(self.clock.counts | {self.number: self.count + more}, self.clock.waits)


class _Wait:
    """A wait for a semaphore; `clock` is what it brings, None while nobody has signalled it."""

    __slots__ = ("clock", "op", "value", "what", "where")

    def __init__(self, op: int, value: int, what: str, where: str) -> None:
        self.op = op
        self.value = value
        self.what = what
        self.where = where
        self.clock: _Clock | None = None


class _Post:
    """A signal of a semaphore."""

    __slots__ = ("clock", "op", "value", "what", "where")

    def __init__(self, op: int, value: int, clock: _Clock, what: str, where: str) -> None:
        self.op = op
        self.value = value
        self.clock = clock
        self.what = what
        self.where = where


class _Semaphore:
    """The posts to one semaphore and the waits for it that are open."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.by_host = False
        self._base = 0
        self._acquired = 0
        self._posts: list[_Post] = []
        self._open: list[tuple[_Wait, int]] = []

    def post(self, post: _Post, known: dict[int, int]) -> None:
        """Add a post and close the waits that it lets go on."""
        posts = [*self._posts, post]
        self._open = [(wait, needed) for wait, needed in self._open if wait.clock is None]
        for wait, needed in self._open:
            self._try(wait, needed, posts, post)
        self._posts = posts
        while self._posts and (len(self._posts) > POSTS or _knows(known, self._posts[0].clock)):
            oldest = self._posts.pop(0)
            self._base = (oldest.value if oldest.op == PostOp.SET else self._base + oldest.value) & 0xFFFFFFFF

    def block(self, wait: _Wait) -> None:
        """Add a wait."""
        needed = wait.value
        if wait.op == WaitOp.ACQUIRE:
            needed += self._acquired
        if not self._reaches(wait.op, needed, []):
            self._try(wait, needed, self._posts, None)
        else:
            wait.clock = _Clock({}, frozenset())
        if wait.op == WaitOp.ACQUIRE:
            self._acquired += wait.value
        if wait.clock is None:
            self._open.append((wait, needed))

    def _try(self, wait: _Wait, needed: int, posts: list[_Post], newest: _Post | None) -> None:
        """Close a wait if posts that do not wait behind it suffice; raise if only those that do would."""
        free = [post for post in posts if wait not in _settle(post.clock).waits]
        if self._reaches(wait.op, needed, free):
            # Without each of these the value would not be reached, so they are certainly done.
            sure = [post for post in free if not self._reaches(wait.op, needed, [p for p in free if p is not post])]
            wait.clock = _join(*(post.clock for post in sure)) if sure else _Clock({}, frozenset())
        elif newest is not None and not self.by_host and self._reaches(wait.op, needed, posts):
            raise DeadlockError(
                f"{wait.what}, submitted at {wait.where}; {newest.what}, submitted at {newest.where}, only when that "
                "wait is over",
                cause="every signal that the wait needs waits behind it",
                hint="signal first, or from a stream that does not wait; a semaphore that the program itself signals "
                     "is set by it once before",
                where=(wait.where, newest.where))

    def _reaches(self, op: int, needed: int, posts: list[_Post]) -> bool:
        """Whether these posts may make a wait's condition true. Serial: distances from what the semaphore had."""
        wanted = _distance(needed, self._base)
        sets = [_distance(post.value, self._base) for post in posts if post.op == PostOp.SET]
        added = sum(post.value for post in posts if post.op == PostOp.ADD)
        reach = max((0, *sets)) + added
        if op == WaitOp.EQ:
            return min((0, *sets)) <= wanted <= reach if added else wanted in (0, *sets)
        return wanted <= reach


class _Access:
    """A command, as one that touches memory."""

    __slots__ = ("clock", "count", "number", "what", "where")

    def __init__(self, number: int, count: int, clock: _Clock, what: str, where: str) -> None:
        self.number = number
        self.count = count
        self.clock = clock
        self.what = what
        self.where = where


class _History:
    """Who wrote each piece of memory last, and who has read it since. Pieces do not overlap."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self._pieces: list[tuple[int, _Access | None, dict[int, _Access]]] = []  # end, writer, readers

    def check(self, access: _Access, address: int, size: int, writes: bool, memory: Any) -> None:
        """Raise where `access` conflicts with one that is not ordered before it."""
        low, high = self._overlap(address, size)
        for index in range(low, high):
            _, writer, readers = self._pieces[index]
            if writer is not None:
                _require_order(writer, access, True, writes, max(address, self.starts[index]), memory)
            if writes:
                for reader in readers.values():
                    _require_order(reader, access, False, True, max(address, self.starts[index]), memory)

    def write(self, access: _Access, address: int, size: int) -> None:
        """Let `access` be the last writer: whoever is ordered after it is so after all before it."""
        if size > 0:
            self.clear(address, size)
            self._insert(address, address + size, access, {})

    def read(self, access: _Access, address: int, size: int) -> None:
        """Add a reader."""
        if size <= 0:
            return
        self._split(address)
        self._split(address + size)
        low, high = self._overlap(address, size)
        at, end, fresh = address, address + size, []
        for index in range(low, high):
            start, (until, _, readers) = self.starts[index], self._pieces[index]
            if at < start:
                fresh.append((at, start))
            readers[access.number] = access
            at = until
        if at < end:
            fresh.append((at, end))
        for start, until in fresh:
            self._insert(start, until, None, {access.number: access})

    def clear(self, address: int, size: int) -> None:
        """Forget a range."""
        self._split(address)
        self._split(address + size)
        low, high = self._overlap(address, size)
        del self.starts[low:high], self._pieces[low:high]

    def prune(self, known: dict[int, int]) -> None:
        """Forget what the host has seen done; where that is not enough, half of the rest."""
        kept = [(start, piece) for start, piece in zip(self.starts, self._pieces, strict=True)
                if any(known.get(a.number, 0) < a.count for a in (piece[1], *piece[2].values()) if a is not None)]
        if len(kept) > SEGMENTS // 2:
            kept = kept[len(kept) // 2:]
        self.starts = [start for start, _ in kept]
        self._pieces = [piece for _, piece in kept]

    def _overlap(self, address: int, size: int) -> tuple[int, int]:
        low = bisect.bisect_right(self.starts, address) - 1
        if low < 0 or self._pieces[low][0] <= address:
            low += 1
        return low, max(low, bisect.bisect_left(self.starts, address + size))

    def _split(self, address: int) -> None:
        index = bisect.bisect_left(self.starts, address) - 1
        if index >= 0 and self._pieces[index][0] > address:
            end, writer, readers = self._pieces[index]
            self._pieces[index] = (address, writer, readers)
            self._insert(address, end, writer, dict(readers))

    def _insert(self, start: int, end: int, writer: _Access | None, readers: dict[int, _Access]) -> None:
        index = bisect.bisect_left(self.starts, start)
        self.starts.insert(index, start)
        self._pieces.insert(index, (end, writer, readers))


def _require_order(old: _Access, new: _Access, old_writes: bool, new_writes: bool, address: int, memory: Any) -> None:
    if old.number == new.number:
        return
    now = _settle(new.clock)
    if now.counts.get(old.number, 0) >= old.count or now.waits or _settle(old.clock).waits:
        return
    verbs = ["writes" if writes else "reads" for writes in (old_writes, new_writes)]
    raise RaceError(
        f"{new.what} {verbs[1]} {memory!r} from {address:#x} on, submitted at {new.where}; {old.what} {verbs[0]} it, "
        f"submitted at {old.where}, and nothing orders the two",
        cause="they are on two streams, without an event, a semaphore or a synchronize between them",
        hint="let one stream wait for an event that the other one records after its command",
        where=(old.where, new.where))


def _settle(clock: _Clock) -> _Clock:
    """The clock with what its waits have brought since."""
    while any(wait.clock is not None for wait in clock.waits):
        closed = [wait.clock for wait in clock.waits if wait.clock is not None]
        clock = _join(_Clock(clock.counts, frozenset(wait for wait in clock.waits if wait.clock is None)), *closed)
    return clock


def _join(*clocks: _Clock) -> _Clock:
    first, *others = clocks
    counts, waits = first.counts, first.waits
    for other in others:
        if other.counts is not counts and any(counts.get(n, 0) < count for n, count in other.counts.items()):
            counts = counts | {n: max(count, counts.get(n, 0)) for n, count in other.counts.items()}
        waits |= other.waits
    return _settle(_Clock(counts, waits)) if any(wait.clock is not None for wait in waits) else _Clock(counts, waits)


def _knows(known: dict[int, int], clock: _Clock) -> bool:
    return not _settle(clock).waits and all(known.get(n, 0) >= count for n, count in clock.counts.items())


def _distance(value: int, base: int) -> int:
    return (value - base + (1 << 31)) % (1 << 32) - (1 << 31)


def _caller() -> str:
    """The line outside of this package that is submitting."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("maia_rt."):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


_SIGNS: Final = {WaitOp.GE: ">=", WaitOp.EQ: "==", WaitOp.ACQUIRE: ">=, to take"}
