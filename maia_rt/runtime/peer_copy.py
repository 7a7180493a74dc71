"""Copies between two devices: by the one whose stream it is where it reaches the other, else through the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from maia_rt._fast.ring import WAIT_DONE
from maia_rt.contract.commands import Opcode
from maia_rt.errors import DeviceFault, FaultCode, InvalidArgument
from maia_rt.memory.space import Space
from maia_rt.runtime import strides
from maia_rt.runtime.buffer import Buffer, Memory
from maia_rt.runtime.host_buffer import HostBuffer
from maia_rt.runtime.strided_copy import submit

if TYPE_CHECKING:
    from maia_rt.runtime.peer import PeerPath
    from maia_rt.runtime.staging import Staging
    from maia_rt.runtime.stream import Stream

_COPY: Final = int(Opcode.COPY)
_REST_NS: Final = 250_000_000
"""How long a stream may take to come to rest for a check; one that takes longer is not held up by it."""


def is_foreign(stream: Stream, memory: Any) -> bool:
    """Whether memory belongs to another device than the stream's."""
    return isinstance(memory, Memory) and memory.device is not stream.device


def require_pair(stream: Stream, dst: Any, src: Any) -> tuple[Buffer, Buffer]:
    """Return the ends of a copy between two devices, one of them the stream's.

    Raises
    ------
    InvalidArgument
        The stream's device has part in neither end; one of them is no device memory; sizes or shapes differ.
    ClosedError
    """
    for memory, what, peer in ((dst, "dst", src), (src, "src", dst)):
        if is_foreign(stream, memory) and (not isinstance(peer, Buffer) or peer.device is not stream.device):
            raise InvalidArgument(f"{what} belongs to another device, {memory.device.name}",
                                  cause="the other end is no device memory of this one",
                                  hint=f"use a stream of {memory.device.name}")
        if isinstance(memory, HostBuffer):
            raise InvalidArgument(f"{what} is pinned for another device, {memory.device.name}",
                                  hint="pass its array, numpy.asarray(buffer)")
    for memory in (dst, src):
        memory.device._require_open()
        memory.address  # noqa: B018  raises where the memory has been closed
    if dst.readonly:
        raise InvalidArgument("dst is read-only")
    if dst.nbytes != src.nbytes:
        raise InvalidArgument(f"dst has {dst.nbytes} bytes, src {src.nbytes}", hint="copy a slice")
    if not (dst.contiguous and src.contiguous) and (dst.shape, dst.itemsize) != (src.shape, src.itemsize):
        raise InvalidArgument(f"dst has shape {dst.shape} with elements of {dst.itemsize} bytes, src {src.shape} with "
                              f"elements of {src.itemsize}", cause="one of them is strided",
                              hint="give both the same shape and element size")
    return dst, src


def copy_between(stream: Stream, staging: Staging, dst: Buffer, src: Buffer, checksum: bool) -> bool:
    """Copy between two devices; say whether it went directly.

    Raises
    ------
    DeviceFault
        `checksum`, and what arrived is not what left; or a device failed.
    ClosedError, DeviceLost, DeviceTimeout
    """
    stream._require_open()
    pull = src.device is not stream.device
    near, far = (dst, src) if pull else (src, dst)
    path = stream.device.peer(far.device)
    flat = dst.contiguous and src.contiguous
    direct = path.kind == "direct" and far.space == Space.hbm()
    if direct:
        there = path._hbm + far.address
        ends = (there, near.address) if pull else (near.address, there)
        if flat:
            stream._submit(_COPY, payload=(*ends, dst.nbytes))
            direct = not path._due() or checksum or _arrived(stream, path, near, far)
        else:
            walk = strides.walk(dst.shape, dst.strides, src.strides, dst.itemsize)
            submit(stream, staging, ends[1], ends[0], walk)
    if not direct:
        _through_the_host(stream, path, dst, src, flat=flat, pull=pull)
    if checksum:
        stream.synchronize()
        if not path._link.same(near.address, far.address, dst.nbytes, stream.timeout):
            raise DeviceFault(FaultCode.CHECKSUM, device=stream.device.name, queue=stream._queue.id,
                              sequence=stream._account.last, address=near.address,
                              detail=f"{dst.nbytes} bytes {'from' if pull else 'to'} {far.device.name} arrived with "
                                     "another CRC than they left with")
    return direct


def _arrived(stream: Stream, path: PeerPath, near: Buffer, far: Buffer) -> bool:
    """Compare the ends of the copy just submitted, where the stream soon comes to rest; False where they differ."""
    if not (path.device.capabilities.crc and path.other.capabilities.crc):
        return True
    queue, sequence = stream._mark()
    if queue.ring.wait(sequence, _REST_NS) != WAIT_DONE or stream.failed:
        return True
    path.checks += 1
    if path._link.same(near.address, far.address, near.nbytes, stream.timeout):
        return True
    path._distrust(near.nbytes, far.address)
    return False


def _through_the_host(stream: Stream, path: PeerPath, dst: Buffer, src: Buffer, *, flat: bool, pull: bool) -> None:
    near, far = (dst, src) if pull else (src, dst)
    if flat:
        path._link.copy(stream, near.address, far.address, dst.nbytes, pull=pull)
        return
    between = np.empty(dst.shape, np.dtype((np.void, dst.itemsize)))
    stream.synchronize()
    behind = path._link.stream()
    first, second = (behind, stream) if pull else (stream, behind)
    first.copy(between, src)
    second.copy(dst, between)
    second.synchronize()
