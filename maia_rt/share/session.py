"""A client's connection to its share: vfio-user, as the device itself would speak it.

Source: the vfio-user specification (QEMU, docs/interop/vfio-user.rst). Every message is hostile until it is checked.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final

from maia_rt.errors import MaiaError, ProtocolError
from maia_rt.share.client_memory import ClientMemory
from maia_rt.share.function import ShareFunction, check_bounds, flags_of
from maia_rt.share.tenant import Tenant
from maia_rt.transport import wire
from maia_rt.transport.protocol import Access
from maia_rt.transport.uapi import PciIrq, PciRegion
from maia_rt.transport.wire import Command

_log = logging.getLogger(__name__)

MAX_DATA: Final = 1 << 20
MAX_FDS: Final = 16
SEND_SECONDS: Final = 5
_PAGE: Final = 4096

Reply = tuple[bytes, Sequence[int]]
"""A reply's body, and descriptors to pass (they stay ours)."""
_EMPTY: Final[Reply] = (b"", ())


class Session:
    """Serves one client until it goes, or :meth:`stop` is called.

    Parameters
    ----------
    sock : socket.socket
        Connected; closed by :meth:`run`.
    function : ShareFunction
    tenant : Tenant
    """

    def __init__(self, sock: socket.socket, function: ShareFunction, tenant: Tenant) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", SEND_SECONDS, 0))
        self._sock = sock
        self._function = function
        self._tenant = tenant
        self._negotiated = False
        self._commands: dict[int, Callable[[bytes, Sequence[int]], Reply]] = {
            Command.DMA_MAP: self._dma_map, Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._get_info, Command.DEVICE_GET_REGION_INFO: self._get_region_info,
            Command.DEVICE_GET_IRQ_INFO: self._get_irq_info, Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read, Command.REGION_WRITE: self._region_write,
            Command.DEVICE_RESET: self._device_reset,
        }

    def run(self) -> None:
        """Serve the client until it is gone. Its tenant is left to the caller."""
        try:
            while self._serve_one():
                pass
        except (EOFError, OSError, ProtocolError) as error:
            _log.debug("a client of the share went: %s", error)
        finally:
            self._sock.close()

    def stop(self) -> None:
        """Make :meth:`run` return soon; any thread may call."""
        with contextlib.suppress(OSError):      # it is gone already
            self._sock.shutdown(socket.SHUT_RDWR)

    def _serve_one(self) -> bool:
        raw = bytearray(wire.HEADER_SIZE)
        fds = wire.recv_exact(self._sock, raw, MAX_FDS)
        try:
            header = wire.unpack_header(raw)
            if not 0 <= header.body_size <= MAX_DATA + wire.MESSAGE_SLACK:
                return False
            body = bytearray(header.body_size)
            wire.recv_exact(self._sock, body)
            good, reply = self._judge(header, bytes(body), fds)
        finally:
            wire.close_fds(fds)
        if header.flags & wire.FLAG_NO_REPLY and header.type == wire.TYPE_COMMAND:
            return good
        if isinstance(reply, int):
            wire.send(self._sock, [wire.pack_error(header, reply)])
        else:
            head = wire.pack_header(header.id, header.command, len(reply[0]), wire.TYPE_REPLY)
            wire.send(self._sock, [head, reply[0]], reply[1])
        return good

    def _judge(self, header: wire.Header, body: bytes, fds: Sequence[int]) -> tuple[bool, Reply | int]:
        """Whether the connection lives on, and the reply or errno."""
        if header.type != wire.TYPE_COMMAND or self._negotiated == (header.command == Command.VERSION):
            return self._negotiated, errno.EINVAL
        if header.command == Command.VERSION:
            client = wire.unpack_version(body)
            if fds or client.major != wire.VERSION_MAJOR:
                return False, errno.EINVAL
            self._negotiated = True
            ours = wire.Capabilities(max_msg_fds=MAX_FDS, max_data_xfer_size=MAX_DATA, pgsizes=_PAGE)
            return True, (wire.pack_version(ours, keys=client.offered), ())
        command = self._commands.get(header.command)
        if command is None:
            return True, errno.ENOTSUP
        if fds and header.command not in (Command.DMA_MAP, Command.DEVICE_SET_IRQS):
            return True, errno.EINVAL
        try:
            return True, command(body, fds)
        except OSError as error:
            return True, error.errno or errno.EIO
        except MaiaError as error:
            _log.info("the share refused a client's %s: %s", header.command, error)
            return True, getattr(error, "errno", None) or errno.EIO

    # --- memory ------------------------------------------------------------------------------------------------------

    def _dma_map(self, body: bytes, fds: Sequence[int]) -> Reply:
        argsz, flags, offset, iova, size = _unpack(wire.DMA_MAP, body)
        _require(argsz >= wire.DMA_MAP.size and bool(flags) and not flags & ~int(Access.READ | Access.WRITE))
        _require(0 < size < 1 << 48 and not (iova | size | offset) % _PAGE and offset < 1 << 62)
        if len(fds) != 1:
            raise OSError(errno.EOPNOTSUPP, "a share takes memory with a descriptor only")
        self._tenant.maps.map(iova, ClientMemory(fds[0], offset, size), Access(flags))
        return _EMPTY

    def _dma_unmap(self, body: bytes, fds: Sequence[int]) -> Reply:
        argsz, flags, iova, size = _unpack(wire.DMA_UNMAP, body)
        _require(argsz >= wire.DMA_UNMAP.size and flags in (0, wire.DMA_UNMAP_FLAG_ALL))
        if flags:
            _require(iova == 0 and size == 0)
            self._tenant.maps.unmap_all()
        else:
            self._tenant.maps.unmap(iova, size)
        return body, ()

    # --- what there is -----------------------------------------------------------------------------------------------

    def _get_info(self, body: bytes, fds: Sequence[int]) -> Reply:
        _require(len(body) >= wire.DEVICE_INFO.size)
        flags = wire.DEVICE_FLAG_RESET | wire.DEVICE_FLAG_PCI
        return wire.DEVICE_INFO.pack(wire.DEVICE_INFO.size, flags, wire.PCI_NUM_REGIONS, wire.PCI_NUM_IRQS), ()

    def _get_region_info(self, body: bytes, fds: Sequence[int]) -> Reply:
        argsz, _, index, _, _, _ = _unpack(wire.REGION_INFO, body)
        _require(argsz >= wire.REGION_INFO.size and index < wire.PCI_NUM_REGIONS)
        doorbells = self._tenant.doorbells
        mapped = index == PciRegion.BAR2
        reply = wire.pack_region_info(
            argsz, index, flags_of(self._function, index), size=self._function.sizes.get(index, 0), offset=0,
            areas=[(0, self._tenant.partition.queues * _PAGE)] if mapped else ())
        return reply, [doorbells.fd] if mapped else ()

    def _get_irq_info(self, body: bytes, fds: Sequence[int]) -> Reply:
        _, _, index, _ = _unpack(wire.IRQ_INFO, body)
        _require(index < wire.PCI_NUM_IRQS)
        flags, count = (wire.IRQ_FLAG_EVENTFD, self._vectors) if index == PciIrq.MSIX else (0, 0)
        return wire.IRQ_INFO.pack(wire.IRQ_INFO.size, flags, index, count), ()

    @property
    def _vectors(self) -> int:
        return 1 + self._tenant.partition.queues

    def _set_irqs(self, body: bytes, fds: Sequence[int]) -> Reply:
        argsz, flags, index, start, count = _unpack(wire.IRQ_SET, body)
        _require(argsz >= wire.IRQ_SET.size and index == PciIrq.MSIX)
        if (flags, start, count) == (wire.IRQ_SET_DATA_NONE | wire.IRQ_SET_ACTION_TRIGGER, 0, 0) and not fds:
            self._tenant.clear_vectors()
            return _EMPTY
        _require(flags == wire.IRQ_SET_DATA_EVENTFD | wire.IRQ_SET_ACTION_TRIGGER and len(fds) == count > 0)
        _require(start + count <= self._vectors)
        # Whoever writes to anything else could be made to wait.
        _require(all(os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]" for fd in fds))
        for vector, fd in enumerate(fds, start):
            self._tenant.set_vector(vector, fd)
        return _EMPTY

    # --- regions -----------------------------------------------------------------------------------------------------

    def _region_read(self, body: bytes, fds: Sequence[int]) -> Reply:
        offset, region, count = _unpack(wire.REGION_ACCESS, body)
        _require(count <= MAX_DATA)
        check_bounds(self._function, region, offset, count)
        return body + self._function.read(region, offset, count), ()

    def _region_write(self, body: bytes, fds: Sequence[int]) -> Reply:
        _require(len(body) >= wire.REGION_ACCESS.size)
        offset, region, count = wire.REGION_ACCESS.unpack_from(body)
        _require(len(body) == wire.REGION_ACCESS.size + count)
        check_bounds(self._function, region, offset, count)
        if count:
            self._function.write(region, offset, body[wire.REGION_ACCESS.size:])
        return body[:wire.REGION_ACCESS.size], ()

    def _device_reset(self, body: bytes, fds: Sequence[int]) -> Reply:
        _require(not body)
        self._function.reset()
        return _EMPTY


def _unpack(layout: struct.Struct, body: bytes) -> tuple[int, ...]:
    _require(len(body) == layout.size)
    return layout.unpack(body)


def _require(good: bool) -> None:
    if not good:
        raise OSError(errno.EINVAL, "a field is out of range")
