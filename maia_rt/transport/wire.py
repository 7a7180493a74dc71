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
import json
import os
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

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
    "MAX_DATA_XFER_SIZE",
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

VERSION_MAJOR: Final = 0
VERSION_MINOR: Final = 0
"""QEMU refuses a server that answers a minor above 0."""

TYPE_MASK: Final = 0xF
TYPE_COMMAND: Final = 0
TYPE_REPLY: Final = 1
FLAG_NO_REPLY: Final = 1 << 4
FLAG_ERROR: Final = 1 << 5

DEFAULT_MAX_MSG_FDS: Final = 1
DEFAULT_MAX_DATA_XFER_SIZE: Final = 1 << 20
DEFAULT_MAX_DMA_MAPS: Final = 65535
DEFAULT_PGSIZES: Final = 4096
MAX_MSG_FDS: Final = 253
"""The kernel's SCM_MAX_FD: more descriptors than this never travel with one message."""
MAX_DATA_XFER_SIZE: Final = 64 << 20
"""The most that QEMU accepts from a server."""
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
VERSION: Final = struct.Struct("<HH")
"""major, minor; JSON text with its NUL may follow."""
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


# --- VERSION ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Capabilities:
    """What the sender of a VERSION message can take. The defaults are the specification's, for keys that are absent."""

    max_msg_fds: int = DEFAULT_MAX_MSG_FDS
    max_data_xfer_size: int = DEFAULT_MAX_DATA_XFER_SIZE
    max_dma_maps: int = DEFAULT_MAX_DMA_MAPS
    pgsizes: int = DEFAULT_PGSIZES
    write_multiple: bool = False
    twin_socket: bool = False
    twin_fd_index: int | None = None


@dataclass(frozen=True)
class Version:
    """A parsed VERSION payload.

    Attributes
    ----------
    offered : frozenset of str
        The capability keys that the text named. A reply may name no others.
    """

    major: int
    minor: int
    capabilities: Capabilities
    offered: frozenset[str]


_ALL_KEYS: Final = ("max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes", "write_multiple", "twin_socket")


def pack_version(
    capabilities: Capabilities, *, keys: Iterable[str] | None = None, major: int = VERSION_MAJOR,
    minor: int = VERSION_MINOR,
) -> bytes:
    """Return a VERSION payload.

    Parameters
    ----------
    capabilities : Capabilities
    keys : iterable of str, optional
        The capability keys to name, by default all; ``twin_socket`` is named only where it is supported. A server
        passes the keys that the client offered. QEMU reads the reply into a buffer of its request's size, hence no
        white space.
    """
    wanted = set(_ALL_KEYS if keys is None else keys)
    caps: dict[str, Any] = {
        key: getattr(capabilities, key) for key in _ALL_KEYS if key in wanted and key != "twin_socket"
    }
    if "twin_socket" in wanted and capabilities.twin_socket:
        twin: dict[str, Any] = {"supported": True}
        if capabilities.twin_fd_index is not None:
            twin["fd_index"] = capabilities.twin_fd_index
        caps["twin_socket"] = twin
    text = json.dumps({"capabilities": caps}, separators=(",", ":"))
    return VERSION.pack(major, minor) + text.encode() + b"\0"


def unpack_version(payload: bytes | bytearray | memoryview) -> Version:
    """Parse and check a VERSION payload (specification, section Version).

    Unknown keys are ignored. The major number is not judged here.

    Raises
    ------
    ProtocolError
        With errno EINVAL: too short, no NUL at the end, broken JSON, a known key of the wrong type or out of range.
    """
    if len(payload) < VERSION.size:
        raise _bad_version(f"the payload has {len(payload)} bytes, at least {VERSION.size} are needed")
    major, minor = VERSION.unpack_from(payload)
    raw = bytes(payload[VERSION.size:])
    if not raw:
        return Version(major, minor, Capabilities(), frozenset())
    if raw[-1] != 0:
        raise _bad_version("the JSON text does not end in NUL")
    try:
        document = json.loads(raw[:-1].decode())
    except (ValueError, RecursionError) as error:
        raise _bad_version(f"the JSON text cannot be parsed: {error}") from None
    if not isinstance(document, dict):
        raise _bad_version("the JSON text is not an object")
    caps = document.get("capabilities", {})
    if not isinstance(caps, dict):
        raise _bad_version("'capabilities' is not an object")
    write_multiple = caps.get("write_multiple", False)
    if not isinstance(write_multiple, bool):
        raise _bad_version("'write_multiple' is not true or false")
    twin_socket, twin_fd_index = _twin(caps.get("twin_socket", {}))
    _check_migration(caps.get("migration", {}))
    capabilities = Capabilities(
        max_msg_fds=_integer(caps, "max_msg_fds", DEFAULT_MAX_MSG_FDS, 0, 1024),
        max_data_xfer_size=_integer(caps, "max_data_xfer_size", DEFAULT_MAX_DATA_XFER_SIZE, 1, 2**64 - 1),
        max_dma_maps=_integer(caps, "max_dma_maps", DEFAULT_MAX_DMA_MAPS, 0, 2**64 - 1),
        pgsizes=_integer(caps, "pgsizes", DEFAULT_PGSIZES, 1, 2**64 - 1),
        write_multiple=write_multiple,
        twin_socket=twin_socket,
        twin_fd_index=twin_fd_index,
    )
    return Version(major, minor, capabilities, frozenset(caps))


def _bad_version(reason: str) -> ProtocolError:
    return ProtocolError(f"bad VERSION message: {reason}", errno=errno.EINVAL)


def _integer(mapping: dict[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = mapping.get(key.rpartition(".")[2], default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _bad_version(f"'{key}' is not an integer")
    if not low <= value <= high:
        raise _bad_version(f"'{key}' is {value}, not within {low} to {high}")
    return value


def _twin(twin: Any) -> tuple[bool, int | None]:
    if not isinstance(twin, dict):
        raise _bad_version("'twin_socket' is not an object")
    supported = twin.get("supported", False)
    if not isinstance(supported, bool):
        raise _bad_version("'twin_socket.supported' is not true or false")
    fd_index = _integer(twin, "twin_socket.fd_index", 0, 0, MAX_MSG_FDS) if "fd_index" in twin else None
    return supported, fd_index


def _check_migration(migration: Any) -> None:
    # QEMU and libvfio-user still send this object of the old migration protocol: checked, then unused.
    if not isinstance(migration, dict):
        raise _bad_version("'migration' is not an object")
    page = _integer(migration, "migration.pgsize", 4096, 1, 2**64 - 1)
    if page % 4096:
        raise _bad_version(f"'migration.pgsize' is {page}, not a multiple of 4096")
    _integer(migration, "migration.max_bitmap_size", 0, 0, 2**64 - 1)


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
