"""The client's end of a vfio-user socket: requests and their replies, and the server's own commands in between.

    us                          server
     | REGION_READ ------------> |
     | <------------- DMA_READ   |     the server may need our memory before it can answer: serve it, go on waiting
     | DMA_READ reply ---------> |
     | <--- REGION_READ reply    |

Replies come in the order of the requests, and one lock lets one request be under way. So a reply that does not match
ends the connection, and so does one that does not come in time: it could come later and be taken for another's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Final, NoReturn

from maia_rt.errors import (
    ClosedError,
    DeviceLost,
    DeviceTimeout,
    ForkedError,
    MaiaError,
    ProtocolError,
    TransportError,
)
from maia_rt.transport import fork, wire
from maia_rt.transport.dma_table import DmaTable
from maia_rt.transport.protocol import Access
from maia_rt.transport.wire import Command, Header

OUR_MAX_MSG_FDS: Final = 16
OUR_MAX_DATA_XFER_SIZE: Final = 1 << 20

_SERVED_AT_ONCE: Final = 256
"""Requests of the server that one call of service takes; the socket stays readable for the next call."""

# The states of a connection. Every call compares with READY under the lock, so one comparison covers all the others.
READY, BUSY, CLOSED, LOST, FORKED = range(5)


class Connection:
    """One socket to one device. :class:`maia_rt.transport.vfio_user.VfioUserClient` adds what the messages mean.

    Parameters
    ----------
    sock : socket.socket
        A connected stream socket; owned from here on.
    name : str
        For error texts.
    timeout : float
        How long the server may take for one reply, in seconds.
    """

    def __init__(self, sock: socket.socket, name: str, timeout: float) -> None:
        self._sock = sock
        self._name = name
        self._timeout = timeout
        # The kernel's own time-outs spare a poll() per call, which Python's would make.
        sock.settimeout(None)
        limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6) or (1 if timeout < 1 else 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._lock = threading.RLock()
        self._state = READY
        self._lost = ""
        self._next_id = 0
        # Bytes that one receive took beyond a message of ours; only the fast path in vfio_user.py can leave some.
        self._pending = bytearray()
        self._peek = bytearray(1)
        self._dma = DmaTable(name, wire.DEFAULT_MAX_DMA_MAPS, 4096)
        fork.follow(self)

    # --- state -------------------------------------------------------------------------------------------------------

    def _refuse(self) -> NoReturn:
        """Raise what the state, which is not READY, calls for."""
        if self._state == FORKED:
            raise ForkedError(f"{self._name}: the device was opened before fork", hint="open it anew in the child")
        if self._state == CLOSED:
            raise ClosedError(f"{self._name}: the device has been closed")
        if self._state == BUSY:
            raise TransportError(f"{self._name}: called from inside another call of the same thread",
                                 errno=errno.EDEADLK, cause="a finalizer or a signal handler uses the device")
        raise DeviceLost(f"{self._name}: the device is gone", cause=self._lost,
                         hint="start the server again and open the device anew")

    def _break(self, reason: MaiaError) -> None:
        """Give the connection up for `reason`. Who polls the socket sees it hang up; its number stays taken."""
        if self._state in (READY, BUSY):
            self._state = LOST
            # Its text only: an exception holds the frames it came through, and with them views of the device's memory.
            self._lost = reason.what
            with contextlib.suppress(OSError):  # the peer may have done so already
                self._sock.shutdown(socket.SHUT_RDWR)

    def _broken_by(self, error: BaseException, what: str) -> MaiaError | None:
        """Give the connection up because of `error`; return what to raise instead, None to raise `error` itself."""
        if isinstance(error, TransportError) and not isinstance(error, ProtocolError):
            self._state = READY
            return None
        reason: MaiaError
        if isinstance(error, ProtocolError):
            self._break(error)
            return None
        if isinstance(error, BlockingIOError | TimeoutError):
            reason = DeviceTimeout(f"{self._name}: no answer to {what} within {self._timeout:g} s",
                                   cause="the server hangs, or serves another client", hint="open the device anew")
        elif isinstance(error, EOFError | OSError):
            reason = DeviceLost(f"{self._name}: the connection broke during {what}: {error}",
                                cause="the server ended or crashed",
                                hint="start the server again and open the device anew")
        else:
            self._break(TransportError(f"{self._name}: {what} was interrupted by {type(error).__name__}"))
            return None
        self._break(reason)
        return reason

    def _after_fork(self) -> None:
        # Another thread of the parent may hold the lock, for ever in this process. The child's copy of the socket is
        # closed at once: otherwise the server would not see the parent end. Closing a copy tells the server nothing.
        self._lock = threading.RLock()
        self._state = FORKED
        self._sock.close()

    # --- requests ----------------------------------------------------------------------------------------------------

    def _request(
        self, command: Command, parts: Sequence[bytes | bytearray | memoryview] = (), *, what: str = "",
        fds: Sequence[int] = (), limit: int = 0, into: memoryview | None = None, max_fds: int = 0,
    ) -> tuple[bytearray, list[int]]:
        """Send one command and return the body of its reply and the descriptors that came with it.

        Parameters
        ----------
        command, parts, fds
            What to send.
        what : str
            What the request is, for error texts; by default the command's name.
        limit : int
            The largest body of the reply, in bytes.
        into : memoryview, optional
            Takes what follows the first 16 bytes of the body; the reply must fill it.
        max_fds : int
            How many descriptors the reply may carry.
        """
        what = what or command.name
        with self._lock:
            if self._state != READY:
                self._refuse()
            self._state = BUSY
            try:
                number = self._next_id = (self._next_id + 1) & 0xFFFF
                header = wire.pack_header(number, command, sum(map(len, parts)))
                self._send((header, *parts), fds, what)
                reply = self._await_reply(number, command, what, limit=limit, into=into, max_fds=max_fds)
                self._drain_pending()
                self._state = READY
                return reply
            except BaseException as error:
                instead = self._broken_by(error, what)
                if instead is None:
                    raise
                raise instead from error

    def _send(self, parts: Sequence[bytes | bytearray | memoryview], fds: Sequence[int], what: str) -> None:
        try:
            wire.send(self._sock, parts, fds)
        except OSError as error:
            # With these nothing has left: a descriptor is not open, or too many are in flight.
            if error.errno in (errno.EBADF, errno.ETOOMANYREFS, errno.EINVAL):
                raise TransportError(f"{self._name}: {what} could not be sent: {error.strerror}",
                                     errno=error.errno) from None
            raise

    def _await_reply(
        self, number: int, command: int, what: str, *, limit: int = 0, into: memoryview | None = None, max_fds: int = 0
    ) -> tuple[bytearray, list[int]]:
        """Return the reply to request `number`; serve the server's commands until it comes."""
        deadline = time.monotonic() + self._timeout
        while True:
            # A server that goes on asking must not hold this call for ever either.
            if time.monotonic() > deadline:
                raise TimeoutError("no reply among the server's messages")
            header, fds = self._receive_header(deadline)
            try:
                if header.type == wire.TYPE_COMMAND:
                    self._serve(header, deadline, bool(fds))
                    continue
                self._check_reply(header, number, command, what)
                if header.flags & wire.FLAG_ERROR:
                    self._fill(bytearray(header.body_size), deadline)
                    self._drain_pending()
                    raise self._refused(header.errno, what)
                if len(fds) > max_fds:
                    raise ProtocolError(f"{self._name}: the reply to {what} carries {len(fds)} descriptors, "
                                        f"{max_fds} may", errno=errno.EINVAL)
                size = header.body_size
                exact = into is not None and size != 16 + len(into)
                if exact or size > (16 + len(into) if into is not None else limit):
                    raise ProtocolError(f"{self._name}: the reply to {what} has {size} bytes", errno=errno.EMSGSIZE)
                body = bytearray(size if into is None else 16)
                self._fill(body, deadline)
                if into is not None:
                    self._fill(into, deadline)
                taken, fds = fds, []
                return body, taken
            finally:
                wire.close_fds(fds)

    def _check_reply(self, header: Header, number: int, command: int, what: str) -> None:
        if header.type != wire.TYPE_REPLY or header.id != number or header.command != command:
            raise ProtocolError(
                f"{self._name}: message {header.id} (command {header.command}, flags {header.flags:#x}) came in place "
                f"of the reply to {what}, message {number}", errno=errno.EPROTO,
                cause="the server answers out of step, or is not a vfio-user server")

    def _refused(self, code: int, what: str) -> TransportError:
        text = os.strerror(code) if 0 < code < 4096 else f"error {code}"
        return TransportError(f"{self._name}: the server refused {what}: {text}", errno=code)

    # --- receiving ---------------------------------------------------------------------------------------------------

    def _fill(self, buffer: bytearray | memoryview, deadline: float, max_fds: int = 0) -> list[int]:
        view = memoryview(buffer)
        if self._pending:
            have = min(len(view), len(self._pending))
            view[:have] = self._pending[:have]
            del self._pending[:have]
            view = view[have:]
        return wire.recv_exact(self._sock, view, max_fds, deadline) if view else []

    def _receive_header(self, deadline: float) -> tuple[Header, list[int]]:
        raw = bytearray(wire.HEADER_SIZE)
        fds = self._fill(raw, deadline, OUR_MAX_MSG_FDS)
        header = wire.unpack_header(raw)
        if not 0 <= header.body_size <= OUR_MAX_DATA_XFER_SIZE + wire.MESSAGE_SLACK:
            wire.close_fds(fds)
            raise ProtocolError(f"{self._name}: a message claims a size of {header.size} bytes", errno=errno.EMSGSIZE,
                                cause="the peer is not a vfio-user server, or is broken")
        return header, fds

    def _drain_pending(self) -> None:
        """Serve what one receive took beyond our reply: polling the socket would not show it."""
        while self._pending:
            self._serve_next("a message of the server")

    # --- the server's commands ---------------------------------------------------------------------------------------

    def service(self) -> int:
        """Serve the server's commands that have arrived; see :meth:`maia_rt.transport.protocol.Transport.service`."""
        with self._lock:
            if self._state != READY:
                self._refuse()
            self._state = BUSY
            served = 0
            try:
                while served < _SERVED_AT_ONCE and self._readable():
                    self._serve_next("a message of the server")
                    served += 1
                self._state = READY
                return served
            except BaseException as error:
                instead = self._broken_by(error, "service")
                if instead is None:
                    raise
                raise instead from error

    def _readable(self) -> bool:
        if self._pending:
            return True
        try:
            if self._sock.recv_into(self._peek, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return True
        except BlockingIOError:
            return False
        raise EOFError("the server closed the connection")

    def _serve_next(self, what: str) -> None:
        deadline = time.monotonic() + self._timeout
        header, fds = self._receive_header(deadline)
        wire.close_fds(fds)
        if header.type != wire.TYPE_COMMAND:
            raise ProtocolError(f"{self._name}: {what} is a reply that nobody waits for", errno=errno.EPROTO)
        self._serve(header, deadline, bool(fds))

    def _serve(self, header: Header, deadline: float, had_fds: bool) -> None:
        """Execute one command of the server: DMA_READ or DMA_WRITE by message. Any other gets an errno."""
        body = bytearray(header.body_size)
        self._fill(body, deadline)
        reply: list[bytes | bytearray | memoryview]
        try:
            if had_fds:
                raise OSError(errno.EINVAL, "descriptors attached")
            reply = self._dma_access(header.command, memoryview(body))
        except OSError as error:
            reply = [wire.pack_error(header, error.errno or errno.EIO)]
        else:
            reply.insert(0, wire.pack_header(header.id, header.command, sum(map(len, reply)), wire.TYPE_REPLY))
        if not header.flags & wire.FLAG_NO_REPLY:
            wire.send(self._sock, reply)

    def _dma_access(self, command: int, body: memoryview) -> list[bytes | bytearray | memoryview]:
        if command not in (Command.DMA_READ, Command.DMA_WRITE):
            raise OSError(errno.ENOSYS, "not a command for a client")
        if len(body) < wire.DMA_ACCESS.size:
            raise OSError(errno.EINVAL, "too short")
        address, count = wire.DMA_ACCESS.unpack_from(body)
        if count > OUR_MAX_DATA_XFER_SIZE:
            raise OSError(errno.E2BIG, "more than max_data_xfer_size")
        given = body[wire.DMA_ACCESS.size:]
        if command == Command.DMA_READ:
            if given:
                raise OSError(errno.EINVAL, "bytes left over")
            return [wire.DMA_ACCESS.pack(address, count), *self._dma.pieces(address, count, Access.READ)]
        if len(given) != count:
            raise OSError(errno.EINVAL, "not as many bytes as announced")
        for piece in self._dma.pieces(address, count, Access.WRITE):
            piece[:] = given[: len(piece)]
            given = given[len(piece):]
        return [wire.DMA_ACCESS.pack(address, count)]
