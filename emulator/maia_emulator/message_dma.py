"""Client memory without a descriptor, reached by asking the client: DMA_READ and DMA_WRITE.

Engine and firmware threads ask and wait. The thread that receives the client's messages hands replies to
:meth:`MessageDma.complete`; it never waits here itself, so a client that waits for us is always heard.

That thread must also take mappings away and reset the device, and both wait for engines, which may wait here. So it
does them under :meth:`MessageDma.barred`, which ends what is under way and refuses what would start.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from maia_emulator.fast_path import Connection
from maia_rt.transport import wire

REPLY_SECONDS: Final = 5.0


@dataclass
class _Request:
    command: wire.Command
    address: int
    size: int
    done: bool = False
    answered: bool = False
    error: int = 0
    reply: bytes = b""


class MessageDma:
    """DMA by messages to the client of the moment."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._connection: Connection | None = None
        self._chunk = 0
        self._next_id = 0
        self._waiting: dict[int, _Request] = {}
        self._abandoned: set[int] = set()
        self._bars: list[tuple[int, int]] = []

    def attach(self, connection: Connection, chunk: int) -> None:
        """Reach a client through `connection`, at most `chunk` bytes a message."""
        with self._changed:
            self._connection, self._chunk = connection, chunk
            self._abandoned.clear()

    def detach(self) -> None:
        """Forget the client; whoever waits for it fails."""
        with self._changed:
            self._connection = None
            self._end(0, 1 << 64, errno.ENOTCONN)

    @contextlib.contextmanager
    def barred(self, address: int = 0, size: int = 1 << 64) -> Iterator[None]:
        """Refuse requests that touch a range, and end those under way, while the block runs."""
        bar = (address, size)
        with self._changed:
            self._bars.append(bar)
            self._end(address, size, errno.EFAULT)
        try:
            yield
        finally:
            with self._changed:
                self._bars.remove(bar)

    def read(self, address: int, size: int) -> bytes:
        """Read client memory.

        Raises
        ------
        OSError
            The client refused, answered nonsense, went away, or took longer than REPLY_SECONDS.
        """
        parts = []
        for at, length in self._chunks(address, size):
            reply = self._ask(_Request(wire.Command.DMA_READ, at, length), wire.DMA_ACCESS.pack(at, length))
            parts.append(reply[wire.DMA_ACCESS.size :])
        return b"".join(parts)

    def write(self, address: int, data: bytes) -> None:
        """Write client memory; raises as `read` does."""
        for at, length in self._chunks(address, len(data)):
            piece = bytes(data[at - address : at - address + length])
            self._ask(_Request(wire.Command.DMA_WRITE, at, length), wire.DMA_ACCESS.pack(at, length) + piece)

    def complete(self, message_id: int, command: int, error: int, body: bytes) -> bool:
        """Take a reply; False where nothing was asked that it could answer.

        Parameters
        ----------
        error : int
            0, or the errno of an error reply.
        """
        with self._changed:
            if message_id in self._abandoned:
                self._abandoned.discard(message_id)
                return True
            request = self._waiting.get(message_id)
            if request is None or request.command != command or request.answered:
                return False
            if request.done:
                # Ended by a bar, and whoever asked has not looked yet: the client's reply is in order all the same.
                request.answered = True
                return True
            if not error:
                error = _judge(request, body)
            request.done = request.answered = True
            request.error, request.reply = error, body
            self._changed.notify_all()
            return True

    def _chunks(self, address: int, size: int) -> Iterator[tuple[int, int]]:
        end = address + size
        while address < end:
            length = min(self._chunk or size, end - address)
            yield address, length
            address += length

    def _ask(self, request: _Request, body: bytes) -> bytes:
        with self._changed:
            connection = self._connection
            if connection is None:
                raise OSError(errno.ENOTCONN, "no client")
            if any(_overlap(request, *bar) for bar in self._bars):
                raise OSError(errno.EFAULT, "the mapping is being removed")
            message_id = self._free_id()
            self._waiting[message_id] = request
        try:
            connection.send(wire.pack_header(message_id, request.command, len(body)), body)
            with self._changed:
                self._changed.wait_for(lambda: request.done, REPLY_SECONDS)
        finally:
            with self._changed:
                del self._waiting[message_id]
                if not request.answered:
                    # The reply may still come; it then answers nobody, which is no error of the client's.
                    self._abandoned.add(message_id)
        if not request.done:
            raise OSError(errno.ETIMEDOUT, f"no reply to {request.command.name} within {REPLY_SECONDS:g} s")
        if request.error:
            raise OSError(request.error, f"{request.command.name} at {request.address:#x} + {request.size:#x} failed")
        return request.reply

    def _free_id(self) -> int:
        for _ in range(1 << 16):
            self._next_id = (self._next_id + 1) & 0xFFFF
            if self._next_id not in self._waiting and self._next_id not in self._abandoned:
                return self._next_id
        raise OSError(errno.EBUSY, "the client left 65536 requests without a reply")

    def _end(self, address: int, size: int, error: int) -> None:
        for request in self._waiting.values():
            if not request.done and _overlap(request, address, size):
                request.done, request.error = True, error
        self._changed.notify_all()


def _overlap(request: _Request, address: int, size: int) -> bool:
    return request.address < address + size and address < request.address + request.size


def _judge(request: _Request, body: bytes) -> int:
    """The errno for a reply that is no error reply by itself."""
    if request.command == wire.Command.DMA_WRITE:
        # The specification's reply has 16 bytes, QEMU before 11 sends the header only.
        return 0 if len(body) in (0, wire.DMA_ACCESS.size) else errno.EIO
    if len(body) != wire.DMA_ACCESS.size + request.size:
        return errno.EIO
    return 0 if wire.DMA_ACCESS.unpack_from(body) == (request.address, request.size) else errno.EIO
