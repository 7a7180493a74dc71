"""Looks after collectives under way: where a rank fails, the others are told instead of left waiting."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from maia_rt.errors import ClosedError, DeviceLost, MaiaError, RankFailure
from maia_rt.queue import FAILED

if TYPE_CHECKING:
    from maia_rt.queue import QueuePair
    from maia_rt.runtime.stream import Stream

_LOOK_SECONDS: Final = 0.05
_ALIVE_SECONDS: Final = 0.3


class Part:
    """One rank's commands of one collective.

    Parameters
    ----------
    rank : int
    stream : Stream
    before, after : (QueuePair, int)
        Where the stream was before the first of them, and where it was with the last.
    """

    def __init__(self, rank: int, stream: Stream, before: tuple[QueuePair, int], after: tuple[QueuePair, int]) -> None:
        self.rank = rank
        self.stream = stream
        self._before = before
        self._queue, self._last = after

    def state(self) -> BaseException | bool:
        """Whether it is done; or why it will never be."""
        try:
            if self._queue.done(self._last):
                return True
        except MaiaError as error:
            return error.with_traceback(None)
        stream = self.stream
        if stream.device.closed:
            return ClosedError(f"{stream.device.name}: the device has been closed")
        if stream._account.stopped & FAILED:
            return stream._fault()
        if stream.closed:
            return ClosedError(f"{stream.device.name}: {stream.name} has been closed")
        return False

    def abort(self, failure: RankFailure) -> None:
        """Have the first command of these that is not done fail for this reason."""
        number = self.stream.number
        queue_before, sequence_before = self._before
        for queue in list(self.stream._account.queues):
            after = sequence_before if queue is queue_before else 0
            first = next((sequence for sequence in queue.ring.outstanding(number) if sequence > after), 0)
            if first and queue.abort(first, number, failure):
                with contextlib.suppress(MaiaError):
                    queue.wait(first, 1.0)
                return


class Watch:
    """The collectives of a communicator that are not done, and the thread that looks after them.

    The thread is started with the first collective. It sleeps while there is none.

    Parameters
    ----------
    broken : callable
        Told the failure that ended the communicator's work, before anybody else is.
    """

    def __init__(self, broken: Callable[[RankFailure], None]) -> None:
        self._broken = broken
        self._parts: deque[Sequence[Part]] = deque()
        self._bell = threading.Condition()
        self._ending = False
        self._asleep = False
        self._thread: threading.Thread | None = None

    def add(self, parts: Sequence[Part]) -> None:
        """Look after a collective from here on."""
        self._parts.append(parts)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="maia-collectives", daemon=True)
            self._thread.start()
        elif self._asleep:
            with self._bell:
                self._bell.notify()

    def fail(self, failure: RankFailure, parts: Sequence[Part]) -> None:
        """Tell every rank of these parts, but the one that failed."""
        self._broken(failure)
        for part in parts:
            if part.rank != failure.rank and part.state() is False:
                with contextlib.suppress(MaiaError):
                    part.abort(failure)

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._ending = True
        with self._bell:
            self._bell.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        next_look = 0.0
        while not self._ending:
            with self._bell:
                self._asleep = not self._parts
                if not self._ending:
                    self._bell.wait(None if self._asleep and not self._parts else _LOOK_SECONDS)
                self._asleep = False
            while self._parts and not self._ending and self._settled(self._parts[0]):
                self._parts.popleft()
            if self._parts and not self._ending:
                look = time.monotonic() >= next_look
                if look:
                    next_look = time.monotonic() + _ALIVE_SECONDS
                self._examine(look)

    def _settled(self, parts: Sequence[Part]) -> bool:
        return all(part.state() is True for part in parts)

    def _examine(self, look: bool) -> None:
        parts = list(self._parts[0])
        for part in parts:
            reason = part.state()
            if reason is False and look:
                try:
                    part.stream.device._firmware.check_alive()
                except DeviceLost as error:
                    reason = error.with_traceback(None)
                except MaiaError:
                    continue
            if isinstance(reason, BaseException):
                failure = RankFailure(part.rank, part.stream.device.name, reason)
                every = [one for collective in list(self._parts) for one in collective]
                self._parts.clear()
                self.fail(failure, every)
                return
