"""Strided copies: as few COPY_ND commands as will do, and their way through pinned memory where the host's is not."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from maia_rt.contract.commands import COPY_DESCRIPTOR, Opcode
from maia_rt.runtime import strides
from maia_rt.runtime.staging import CHUNK_BYTES, Staging
from maia_rt.runtime.strides import Dims, Walk

if TYPE_CHECKING:
    from maia_rt.runtime.stream import Stream

_COPY: Final = int(Opcode.COPY)
_COPY_ND: Final = int(Opcode.COPY_ND)
_DESCRIPTOR_BYTES: Final = COPY_DESCRIPTOR.itemsize
_pack: Final = struct.Struct("<3Q2I4q").pack
"""A COPY_DESCRIPTOR, in a fraction of the time that an array of them takes."""
_MOST_AT_ONCE: Final = 512
"""Descriptors that are written before one of them is used: 32 KiB."""
_MOST_RANGES: Final = 256


def submit(stream: Stream, staging: Staging, to: int, at: int, walk: Walk) -> None:
    """Submit what walks from address `at` to address `to`."""
    if not walk.run:
        return
    with stream._staging_lock:
        if not walk.shape:
            stream._submit(_COPY, payload=(at, to, walk.run))
            return
        rows = _descriptors(to, at, walk)
        most = _MOST_AT_ONCE * _DESCRIPTOR_BYTES
        for first in range(0, len(rows), most):
            some = rows[first:first + most]
            address, host = staging.take(len(some))
            ctypes.memmove(host, some, len(some))
            _submit_each(stream, address, len(some) // _DESCRIPTOR_BYTES)
            staging.use(stream._mark())


def from_array(stream: Stream, staging: Staging, to: int, to_steps: Dims, source: npt.NDArray[Any]) -> None:
    """Copy an array, which the device does not reach, to strided memory that it does."""
    size, shape = source.dtype.itemsize, source.shape
    for part in _parts(shape, to_steps, size):
        piece = source[part]
        offset, dims, steps = strides.index(shape, to_steps, part)
        rows, walk = _staged(dims, steps, size)
        address, host = staging.take(rows * _DESCRIPTOR_BYTES + piece.nbytes)
        data = rows * _DESCRIPTOR_BYTES
        np.copyto(_array_at(host + data, piece), piece)
        _submit_staged(stream, (address, host), to + offset, address + data, walk)
        staging.use(stream._mark())


def to_array(stream: Stream, staging: Staging, target: npt.NDArray[Any], at: int, at_steps: Dims) -> None:
    """Copy strided memory of the device to an array that it does not reach; the staging memory has to be finished."""
    size, shape = target.dtype.itemsize, target.shape
    for part in _parts(shape, at_steps, size):
        # An index of integers alone gives a number, not a view.
        piece = target[(*part, ...)]
        offset, dims, steps = strides.index(shape, at_steps, part)
        rows, walk = _staged(dims, steps, size)
        address, host = staging.take(rows * _DESCRIPTOR_BYTES + piece.nbytes)
        data = rows * _DESCRIPTOR_BYTES
        turned = Walk(walk.run, walk.shape, walk.src, walk.dst)
        _submit_staged(stream, (address, host), address + data, at + offset, turned)
        staging.use(stream._mark(), _Piece(piece, data), 0)


class _Piece:
    """A part of an array that staged bytes go to."""

    def __init__(self, array: npt.NDArray[Any], skip: int) -> None:
        self._array = array
        self._skip = skip

    def copy_from(self, address: int, start: int, size: int, /) -> None:
        np.copyto(self._array, _array_at(address + self._skip, self._array))


def ranges(address: int, shape: Dims, steps: Dims, size: int) -> list[tuple[int, int]]:
    """Return the (address, bytes) that strided memory consists of; none where there are very many."""
    walk = strides.walk(shape, steps, steps, size)
    if math.prod(walk.shape) > _MOST_RANGES:
        return []
    return [(address + sum(i * step for i, step in zip(index, walk.dst, strict=True)), walk.run)
            for index in itertools.product(*map(range, walk.shape))]


def _parts(shape: Dims, steps: Dims, size: int) -> list[tuple[slice | int, ...]]:
    """Cut an array so that each part, and the descriptors that it takes, fit into a chunk."""
    most = CHUNK_BYTES
    while True:
        parts = strides.pieces(shape, size, most)
        _, dims, inner = strides.index(shape, steps, parts[0])
        if _staged(dims, inner, size)[0] <= _MOST_AT_ONCE or most <= size:
            return parts
        most //= 2


def _staged(dims: Dims, steps: Dims, size: int) -> tuple[int, Walk]:
    """Return how a part goes between contiguous memory and strided memory: how many descriptors, and the walk."""
    walk = strides.walk(dims, steps, strides.contiguous(dims, size), size)
    rows = math.prod(walk.shape) // math.prod(sorted(walk.shape)[-2:]) if walk.shape else 0
    return rows, walk


def _submit_staged(stream: Stream, room: tuple[int, int], to: int, at: int, walk: Walk) -> None:
    if not walk.shape:
        stream._submit(_COPY, payload=(at, to, walk.run))
        return
    rows = _descriptors(to, at, walk)
    ctypes.memmove(room[1], rows, len(rows))
    _submit_each(stream, room[0], len(rows) // _DESCRIPTOR_BYTES)


def _submit_each(stream: Stream, address: int, count: int) -> None:
    for number in range(count):
        stream._submit(_COPY_ND, payload=(address + number * _DESCRIPTOR_BYTES, 0, 0))


class _Plan(NamedTuple):
    """What the descriptors of a walk have in common, and the offsets of dst and src where each starts."""

    fields: tuple[int, ...]
    starts: tuple[tuple[int, int], ...]


@functools.lru_cache(maxsize=512)
def _plan(walk: Walk) -> _Plan:
    """The device does the two longest loops, each turn of the others is one command."""
    order = sorted(range(len(walk.shape)), key=walk.shape.__getitem__)
    inner, outer = sorted(order[-2:]), sorted(order[:-2])
    rows = inner[-1]
    planes, src_plane, dst_plane = 1, 0, 0
    if len(inner) > 1:
        planes, src_plane, dst_plane = walk.shape[inner[0]], walk.src[inner[0]], walk.dst[inner[0]]
    starts = tuple(
        (sum(i * walk.dst[axis] for i, axis in zip(index, outer, strict=True)),
         sum(i * walk.src[axis] for i, axis in zip(index, outer, strict=True)))
        for index in itertools.product(*(range(walk.shape[axis]) for axis in outer)))
    return _Plan((walk.run, walk.shape[rows], planes, walk.src[rows], walk.dst[rows], src_plane, dst_plane), starts)


def _descriptors(to: int, at: int, walk: Walk) -> bytes:
    fields, starts = _plan(walk)
    return b"".join(_pack(at + src, to + dst, *fields) for dst, src in starts)


def _array_at(address: int, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a contiguous array over staging memory, of the shape and dtype of another."""
    memory = memoryview((ctypes.c_ubyte * max(like.nbytes, 1)).from_address(address))
    return np.ndarray(like.shape, like.dtype, memory)
