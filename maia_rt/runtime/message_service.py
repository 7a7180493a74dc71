"""Answering a vfio-user server that reaches our memory by messages, also while nobody waits for the device."""

from __future__ import annotations

import os
import select
import threading

from maia_rt.errors import MaiaError
from maia_rt.transport import Transport

_JOIN_SECONDS = 2.0


class MessageService:
    """A thread that serves a transport as long as memory without a file is registered. Any thread may call.

    Parameters
    ----------
    transport : Transport
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._users = 0
        self._thread: threading.Thread | None = None
        self._stop = -1

    def begin(self) -> None:
        """Serve from now on; the counterpart is :meth:`end`."""
        with self._lock:
            self._users += 1
            fd = self._transport.liveness_fd
            if self._thread is None and fd is not None:
                read, self._stop = os.pipe2(os.O_CLOEXEC)
                self._thread = threading.Thread(target=self._run, args=(fd, read), name="maia-dma", daemon=True)
                self._thread.start()

    def end(self) -> None:
        """Serve no longer, where nobody else wants it."""
        with self._lock:
            self._users -= 1
            if self._users or self._thread is None:
                return
            thread, self._thread = self._thread, None
            os.close(self._stop)
        if thread is not threading.current_thread():
            thread.join(_JOIN_SECONDS)

    def _run(self, fd: int, stop: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(stop, 0)
        try:
            while True:
                ready = dict(poll.poll())
                if stop in ready:
                    return
                try:
                    self._transport.service()
                except MaiaError:
                    return  # gone, or closed: whoever uses the device is told
        finally:
            os.close(stop)
