"""Copies: which way the bytes of one go, and the commands that move them."""

from __future__ import annotations

import enum
import itertools
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from maia_rt._fast.host_memory import HostMemory
from maia_rt.contract.commands import MAX_INLINE_BYTES, Opcode
from maia_rt.errors import DeviceFault, FaultCode, InvalidArgument, InvalidType, Unsupported
from maia_rt.runtime import dlpack, strides
from maia_rt.runtime.buffer import Memory
from maia_rt.runtime.peer_copy import copy_between, is_foreign, require_pair
from maia_rt.runtime.staging import CHUNK_BYTES, STAGING_BYTES, Staging
from maia_rt.runtime.strided_copy import from_array, ranges, submit, to_array
from maia_rt.runtime.strides import Dims

if TYPE_CHECKING:
    from maia_rt.runtime.stream import Stream

_COPY: Final = int(Opcode.COPY)
_WRITE_IMM: Final = int(Opcode.WRITE_IMM)
_CRC: Final = int(Opcode.CRC)
_COMPARE: Final = 1
_PLAIN: Final = np.dtype(np.uint8)


class CopyPath(enum.Enum):
    """How :meth:`maia_rt.Stream.copy` moved the bytes."""

    INLINE = "inline"
    """Inside the command: up to 16 bytes from memory the device does not reach."""
    STAGED = "staged"
    """In chunks through pinned memory of the stream; between devices, through memory that both have pinned."""
    DIRECT = "direct"
    """By the device alone, which reaches both ends: one command, more for strided memory of over three dimensions."""


class _End(NamedTuple):
    """One end of a copy.

    Attributes
    ----------
    address : int or None
        Of element 0, where the device reaches it.
    host : HostMemory, ndarray or None
        What else it is; strided memory is an array.
    nbytes : int
    shape : tuple of int
    strides : tuple of int or None
        None: contiguous.
    size : int
        Of an element, in bytes.
    plain : bool
        Whether it is bytes without a dtype.
    """

    address: int | None
    host: HostMemory | npt.NDArray[Any] | None
    nbytes: int
    shape: Dims
    strides: Dims | None
    size: int
    plain: bool


def copy(stream: Stream, dst: Any, src: Any, checksum: bool = False) -> CopyPath:
    """Submit what copies all of `src` to `dst`; see :meth:`maia_rt.Stream.copy`."""
    if is_foreign(stream, dst) or is_foreign(stream, src):
        return _copy_to_peer(stream, dst, src, checksum)
    to, at = _locate(stream, dst, "dst"), _locate(stream, src, "src")
    if to.nbytes != at.nbytes:
        raise InvalidArgument(f"dst has {to.nbytes} bytes, src {at.nbytes}", hint="copy a slice")
    strided = to.strides is not None or at.strides is not None
    if to.address is None and at.address is None:
        raise InvalidType("neither end of the copy is memory of the device", hint="use numpy.copyto")
    if strided:
        shape, size = _common_shape(to, at)
    if checksum:
        _require_checksum(stream, strided)
    if not to.nbytes:
        return CopyPath.DIRECT
    if stream.device._validator is not None:
        stream.device._validator.command(stream, "copy", _accessed(at, src), _accessed(to, dst))
    if strided:
        path = _copy_strided(stream, to, at, shape, size)
    elif checksum:
        path = _copy_checked(stream, to, at)
    else:
        path = _copy_plain(stream, to, at)
    if to.address is None and stream.device._validator is not None:
        stream.device._validator.synchronized(stream)
    return path


def _copy_to_peer(stream: Stream, dst: Any, src: Any, checksum: bool) -> CopyPath:
    target, source = require_pair(stream, dst, src)
    strided = not (target.contiguous and source.contiguous)
    if checksum:
        _require_checksum(stream, strided)
    if not target.nbytes:
        return CopyPath.DIRECT
    if stream.device._validator is not None:
        reads, writes = ([_accessed(_locate(stream, memory, what), memory) if memory.device is stream.device else []
                          for memory, what in ((source, "src"), (target, "dst"))])
        stream.device._validator.command(stream, "copy", reads, writes)
    with stream._staging_lock:
        direct = copy_between(stream, _stage(stream), target, source, checksum)
    return CopyPath.DIRECT if direct else CopyPath.STAGED


def multicast(stream: Stream, dsts: Sequence[Memory], src: Memory) -> int:
    """Submit what copies `src` to each of `dsts`; see :meth:`maia_rt.Stream.multicast`."""
    stream._require_own(src, "src")
    require_plain(src, "src")
    try:
        targets = list(dsts)
    except TypeError:
        raise InvalidType(f"dsts is {type(dsts).__name__}, not a sequence of buffers") from None
    for number, dst in enumerate(targets):
        stream._require_own(dst, f"dsts[{number}]")
        require_plain(dst, f"dsts[{number}]", writes=True)
        if dst.nbytes != src.nbytes:
            raise InvalidArgument(f"dsts[{number}] has {dst.nbytes} bytes, src {src.nbytes}")
    at, size = src.address, src.nbytes
    found = sorted(dst.address for dst in targets)
    for one, other in itertools.pairwise(found):
        if size and other - one < size:
            raise InvalidArgument(f"two destinations overlap, at {one:#x} and {other:#x}")
    stream._require_open()
    if not found or not size:
        return 0
    if stream.device._validator is not None:
        stream.device._validator.command(stream, "multicast", [(at, size, src)],
                                         [(dst.address, size, dst) for dst in targets])
    groups = _evenly_spaced(found)
    for base, shape, steps in groups:
        submit(stream, _stage(stream), base, at, strides.Walk(size, shape, steps, (0,) * len(shape)))
    return len(groups)


def require_plain(memory: Memory, what: str, *, writes: bool = False) -> None:
    """Raise InvalidArgument unless the elements lie side by side, and may be written where that is meant."""
    if writes and memory.readonly:
        raise InvalidArgument(f"{what} is read-only", cause="the array was read-only when it was registered")
    if memory._strides is not None:
        raise InvalidArgument(f"{what} is a strided view {memory.shape} with strides {memory._strides}",
                              hint="copy it to a buffer of its own with stream.copy")


# --- ends ------------------------------------------------------------------------------------------------------------


def _locate(stream: Stream, memory: Any, what: str) -> _End:
    """Find an end of a copy: its device address if the device reaches it, the host memory if it is some."""
    writes = what == "dst"
    if isinstance(memory, Memory):
        stream._require_own(memory, what)
        if writes and memory.readonly:
            raise InvalidArgument(f"{what} is read-only", cause="the array was read-only when it was registered")
        return _End(memory.address, None, memory.nbytes, memory.shape, memory._strides, memory.itemsize,
                    memory.dtype is None)
    if not isinstance(memory, np.ndarray):
        try:
            host = HostMemory(memory, writes)
        except TypeError:
            if not hasattr(memory, "__dlpack__"):
                raise InvalidType(f"{what} is {type(memory).__name__}, which is no memory",
                                  hint="pass a Buffer, a HostBuffer, an array or another object with a buffer or DLPack"
                                  ) from None
            memory = dlpack.as_array(memory)
        except (ValueError, BufferError) as error:
            raise InvalidArgument(f"{what} cannot be used: {error}",
                                  cause="it is read-only, or not contiguous") from None
        else:
            return _End(stream.device._pinned.find(host.address, host.nbytes), host, host.nbytes, (host.nbytes,), None,
                        1, True)
    if memory.dtype.hasobject:
        raise InvalidType(f"{what} is an array of Python objects, which is no memory")
    if writes and not memory.flags.writeable:
        raise InvalidArgument(f"{what} cannot be used: it is read-only")
    size = memory.dtype.itemsize
    if memory.flags.c_contiguous:
        host = HostMemory(memory.reshape(-1).view(np.uint8) if memory.nbytes else b"", writes and memory.nbytes > 0)
        return _End(stream.device._pinned.find(host.address, host.nbytes), host, host.nbytes, memory.shape, None, size,
                    False)
    if writes and any(n > 1 and not step for n, step in zip(memory.shape, memory.strides, strict=True)):
        raise InvalidArgument("dst has elements that share memory", cause="it is broadcast")
    below, above = strides.span(memory.shape, memory.strides, size)
    first = memory.ctypes.data
    address = stream.device._pinned.find(first + below, above - below)
    return _End(None if address is None else address - below, memory, memory.nbytes, memory.shape, memory.strides, size,
                False)


def _common_shape(to: _End, at: _End) -> tuple[Dims, int]:
    """Return shape and element size of a strided copy; plain bytes take those of the other end."""
    if at.plain and at.strides is None:
        return to.shape, to.size
    if to.plain and to.strides is None:
        return at.shape, at.size
    if to.shape != at.shape or to.size != at.size:
        raise InvalidArgument(f"dst has shape {to.shape} with elements of {to.size} bytes, src {at.shape} with "
                              f"elements of {at.size}",
                              cause="one of them is strided", hint="give both the same shape and element size")
    return to.shape, to.size


def _accessed(end: _End, memory: Any) -> list[tuple[int, int, Any]]:
    """What validation is told of an end: the ranges of device addresses, none where there are too many."""
    if end.address is None:
        return []
    if end.strides is None:
        return [(end.address, end.nbytes, memory)]
    return [(address, size, memory) for address, size in ranges(end.address, end.shape, end.strides, end.size)]


# --- contiguous ------------------------------------------------------------------------------------------------------


def _copy_plain(stream: Stream, to: _End, at: _End) -> CopyPath:
    if to.address is not None and at.address is not None:
        stream._submit(_COPY, payload=(at.address, to.address, to.nbytes))
        return CopyPath.DIRECT
    if to.address is not None:
        assert isinstance(at.host, HostMemory)
        return _from_host(stream, to.address, at.host)
    assert isinstance(to.host, HostMemory) and at.address is not None
    _to_host(stream, to.host, at.address)
    return CopyPath.STAGED


def _from_host(stream: Stream, to: int, source: HostMemory) -> CopyPath:
    size = source.nbytes
    if size <= MAX_INLINE_BYTES:
        _write_inline(stream, to, source.tobytes())
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


def _write_inline(stream: Stream, to: int, data: bytes) -> None:
    padded = data.ljust(MAX_INLINE_BYTES, b"\0")
    words = int.from_bytes(padded[:8], "little"), int.from_bytes(padded[8:], "little")
    stream._submit(_WRITE_IMM, units=len(data), payload=(to, *words))


def _stage(stream: Stream) -> Staging:
    stream._require_open()
    if stream._staging is None:
        stream._staging = Staging(stream.device._pool.allocate(STAGING_BYTES), stream.timeout)
    return stream._staging


# --- with a checksum -------------------------------------------------------------------------------------------------


def _require_checksum(stream: Stream, strided: bool) -> None:
    if strided:
        raise InvalidArgument("a copy with a checksum needs memory that is contiguous",
                              cause="CRC goes over bytes that lie side by side", hint="copy to a contiguous one first")
    capabilities = stream.device.capabilities
    if not capabilities.crc_compare:
        raise Unsupported(f"{stream.device.name}: the device cannot compare checksums",
                          cause="its firmware is older than contract 1.1")


def _copy_checked(stream: Stream, to: _End, at: _End) -> CopyPath:
    """Copy between a checksum of the source and its comparison with the destination; one word a stream is enough."""
    size = to.nbytes
    with stream._staging_lock:
        staging = _stage(stream)
        word = staging.word
        if at.address is not None:
            stream._submit(_CRC, payload=(at.address, size, word))
        else:
            assert isinstance(at.host, HostMemory)
            _write_inline(stream, word, zlib.crc32(memoryview(at.host)).to_bytes(4, "little"))
        path = _copy_plain(stream, to, at)
        if to.address is not None:
            stream._submit(_CRC, units=_COMPARE, payload=(to.address, size, word))
            return path
        assert isinstance(to.host, HostMemory)
        expected, found = staging.read_word(), zlib.crc32(memoryview(to.host))
        if expected != found:
            raise DeviceFault(FaultCode.CHECKSUM, device=stream.device.name, queue=stream._queue.id,
                              sequence=stream._ring.head, address=at.address or 0,
                              detail=f"{size} bytes arrived on the host with CRC {found:#010x}, {expected:#010x} left")
    return path


# --- strided ---------------------------------------------------------------------------------------------------------


def _copy_strided(stream: Stream, to: _End, at: _End, shape: Dims, size: int) -> CopyPath:
    whole = strides.contiguous(shape, size)
    to_steps, at_steps = to.strides or whole, at.strides or whole
    with stream._staging_lock:
        staging = _stage(stream)
        if to.address is not None and at.address is not None:
            submit(stream, staging, to.address, at.address, strides.walk(shape, to_steps, at_steps, size))
            return CopyPath.DIRECT
        if to.address is not None:
            from_array(stream, staging, to.address, to_steps, _as_array(at, shape, size))
        else:
            assert at.address is not None
            try:
                to_array(stream, staging, _as_array(to, shape, size), at.address, at_steps)
                staging.finish()
            except BaseException:
                staging.forget_targets()
                raise
    return CopyPath.STAGED


def _as_array(end: _End, shape: Dims, size: int) -> npt.NDArray[Any]:
    if isinstance(end.host, np.ndarray):
        return end.host
    assert end.host is not None
    return np.ndarray(shape, np.dtype((np.void, size)), memoryview(end.host))


def _evenly_spaced(addresses: list[int]) -> list[tuple[int, Dims, Dims]]:
    """Cut sorted addresses into groups ``base + i * stride``, then ``+ j * other stride``; each is one command."""
    runs: list[tuple[int, int, int]] = []
    at = 0
    while at < len(addresses):
        end, step = at + 1, 0
        if end < len(addresses):
            step = addresses[end] - addresses[at]
            while end < len(addresses) and addresses[end] - addresses[end - 1] == step:
                end += 1
        runs.append((addresses[at], end - at, step if end - at > 1 else 0))
        at = end
    groups: list[tuple[int, Dims, Dims]] = []
    first = 0
    while first < len(runs):
        base, count, step = runs[first]
        last = first + 1
        gap = runs[last][0] - base if last < len(runs) else 0
        while last < len(runs) and runs[last][1:] == (count, step) and runs[last][0] - runs[last - 1][0] == gap:
            last += 1
        dims = [(last - first, gap), (count, step)]
        kept = [(n, d) for n, d in dims if n > 1]
        groups.append((base, tuple(n for n, _ in kept), tuple(d for _, d in kept)))
        first = last
    return groups
