"""A strided view of a buffer argument or of a piece of tile SRAM: what kernels are written in terms of."""

from __future__ import annotations

import math
from collections.abc import Sequence

from maia_rt.contract.dtype import DTYPE_BITS, MX_BLOCK, MX_DTYPES, Dtype, row_bytes
from maia_rt.contract.program import Space
from maia_rt.errors import InvalidArgument

WIDTHS: dict[Dtype, int] = {d: 0 if d in MX_DTYPES else int(DTYPE_BITS[d]) // 8 for d in Dtype}
"""Bytes an element; 0 for MX types, whose elements have no address of their own."""


class Allocation:
    """A piece of one tile's SRAM, and the operations that last touched it: what the builder orders operations by.

    ``retired`` once a ring has handed the piece out again: views of before must not be used any more.
    """

    __slots__ = ("nbytes", "offset", "readers", "retired", "tile", "writer")

    def __init__(self, tile: int, offset: int, nbytes: int) -> None:
        self.tile = tile
        self.offset = offset
        self.nbytes = nbytes
        self.retired = False
        self.writer: object | None = None
        self.readers: dict[int, object] = {}

    def renew(self) -> Allocation:
        """The same piece for another use, with its history; this one is retired."""
        fresh = Allocation(self.tile, self.offset, self.nbytes)
        fresh.writer, fresh.readers = self.writer, self.readers
        self.retired = True
        return fresh


class View:
    """Elements in a buffer argument or in SRAM, addressed as numpy addresses an array.

    Views are made by `KernelBuilder.argument` and `TileBuilder.allocate`, and cut down by indexing, `split`, `permute`
    and `broadcast`. They never hold data.

    Attributes
    ----------
    space : Space
        ARG or TILE.
    index : int
        Number of the argument; 0 in SRAM.
    offset : int
        Bytes from the start of the argument or of SRAM.
    dtype : Dtype
    shape : tuple of int
    strides : tuple of int
        Bytes from one element to the next, for each axis; 0 shows the same elements again. The last axis of an MX view
        is a row of whole blocks: it is not cut or moved, and its stride is 0.
    allocation : Allocation or None
        None for arguments.
    """

    __slots__ = ("allocation", "dtype", "index", "offset", "shape", "space", "strides")

    def __init__(self, space: Space, index: int, offset: int, dtype: Dtype, shape: tuple[int, ...],
                 strides: tuple[int, ...], allocation: Allocation | None) -> None:
        self.space = space
        self.index = index
        self.offset = offset
        self.dtype = dtype
        self.shape = shape
        self.strides = strides
        self.allocation = allocation

    @property
    def width(self) -> int:
        """Bytes an element; 0 for an MX type."""
        return WIDTHS[self.dtype]

    @property
    def raw(self) -> View:
        """The same memory as UINT8 for DMA: the last axis of an MX view becomes the bytes of a row, scales last."""
        if self.dtype not in MX_DTYPES:
            raise InvalidArgument(f"{self!r} has no raw form", cause="only rows of MX types are seen as bytes")
        return View(self.space, self.index, self.offset, Dtype.UINT8,
                    (*self.shape[:-1], row_bytes(self.dtype, self.shape[-1])), (*self.strides[:-1], 1), self.allocation)

    def bits(self, dtype: Dtype) -> View:
        """The same bytes as another type of the same width: FP32 as INT32, whose sums move exponents."""
        if dtype in MX_DTYPES or self.dtype in MX_DTYPES or WIDTHS[dtype] != self.width:
            raise InvalidArgument(f"{self!r} has no bits of {dtype.name}", cause="the types differ in width")
        return View(self.space, self.index, self.offset, dtype, self.shape, self.strides, self.allocation)

    def first(self, *shape: int) -> View:
        """The start of a piece of SRAM as a smaller array: C order, no gaps. What a block of MX rows is cut down by."""
        strides = contiguous_strides(shape, self.dtype)
        if self.allocation is None or nbytes_of(shape, self.dtype) > (
                self.allocation.nbytes - (self.offset - self.allocation.offset)):
            raise InvalidArgument(f"{self!r} has no room for {shape}", cause="it is no SRAM, or too little")
        return self._with(self.offset, tuple(shape), strides)

    def _with(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> View:
        return View(self.space, self.index, offset, self.dtype, shape, strides, self.allocation)

    def __getitem__(self, key: int | slice | tuple[int | slice, ...]) -> View:
        """Cut a part out: integers drop their axis, slices have step 1; missing axes are whole."""
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) > len(self.shape):
            raise InvalidArgument(f"{len(keys)} indices for a view of shape {self.shape}")
        offset = self.offset
        shape: list[int] = []
        strides: list[int] = []
        if len(keys) == len(self.shape) and self.dtype in MX_DTYPES:
            row = keys[-1]
            if not isinstance(row, slice) or row.indices(self.shape[-1]) != (0, self.shape[-1], 1):
                raise InvalidArgument(f"{self!r}: a row of MX blocks is not cut",
                                      cause="its scales lie behind all of it",
                                      hint="move parts of elements and of scales by .raw")
        for k, extent, stride in zip(keys, self.shape, self.strides, strict=False):
            if isinstance(k, slice):
                start, stop, step = k.indices(extent)
                if step != 1 or stop <= start:
                    raise InvalidArgument(f"slice {k} of an axis of {extent} is empty or has a step")
                shape.append(stop - start)
                strides.append(stride)
            else:
                start = k
                if not 0 <= k < extent:
                    raise InvalidArgument(f"index {k} is outside an axis of {extent}")
            offset += start * stride
        rest = len(keys)
        return self._with(offset, (*shape, *self.shape[rest:]), (*strides, *self.strides[rest:]))

    def split(self, axis: int, extents: Sequence[int]) -> View:
        """Show one axis as several whose extents multiply to its own, outermost first."""
        extent, stride = self.shape[axis], self.strides[axis]
        if self.dtype in MX_DTYPES and axis in (-1, len(self.shape) - 1):
            raise InvalidArgument(f"{self!r}: a row of MX blocks is not split", cause="its scales lie behind all of it")
        product = 1
        inner: list[int] = []
        for e in reversed(extents):
            inner.append(stride * product)
            product *= e
        if product != extent:
            raise InvalidArgument(f"{tuple(extents)} does not multiply to the axis of {extent}")
        return self._with(self.offset, (*self.shape[:axis], *extents, *self.shape[axis + 1 :]),
                          (*self.strides[:axis], *reversed(inner), *self.strides[axis + 1 :]))

    def permute(self, *axes: int) -> View:
        """Show the axes in another order."""
        if sorted(axes) != list(range(len(self.shape))):
            raise InvalidArgument(f"{axes} is no order of {len(self.shape)} axes")
        if self.dtype in MX_DTYPES and axes[-1] != len(self.shape) - 1:
            raise InvalidArgument(f"{self!r}: the row of MX blocks stays the last axis", cause="blocks run along it")
        return self._with(self.offset, tuple(self.shape[a] for a in axes), tuple(self.strides[a] for a in axes))

    def broadcast(self, *shape: int) -> View:
        """Show axes of extent 1, and axes added in front, again and again (sources only)."""
        if len(shape) < len(self.shape):
            raise InvalidArgument(f"{self.shape} cannot become {shape}")
        added = len(shape) - len(self.shape)
        strides = [0] * added
        for want, have, stride in zip(shape[added:], self.shape, self.strides, strict=True):
            if have not in (want, 1):
                raise InvalidArgument(f"{self.shape} cannot become {shape}")
            strides.append(stride if want == have else 0)
        return self._with(self.offset, tuple(shape), tuple(strides))

    def __repr__(self) -> str:
        where = "SRAM" if self.space is Space.TILE else f"argument {self.index}"
        return f"<View of {where}+{self.offset:#x}: {self.dtype.name} {self.shape}, strides {self.strides}>"


def contiguous_strides(shape: Sequence[int], dtype: Dtype) -> tuple[int, ...]:
    """Byte strides of a C-ordered array without gaps.

    Raises
    ------
    InvalidArgument
        Rows of an MX type that are no multiple of 32 elements.
    """
    if dtype in MX_DTYPES and (not shape or shape[-1] % MX_BLOCK):
        raise InvalidArgument(f"{dtype.name} of shape {tuple(shape)}", cause=f"its rows are blocks of {MX_BLOCK}",
                              hint=f"make the last axis a multiple of {MX_BLOCK}")
    if not shape:
        return ()
    strides = [WIDTHS[dtype]]
    step = row_bytes(dtype, shape[-1])
    for extent in reversed(shape[:-1]):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def nbytes_of(shape: Sequence[int], dtype: Dtype) -> int:
    """Bytes of a C-ordered array without gaps."""
    return math.prod(shape[:-1]) * row_bytes(dtype, shape[-1] if shape else 1)
