"""Clients that wait for their turn at a device."""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
from typing import Final

from maia_emulator.session import close_drained
from maia_rt.transport import wire

log = logging.getLogger(__name__)

TURN_SECONDS: Final = 2.0
"""Longer than a device takes to be rid of its last client, shorter than the patience of any client."""
WAITING_CLIENTS: Final = 64
RETRY_SECONDS: Final = 0.1


class WaitingClients:
    """Clients in the order in which they came: each is handed out to be served, or told that the device is in use.

    A client that comes while another is served may be the next one of a driver that starts anew, so it waits for its
    turn; but not so long that it gives the device up for dead (QEMU does after five seconds, without a word of why).

    Parameters
    ----------
    listening : socket.socket
        Stays the caller's.
    name : str
        For messages on stderr.
    """

    def __init__(self, listening: socket.socket, name: str) -> None:
        self._listening = listening
        self._name = name
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._changed = threading.Condition()
        self._waiting: collections.deque[tuple[socket.socket, float]] = collections.deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="waiting clients", daemon=True)
        self._thread.start()

    def next(self) -> socket.socket | None:
        """Wait for a client; None where `stop` was called."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            return None if self._stopping else self._waiting.popleft()[0]

    def stop(self) -> None:
        """Accept no more, and leave those who wait."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        for client, _ in self._waiting:
            _refuse(client, errno.ESHUTDOWN)
        self._waiting.clear()
        os.close(self._stop_fd)

    def _run(self) -> None:
        ready = select.poll()
        ready.register(self._stop_fd, select.POLLIN)
        while not self._stopping:
            # Those for whom there is no room wait outside, in the socket's backlog.
            room = len(self._waiting) < WAITING_CLIENTS
            ready.register(self._listening, select.POLLIN if room else 0)
            events = ready.poll(self._milliseconds())
            if any(fd == self._listening.fileno() for fd, _ in events):
                self._accept()
            self._refuse_late()

    def _milliseconds(self) -> float | None:
        """Until the first one has waited too long."""
        with self._changed:
            if not self._waiting:
                return None
            return max(0.0, self._waiting[0][1] - time.monotonic()) * 1000 + 1

    def _accept(self) -> None:
        try:
            client, _ = self._listening.accept()
        except OSError as error:
            # The client gave up already, or descriptors ran out: the next one may have more luck.
            log.warning("%s: accept: %s", self._name, error)
            time.sleep(RETRY_SECONDS)
            return
        with self._changed:
            self._waiting.append((client, time.monotonic() + TURN_SECONDS))
            self._changed.notify_all()

    def _refuse_late(self) -> None:
        while True:
            with self._changed:
                if not self._waiting or self._waiting[0][1] > time.monotonic():
                    return
                client, _ = self._waiting.popleft()
            log.info("%s: in use, a client was refused", self._name)
            _refuse(client, errno.EBUSY)


def _refuse(client: socket.socket, error: int) -> None:
    """Answer a client's first message with an errno, if it has sent one, and close."""
    client.setblocking(False)
    with contextlib.suppress(OSError):
        header = client.recv(wire.HEADER_SIZE)
        if len(header) == wire.HEADER_SIZE:
            client.send(wire.pack_error(wire.unpack_header(header), error))
    close_drained(client)
