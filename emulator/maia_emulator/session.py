"""One client's connection: every message is checked, done, and answered with a reply or its errno.

The rules are those of the vfio-user specification (QEMU, docs/interop/vfio-user.rst); where it leaves a choice, the
kernel's VFIO decides.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from maia_emulator.fast_path import Connection
from maia_emulator.irqs import set_irqs
from maia_emulator.regions import Region
from maia_rt.errors import ProtocolError
from maia_rt.transport import wire
from maia_rt.transport.wire import Command

if TYPE_CHECKING:
    from maia_emulator.function import Function

log = logging.getLogger(__name__)

MAX_DATA: Final = wire.DEFAULT_MAX_DATA_XFER_SIZE
MAX_BODY: Final = 16 + MAX_DATA
"""The largest message carries MAX_DATA bytes behind a 16-byte structure."""
MAX_FDS: Final = 16
"""QEMU refuses a server that announces more."""
PAGE: Final = 4096
SEND_SECONDS: Final = 5
"""A client that lets its socket fill up and does not read for this long is given up."""

Reply = tuple[bytes, Sequence[int]]
"""A reply's body, and descriptors to pass (they stay ours)."""
EMPTY: Final[Reply] = (b"", ())


class Session:
    """Serves one connected client until it goes, or `stop` is called.

    Parameters
    ----------
    function : Function
        The device.
    sock : socket.socket
        Connected; closed by `run`.
    name : str
        For messages on stderr.
    """

    def __init__(self, function: Function, sock: socket.socket, name: str) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", SEND_SECONDS, 0))
        self._function = function
        self._sock = sock
        self._name = name
        self._connection = Connection(sock, function.registers.memory, MAX_BODY)
        self._twin: tuple[socket.socket, Connection, threading.Thread] | None = None
        self._twin_peer: socket.socket | None = None
        self._negotiated = False
        self._write_multiple = False
        self._read_limit = MAX_DATA
        self._commands: dict[int, Callable[[bytes, Sequence[int]], Reply]] = {
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._get_info,
            Command.DEVICE_GET_REGION_INFO: self._get_region_info,
            Command.DEVICE_GET_REGION_IO_FDS: self._get_region_io_fds,
            Command.DEVICE_GET_IRQ_INFO: self._get_irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.DEVICE_RESET: self._device_reset,
            Command.REGION_WRITE_MULTI: self._region_write_multi,
        }

    def run(self) -> None:
        """Serve until the client is gone, then drop everything that was the client's."""
        try:
            while self._serve_one(self._connection):
                pass
        except EOFError:
            pass
        except OSError as error:
            log.info("%s: %s", self._name, error)
        finally:
            self._connection.shut_down()
            self._function.release_client()
            if self._twin is not None:
                sock, connection, thread = self._twin
                connection.shut_down()
                thread.join()
                sock.close()
            close_drained(self._sock)

    def stop(self) -> None:
        """Make `run` return soon, from any thread."""
        self._connection.shut_down()

    def _serve_one(self, connection: Connection) -> bool:
        """Receive one message and answer it; False where the connection is of no further use."""
        fields, body, fds, truncated = connection.receive()
        header = wire.Header(*fields)
        try:
            if header.type == wire.TYPE_REPLY and body is not None and not fds and not truncated:
                error = (header.errno or errno.EIO) if header.flags & wire.FLAG_ERROR else 0
                if self._function.message_dma.complete(header.id, header.command, error, body):
                    return True
            good, reply = self._judge(connection, header, body, fds, truncated)
        finally:
            wire.close_fds(fds)
        try:
            self._answer(connection, header, reply)
        finally:
            if self._twin_peer is not None and header.command == Command.VERSION:
                self._twin_peer.close()
                self._twin_peer = None
        return good

    def _answer(self, connection: Connection, header: wire.Header, reply: Reply | int) -> None:
        if header.type == wire.TYPE_COMMAND and header.flags & wire.FLAG_NO_REPLY:
            return
        if isinstance(reply, int):
            connection.send(wire.pack_error(header, reply))
        else:
            head = wire.pack_header(header.id, header.command, len(reply[0]), wire.TYPE_REPLY)
            connection.send(head, reply[0], reply[1])

    def _judge(
        self, connection: Connection, header: wire.Header, body: bytes | None, fds: Sequence[int], truncated: bool
    ) -> tuple[bool, Reply | int]:
        """Whether the connection lives on, and the reply or errno."""
        if body is None:
            # The next header could be anywhere: there is no way to read on.
            return False, errno.EINVAL
        if header.type != wire.TYPE_COMMAND or connection is not self._connection:
            return self._negotiated, errno.EINVAL
        if header.command == Command.VERSION:
            if self._negotiated:
                return True, errno.EINVAL
            try:
                if fds or truncated:
                    raise ProtocolError("VERSION carries descriptors", errno=errno.EINVAL)
                return True, self._version(body)
            except ProtocolError as error:
                log.info("%s: %s", self._name, error)
                return False, error.errno or errno.EINVAL
        if not self._negotiated:
            return False, errno.EINVAL
        command = self._commands.get(header.command)
        if command is None:
            return True, errno.EINVAL if header.command in (Command.DMA_READ, Command.DMA_WRITE) else errno.ENOTSUP
        if truncated or (fds and header.command not in (Command.DMA_MAP, Command.DEVICE_SET_IRQS)):
            return True, errno.EINVAL
        try:
            return True, command(body, fds)
        except OSError as error:
            log.debug("%s: %s refused: %s", self._name, header.command, error)
            return True, error.errno or errno.EIO
        except Exception:
            # A bug of ours in one message is this message's failure, not the client's end.
            traceback.print_exc(file=sys.stderr)
            return True, errno.EIO

    # --- commands ----------------------------------------------------------------------------------------------

    def _version(self, body: bytes) -> Reply:
        client = wire.unpack_version(body)
        if client.major != wire.VERSION_MAJOR:
            raise ProtocolError(f"the client speaks version {client.major}", errno=errno.EINVAL)
        theirs = client.capabilities
        fds: list[int] = []
        if theirs.twin_socket:
            fds.append(self._open_twin())
        ours = wire.Capabilities(
            max_msg_fds=MAX_FDS, max_data_xfer_size=MAX_DATA, max_dma_maps=wire.DEFAULT_MAX_DMA_MAPS,
            pgsizes=PAGE, write_multiple=theirs.write_multiple, twin_socket=bool(fds), twin_fd_index=0 if fds else None,
        )
        self._read_limit = min(MAX_DATA, theirs.max_data_xfer_size)
        self._write_multiple = theirs.write_multiple
        self._negotiated = True
        dma = self._twin[1] if self._twin else self._connection
        self._function.message_dma.attach(dma, self._read_limit)
        # Reads longer than the client's limit must be refused, so they may not take the fast path.
        self._connection.fast = self._read_limit >= 8
        return wire.pack_version(ours, keys=client.offered), fds

    def _dma_map(self, body: bytes, fds: Sequence[int]) -> Reply:
        argsz, flags, offset, iova, size = _unpack(wire.DMA_MAP, body)
        _require(argsz >= wire.DMA_MAP.size and len(fds) <= 1)
        _require(flags != 0 and not flags & ~(wire.DMA_FLAG_READ | wire.DMA_FLAG_WRITE))
        _require(size != 0 and iova + size <= 1 << 64 and not (iova | size | (offset if fds else 0)) % PAGE)
        self._function.engine.dma_map(iova, size, fds[0] if fds else -1, offset, flags)
        return EMPTY

    def _dma_unmap(self, body: bytes, fds: Sequence[int]) -> Reply:
        argsz, flags, iova, size = _unpack(wire.DMA_UNMAP, body)
        _require(argsz >= wire.DMA_UNMAP.size and not flags & ~wire.DMA_UNMAP_FLAG_ALL)
        function = self._function
        if flags & wire.DMA_UNMAP_FLAG_ALL:
            _require(iova == 0 and size == 0)
            with function.message_dma.barred():
                function.engine.dma_unmap_all()
        else:
            _require(not (iova | size) % PAGE)
            with function.message_dma.barred(iova, size):
                size = function.engine.dma_unmap(iova, size)
        return wire.DMA_UNMAP.pack(argsz, flags, iova, size), ()

    def _get_info(self, body: bytes, fds: Sequence[int]) -> Reply:
        _require(_unpack(wire.DEVICE_INFO, body, longer=True)[0] >= wire.DEVICE_INFO.size)
        flags = wire.DEVICE_FLAG_RESET | wire.DEVICE_FLAG_PCI
        return wire.DEVICE_INFO.pack(wire.DEVICE_INFO.size, flags, wire.PCI_NUM_REGIONS, wire.PCI_NUM_IRQS), ()

    def _get_region_info(self, body: bytes, fds: Sequence[int]) -> Reply:
        argsz, _, index, _, _, _ = _unpack(wire.REGION_INFO, body, longer=True)
        _require(argsz >= wire.REGION_INFO.size)
        region = self._region(index)
        reply = wire.pack_region_info(argsz, index, region.flags, size=region.size, offset=0, areas=region.areas)
        return reply, ((region.fd,) if region.fd >= 0 else ())

    def _get_region_io_fds(self, body: bytes, fds: Sequence[int]) -> Reply:
        argsz, flags, index, count = _unpack(wire.REGION_IO_FDS, body)
        _require(wire.REGION_IO_FDS.size <= argsz <= MAX_BODY and flags == 0 and count == 0)
        _require(self._region(index).size > 0)
        return wire.REGION_IO_FDS.pack(wire.REGION_IO_FDS.size, 0, index, 0), ()

    def _get_irq_info(self, body: bytes, fds: Sequence[int]) -> Reply:
        argsz, _, index, _ = _unpack(wire.IRQ_INFO, body, longer=True)
        _require(argsz >= wire.IRQ_INFO.size and index < len(self._function.irqs))
        irq = self._function.irqs[index]
        return wire.IRQ_INFO.pack(wire.IRQ_INFO.size, irq.flags, index, irq.count), ()

    def _set_irqs(self, body: bytes, fds: Sequence[int]) -> Reply:
        set_irqs(self._function.irqs, body, fds)
        return EMPTY

    def _region_read(self, body: bytes, fds: Sequence[int]) -> Reply:
        offset, index, count = _unpack(wire.REGION_ACCESS, body)
        region = self._range(index, offset, count, self._read_limit)
        return body + region.read(offset, count) if count else body, ()

    def _region_write(self, body: bytes, fds: Sequence[int]) -> Reply:
        _require(len(body) >= wire.REGION_ACCESS.size)
        offset, index, count = wire.REGION_ACCESS.unpack_from(body)
        _require(len(body) == wire.REGION_ACCESS.size + count)
        region = self._range(index, offset, count, MAX_DATA)
        if count:
            region.write(offset, body[wire.REGION_ACCESS.size :])
        return body[: wire.REGION_ACCESS.size], ()

    def _region_write_multi(self, body: bytes, fds: Sequence[int]) -> Reply:
        head = wire.WRITE_MULTI_COUNT
        _require(self._write_multiple and len(body) >= head.size)
        (count,) = head.unpack_from(body)
        _require(len(body) == head.size + count * wire.WRITE_MULTI_ENTRY.size)
        writes = []
        for offset, index, size, data in wire.WRITE_MULTI_ENTRY.iter_unpack(body[head.size :]):
            _require(size <= len(data))
            writes.append((self._range(index, offset, size, MAX_DATA), offset, data[:size]))
        # All are checked before the first is done: a bad list changes nothing.
        for region, offset, data in writes:
            if data:
                region.write(offset, data)
        return head.pack(count), ()

    def _device_reset(self, body: bytes, fds: Sequence[int]) -> Reply:
        _require(not body)
        self._function.reset()
        return EMPTY

    def _region(self, index: int) -> Region:
        _require(index < len(self._function.regions))
        return self._function.regions[index]

    def _range(self, index: int, offset: int, count: int, limit: int) -> Region:
        region = self._region(index)
        _require(count <= limit and offset + count <= region.size)
        return region

    # --- twin socket -------------------------------------------------------------------------------------------

    def _open_twin(self) -> int:
        """Make the socket for our own commands; returns the client's end."""
        ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", SEND_SECONDS, 0))
        connection = Connection(ours, None, MAX_BODY)
        thread = threading.Thread(target=self._serve_twin, args=(connection,), name=f"{self._name} twin", daemon=True)
        self._twin = (ours, connection, thread)
        thread.start()
        self._twin_peer = peer
        return peer.fileno()

    def _serve_twin(self, connection: Connection) -> None:
        try:
            while self._serve_one(connection):
                pass
        except (EOFError, OSError) as error:
            log.debug("%s: twin socket: %s", self._name, error)
        connection.shut_down()


def close_drained(client: socket.socket) -> None:
    """Close a socket so that its client reads the end of the stream, and what was sent before.

    A socket that is closed with unread bytes resets the connection instead, and QEMU 11 aborts when it meets that.
    """
    with client, contextlib.suppress(OSError):
        client.setblocking(False)
        client.shutdown(socket.SHUT_RDWR)
        while client.recv(1 << 16):
            pass


def _unpack(layout: struct.Struct, body: bytes, longer: bool = False) -> tuple[int, ...]:
    """The fields of a body of exactly that layout, or one that begins with it."""
    _require(len(body) == layout.size or (longer and len(body) > layout.size))
    return layout.unpack_from(body)


def _require(good: bool) -> None:
    if not good:
        raise OSError(errno.EINVAL, "a field of the message holds a value that it may not have")
