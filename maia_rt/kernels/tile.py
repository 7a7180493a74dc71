"""One tile of a kernel in the making: its SRAM, the operations of its engines, and what waits for what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maia_rt.contract.dtype import FLOATS, INTEGERS, MX_DTYPES
from maia_rt.contract.program import Arg, Capabilities, Dtype, Engine, MacroOp, OpFlag, Space
from maia_rt.errors import InvalidArgument, InvalidType, ProgramError
from maia_rt.kernels.operation import NO_OPERAND, Operand, Operation
from maia_rt.kernels.view import Allocation, View, contiguous_strides, nbytes_of

SRAM_ALIGNMENT = 64
"""Bytes; a vector register of the widest hosts."""
MAX_EXTENT = 1 << 24
"""The largest value of an operation's ``n``."""


class TileBuilder:
    """One tile of a kernel: its SRAM and its three engines. Made by `KernelBuilder.tile`.

    Operations take views of SRAM (DMA also views of arguments) and return an `Operation`. Sources are broadcast to the
    destination's shape as in numpy, but never within a row.
    """

    def __init__(self, kernel: str, number: int, capabilities: Capabilities, args: list[Arg]) -> None:
        self.number = number
        self.used = 0
        self.operations: dict[Engine, list[Operation]] = {e: [] for e in Engine}
        self._kernel = kernel
        self._capabilities = capabilities
        self._args = args
        self._seen: dict[tuple[Engine, Engine], int] = {}

    # SRAM ----------------------------------------------------------------------------------------------------------

    def allocate(self, shape: Sequence[int], dtype: Dtype) -> View:
        """Take SRAM for an array.

        Parameters
        ----------
        shape : sequence of int
        dtype : Dtype

        Returns
        -------
        View
            C order, aligned to 64 bytes; its contents are undefined.

        Raises
        ------
        ProgramError
            The tile has less SRAM than that.
        """
        extents = tuple(int(e) for e in shape)
        strides = contiguous_strides(extents, dtype)
        nbytes = nbytes_of(extents, dtype)
        offset = self.used
        end = offset + -(-nbytes // SRAM_ALIGNMENT) * SRAM_ALIGNMENT
        if end > self._capabilities.tile_sram_bytes:
            raise ProgramError(f"kernel {self._kernel!r} needs {end} bytes of SRAM in tile {self.number}",
                               cause=f"a tile has {self._capabilities.tile_sram_bytes}", hint="use smaller blocks")
        self.used = end
        return View(Space.TILE, 0, offset, dtype, extents, strides,
                    Allocation(self.number, offset, nbytes))

    def ring(self, count: int, shape: Sequence[int], dtype: Dtype) -> Ring:
        """Take SRAM for ``count`` arrays that are used in turn (2: double buffering)."""
        return Ring([self.allocate(shape, dtype) for _ in range(count)])

    # DMA -----------------------------------------------------------------------------------------------------------

    def move(self, dst: View, src: View, *, after: Sequence[Operation] = ()) -> Operation:
        """Copy ``src``, broadcast to ``dst``'s shape, between arguments and SRAM; any strides, any number of axes.

        Axes that lie end to end are joined, so that a copy is as few and as long runs as it can be. Returns the last
        operation where more than three axes need several.
        """
        source = _like(src, dst)
        if dst.dtype is not src.dtype:
            raise InvalidType(f"move from {src.dtype.name} to {dst.dtype.name}", hint="convert it in SRAM")
        if dst.dtype in MX_DTYPES:
            return self.move(dst.raw, source.raw, after=after)
        shape, (to, origin) = _joined(dst.shape, [list(dst.strides), list(source.strides)], dst.width)
        return self._move(dst, source, shape, to, origin, dst.offset, source.offset, after)

    def _move(self, dst: View, src: View, shape: list[int], to: list[int], origin: list[int], dst_offset: int,
              src_offset: int, after: Sequence[Operation]) -> Operation:
        if len(shape) > 3:
            for i in range(shape[0]):
                last = self._move(dst, src, shape[1:], to[1:], origin[1:], dst_offset + i * to[0],
                                  src_offset + i * origin[0], after)
            return last
        if len(shape) == 3 and to[0] < to[1]:
            shape = [shape[1], shape[0], shape[2]]
            to, origin = [to[1], to[0], to[2]], [origin[1], origin[0], origin[2]]
        while len(shape) < 3:
            shape, to, origin = [1, *shape], [0, *to], [0, *origin]
        return self._emit(
            MacroOp.MOVE, (_operand(dst, to, dst_offset, 0), _operand(src, origin, src_offset, 0)),
            (shape[2] * dst.width, shape[1], shape[0]), reads=(src,), write=dst, after=after)

    def gather(self, dst: View, table: View, indices: View, *, after: Sequence[Operation] = ()) -> Operation:
        """``dst[i] = table[indices[i]]``: ``dst`` (rows, columns), ``table`` (entries, columns), INT32 indices in SRAM.

        An index outside the table is a PROGRAM fault when the kernel runs.
        """
        rows, columns = _extents(dst, 2)
        if table.shape[1:] != (columns,) or indices.shape != (rows,) or indices.dtype is not Dtype.INT32:
            raise InvalidArgument(f"gather of {dst!r} from {table!r} by {indices!r}")
        if dst.dtype is not table.dtype:
            raise InvalidType(f"gather from {table.dtype.name} to {dst.dtype.name}")
        if dst.dtype in MX_DTYPES:
            return self.gather(dst.raw, table.raw, indices, after=after)
        return self._emit(
            MacroOp.GATHER,
            (_operand(dst, [0, *dst.strides], dst.offset, 0), _operand(table, [0, *table.strides], table.offset, 0),
             _operand(indices, [0, 0, 0], indices.offset, Dtype.INT32)),
            (columns * dst.width, rows, table.shape[0]), reads=(table, indices), write=dst, after=after)

    def fill(self, dst: View, pattern: int, *, after: Sequence[Operation] = ()) -> Operation:
        """Fill with a 32-bit pattern; rows are multiples of 4 bytes. 0 is zero in every type."""
        if dst.dtype in MX_DTYPES:
            return self.fill(dst.raw, pattern, after=after)
        shape, (to,) = _joined(dst.shape, [list(dst.strides)], dst.width)
        while len(shape) < 3:
            shape, to = [1, *shape], [0, *to]
        if len(shape) > 3 or shape[2] * dst.width % 4:
            raise InvalidArgument(f"fill of {dst!r}", cause="more than three axes, or rows of odd length")
        return self._emit(MacroOp.SET, (_operand(dst, to, dst.offset, 0),), (shape[2] * dst.width, shape[1], shape[0]),
                          write=dst, scalars=(pattern, 0), after=after)

    # Tensor --------------------------------------------------------------------------------------------------------

    def matmul(self, dst: View, a: View, b: View, *, alpha: float = 1.0, accumulate: bool = False,
               transpose_a: bool = False, transpose_b: bool = False, after: Sequence[Operation] = ()) -> Operation:
        """``dst = alpha * op(a) @ op(b)``, plus ``dst`` where ``accumulate``; summed in FP32, INT8 exactly in INT32.

        Parameters
        ----------
        dst : View
            (m, n) or (batch, m, n).
        a, b : View
            (m, k) and (k, n), or stored (k, m) and (n, k) where transposed; with a batch axis, or shared by all
            planes without.
        """
        planes, m, n = _extents(dst, 3)
        rows_a, columns_a = a.shape[-2:]
        rows_b, columns_b = b.shape[-2:]
        if transpose_a:
            rows_a, columns_a = columns_a, rows_a
        if transpose_b:
            rows_b, columns_b = columns_b, rows_b
        if (rows_a, columns_b) != (m, n) or columns_a != rows_b:
            raise InvalidArgument(f"matmul of {dst!r} from {a!r} and {b!r}")
        dtypes = (dst.dtype, a.dtype, b.dtype)
        if not all(d in FLOATS for d in dtypes) and dtypes != (Dtype.INT32, Dtype.INT8, Dtype.INT8):
            raise InvalidType(f"matmul of {a.dtype.name} by {b.dtype.name} into {dst.dtype.name}",
                              cause="factors and result are floating types, or INT8, INT8 and INT32")
        if (a.dtype in MX_DTYPES and transpose_a) or (b.dtype in MX_DTYPES and not transpose_b):
            raise InvalidType(f"matmul of {a.dtype.name} by {b.dtype.name}", cause="blocks of MX run along k",
                              hint="store a as (m, k) and b as (n, k), with transpose_b=True")
        if Dtype.INT8 in dtypes and alpha != 1.0:
            raise InvalidArgument("a product of integers is not scaled", hint="scale the INT32 result")
        flags = ((OpFlag.TRANSPOSE_A if transpose_a else 0) | (OpFlag.TRANSPOSE_B if transpose_b else 0)
                 | (OpFlag.ACCUMULATE if accumulate else 0))
        a3, b3 = a.broadcast(planes, *a.shape[-2:]), b.broadcast(planes, *b.shape[-2:])
        d3 = dst.broadcast(planes, m, n)
        return self._emit(
            MacroOp.MATMUL, tuple(_operand(v, _row_strides(v), v.offset, v.dtype) for v in (d3, a3, b3)),
            (m, n, columns_a), reads=(a, b, dst) if accumulate else (a, b), write=dst, batch=planes, flags=int(flags),
            scalars=(_bits(alpha), 0), after=after)

    # Vector --------------------------------------------------------------------------------------------------------

    def add(self, dst: View, a: View, b: View, *, after: Sequence[Operation] = ()) -> Operation:
        """``dst = a + b``."""
        return self._elementwise(MacroOp.ADD, dst, (a, b), after=after)

    def subtract(self, dst: View, a: View, b: View, *, after: Sequence[Operation] = ()) -> Operation:
        """``dst = a - b``."""
        return self._elementwise(MacroOp.SUB, dst, (a, b), after=after)

    def multiply(self, dst: View, a: View, b: View, *, after: Sequence[Operation] = ()) -> Operation:
        """``dst = a * b``, element by element."""
        return self._elementwise(MacroOp.MUL, dst, (a, b), after=after)

    def scale(self, dst: View, a: View, factor: float | Scalar, shift: float | Scalar = 0.0, *,
              after: Sequence[Operation] = ()) -> Operation:
        """``dst = factor * a + shift``; also to and from integers."""
        return self._elementwise(MacroOp.SCALE, dst, (a,), (factor, shift), after=after)

    def convert(self, dst: View, a: View, *, after: Sequence[Operation] = ()) -> Operation:
        """``dst = a`` in ``dst``'s dtype, rounded to nearest even; to integers, FP8 E4M3 and MX, saturating."""
        return self._elementwise(MacroOp.CONVERT, dst, (a,), after=after)

    def gelu(self, dst: View, a: View, *, after: Sequence[Operation] = ()) -> Operation:
        """``dst = a / 2 * (1 + erf(a / sqrt 2))``."""
        return self._elementwise(MacroOp.GELU, dst, (a,), after=after)

    def relu(self, dst: View, a: View, *, after: Sequence[Operation] = ()) -> Operation:
        """``dst = max(a, 0)``."""
        return self._elementwise(MacroOp.RELU, dst, (a,), after=after)

    def tanh(self, dst: View, a: View, *, after: Sequence[Operation] = ()) -> Operation:
        """``dst = tanh a``."""
        return self._elementwise(MacroOp.TANH, dst, (a,), after=after)

    def exp(self, dst: View, a: View, *, after: Sequence[Operation] = ()) -> Operation:
        """``dst = e ** a``."""
        return self._elementwise(MacroOp.EXP, dst, (a,), after=after)

    def softmax(self, dst: View, a: View, scale: float | Scalar = 1.0, mask: View | None = None, *,
                after: Sequence[Operation] = ()) -> Operation:
        """Softmax of ``scale * a`` over the last axis; where ``mask`` is 0 the result is exactly 0."""
        return self._elementwise(MacroOp.SOFTMAX, dst, (a,) if mask is None else (a, mask), (scale, 0.0), by_row=True,
                                 after=after)

    def layernorm(self, dst: View, a: View, gamma: View, beta: View, epsilon: float | Scalar, *,
                  after: Sequence[Operation] = ()) -> Operation:
        """``(a - mean) / sqrt(variance + epsilon) * gamma + beta`` over the last axis; gamma and beta (columns,)."""
        if gamma.shape != dst.shape[-1:] or beta.shape != dst.shape[-1:]:
            raise InvalidArgument(f"layernorm of {dst!r} by {gamma!r} and {beta!r}")
        return self._elementwise(MacroOp.LAYERNORM, dst, (a,), (epsilon, 0.0), by_row=True, rows=(gamma, beta),
                                 after=after)

    def l2_normalize(self, dst: View, a: View, floor: float | Scalar, *, after: Sequence[Operation] = ()) -> Operation:
        """Each row divided by its length, or by ``floor`` where that is more."""
        return self._elementwise(MacroOp.L2_NORMALIZE, dst, (a,), (floor, 0.0), by_row=True, after=after)

    def mean_rows(self, dst: View, a: View, mask: View, floor: float | Scalar, *,
                  after: Sequence[Operation] = ()) -> Operation:
        """``dst[p] = sum over r of mask[p, r] * a[p, r] / max(sum of mask[p], floor)``.

        ``dst`` (planes, columns), ``a`` (planes, rows, columns), ``mask`` (planes, rows).
        """
        planes, columns = _extents(dst, 2)
        rows = a.shape[1]
        if a.shape != (planes, rows, columns) or mask.shape != (planes, rows):
            raise InvalidArgument(f"mean_rows of {dst!r} from {a!r} and {mask!r}")
        _check_dtypes(MacroOp.MEAN_ROWS, (dst, a, mask))
        if mask.dtype in MX_DTYPES:
            raise InvalidType(f"mean_rows by {mask!r}", cause="weights of rows are not MX")
        bits, flags = self._scalars((floor, 0.0))
        d3 = dst._with(dst.offset, (planes, 1, columns), (dst.strides[0], 0, dst.strides[1]))
        m3 = mask._with(mask.offset, (planes, 1, rows), (mask.strides[0], 0, mask.strides[1]))
        return self._emit(
            MacroOp.MEAN_ROWS, tuple(_operand(v, _row_strides(v), v.offset, v.dtype) for v in (d3, a, m3)),
            (columns, rows, planes), reads=(a, mask), write=dst, flags=flags, scalars=bits, after=after)

    # -----------------------------------------------------------------------------------------------------------------

    def _elementwise(self, opcode: MacroOp, dst: View, sources: tuple[View, ...],
                     scalars: tuple[float | Scalar, float | Scalar] = (0.0, 0.0), *, by_row: bool = False,
                     rows: tuple[View, ...] = (), after: Sequence[Operation] = ()) -> Operation:
        views = (dst, *(_like(s, dst) for s in sources))
        _check_dtypes(opcode, (*views, *rows))
        by_row = by_row or any(v.dtype in MX_DTYPES for v in views)
        shape = list(dst.shape)
        strides = [list(v.strides) for v in views]
        for v in views:
            if shape[-1] > 1 and v.strides[-1] != v.width:
                raise InvalidArgument(f"{opcode.name} of {v!r}", cause="the elements of a row must lie side by side")
        last = len(shape) - 1
        for axis in range(last - 1, -1, -1):
            inner = axis + 1
            if by_row and inner == last:
                continue
            if shape[inner] == 1 and inner != last:
                for s in strides:
                    s[inner] = s[axis]
            joined = all(s[axis] == shape[inner] * s[inner] for s in strides) or shape[axis] == 1
            if joined and shape[axis] * shape[inner] <= MAX_EXTENT:
                shape[axis : inner + 1] = [shape[axis] * shape[inner]]
                for s in strides:
                    del s[axis]
                last -= 1
        if len(shape) > 3:
            raise InvalidArgument(f"{opcode.name} of {dst!r}", cause="more than three axes that cannot be joined")
        while len(shape) < 3:
            shape.insert(0, 1)
            for s in strides:
                s.insert(0, 0)
        operands = [_operand(v, s, v.offset, v.dtype) for v, s in zip(views, strides, strict=True)]
        operands += [_operand(r, [0, 0, 0], r.offset, r.dtype) for r in rows]
        bits, flags = self._scalars(scalars)
        return self._emit(opcode, tuple(operands), (shape[2], shape[1], shape[0]), reads=(*sources, *rows), write=dst,
                          flags=flags, scalars=bits, after=after)

    def _scalars(self, scalars: tuple[float | Scalar, float | Scalar]) -> tuple[tuple[int, int], int]:
        first, second = scalars
        flags = 0
        if isinstance(first, Scalar):
            flags |= OpFlag.SCALAR0_ARG
        if isinstance(second, Scalar):
            flags |= OpFlag.SCALAR1_ARG
        return (_bits(first), _bits(second)), int(flags)

    def _emit(self, opcode: MacroOp, operands: tuple[Operand, ...], n: tuple[int, int, int], *, write: View,
              reads: tuple[View, ...] = (), batch: int = 0, flags: int = 0, scalars: tuple[int, int] = (0, 0),
              after: Sequence[Operation] = ()) -> Operation:
        if max(n) > MAX_EXTENT:
            raise InvalidArgument(f"kernel {self._kernel!r}: {opcode.name} of {n}",
                                  cause=f"extents end at {MAX_EXTENT}", hint="split it")
        engine = Engine(min(opcode >> 4, 2))
        needs: dict[Engine, Operation] = {}

        def need(other: object) -> None:
            if isinstance(other, Operation) and other.engine is not engine:
                known = needs.get(other.engine)
                if known is None or known.position < other.position:
                    needs[other.engine] = other

        for view in (*reads, write):
            allocation = view.allocation
            if allocation is None:
                if engine is not Engine.DMA:
                    raise InvalidArgument(f"{opcode.name} of {view!r}", cause="only DMA reaches arguments",
                                          hint="move it to SRAM first")
                continue
            if allocation.tile != self.number:
                raise InvalidArgument(f"{opcode.name} in tile {self.number} of SRAM of tile {allocation.tile}")
            if allocation.retired:
                raise InvalidArgument(f"{opcode.name} of {view!r}", cause="its ring has handed that SRAM out again",
                                      hint="make the ring longer, or use the block before taking the next")
            need(allocation.writer)
        if write.allocation is not None:
            for reader in write.allocation.readers.values():
                need(reader)
        for operation in after:
            if operation.tile != self.number:
                raise InvalidArgument("after= names an operation of another tile",
                                      cause="tiles are ordered by launches, not within one")
            need(operation)
        waits: dict[int, Operation] = {}
        for producer, operation in needs.items():
            if self._seen.get((engine, producer), -1) < operation.position:
                self._seen[engine, producer] = operation.position
                waits[producer] = operation
        stream = self.operations[engine]
        written = Operation(self.number, engine, len(stream), opcode, flags,
                            (*operands, *(NO_OPERAND,) * (4 - len(operands))), n, batch, scalars, waits)
        stream.append(written)
        for view in reads:
            if view.allocation is not None:
                view.allocation.readers[engine] = written
        if write.allocation is not None:
            write.allocation.writer = written
            write.allocation.readers = {}
        return written


class Scalar:
    """A SCALAR argument; usable wherever an operation takes a number at launch time."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Ring:
    """Arrays in SRAM that are used in turn."""

    __slots__ = ("_next", "_views")

    def __init__(self, views: list[View]) -> None:
        self._views = views
        self._next = 0

    def take(self) -> View:
        """The next array; operations on it wait for those on its last use, whose views are of no more use."""
        view = self._views[self._next]
        if view.allocation is not None:
            view = self._views[self._next] = View(view.space, view.index, view.offset, view.dtype, view.shape,
                                                  view.strides, view.allocation.renew())
        self._next = (self._next + 1) % len(self._views)
        return view


def _operand(view: View, strides: list[int], offset: int, dtype: int) -> Operand:
    return offset, strides[0], strides[1], view.space, dtype, view.index


def _bits(value: float | Scalar) -> int:
    return value.index if isinstance(value, Scalar) else int(np.float32(value).view(np.uint32))


def _check_dtypes(opcode: MacroOp, views: Sequence[View]) -> None:
    """Which vector operations take integers: the verifier's rule, told where the operation is written."""
    dtypes = [v.dtype for v in views]
    integers = [d for d in dtypes if d in INTEGERS]
    legal = not integers
    if opcode in (MacroOp.SCALE, MacroOp.CONVERT):
        legal = True
    elif opcode in (MacroOp.ADD, MacroOp.SUB, MacroOp.MUL):
        legal = legal or dtypes == [Dtype.INT32] * 3
    if not legal or Dtype.UINT8 in dtypes:
        raise InvalidType(f"{opcode.name} of {', '.join(d.name for d in dtypes)}", hint="convert it first",
                          cause="SCALE and CONVERT take integers; ADD, SUB and MUL three INT32; UINT8 is only moved")


def _row_strides(view: View) -> list[int]:
    """Strides of a three-axis view, its rows checked; a lone row gets the stride that BLAS wants of it."""
    planes, rows, columns = view.strides
    if view.shape[2] > 1 and columns != view.width:
        raise InvalidArgument(f"{view!r}", cause="the elements of a row must lie side by side")
    if view.shape[1] == 1:
        rows = max(rows, nbytes_of(view.shape[2:], view.dtype))
    return [planes if view.shape[0] > 1 else 0, rows, columns]


def _extents(view: View, axes: int) -> tuple[int, ...]:
    """A view's shape with axes of 1 put in front."""
    if len(view.shape) > axes:
        raise InvalidArgument(f"{view!r} has more than {axes} axes")
    return (1,) * (axes - len(view.shape)) + view.shape


def _like(src: View, dst: View) -> View:
    return src if src.shape == dst.shape else src.broadcast(*dst.shape)


def _joined(shape: tuple[int, ...], strides: list[list[int]], width: int) -> tuple[list[int], list[list[int]]]:
    """Drop axes of 1 and join axes that lie end to end in every operand; the last axis comes out as a run of bytes."""
    axes = [i for i, e in enumerate(shape) if e > 1]
    extents = [shape[i] for i in axes]
    out = [[s[i] for i in axes] for s in strides]
    if not extents or any(s[-1] != width for s in out):
        extents.append(1)
        for s in out:
            s.append(width)
    for axis in range(len(extents) - 2, -1, -1):
        inner = axis + 1
        if (all(s[axis] == extents[inner] * s[inner] for s in out)
                and extents[axis] * extents[inner] * (width if inner == len(extents) - 1 else 1) <= MAX_EXTENT):
            extents[axis : inner + 1] = [extents[axis] * extents[inner]]
            for s in out:
                del s[axis]
    return extents, out
