"""Which streams are on which hardware queue."""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

from maia_rt._fast.lane import Lane
from maia_rt._fast.ring import Account, QueueStopped
from maia_rt.errors import MaiaError, OutOfQueues
from maia_rt.queue import CLOSED, QueuePair

MOVE: Final = 2
"""In `Account.stopped`: the stream must look for another queue before its next command."""
_UNKNOWN: Final = 1 << 64


class Place:
    """A hardware queue in use.

    Attributes
    ----------
    queue : QueuePair
    priority : int
    streams : dict
        The accounts of the streams that submit here, by number.
    left : dict
        By number of a stream that has gone: the account, and its last command here.
    holder : Account or None
        Whose unbounded waits are outstanding here. Nobody else submits here then.
    waits : deque of int
        Their sequence numbers.
    """

    def __init__(self, queue: QueuePair, priority: int) -> None:
        self.queue = queue
        self.priority = priority
        self.streams: dict[int, Account] = {}
        self.left: dict[int, tuple[Account, int]] = {}
        self.holder: Account | None = None
        self.waits: deque[int] = deque()

    def refresh(self) -> Place:
        """Forget what is done."""
        ring = self.queue.ring
        progress = ring.head if ring.closed else ring.poll()
        while self.waits and self.waits[0] <= progress:
            self.waits.popleft()
        if not self.waits:
            self.holder = None
        for number, (account, last) in list(self.left.items()):
            if self.queue.quiet(last):
                del self.left[number]
                if number not in self.streams:
                    account.queues.pop(self.queue, None)
                    self.queue.accounts.pop(number, None)
        return self

    def join(self, account: Account) -> None:
        """Take a stream in."""
        self.streams[account.number] = self.queue.accounts[account.number] = account
        account.queues[self.queue] = 0
        self.queue.ring.sole = account if len(self.streams) == 1 else None

    def part(self, account: Account, last: int) -> None:
        """Let a stream go, which has submitted up to `last` here."""
        self.streams.pop(account.number, None)
        self.left[account.number] = account, last
        self.queue.ring.sole = next(iter(self.streams.values())) if len(self.streams) == 1 else None

    def submit_wait(self, account: Account, semaphore: int, value: int) -> int:
        """Submit a wait for a stream that is on another queue still; return its sequence number."""
        while True:
            try:
                return self.queue.ring.submit_for(account, semaphore, value)
            except QueueStopped:
                self.queue.repair()


class Claim:
    """An unbounded wait that is about to be submitted: its stream has the queue for itself.

    Parameters
    ----------
    place : Place
    lock : RLock
        Of the table.
    """

    def __init__(self, place: Place, lock: Any) -> None:
        self._place = place
        self._lock = lock

    def hold(self, sequence: int) -> None:
        """Keep the queue until the command `sequence`, which waits, is done."""
        with self._lock:
            self._place.waits.remove(_UNKNOWN)
            self._place.waits.append(sequence)

    def drop(self) -> None:
        """Give the queue up: the wait was not submitted."""
        with self._lock:
            self._place.waits.remove(_UNKNOWN)
            self._place.refresh()


class QueueTable:
    """The hardware queues of a device, and the streams on them.

    A stream gets a queue of its own while there are any; after that, queues are shared among streams of one priority.

    Events cannot deadlock a queue that is shared, for they stand for what was submitted before: the oldest command that
    is not done never waits for a younger one. A wait for something that may be submitted later can: its signal could
    stand behind it. So a stream that waits in such a way, or for an event behind such a wait, has its queue for itself
    until that is over. The others go to another queue with their next command, which waits for their last one here.

    Parameters
    ----------
    make : callable
        ``(number, first index, priority, entries)`` to a queue pair.
    count : int
        How many hardware queues there are.
    first_index : int
        Where queues start that were not used before.
    name : str
        The device's, for error texts.
    """

    def __init__(self, make: Callable[[int, int, int, int], QueuePair], count: int, name: str,
                 first_index: int = 0) -> None:
        self._make = make
        self._name = name
        self._count = count
        self._lock = threading.RLock()
        self._free = list(range(count))
        self._initial = [first_index] * count
        self._places: dict[QueuePair, Place] = {}
        self._unconfirmed: list[QueuePair] = []

    def __iter__(self) -> Iterator[QueuePair]:
        """The queues that are in use."""
        return iter(list(self._places))

    def __len__(self) -> int:
        return len(self._places)

    def streams_on(self, queue: QueuePair) -> list[str]:
        """Return the names of the streams on a queue."""
        place = self._places.get(queue)
        return [account.name for account in list(place.streams.values())] if place else []

    def join(self, account: Account, entries: int, first_index: int | None) -> QueuePair:
        """Give a new stream its queue: one of its own, or the one with the fewest streams of its priority.

        Raises
        ------
        OutOfQueues
            Every queue waits for something of one stream.
        """
        with self._lock:
            self.collect()
            place = self._find(account.priority, entries, first_index)
            place.join(account)
            return place.queue

    def move(self, lane: Lane) -> None:
        """Bring a stream that was asked to move to another queue, unless it may stay by now.

        There it waits for what it has submitted here.

        Raises
        ------
        OutOfQueues, QueueFull, DeviceLost
            It has not moved.
        """
        account = lane._account
        with self._lock:
            if not account.stopped & MOVE:
                return
            place = self._places[lane._queue].refresh()
            # Who has claimed a queue stays: its wait may be on the way there.
            if place.holder is account or (place.holder is None and not (self._free and len(place.streams) > 1)):
                account.go(MOVE)
                return
            queue = place.queue
            target = self._find(account.priority, queue.ring.entries, None)
            if target is place:  # the wait that it was to make way for is over
                account.go(MOVE)
                return
            last = max(account.last, account.follow)
            # It is known there before anything of it is: a fault finds the account by its number.
            target.join(account)
            try:
                sequence = target.submit_wait(account, queue.id, last & 0xFFFFFFFF)
            except BaseException:
                target.part(account, target.queue.ring.initial)
                raise
            account.queues[queue] = last
            lane._settle(target.queue, sequence, MOVE)
            place.part(account, last)

    def claim(self, account: Account, queue: QueuePair) -> Claim | None:
        """Let a stream have its queue for itself, for a wait that may take as long as it likes.

        Returns
        -------
        Claim or None
            None where another stream has the queue: this one must move first.

        Raises
        ------
        OutOfQueues
            There would be none left for other streams.
        """
        with self._lock:
            place = self._places[queue].refresh()
            if place.holder not in (None, account):
                account.stop(MOVE)
                return None
            places = [p.refresh() for p in self._places.values()]
            others = [a for p in places for a in p.streams.values() if a is not account and a is not p.holder]
            if others and not self._free and all(p is place or p.holder for p in places):
                raise OutOfQueues(
                    f"{self._name}: a wait for what may be submitted later needs a queue for its stream alone, and of "
                    f"{self._count} hardware queues none would be left for {others[0].name}",
                    cause="every other queue has such a wait outstanding", hint="signal first, or use fewer streams")
            place.holder = account
            place.waits.append(_UNKNOWN)
            for other in place.streams.values():
                if other is not account:
                    other.stop(MOVE)
            return Claim(place, self._lock)

    def waits_behind(self, queue: QueuePair, sequence: int) -> bool:
        """Say whether a command stands behind a wait that may take as long as it likes."""
        with self._lock:
            place = self._places.get(queue)
            return place is not None and bool(place.refresh().waits) and place.waits[0] <= sequence

    def waits_after(self, queue: QueuePair, sequence: int, until: int | None = None) -> bool:
        """Say whether such a wait stands behind a command, and before the command `until` where that is given."""
        with self._lock:
            place = self._places.get(queue)
            return place is not None and any(wait == _UNKNOWN or (wait > sequence and (until is None or wait < until))
                                             for wait in place.refresh().waits)

    def leave(self, account: Account, queue: QueuePair) -> None:
        """Take a stream that ends off its queue. What it has not done yet is aborted.

        The queue is given back with the last stream; where it has commands of others to finish, as soon as it has.
        """
        account.stop(CLOSED)
        with self._lock:
            place = self._places.get(queue)
            if place is None:
                return
            place.part(account, account.last)
            place.refresh()
            shared = bool(place.streams) or any(number != account.number for number in place.left)
            for other in list(account.queues):
                if shared or other is not queue:
                    other.doom(account.number)
            if not shared:
                self._give_back(place)
            self._spread()

    def collect(self) -> None:
        """Give back queues that nobody is on any more."""
        with self._lock:
            for place in list(self._places.values()):
                if not place.streams and not place.refresh().left:
                    self._give_back(place)

    def release(self) -> None:
        """Let go of every queue of a device that no longer runs."""
        with self._lock:
            for queue in [*self._places, *self._unconfirmed]:
                queue.release()
            self._places.clear()
            self._unconfirmed.clear()
            self._free = []

    def _find(self, priority: int, entries: int, first_index: int | None) -> Place:
        """Return a queue nobody has, or the best one to share."""
        if self._free:
            number = heapq.heappop(self._free)
            try:
                queue = self._make(number, self._initial[number] if first_index is None else first_index, priority,
                                   entries)
            except BaseException:
                heapq.heappush(self._free, number)
                raise
            place = self._places[queue] = Place(queue, priority)
            return place
        open_to_all = [place for place in self._places.values() if place.refresh().holder is None]
        if not open_to_all:
            raise OutOfQueues(
                f"{self._name}: all {self._count} hardware queues are in use",
                cause="each has a wait outstanding that only its own stream may stand behind, or is being closed",
                hint="signal what they wait for, or close streams that are idle")
        return min(open_to_all, key=lambda p: (abs(p.priority - priority), len(p.streams), p.queue.id))

    def _give_back(self, place: Place) -> None:
        queue = place.queue
        del self._places[queue]
        # A queue starts where the last one of its number ended: a wait for that one's progress stays satisfied.
        self._initial[queue.id] = queue.ring.head
        try:
            queue.close()
        except MaiaError:
            self._unconfirmed.append(queue)
            raise
        for account, _ in place.left.values():
            account.queues.pop(queue, None)
        heapq.heappush(self._free, queue.id)

    def _spread(self) -> None:
        """Have a stream that shares a queue go to one that has come free."""
        if self._free:
            crowded = max(self._places.values(), key=lambda p: len(p.streams), default=None)
            if crowded is not None and len(crowded.streams) > 1:
                next(reversed(crowded.streams.values())).stop(MOVE)
