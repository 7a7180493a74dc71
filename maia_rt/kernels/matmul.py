"""Matrix products of any size: cut over tiles, then into blocks that SRAM holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from maia_rt.contract.dtype import MX_BLOCK, MX_DTYPES, row_bytes
from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.errors import InvalidArgument, InvalidType, ProgramError
from maia_rt.kernels.blocking import (
    BYTES_PER_NS,
    LEAST_ROWS,
    MACS_PER_NS,
    MEMORY_BYTES_PER_NS,
    OPERATION_NS,
    PACK_PER_NS,
    Span,
    blocks,
    halvings,
    largest,
    pipelined,
    shares,
)
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.tile import SRAM_ALIGNMENT, TileBuilder
from maia_rt.kernels.view import WIDTHS, View

MOST_ROWS = 256
"""Rows in a block: past this a tensor unit gains nothing more from laying out its second factor once."""


@dataclass(frozen=True)
class Blocking:
    """The block sizes of one tile's product of (m, k) by (k, n), and what they cost, multiplications aside.

    ``rows`` x ``columns`` results are formed at a time, ``depth`` of k at a time.
    """

    rows: int
    columns: int
    depth: int
    bytes_moved: int
    nanoseconds: float


@lru_cache(maxsize=1024)
def plan(m: int, n: int, k: int, width: float, sram_bytes: int, extra_row_bytes: int = 0,
         whole_rows: bool = False, *, result_width: int | None = None, grain: int = 1) -> Blocking | None:
    """The cheapest block sizes for one tile.

    Parameters
    ----------
    m, n, k : int
        The tile's share.
    width : float
        Bytes an element of the factors, its share of a scale included; results gather in 4 bytes.
    sram_bytes : int
        What blocks may fill.
    extra_row_bytes : int
        SRAM that each row of a block needs besides.
    whole_rows : bool
        Whether a block must hold all ``n`` columns.
    result_width : int, optional
        Bytes an element of the result; ``width`` where it is not given.
    grain : int
        Pieces of k are multiples of this.

    Returns
    -------
    Blocking or None
        None where not even the smallest blocks fit.
    """
    best: Blocking | None = None
    if result_width is None:
        result_width = math.ceil(width)
    row_sizes = sorted({min(m, s) for s in (MOST_ROWS, 192, 128, 96, 64, 48, 32, 16, 8, 4, 2, 1)})
    for columns in [n] if whole_rows else halvings(n):
        for depth in sorted({-(-d // grain) * grain for d in halvings(k)}, reverse=True):
            once = depth == k
            second = columns * depth * width * (1 if once and columns == n else 2)
            steps_k = -(-k // depth)
            steps_n = -(-n // columns)
            for rows in reversed(row_sizes):
                pad = SRAM_ALIGNMENT * 12
                results = 2 * rows * columns * (4 if result_width == 4 else 4 + result_width)
                if second + 2 * rows * depth * width + results + 2 * rows * extra_row_bytes + pad > sram_bytes:
                    continue
                steps_m = -(-m // rows)
                factors = k * n * (1 if once else steps_m) + m * k * steps_n
                bytes_moved = int(width * factors) + result_width * m * n
                packed = k * n * steps_m + m * k * steps_n + m * n * (steps_k - 1)
                ops = steps_n * steps_m * (steps_k * 3 + 3)
                cost = bytes_moved / BYTES_PER_NS + packed / PACK_PER_NS + ops * OPERATION_NS
                if best is None or cost < best.nanoseconds:
                    best = Blocking(rows, columns, depth, bytes_moved, cost)
                break
    return best


def matmul(capabilities: Capabilities, m: int, n: int, k: int, *, bias: bool = False, gelu: bool = False,
           relu: bool = False, transpose_a: bool = False, transpose_b: bool = False, dtype: Dtype = Dtype.FP32,
           result: Dtype | None = None, name: str = "matmul") -> KernelImage:
    """``y = a @ b``, with bias and GELU or ReLU where asked for.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    m, n, k : int
        a is (m, k), b is (k, n), y is (m, n).
    bias : bool
        Add a row to every row of the product.
    gelu : bool
        Then apply ``x / 2 * (1 + erf(x / sqrt 2))``.
    relu : bool
        Or ``max(x, 0)``.
    transpose_a : bool
        a is stored as (k, m): with a layer's input as a and the gradient of its output as b, the product is the
        gradient of its weights.
    transpose_b : bool
        b is stored as (n, k), as linear layers store their weights.
    dtype : Dtype
        Of a and b; summed in FP32, INT8 exactly in INT32, rounded once. MX blocks run along k, so b is stored as (n, k)
        and k is a multiple of 32.
    result : Dtype, optional
        Of y and bias. Not given: ``dtype``, but FP32 for FP8 and MX, and INT32, the only one there is, for INT8.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments a, b, bias (n,) where there is one, y (out).

    Raises
    ------
    ProgramError
        SRAM does not hold the smallest blocks.
    InvalidType
        Types that do not go together: see ``dtype`` and ``result``; GELU or ReLU of integers.
    InvalidArgument
        A k that is no multiple of 32 with an MX type; GELU and ReLU at once.
    """
    if gelu and relu:
        raise InvalidArgument(f"kernel {name!r}: GELU and ReLU at once", hint="choose one")
    result = _result(dtype, result, k, transpose_a=transpose_a, transpose_b=transpose_b, activated=gelu or relu,
                     name=name)
    builder = KernelBuilder(name, capabilities)
    a = builder.argument("a", ArgKind.IN, dtype, (k, m) if transpose_a else (m, k))
    b = builder.argument("b", ArgKind.IN, dtype, (n, k) if transpose_b else (k, n))
    row = builder.argument("bias", ArgKind.IN, result, (n,)) if bias else None
    y = builder.argument("y", ArgKind.OUT, result, (m, n))
    row_parts, column_parts, blocking = _grid(capabilities, m, n, k, dtype, WIDTHS[result], name)
    number = 0
    for column_span in shares(n, column_parts, 16):
        for row_span in shares(m, row_parts):
            _write_share(builder.tile(number), row_span, column_span, blocking, a, b, row, y,
                         transpose_a=transpose_a, transpose_b=transpose_b, gelu=gelu, relu=relu)
            number += 1
    return builder.build()


def _result(dtype: Dtype, result: Dtype | None, k: int, *, transpose_a: bool, transpose_b: bool, activated: bool,
            name: str) -> Dtype:
    """The type of the result, once the types go together."""
    integers = dtype is Dtype.INT8
    narrow = dtype in MX_DTYPES or dtype in (Dtype.FP8_E4M3, Dtype.FP8_E5M2)
    if result is None:
        result = Dtype.INT32 if integers else Dtype.FP32 if narrow else dtype
    if dtype in (Dtype.INT32, Dtype.UINT8) or result in MX_DTYPES or result in (Dtype.INT8, Dtype.UINT8) or (
            integers != (result is Dtype.INT32)) or (integers and activated):
        raise InvalidType(f"kernel {name!r}: {dtype.name} into {result.name}{', activated' if activated else ''}",
                          cause="factors are floating types or INT8; INT8 goes into INT32, all else into FP32, FP16, "
                          "BF16 or FP8", hint="convert with maia_rt.kernels.convert")
    if dtype in MX_DTYPES and not transpose_b:
        raise InvalidType(f"kernel {name!r}: b in {dtype.name} stored as (k, n)", cause="MX blocks run along k",
                          hint="store b as (n, k) and pass transpose_b=True")
    if dtype in MX_DTYPES and transpose_a:
        raise InvalidType(f"kernel {name!r}: a in {dtype.name} stored as (k, m)", cause="MX blocks run along k",
                          hint="store a as (m, k)")
    if dtype in MX_DTYPES and k % MX_BLOCK:
        raise InvalidArgument(f"kernel {name!r}: k is {k}", cause=f"MX rows are blocks of {MX_BLOCK}")
    return result


def _grid(capabilities: Capabilities, m: int, n: int, k: int, dtype: Dtype, result_width: int,
          name: str) -> tuple[int, int, Blocking]:
    """In how many spans rows and columns are cut over the tiles, and the block sizes of a tile's share."""
    best: tuple[float, int, int, Blocking] | None = None
    room = capabilities.tile_sram_bytes
    grain = MX_BLOCK if dtype in MX_DTYPES else 1
    width = row_bytes(dtype, MX_BLOCK) / MX_BLOCK
    for column_parts in range(1, capabilities.tiles + 1):
        row_parts = min(capabilities.tiles // column_parts, -(-m // LEAST_ROWS))
        share_n = largest(shares(n, column_parts, 16))
        share_m = -(-m // row_parts)
        blocking = plan(share_m, share_n, k, width, room - share_n * result_width - SRAM_ALIGNMENT,
                        result_width=result_width, grain=grain)
        if blocking is None:
            continue
        # Tiles load beside each other, but from one memory.
        shared = blocking.bytes_moved * row_parts * column_parts / MEMORY_BYTES_PER_NS
        waiting = max(0.0, shared - blocking.bytes_moved / BYTES_PER_NS)
        cost = blocking.nanoseconds + waiting + share_m * share_n * k / MACS_PER_NS
        if best is None or cost < best[0]:
            best = cost, row_parts, column_parts, blocking
    if best is None:
        raise ProgramError(f"kernel {name!r}: no block of a {m} x {n} x {k} product fits into SRAM",
                           cause=f"a tile has {room} bytes")
    return best[1:]


def _write_share(tile: TileBuilder, row_span: Span, column_span: Span, blocking: Blocking, a: View, b: View,
                 bias: View | None, y: View, *, transpose_a: bool, transpose_b: bool, gelu: bool, relu: bool) -> None:
    """One tile's part: these rows by these columns."""
    row_blocks = blocks(*row_span, blocking.rows)
    column_blocks = blocks(*column_span, blocking.columns)
    grain = MX_BLOCK if a.dtype in MX_DTYPES else 1
    k = a.shape[0 if transpose_a else 1]
    depth_blocks = [(first * grain, last * grain)
                    for first, last in blocks(0, k // grain, blocking.depth // grain)]
    rows, columns, depth = (largest(spans) for spans in (row_blocks, column_blocks, depth_blocks))
    once = len(depth_blocks) == 1
    b_ring = tile.ring(1 if once and len(column_blocks) == 1 else 2,
                       (columns, depth) if transpose_b else (depth, columns), b.dtype)
    a_ring = tile.ring(2, (depth, rows) if transpose_a else (rows, depth), a.dtype)
    sums = tile.ring(2, (rows, columns), Dtype.INT32 if a.dtype is Dtype.INT8 else Dtype.FP32)
    results = sums if y.dtype in (Dtype.FP32, Dtype.INT32) else tile.ring(2, (rows, columns), y.dtype)
    first, last = column_span
    row = None
    if bias is not None:
        row = tile.allocate((last - first,), bias.dtype)
        tile.move(row, bias[first:last])
    held: dict[str, View] = {}

    def load(item: tuple[Span, Span, Span]) -> tuple[View, View]:
        (c0, c1), (r0, r1), (k0, k1) = item
        if not once or r0 == row_span[0]:
            if transpose_b:
                held["b"] = _load_rows(tile, b_ring.take(), b[c0:c1], (k0, k1))
            else:
                held["b"] = b_ring.take()[: k1 - k0, : c1 - c0]
                tile.move(held["b"], b[k0:k1, c0:c1])
        if not transpose_a:
            return _load_rows(tile, a_ring.take(), a[r0:r1], (k0, k1)), held["b"]
        block = a_ring.take()[: k1 - k0, : r1 - r0]
        tile.move(block, a[k0:k1, r0:r1])
        return block, held["b"]

    def run(item: tuple[Span, Span, Span], loaded: tuple[View, View]) -> None:
        (c0, c1), (r0, r1), (k0, k1) = item
        if k0 == 0:
            held["sum"] = sums.take()[: r1 - r0, : c1 - c0]
        total = held["sum"]
        tile.matmul(total, *loaded, accumulate=k0 > 0, transpose_a=transpose_a, transpose_b=transpose_b)
        if k1 < k:
            return
        result = total if results is sums else results.take()[: r1 - r0, : c1 - c0]
        if row is not None:
            tile.add(total if gelu or relu else result, total, row[c0 - first : c1 - first])
        if gelu:
            tile.gelu(result, total)
        elif relu:
            tile.relu(result, total)
        elif row is None and result is not total:
            tile.convert(result, total)
        tile.move(y[r0:r1, c0:c1], result)

    pipelined([(c, r, d) for c in column_blocks for r in row_blocks for d in depth_blocks], load, run)


def _load_rows(tile: TileBuilder, block: View, source: View, span: Span) -> View:
    """Bring these columns of ``source`` into the block; of MX rows, the elements and then the scales."""
    start, end = span
    rows = source.shape[0]
    if source.dtype not in MX_DTYPES:
        part = block[:rows, : end - start]
        tile.move(part, source[:, start:end])
        return part
    part = block.first(rows, end - start)
    if end - start == source.shape[1]:
        tile.move(part, source)
        return part
    # A row's elements without its scales, up to a column: how far elements of so many blocks reach.
    element_bytes, first, last = (row_bytes(source.dtype, c) - c // MX_BLOCK for c in (source.shape[1], start, end))
    tile.move(part.raw[:, : last - first], source.raw[:, first:last])
    tile.move(part.raw[:, last - first :],
              source.raw[:, element_bytes + start // MX_BLOCK : element_bytes + end // MX_BLOCK])
    return part
