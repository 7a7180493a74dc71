"""Devices on sockets: a listener each, one client at a time, and an orderly end."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from maia_emulator.function import Function
from maia_emulator.session import Session
from maia_emulator.waiting_clients import WaitingClients

log = logging.getLogger(__name__)

SUN_PATH_BYTES: Final = 108
"""sockaddr_un.sun_path, with its NUL."""
BACKLOG: Final = 128


class ServerError(Exception):
    """The socket cannot be served; the text says why."""


class ListeningSocket:
    """A listening socket with its file, which only this user may connect to.

    Made before any thread is started: the file's mode is set through the process's umask, so that there is no moment
    at which others could connect.

    Parameters
    ----------
    path : str
        A socket file that nobody serves any more is replaced; anything else there is left alone.

    Raises
    ------
    ServerError
        The path is too long, its folder is missing or closed to us, or it is taken.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._bind()
            status = os.lstat(path)
        except BaseException:
            self.socket.close()
            raise
        self._identity = (status.st_dev, status.st_ino)

    def close(self) -> None:
        """Stop listening; remove the file if it is still the one made here."""
        if self.socket.fileno() < 0:
            return
        try:
            status = os.lstat(self.path)
            if (status.st_dev, status.st_ino) == self._identity:
                os.unlink(self.path)
        except OSError:
            pass
        self.socket.close()

    def _bind(self) -> None:
        size = len(os.fsencode(self.path))
        if not 0 < size < SUN_PATH_BYTES:
            raise ServerError(
                f"the socket path {self.path!r} has {size} bytes, {SUN_PATH_BYTES - 1} are possible: use a shorter one"
            )
        folder = Path(self.path).parent
        try:
            # Two servers that find the same stale file must not remove each other's new one.
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ServerError(f"the folder {str(folder)!r} of the socket cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._remove_stale()
            before = os.umask(0o177)
            try:
                self.socket.bind(self.path)
            finally:
                os.umask(before)
            self.socket.listen(BACKLOG)
        except OSError as error:
            raise ServerError(f"cannot listen on {self.path!r}: {error.strerror}") from None
        finally:
            os.close(lock)

    def _remove_stale(self) -> None:
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(status.st_mode):
            raise ServerError(f"{self.path!r} exists and is no socket; it is left as it is")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            result = probe.connect_ex(self.path)
        if result != errno.ECONNREFUSED:
            reason = "is in use by another server" if result in (0, errno.EAGAIN) else os.strerror(result)
            raise ServerError(f"the socket {self.path!r} {reason}")
        os.unlink(self.path)


class Server:
    """Serves one device on its own thread.

    Parameters
    ----------
    function : Function
    listening : ListeningSocket or socket.socket
        A connected socket is served once.
    ended : callable, optional
        Called when the thread ends by itself.
    """

    def __init__(
        self, function: Function, listening: ListeningSocket | socket.socket, ended: Callable[[], None]
    ) -> None:
        self._function = function
        self._listening = listening
        self._ended = ended
        self._waiting: WaitingClients | None = None
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)

    def start(self) -> None:
        """Start serving."""
        if isinstance(self._listening, ListeningSocket):
            self._waiting = WaitingClients(self._listening.socket, self._listening.path)
        self._thread.start()

    def stop(self) -> None:
        """End with the client of the moment, close the socket and the device."""
        with self._lock:
            self._stopping = True
            if self._session is not None:
                self._session.stop()
        if self._waiting is not None:
            self._waiting.stop()
        if self._thread.ident is not None:
            self._thread.join()
        self._listening.close()
        self._function.close()

    def _run(self) -> None:
        try:
            if isinstance(self._listening, socket.socket):
                self._serve(self._listening, "client")
            elif self._waiting is not None:
                while (client := self._waiting.next()) is not None:
                    self._serve(client, self._listening.path)
        finally:
            self._ended()

    def _serve(self, client: socket.socket, name: str) -> None:
        session = Session(self._function, client, name)
        with self._lock:
            if self._stopping:
                client.close()
                return
            self._session = session
            self._function.hang_up = session.stop
        try:
            session.run()
        except Exception:
            # A bug of ours ended this client; the next one is served all the same.
            log.exception("%s: the session failed", name)
        with self._lock:
            self._session = None
