"""Matrix products of any size: cut over tiles, then into blocks that SRAM holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.errors import ProgramError
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
def plan(m: int, n: int, k: int, width: int, sram_bytes: int, extra_row_bytes: int = 0,
         whole_rows: bool = False) -> Blocking | None:
    """The cheapest block sizes for one tile.

    Parameters
    ----------
    m, n, k : int
        The tile's share.
    width : int
        Bytes an element of the factors; results gather in FP32.
    sram_bytes : int
        What blocks may fill.
    extra_row_bytes : int
        SRAM that each row of a block needs besides.
    whole_rows : bool
        Whether a block must hold all ``n`` columns.

    Returns
    -------
    Blocking or None
        None where not even the smallest blocks fit.
    """
    best: Blocking | None = None
    row_sizes = sorted({min(m, s) for s in (MOST_ROWS, 192, 128, 96, 64, 48, 32, 16, 8, 4, 2, 1)})
    for columns in [n] if whole_rows else halvings(n):
        for depth in halvings(k):
            once = depth == k
            second = columns * depth * width * (1 if once and columns == n else 2)
            steps_k = -(-k // depth)
            steps_n = -(-n // columns)
            for rows in reversed(row_sizes):
                pad = SRAM_ALIGNMENT * 12
                results = 2 * rows * columns * (4 if width == 4 else 4 + width)
                if second + 2 * rows * depth * width + results + 2 * rows * extra_row_bytes + pad > sram_bytes:
                    continue
                steps_m = -(-m // rows)
                bytes_moved = width * (k * n * (1 if once else steps_m) + m * k * steps_n + m * n)
                packed = k * n * steps_m + m * k * steps_n + m * n * (steps_k - 1)
                ops = steps_n * steps_m * (steps_k * 3 + 3)
                cost = bytes_moved / BYTES_PER_NS + packed / PACK_PER_NS + ops * OPERATION_NS
                if best is None or cost < best.nanoseconds:
                    best = Blocking(rows, columns, depth, bytes_moved, cost)
                break
    return best


def matmul(capabilities: Capabilities, m: int, n: int, k: int, *, bias: bool = False, gelu: bool = False,
           transpose_b: bool = False, dtype: Dtype = Dtype.FP32, name: str = "matmul") -> KernelImage:
    """``y = a @ b``, with bias and GELU where asked for.

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
    transpose_b : bool
        b is stored as (n, k), as linear layers store their weights.
    dtype : Dtype
        Of every argument; accumulated in FP32, rounded once.
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
    """
    builder = KernelBuilder(name, capabilities)
    a = builder.argument("a", ArgKind.IN, dtype, (m, k))
    b = builder.argument("b", ArgKind.IN, dtype, (n, k) if transpose_b else (k, n))
    row = builder.argument("bias", ArgKind.IN, dtype, (n,)) if bias else None
    y = builder.argument("y", ArgKind.OUT, dtype, (m, n))
    width = WIDTHS[dtype]
    row_parts, column_parts, blocking = _grid(capabilities, m, n, k, width, name)
    number = 0
    for column_span in shares(n, column_parts, 16):
        for row_span in shares(m, row_parts):
            _write_share(builder.tile(number), row_span, column_span, blocking, a, b, row, y,
                         transpose_b=transpose_b, gelu=gelu)
            number += 1
    return builder.build()


def _grid(capabilities: Capabilities, m: int, n: int, k: int, width: int, name: str) -> tuple[int, int, Blocking]:
    """In how many spans rows and columns are cut over the tiles, and the block sizes of a tile's share."""
    best: tuple[float, int, int, Blocking] | None = None
    room = capabilities.tile_sram_bytes
    for column_parts in range(1, capabilities.tiles + 1):
        row_parts = min(capabilities.tiles // column_parts, -(-m // LEAST_ROWS))
        share_n = largest(shares(n, column_parts, 16))
        share_m = -(-m // row_parts)
        blocking = plan(share_m, share_n, k, width, room - share_n * width - SRAM_ALIGNMENT)
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
                 bias: View | None, y: View, *, transpose_b: bool, gelu: bool) -> None:
    """One tile's part: these rows by these columns."""
    row_blocks = blocks(*row_span, blocking.rows)
    column_blocks = blocks(*column_span, blocking.columns)
    depth_blocks = blocks(0, a.shape[1], blocking.depth)
    rows, columns, depth = (largest(spans) for spans in (row_blocks, column_blocks, depth_blocks))
    once = len(depth_blocks) == 1
    b_ring = tile.ring(1 if once and len(column_blocks) == 1 else 2,
                       (columns, depth) if transpose_b else (depth, columns), b.dtype)
    a_ring = tile.ring(2, (rows, depth), a.dtype)
    sums = tile.ring(2, (rows, columns), Dtype.FP32)
    results = sums if y.dtype is Dtype.FP32 else tile.ring(2, (rows, columns), y.dtype)
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
                held["b"] = b_ring.take()[: c1 - c0, : k1 - k0]
                tile.move(held["b"], b[c0:c1, k0:k1])
            else:
                held["b"] = b_ring.take()[: k1 - k0, : c1 - c0]
                tile.move(held["b"], b[k0:k1, c0:c1])
        block = a_ring.take()[: r1 - r0, : k1 - k0]
        tile.move(block, a[r0:r1, k0:k1])
        return block, held["b"]

    def run(item: tuple[Span, Span, Span], loaded: tuple[View, View]) -> None:
        (c0, c1), (r0, r1), (k0, k1) = item
        if k0 == 0:
            held["sum"] = sums.take()[: r1 - r0, : c1 - c0]
        total = held["sum"]
        tile.matmul(total, *loaded, accumulate=k0 > 0, transpose_b=transpose_b)
        if k1 < a.shape[1]:
            return
        result = total if results is sums else results.take()[: r1 - r0, : c1 - c0]
        if row is not None:
            tile.add(total if gelu else result, total, row[c0 - first : c1 - first])
        if gelu:
            tile.gelu(result, total)
        elif row is None and result is not total:
            tile.convert(result, total)
        tile.move(y[r0:r1, c0:c1], result)

    pipelined([(c, r, d) for c in column_blocks for r in row_blocks for d in depth_blocks], load, run)
