"""Memory that was freed while the device may still use it: kept until every queue has passed the moment of the free."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from maia_rt.errors import MaiaError
from maia_rt.queue import QueuePair

if TYPE_CHECKING:
    from maia_rt.runtime.event import Event


class Reclaimer:
    """Frees things when the device is done with what was submitted before they were given up.

    No use of a buffer is recorded. Giving one up takes the newest sequence number of every queue instead: that costs
    nothing where commands are submitted, and no use can be missed.

    Parameters
    ----------
    queues : callable
        Returns the device's queue pairs.
    """

    def __init__(self, queues: Callable[[], Iterable[QueuePair]]) -> None:
        self._queues = queues
        self._lock = threading.RLock()
        self._abandoned: deque[Callable[[], object]] = deque()
        self._pending: deque[tuple[list[tuple[QueuePair, int]], Callable[[], object]]] = deque()
        self._after: deque[tuple[Event, Callable[[], object]]] = deque()

    def abandon(self, free: Callable[[], object]) -> None:
        """Take something over for a finalizer: nothing but an append happens here."""
        self._abandoned.append(free)

    def give_up(self, free: Callable[[], object]) -> None:
        """Call `free` once the device is done with what has been submitted so far: now, or in a later call."""
        self.abandon(free)
        self.collect()

    def give_up_after(self, event: Event, free: Callable[[], object]) -> None:
        """Call `free` once an event is done, whatever became of the commands before it."""
        self._after.append((event, free))
        self.collect()

    def collect(self) -> None:
        """Free what the device is done with."""
        with self._lock:
            while self._abandoned:
                free = self._abandoned.popleft()
                marks = [(queue, queue.ring.head) for queue in self._queues()]
                self._pending.append((marks, free))
            for _ in range(len(self._pending)):
                marks, free = self._pending.popleft()
                if all(queue.quiet(sequence) for queue, sequence in marks):
                    free()
                else:
                    self._pending.append((marks, free))
            for _ in range(len(self._after)):
                event, free = self._after.popleft()
                if passed(event):
                    free()
                else:
                    self._after.append((event, free))

    def close(self) -> None:
        """Free everything: the device no longer runs."""
        with self._lock:
            while self._pending:
                self._pending.popleft()[1]()
            while self._after:
                self._after.popleft()[1]()
            while self._abandoned:
                self._abandoned.popleft()()


def passed(event: Event) -> bool:
    """Say whether the device is done with everything before an event, whatever became of it."""
    try:
        return event.query()
    except MaiaError:
        return True  # a command before it failed, or its queue is gone: nothing of it runs any more
