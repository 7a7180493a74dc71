"""Strided shapes: what indexing makes of them, and the fewest loops that walk two of them side by side."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from maia_rt.errors import IndexOutOfRange, InvalidArgument, InvalidType

Dims = tuple[int, ...]


def contiguous(shape: Dims, size: int) -> Dims:
    """Return the strides in bytes of a C-contiguous array with elements of `size` bytes."""
    strides = []
    for extent in reversed(shape):
        strides.append(size)
        size *= max(extent, 1)
    return tuple(reversed(strides))


def is_contiguous(shape: Dims, strides: Dims, size: int) -> bool:
    """Say whether the elements lie side by side in C order; strides of dimensions with one element do not matter."""
    if 0 in shape:
        return True
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != size:
            return False
        size *= extent
    return True


def span(shape: Dims, strides: Dims, size: int) -> tuple[int, int]:
    """Return the first byte and the end, relative to element 0, of everything that is touched."""
    if 0 in shape:
        return 0, 0
    below = above = 0
    for extent, stride in zip(shape, strides, strict=True):
        reach = stride * (extent - 1)
        below, above = (below + reach, above) if reach < 0 else (below, above + reach)
    return below, above + size


def index(shape: Dims, strides: Dims, item: Any) -> tuple[int, Dims, Dims]:
    """Index with integers, slices and an ellipsis, as numpy's basic indexing.

    Returns
    -------
    offset, shape, strides
        Of the part, in bytes; `offset` from element 0.

    Raises
    ------
    InvalidType
        Something else is among the indices.
    InvalidArgument
        There are too many.
    IndexOutOfRange
        One is outside its dimension.
    """
    items = item if isinstance(item, tuple) else (item,)
    if sum(one is Ellipsis for one in items) > 1:
        raise InvalidArgument("an index has one ellipsis at most")
    given = sum(one is not Ellipsis for one in items)
    if given > len(shape):
        raise InvalidArgument(f"{given} indices for memory with {len(shape)} dimensions")
    if Ellipsis not in items:
        items = (*items, Ellipsis)
    offset = axis = 0
    dims: list[int] = []
    steps: list[int] = []
    for one in items:
        if one is Ellipsis:
            rest = len(shape) - given
            dims += shape[axis:axis + rest]
            steps += strides[axis:axis + rest]
            axis += rest
            continue
        if isinstance(one, slice):
            try:
                start, stop, step = one.indices(shape[axis])
            except (TypeError, ValueError) as error:
                raise InvalidType(f"{one} is no slice: {error}") from None
            count = len(range(start, stop, step))
            offset += start * strides[axis] if count else 0
            dims.append(count)
            steps.append(step * strides[axis])
        else:
            try:
                at = one.__index__()
            except (AttributeError, TypeError):
                raise InvalidType(f"memory is indexed by integers and slices, as in x[3, a:b, ::2], not by "
                                  f"{type(one).__name__}", hint="copy it to the host for other indices") from None
            if isinstance(one, bool) or not -shape[axis] <= at < shape[axis]:
                raise IndexOutOfRange(f"index {one} is outside dimension {axis}, which has {shape[axis]} elements")
            offset += (at % shape[axis]) * strides[axis]
        axis += 1
    return offset, tuple(dims), tuple(steps)


class Walk(NamedTuple):
    """Runs of bytes at two addresses at once: for every index of `shape` one run of `run` bytes.

    Attributes
    ----------
    run : int
        Bytes that lie side by side at both ends.
    shape : tuple of int
        None of its extents is 1.
    dst, src : tuple of int
        Strides in bytes.
    """

    run: int
    shape: Dims
    dst: Dims
    src: Dims


@functools.lru_cache(maxsize=512)
def walk(shape: Dims, dst: Dims, src: Dims, size: int) -> Walk:
    """Find the fewest loops that go over two strided arrays of one shape, with elements of `size` bytes."""
    if 0 in shape:
        return Walk(0, (), (), ())
    # The order of the loops is free: the destination's longest stride goes outside, so that rows come out long.
    loops = sorted(((abs(d), abs(s), n, d, s) for n, d, s in zip(shape, dst, src, strict=True) if n != 1), reverse=True)
    joined: list[tuple[int, int, int]] = []
    for _, _, n, d, s in loops:
        if joined and joined[-1][1] == d * n and joined[-1][2] == s * n:
            joined[-1] = (joined[-1][0] * n, d, s)
        else:
            joined.append((n, d, s))
    run = size
    if joined and joined[-1][1] == size and joined[-1][2] == size:
        run = joined.pop()[0] * size
    return Walk(run, tuple(n for n, _, _ in joined), tuple(d for _, d, _ in joined), tuple(s for _, _, s in joined))


def pieces(shape: Dims, size: int, most: int) -> list[tuple[slice | int, ...]]:
    """Cut an array into parts of at most `most` bytes; return the index of each. One element is never cut."""
    found: list[tuple[slice | int, ...]] = []
    _cut(shape, size, most, (), found)
    return found


def _cut(shape: Dims, size: int, most: int, before: tuple[slice | int, ...],
         found: list[tuple[slice | int, ...]]) -> None:
    if not shape or math.prod(shape) * size <= most:
        found.append(before)
        return
    row = math.prod(shape[1:]) * size
    if row <= most or len(shape) == 1:
        rows = max(most // row, 1)
        found += [(*before, slice(at, min(at + rows, shape[0]))) for at in range(0, shape[0], rows)]
        return
    for at in range(shape[0]):
        _cut(shape[1:], size, most, (*before, at), found)
