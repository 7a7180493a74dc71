"""Waiting in asyncio: with the event loop's own selector, without threads."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from maia_rt.diagnosis import timeout_error
from maia_rt.errors import MaiaError
from maia_rt.queue import QueuePair
from maia_rt.runtime.queue_watch import ALIVE_SECONDS, QueueWatch

if TYPE_CHECKING:
    import asyncio


async def reach(queue: QueuePair, sequence: int, seconds: float) -> None:
    """Wait until a command is done. Raises as :meth:`maia_rt.queue.QueuePair.wait`."""
    if queue.done(sequence, waiting=True):
        return
    from asyncio import get_running_loop  # whoever gets here has imported it; others need not

    loop = get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def heard(error: MaiaError | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def expire() -> None:
        try:
            heard(timeout_error(queue.ring, queue._port, queue.id, sequence, seconds))
        except MaiaError as error:  # it has just been closed
            heard(error)

    watch = _watch_of(loop, queue)
    number = watch.waits.add(sequence, heard)
    timer = loop.call_later(seconds, expire)
    try:
        await future
    finally:
        timer.cancel()
        watch.discard(number)


class LoopWatch:
    """What one event loop waits for on one queue. It ends with its last wait, or with the loop.

    Of the loop only `add_reader`, `remove_reader` and `call_later` are used.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: QueuePair) -> None:
        self.loop = loop
        self.waits = QueueWatch(queue)
        for fd in self.waits.fds:
            loop.add_reader(fd, self.waits.look)
        self._timer = loop.call_later(ALIVE_SECONDS, self._check)

    def discard(self, number: int) -> None:
        """Give a wait up, unless it is over; end with the last one."""
        self.waits.discard(number)
        if not self.waits:
            self._timer.cancel()
            if not self.loop.is_closed():
                for fd in self.waits.fds:
                    self.loop.remove_reader(fd)
            self.waits.close()

    def _check(self) -> None:
        self.waits.check()
        if self.waits:
            self._timer = self.loop.call_later(ALIVE_SECONDS, self._check)


# Held by those who wait and by the loop itself, so that a loop that is closed in the middle takes them with it.
_watches: weakref.WeakValueDictionary[tuple[int, int], LoopWatch] = weakref.WeakValueDictionary()


def _watch_of(loop: asyncio.AbstractEventLoop, queue: QueuePair) -> LoopWatch:
    key = id(loop), id(queue)
    found = _watches.get(key)
    # One without waits has ended; another loop may have had the same address.
    if found is None or not found.waits or found.loop is not loop or found.waits.queue is not queue:
        found = _watches[key] = LoopWatch(loop, queue)
    return found
