"""The vfio-user wire formats, shared by the client here and by the emulator's server.

Source: the vfio-user specification (QEMU, docs/interop/vfio-user.rst). All structures are packed and little endian.

    byte 0      2      4          8          12         16
         | id   | cmd  | size     | flags    | errno    | payload ...      size counts the header too

A connection is a byte stream; descriptors travel beside it (SCM_RIGHTS), attached to the first byte of their message.
The kernel joins a message without descriptors to the following one that has some, so a reader that takes more bytes
than one message hands descriptors to the wrong one. Hence :func:`recv_exact`: a header, then its body, never more.
"""

from __future__ import annotations

import array
import enum
import errno
import os
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from maia_rt.errors import ProtocolError
from maia_rt.transport.uapi import (
    DEVICE_FLAG_PCI,
    DEVICE_FLAG_RESET,
    DMA_FLAG_READ,
    DMA_FLAG_WRITE,
    DMA_UNMAP_FLAG_ALL,
    DMA_UNMAP_FLAG_GET_DIRTY,
    IRQ_FLAG_AUTOMASKED,
    IRQ_FLAG_EVENTFD,
    IRQ_FLAG_MASKABLE,
    IRQ_FLAG_NORESIZE,
    IRQ_SET_ACTION_MASK,
    IRQ_SET_ACTION_MASK_ALL,
    IRQ_SET_ACTION_TRIGGER,
    IRQ_SET_ACTION_UNMASK,
    IRQ_SET_DATA_BOOL,
    IRQ_SET_DATA_EVENTFD,
    IRQ_SET_DATA_MASK,
    IRQ_SET_DATA_NONE,
    PCI_NUM_IRQS,
    PCI_NUM_REGIONS,
    REGION_CAP_MSIX_MAPPABLE,
    REGION_CAP_SPARSE_MMAP,
    REGION_CAP_TYPE,
    REGION_FLAG_CAPS,
    REGION_FLAG_MMAP,
    REGION_FLAG_READ,
    REGION_FLAG_WRITE,
    PciIrq,
    PciRegion,
)
from maia_rt.transport.wire_version import (
    DEFAULT_MAX_DATA_XFER_SIZE,
    DEFAULT_MAX_DMA_MAPS,
    DEFAULT_MAX_MSG_FDS,
    DEFAULT_PGSIZES,
    MAX_MSG_FDS,
    VERSION,
    VERSION_MAJOR,
    VERSION_MINOR,
    Capabilities,
    Version,
    pack_version,
    unpack_version,
)

__all__ = [
    "CAP_HEADER",
    "DEFAULT_MAX_DATA_XFER_SIZE",
    "DEFAULT_MAX_DMA_MAPS",
    "DEFAULT_MAX_MSG_FDS",
    "DEFAULT_PGSIZES",
    "DEVICE_FLAG_PCI",
    "DEVICE_FLAG_RESET",
    "DEVICE_INFO",
    "DMA_ACCESS",
    "DMA_FLAG_READ",
    "DMA_FLAG_WRITE",
    "DMA_MAP",
    "DMA_UNMAP",
    "DMA_UNMAP_FLAG_ALL",
    "DMA_UNMAP_FLAG_GET_DIRTY",
    "FLAG_ERROR",
    "FLAG_NO_REPLY",
    "HEADER",
    "HEADER_SIZE",
    "IOEVENTFD",
    "IRQ_FLAG_AUTOMASKED",
    "IRQ_FLAG_EVENTFD",
    "IRQ_FLAG_MASKABLE",
    "IRQ_FLAG_NORESIZE",
    "IRQ_INFO",
    "IRQ_SET",
    "IRQ_SET_ACTION_MASK",
    "IRQ_SET_ACTION_MASK_ALL",
    "IRQ_SET_ACTION_TRIGGER",
    "IRQ_SET_ACTION_UNMASK",
    "IRQ_SET_DATA_BOOL",
    "IRQ_SET_DATA_EVENTFD",
    "IRQ_SET_DATA_MASK",
    "IRQ_SET_DATA_NONE",
    "MAX_MSG_FDS",
    "MESSAGE_SLACK",
    "PCI_NUM_IRQS",
    "PCI_NUM_REGIONS",
    "REGION_ACCESS",
    "REGION_CAP_MSIX_MAPPABLE",
    "REGION_CAP_SPARSE_MMAP",
    "REGION_CAP_TYPE",
    "REGION_FLAG_CAPS",
    "REGION_FLAG_MMAP",
    "REGION_FLAG_READ",
    "REGION_FLAG_WRITE",
    "REGION_INFO",
    "REGION_IO_FDS",
    "SPARSE_AREA",
    "SPARSE_HEADER",
    "TYPE_COMMAND",
    "TYPE_MASK",
    "TYPE_REPLY",
    "VERSION",
    "VERSION_MAJOR",
    "VERSION_MINOR",
    "WRITE_MULTI_COUNT",
    "WRITE_MULTI_ENTRY",
    "Capabilities",
    "Command",
    "Header",
    "PciIrq",
    "PciRegion",
    "Version",
    "close_fds",
    "pack_error",
    "pack_header",
    "pack_region_info",
    "pack_version",
    "recv_exact",
    "send",
    "unpack_header",
    "unpack_region_caps",
    "unpack_version",
]

TYPE_MASK: Final = 0xF
TYPE_COMMAND: Final = 0
TYPE_REPLY: Final = 1
FLAG_NO_REPLY: Final = 1 << 4
FLAG_ERROR: Final = 1 << 5

MESSAGE_SLACK: Final = 64
"""A message is at most a header and a fixed structure larger than the data it carries; this covers both."""


class Command(enum.IntEnum):
    """Command numbers (specification, section Commands). 14 is dead."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


HEADER: Final = struct.Struct("<HHIII")
"""id, command, size, flags, errno."""
HEADER_SIZE: Final = HEADER.size
DMA_MAP: Final = struct.Struct("<IIQQQ")
"""argsz, flags, offset in the descriptor, iova, size."""
DMA_UNMAP: Final = struct.Struct("<IIQQ")
"""argsz, flags, iova, size. The reply echoes it."""
DEVICE_INFO: Final = struct.Struct("<IIII")
"""argsz, flags, num_regions, num_irqs."""
REGION_INFO: Final = struct.Struct("<IIIIQQ")
"""argsz, flags, index, cap_offset, size, offset in the region's descriptor."""
CAP_HEADER: Final = struct.Struct("<HHI")
"""id, version, offset of the next capability from the start of the structure."""
SPARSE_HEADER: Final = struct.Struct("<II")
"""number of areas, reserved; stands after its CAP_HEADER."""
SPARSE_AREA: Final = struct.Struct("<QQ")
"""offset, size."""
REGION_IO_FDS: Final = struct.Struct("<IIII")
"""argsz, flags, index, count."""
IOEVENTFD: Final = struct.Struct("<QQIIIIQ")
"""offset, size, fd_index, type, flags, padding, datamatch (user_data for an ioregionfd)."""
IRQ_INFO: Final = struct.Struct("<IIII")
"""argsz, flags, index, count."""
IRQ_SET: Final = struct.Struct("<IIIII")
"""argsz, flags, index, start, count; bool bytes may follow."""
REGION_ACCESS: Final = struct.Struct("<QII")
"""offset, region, count; data may follow."""
WRITE_MULTI_COUNT: Final = struct.Struct("<Q")
WRITE_MULTI_ENTRY: Final = struct.Struct("<QII8s")
"""offset, region, count (<= 8), data."""
DMA_ACCESS: Final = struct.Struct("<QQ")
"""address, count; data may follow."""


class Header(NamedTuple):
    """The 16 bytes in front of every message."""

    id: int
    command: int
    size: int
    flags: int
    errno: int

    @property
    def type(self) -> int:
        """TYPE_COMMAND, TYPE_REPLY, or a number that no peer may send."""
        return self.flags & TYPE_MASK

    @property
    def body_size(self) -> int:
        """Bytes after the header; negative where the peer wrote a size below 16."""
        return self.size - HEADER_SIZE


def pack_header(message_id: int, command: int, body_size: int, flags: int = 0, error: int = 0) -> bytes:
    """Return a header for a body of `body_size` bytes."""
    return HEADER.pack(message_id, command, HEADER_SIZE + body_size, flags, error)


def pack_error(request: Header, error: int) -> bytes:
    """Return the error reply to `request`: a header only, with a positive Linux errno."""
    return HEADER.pack(request.id, request.command, HEADER_SIZE, TYPE_REPLY | FLAG_ERROR, error)


def unpack_header(buffer: bytes | bytearray | memoryview) -> Header:
    """Return the header at the start of `buffer`."""
    return Header(*HEADER.unpack_from(buffer))


# --- region information and its capability chain ---------------------------------------------------------------------


def pack_region_info(
    argsz: int, index: int, flags: int, *, size: int, offset: int, areas: Sequence[tuple[int, int]] = ()
) -> bytes:
    """Return a reply to DEVICE_GET_REGION_INFO.

    Parameters
    ----------
    argsz : int
        The room that the request announced. Where it cannot hold the sparse areas, 32 bytes come back whose argsz says
        how much is needed, with the CAPS flag clear; the client asks again.
    index, flags, size, offset : int
        The region; `flags` without REGION_FLAG_CAPS, which is set here.
    areas : sequence of (offset, size)
        Mappable areas in bytes; none for a region that is mappable whole, or not at all.
    """
    if not areas:
        return REGION_INFO.pack(REGION_INFO.size, flags, index, 0, size, offset)
    needed = REGION_INFO.size + CAP_HEADER.size + SPARSE_HEADER.size + SPARSE_AREA.size * len(areas)
    if argsz < needed:
        return REGION_INFO.pack(needed, flags, index, 0, size, offset)
    return b"".join((
        REGION_INFO.pack(needed, flags | REGION_FLAG_CAPS, index, REGION_INFO.size, size, offset),
        CAP_HEADER.pack(REGION_CAP_SPARSE_MMAP, 1, 0),
        SPARSE_HEADER.pack(len(areas), 0),
        *(SPARSE_AREA.pack(*area) for area in areas),
    ))


def unpack_region_caps(
    info: bytes | bytearray | memoryview, cap_offset: int, minimum: int = REGION_INFO.size
) -> tuple[list[tuple[int, int]] | None, tuple[int, int] | None]:
    """Walk the capability chain of a region (the same layout comes from the kernel).

    Parameters
    ----------
    info : bytes-like
        The whole structure, from its argsz on.
    cap_offset : int
        Where the first capability stands.
    minimum : int
        Capabilities stand at or after this offset.

    Returns
    -------
    areas : list of (offset, size) or None
        The sparse mmap areas; None where the capability is absent.
    kind : (type, subtype) or None

    Raises
    ------
    ProtocolError
        A link points outside the structure or back, or an area list is longer than the structure.
    """
    areas: list[tuple[int, int]] | None = None
    kind: tuple[int, int] | None = None
    at, floor = cap_offset, minimum
    while at:
        if at < floor or at + CAP_HEADER.size > len(info):
            raise ProtocolError(f"a region capability is said to stand at byte {at} of {len(info)}", errno=errno.EINVAL)
        cap_id, _version, following = CAP_HEADER.unpack_from(info, at)
        body = at + CAP_HEADER.size
        if cap_id in (REGION_CAP_SPARSE_MMAP, REGION_CAP_TYPE):
            if body + SPARSE_HEADER.size > len(info):
                raise ProtocolError("a region capability is cut short", errno=errno.EINVAL)
            first, second = SPARSE_HEADER.unpack_from(info, body)
            if cap_id == REGION_CAP_TYPE:
                kind = (first, second)
            else:
                start = body + SPARSE_HEADER.size
                if start + first * SPARSE_AREA.size > len(info):
                    raise ProtocolError(f"a region lists {first} mappable areas in too few bytes", errno=errno.EINVAL)
                areas = [SPARSE_AREA.unpack_from(info, start + n * SPARSE_AREA.size) for n in range(first)]
        # Chains only go forward, so a hostile one cannot loop.
        at, floor = following, body
    return areas, kind


# --- the socket ------------------------------------------------------------------------------------------------------

_FD: Final = struct.calcsize("i")


def close_fds(fds: Iterable[int]) -> None:
    """Close every descriptor of `fds`."""
    for fd in fds:
        os.close(fd)


def recv_exact(
    sock: socket.socket, buffer: bytearray | memoryview, max_fds: int = 0, deadline: float | None = None
) -> list[int]:
    """Fill `buffer` from the stream, and take the descriptors that come with its bytes.

    Parameters
    ----------
    sock : socket.socket
    buffer : writable bytes-like
        Filled to its last byte; nothing beyond it is read.
    max_fds : int
        Room for descriptors. With 0 the kernel drops any that arrive.
    deadline : float, optional
        A ``time.monotonic`` moment after which a peer that sends drop by drop is given up. It bounds the whole; the
        socket's own time-out bounds each wait.

    Returns
    -------
    list of int
        Close-on-exec descriptors, now the caller's.

    Raises
    ------
    EOFError
        The peer closed; the text says after how many bytes.
    ProtocolError
        More descriptors came than there was room for.
    TimeoutError, BlockingIOError
        The socket's time-out or the deadline passed. Bytes may be lost: the stream cannot be read on.

    On every error the descriptors received so far are closed.
    """
    view = memoryview(buffer)
    want, done = len(view), 0
    fds: list[int] = []
    try:
        while done < want:
            if max_fds == 0:
                count = sock.recv_into(view[done:])
            else:
                count, ancillary, flags, _ = sock.recvmsg_into(
                    [view[done:]], socket.CMSG_SPACE(max_fds * _FD), socket.MSG_CMSG_CLOEXEC
                )
                for level, kind, raw in ancillary:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        fds.extend(array.array("i", raw[: len(raw) - len(raw) % _FD]))
                # CMSG_SPACE rounds up, so one descriptor more than asked for may arrive without MSG_CTRUNC.
                if flags & socket.MSG_CTRUNC or len(fds) > max_fds:
                    raise ProtocolError(f"a message carried more than {max_fds} descriptors", errno=errno.EINVAL)
            if count == 0:
                raise EOFError(f"the peer closed the connection after {done} of {want} bytes")
            done += count
            if deadline is not None and done < want and time.monotonic() > deadline:
                raise TimeoutError(f"{done} of {want} bytes came in time")
    except BaseException:
        close_fds(fds)
        raise
    return fds


def send(sock: socket.socket, parts: Sequence[bytes | bytearray | memoryview], fds: Sequence[int] = ()) -> None:
    """Send `parts` as one message with `fds` attached to its first byte.

    Raises
    ------
    BrokenPipeError, ConnectionResetError
        The peer is gone.
    TimeoutError, BlockingIOError
        The socket's time-out passed. Part of the message may be out: the stream cannot be written on.
    """
    total = sum(len(part) for part in parts)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = sock.sendmsg(parts, ancillary, socket.MSG_NOSIGNAL)
    if sent == total:
        return
    rest = memoryview(b"".join(parts))[sent:]
    while rest:
        rest = rest[sock.send(rest, socket.MSG_NOSIGNAL):]
