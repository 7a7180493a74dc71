"""Register access over vfio-user: REGION_READ and REGION_WRITE.

A register access costs two system calls of ours and a wait for the server. The fast path therefore packs into a buffer
made once, takes the reply with one receive of exactly its size, and compares it there; anything but exactly that reply
(part of it, an error, a command of the server in front of it) goes on in :mod:`vfio_user_connection`.

Such a receive cannot rob a later message of its descriptors: only replies to requests made elsewhere carry any.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Final, NoReturn

from maia_rt.errors import InvalidArgument, InvalidType, ProtocolError
from maia_rt.transport import uapi, wire
from maia_rt.transport.protocol import RegionInfo, check_access
from maia_rt.transport.vfio_user_connection import (
    BUSY,
    CLOSED,
    FORKED,
    LOST,
    OUR_MAX_DATA_XFER_SIZE,
    READY,
    Connection,
)
from maia_rt.transport.wire import Command

# Header and body of a register access in one structure: one pack or unpack a message.
_ACCESS: Final = struct.Struct("<HHIIIQII")
_WITH_VALUE: Final = {
    size: struct.Struct("<HHIIIQII" + code) for size, code in ((1, "B"), (2, "H"), (4, "I"), (8, "Q"))
}
_REPLY_BITS: Final = wire.TYPE_MASK | wire.FLAG_ERROR
_NOSIGNAL: Final = socket.MSG_NOSIGNAL


class RegisterConnection(Connection):
    """A connection that reads and writes the device's regions."""

    def __init__(self, sock: socket.socket, name: str, timeout: float) -> None:
        super().__init__(sock, name, timeout)
        self._rx = bytearray(_ACCESS.size + 8)
        self._tx = bytearray(_ACCESS.size + 8)
        self._tx_views = {size: memoryview(self._tx)[:_ACCESS.size + size] for size in (0, *_WITH_VALUE)}
        self._tx_access = self._tx_views[0]
        self._regions: tuple[RegionInfo, ...] = ()
        # The size of each region that can be read, 0 for one that cannot; likewise for writes.
        self._read_limits: list[int] = []
        self._write_limits: list[int] = []
        self._chunk = OUR_MAX_DATA_XFER_SIZE

    def read(self, region: int, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes."""
        value: int
        try:
            reply = _WITH_VALUE[size]
            if region < 0 or not 0 <= offset <= self._read_limits[region] - size:
                raise IndexError
        except (KeyError, IndexError):
            self._refuse_access(region, offset, size, uapi.REGION_FLAG_READ)
        with self._lock:
            if self._state != READY:
                self._refuse()
            number = self._next_id = (self._next_id + 1) & 0xFFFF
            try:
                _ACCESS.pack_into(self._tx, 0, number, 9, 32, 0, 0, offset, region, size)
            except struct.error:
                raise InvalidType(f"{self._name}: offsets are integers, not {type(offset).__name__}") from None
            self._state = BUSY
            try:
                if self._sock.send(self._tx_access, _NOSIGNAL) < 32:
                    raise ProtocolError(f"{self._name}: the socket took half a message", errno=errno.EPIPE)
                rx = self._rx
                count = self._sock.recv_into(rx, 32 + size)
                if count == 32 + size:
                    got, command, length, flags, _, _, _, returned, value = reply.unpack_from(rx)
                    if (got == number and command == 9 and length == count and flags & _REPLY_BITS == 1
                            and returned == size):
                        self._state = READY
                        return value
                body = self._finish(count, number, Command.REGION_READ, region=region, offset=offset, size=size)
                return int.from_bytes(body[16:], "little")
            except BaseException as error:
                self._fail(error, "REGION_READ", region, offset, size)

    def write(self, region: int, offset: int, size: int, value: int, *, posted: bool = False) -> None:
        """Write 1, 2, 4 or 8 bytes."""
        try:
            request = _WITH_VALUE[size]
            if region < 0 or not 0 <= offset <= self._write_limits[region] - size:
                raise IndexError
        except (KeyError, IndexError):
            self._refuse_access(region, offset, size, uapi.REGION_FLAG_WRITE)
        with self._lock:
            if self._state != READY:
                self._refuse()
            number = self._next_id = (self._next_id + 1) & 0xFFFF
            try:
                flags = wire.FLAG_NO_REPLY if posted else 0
                request.pack_into(self._tx, 0, number, 10, 32 + size, flags, 0, offset, region, size, value)
            except struct.error:
                raise InvalidArgument(f"{self._name}: {value!r} does not fit into {size} bytes, or the offset "
                                      f"{offset!r} is no integer") from None
            self._state = BUSY
            try:
                if self._sock.send(self._tx_views[size], _NOSIGNAL) < 32 + size:
                    raise ProtocolError(f"{self._name}: the socket took half a message", errno=errno.EPIPE)
                if posted:
                    self._state = READY
                    return
                rx = self._rx
                count = self._sock.recv_into(rx, 32)
                if count == 32:
                    got, command, length, flags, _, _, _, returned = _ACCESS.unpack_from(rx)
                    if (got == number and command == 10 and length == 32 and flags & _REPLY_BITS == 1
                            and returned == size):
                        self._state = READY
                        return
                self._finish(count, number, Command.REGION_WRITE, region=region, offset=offset, size=size)
            except BaseException as error:
                self._fail(error, "REGION_WRITE", region, offset, size)

    def _finish(
        self, count: int, number: int, command: Command, *, region: int, offset: int, size: int
    ) -> bytearray:
        """Go on from a receive that did not bring exactly the reply: a part, an error, or a command of the server."""
        if count == 0:
            raise EOFError("the server closed the connection")
        self._pending += memoryview(self._rx)[:count]
        what = _describe(command.name, region, offset, size)
        expected = 16 + size if command == Command.REGION_READ else 16
        body, _ = self._await_reply(number, command, what, limit=expected)
        if len(body) != expected or wire.REGION_ACCESS.unpack_from(body)[2] != size:
            raise ProtocolError(f"{self._name}: the reply to {what} is for another access", errno=errno.EPROTO)
        self._drain_pending()
        self._state = READY
        return body

    def _fail(self, error: BaseException, what: str, region: int, offset: int, size: int) -> NoReturn:
        instead = self._broken_by(error, _describe(what, region, offset, size))
        if instead is None:
            raise error
        raise instead from error

    def _refuse_access(self, region: int, offset: int, size: int, flag: int, *, block: bool = False) -> NoReturn:
        if self._state in (CLOSED, FORKED, LOST):
            self._refuse()
        check_access(self._name, self._regions, region, offset=offset, size=size, flag=flag,
                     sizes=() if block else tuple(_WITH_VALUE))
        raise AssertionError("an access was refused that is allowed")

    def read_bytes(self, region: int, offset: int, size: int) -> bytes:
        """Read a block of any size, in pieces of what one message may carry."""
        if not (0 <= region < len(self._read_limits) and size >= 0 and 0 <= offset <= self._read_limits[region] - size):
            self._refuse_access(region, offset, size, uapi.REGION_FLAG_READ, block=True)
        result = bytearray(size)
        view = memoryview(result)
        for start in range(0, size, self._chunk):
            piece = view[start:start + self._chunk]
            body, _ = self._request(
                Command.REGION_READ, [wire.REGION_ACCESS.pack(offset + start, region, len(piece))], into=piece,
                what=_describe("REGION_READ", region, offset + start, len(piece)))
            self._check_count(body, len(piece), Command.REGION_READ)
        return bytes(result)

    def write_bytes(self, region: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write a block of any size, in pieces of what one message may carry."""
        view = memoryview(data).cast("B")
        size = len(view)
        if not (0 <= region < len(self._write_limits) and 0 <= offset <= self._write_limits[region] - size):
            self._refuse_access(region, offset, size, uapi.REGION_FLAG_WRITE, block=True)
        for start in range(0, size, self._chunk):
            piece = view[start:start + self._chunk]
            body, _ = self._request(
                Command.REGION_WRITE, [wire.REGION_ACCESS.pack(offset + start, region, len(piece)), piece], limit=16,
                what=_describe("REGION_WRITE", region, offset + start, len(piece)))
            self._check_count(body, len(piece), Command.REGION_WRITE)

    def _check_count(self, body: bytearray, size: int, command: Command) -> None:
        if len(body) != wire.REGION_ACCESS.size or wire.REGION_ACCESS.unpack(body)[2] != size:
            raise self._nonsense(f"the reply to {command.name} is not for the {size} bytes asked for")

    def _nonsense(self, text: str) -> ProtocolError:
        """Give the connection up and return the error to raise."""
        error = ProtocolError(f"{self._name}: {text}", errno=errno.EPROTO)
        with self._lock:
            self._break(error)
        return error


def _describe(what: str, region: int, offset: int, size: int) -> str:
    return f"{what} of {size} bytes at {offset:#x} of region {region}"
