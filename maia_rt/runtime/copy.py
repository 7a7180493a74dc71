"""Copies: which way the bytes of one go, and the commands that move them."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from maia_rt._fast.host_memory import HostMemory
from maia_rt.contract.commands import MAX_INLINE_BYTES, Opcode
from maia_rt.errors import InvalidArgument, InvalidType
from maia_rt.runtime.buffer import Memory
from maia_rt.runtime.staging import CHUNK_BYTES, STAGING_BYTES, Staging

if TYPE_CHECKING:
    from maia_rt.runtime.stream import Stream

_COPY: Final = int(Opcode.COPY)
_WRITE_IMM: Final = int(Opcode.WRITE_IMM)


class CopyPath(enum.Enum):
    """How :meth:`maia_rt.Stream.copy` moved the bytes."""

    INLINE = "inline"
    """Inside the command: up to 16 bytes from memory the device does not reach."""
    STAGED = "staged"
    """In chunks through pinned memory of the stream."""
    DIRECT = "direct"
    """By one command: the device reaches both ends."""


def copy(stream: Stream, dst: Any, src: Any) -> CopyPath:
    """Submit what copies all of `src` to `dst`; see :meth:`maia_rt.Stream.copy`."""
    to, target, size = _locate(stream, dst, "dst")
    at, source, available = _locate(stream, src, "src")
    if size != available:
        raise InvalidArgument(f"dst has {size} bytes, src {available}", hint="copy a slice")
    if size == 0:
        return CopyPath.DIRECT
    if stream.device._validator is not None:
        stream.device._validator.command(stream, "copy", [] if at is None else [(at, size, src)],
                                         [] if to is None else [(to, size, dst)])
    if to is not None and at is not None:
        stream._submit(_COPY, payload=(at, to, size))
        return CopyPath.DIRECT
    if to is not None and source is not None:
        return _from_host(stream, to, source)
    if at is not None and target is not None:
        _to_host(stream, target, at)
        if stream.device._validator is not None:
            stream.device._validator.synchronized(stream)
        return CopyPath.STAGED
    raise InvalidType("neither end of the copy is memory of the device", hint="use numpy.copyto")


def _locate(stream: Stream, memory: Any, what: str) -> tuple[int | None, HostMemory | None, int]:
    """Find an end of a copy: its device address if the device reaches it, the host memory if it is some, bytes."""
    if isinstance(memory, Memory):
        stream._require_own(memory, what)
        return memory.address, None, memory.nbytes
    host = _host_memory(memory, what)
    size = host.nbytes
    return stream.device._pinned.find(host.address, size), host, size


def _from_host(stream: Stream, to: int, source: HostMemory) -> CopyPath:
    size = source.nbytes
    if size <= MAX_INLINE_BYTES:
        data = source.tobytes().ljust(MAX_INLINE_BYTES, b"\0")
        words = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little")
        stream._submit(_WRITE_IMM, units=size, payload=(to, *words))
        return CopyPath.INLINE
    with stream._staging_lock:
        staging = _stage(stream)
        for start in range(0, size, CHUNK_BYTES):
            count = min(CHUNK_BYTES, size - start)
            address, piece = staging.take(count)
            source.copy_to(piece, start, count)
            stream._submit(_COPY, payload=(address, to + start, count))
            staging.use(stream._mark())
    return CopyPath.STAGED


def _to_host(stream: Stream, target: HostMemory, at: int) -> None:
    size = target.nbytes
    with stream._staging_lock:
        staging = _stage(stream)
        try:
            for start in range(0, size, CHUNK_BYTES):
                count = min(CHUNK_BYTES, size - start)
                address, _ = staging.take(count)
                stream._submit(_COPY, payload=(at + start, address, count))
                staging.use(stream._mark(), target, start)
            staging.finish()
        except BaseException:
            staging.forget_targets()
            raise


def _stage(stream: Stream) -> Staging:
    stream._require_open()
    if stream._staging is None:
        stream._staging = Staging(stream.device._pool.allocate(STAGING_BYTES), stream.timeout)
    return stream._staging


def _host_memory(memory: Any, what: str) -> HostMemory:
    """The bytes of a host object, without a copy but for a source that is not contiguous."""
    writable = what == "dst"
    if isinstance(memory, np.ndarray):
        if memory.dtype.hasobject:
            raise InvalidType(f"{what} is an array of Python objects, which is no memory")
        if not memory.flags.c_contiguous:
            if writable:
                raise InvalidArgument("dst is not contiguous", hint="copy to a contiguous array and assign from it")
            memory = np.ascontiguousarray(memory)
    try:
        return HostMemory(memory, writable)
    except TypeError:
        raise InvalidType(f"{what} is {type(memory).__name__}, which is no memory",
                          hint="pass a Buffer, a HostBuffer, an array or another object with a buffer") from None
    except (ValueError, BufferError) as error:
        raise InvalidArgument(f"{what} cannot be used: {error}",
                              cause="it is read-only, or not contiguous") from None
