"""Waiting for a queue without a thread that sits in the wait: for event loops, and for the thread of callbacks."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from typing import Final

from maia_rt._fast.waiters import Watch
from maia_rt.errors import MaiaError
from maia_rt.queue import QueuePair

ALIVE_SECONDS: Final = 0.4
"""How often it is looked whether the device is still there: the kernel's VFIO is silent where one just vanishes."""


class QueueWatch:
    """Waits for commands of one queue, whose ends it tells by calls.

    Poll `fds` and call :meth:`look` where one is readable, and :meth:`check` every `ALIVE_SECONDS`. One thread calls.

    Parameters
    ----------
    queue : QueuePair

    Attributes
    ----------
    fds : tuple of int
        Two eventfds: its own, and another number for the queue's.
    """

    def __init__(self, queue: QueuePair) -> None:
        self.queue = queue
        self.fds: tuple[int, ...] = ()
        self._numbers = itertools.count()
        self._waits: dict[int, tuple[int, Callable[[MaiaError | None], None]]] = {}
        waiters = queue.ring.waiters
        self._watch = Watch(waiters)
        # Of its own: the device may close the queue's while an event loop still polls it.
        self.fds = (self._watch.fd, os.dup(waiters.queue_fd))

    def __len__(self) -> int:
        """How many waits there are."""
        return len(self._waits)

    def add(self, sequence: int, heard: Callable[[MaiaError | None], None]) -> int:
        """Wait for a command too; return a number for :meth:`discard`.

        Parameters
        ----------
        sequence : int
        heard : callable
            Called from :meth:`look` or :meth:`check`, once: with None where the command is done, else with the error.
        """
        number = next(self._numbers)
        self._waits[number] = sequence, heard
        self._arm()
        return number

    def discard(self, number: int) -> None:
        """Give a wait up, unless it is over."""
        self._waits.pop(number, None)

    def look(self) -> None:
        """Tell those whose commands are done."""
        with contextlib.suppress(MaiaError):  # the device is gone and cannot be woken: check() tells
            self._watch.serve()
        for number, (sequence, heard) in list(self._waits.items()):
            try:
                if not self.queue.done(sequence, waiting=True):
                    continue
                error = None
            except MaiaError as raised:
                error = raised
            if self._waits.pop(number, None) is not None:
                heard(error)
        self._arm()

    def check(self) -> None:
        """Look, and tell everybody where the device is gone."""
        self.look()
        if self._waits:
            try:
                self.queue._port.check_alive()
            except MaiaError as error:
                waits, self._waits = self._waits, {}
                for _, heard in waits.values():
                    heard(error)

    def close(self) -> None:
        """Give the eventfds back; idempotent. Waits that are left are not told."""
        fds, self.fds = self.fds, ()
        if fds:
            self._watch.close()
            os.close(fds[1])

    def __del__(self) -> None:
        if hasattr(self, "fds"):
            self.close()

    def _arm(self) -> None:
        if self.fds:
            with contextlib.suppress(MaiaError):
                self._watch.want(min((sequence for sequence, _ in self._waits.values()), default=None))
