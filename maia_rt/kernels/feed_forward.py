"""Two linear layers with GELU between them; the hidden units are cut over tiles and never leave SRAM."""

from __future__ import annotations

from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.errors import ProgramError
from maia_rt.kernels.blocking import (
    BYTES_PER_NS,
    OPERATION_NS,
    PACK_PER_NS,
    Span,
    blocks,
    halvings,
    largest,
    pipelined,
    row_shares,
    shares,
)
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.tile import SRAM_ALIGNMENT, TileBuilder
from maia_rt.kernels.view import WIDTHS, View

MOST_ROWS = 256
"""Rows in a block; see `maia_rt.kernels.matmul`."""


MOST_PARTS = 4
"""Partial sums; each costs a pass over the result. More tiles than these share the rows."""


def parts_of(capabilities: Capabilities, hidden: int) -> int:
    """How many partial sums `feed_forward` leaves for a hidden layer of this size."""
    return len(_unit_shares(capabilities, hidden))


def _unit_shares(capabilities: Capabilities, hidden: int) -> list[Span]:
    return shares(hidden, min(capabilities.tiles, MOST_PARTS), 16)


def feed_forward(capabilities: Capabilities, m: int, n: int, hidden: int, *, dtype: Dtype = Dtype.FP32,
                 name: str = "feed_forward") -> KernelImage:
    """``gelu(x @ w1 + b1) @ w2``, in a few partial sums; `add_norm` adds them up.

    Each tile keeps its hidden units' part of both weights in SRAM where they fit, so weights are read once and the
    hidden layer is never written to memory; the price is that the sums come out in parts.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    m, n, hidden : int
        x is (m, n), w1 is (n, hidden), w2 is (hidden, n).
    dtype : Dtype
        Of every argument but y, and of the hidden layer; sums are FP32.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments x, w1, b1 (hidden,), w2, y (parts, m, n) in FP32 (out); see `parts_of`.

    Raises
    ------
    ProgramError
        SRAM does not hold the smallest blocks.
    """
    builder = KernelBuilder(name, capabilities)
    spans = _unit_shares(capabilities, hidden)
    x = builder.argument("x", ArgKind.IN, dtype, (m, n))
    w1 = builder.argument("w1", ArgKind.IN, dtype, (n, hidden))
    b1 = builder.argument("b1", ArgKind.IN, dtype, (hidden,))
    w2 = builder.argument("w2", ArgKind.IN, dtype, (hidden, n))
    y = builder.argument("y", ArgKind.OUT, Dtype.FP32, (len(spans), m, n))
    row_spans = row_shares(m, capabilities.tiles // len(spans))
    rows, units = _sizes(largest(row_spans), n, largest(spans), WIDTHS[dtype], capabilities.tile_sram_bytes, name)
    tiles = iter(range(capabilities.tiles))
    for part, span in enumerate(spans):
        for row_span in row_spans:
            _write_share(builder.tile(next(tiles)), blocks(*row_span, rows), blocks(*span, units), x, (w1, b1, w2),
                         y[part])
    return builder.build()


def _sizes(m: int, n: int, hidden: int, width: int, sram_bytes: int, name: str) -> tuple[int, int]:
    """Rows and hidden units in a block: the cheapest that fit."""
    best: tuple[float, int, int] | None = None
    for units in halvings(hidden):
        copies = 1 if units == hidden else 2
        for rows in sorted({min(m, s) for s in (MOST_ROWS, 192, 128, 96, 64, 48, 32, 16, 8, 4, 2, 1)}):
            sums = 0 if copies == 1 and width == 4 else 4
            need = (copies * units * (2 * n + 1) * width + 2 * rows * n * (width + sums)
                    + rows * units * (4 if width == 4 else 4 + width) + 16 * SRAM_ALIGNMENT)
            if need > sram_bytes:
                break
            steps_m, steps_h = -(-m // rows), -(-hidden // units)
            loads = 1 if units == hidden else steps_m
            packed = 2 * n * hidden * steps_m + 2 * m * n * steps_h
            cost = (2 * n * hidden * width * loads / BYTES_PER_NS + packed / PACK_PER_NS
                    + steps_m * (2 + steps_h * 5) * OPERATION_NS)
            if best is None or cost < best[0]:
                best = cost, rows, units
    if best is None:
        raise ProgramError(f"kernel {name!r}: no block of {n} columns fits into SRAM",
                           cause=f"a tile has {sram_bytes} bytes")
    return best[1], best[2]


def _write_share(tile: TileBuilder, row_blocks: list[Span], unit_blocks: list[Span], x: View,
                 weights: tuple[View, View, View], y: View) -> None:
    """One tile's hidden units, for all rows."""
    w1, b1, w2 = weights
    n = x.shape[1]
    rows, units = largest(row_blocks), largest(unit_blocks)
    once = len(unit_blocks) == 1
    copies = 1 if once else 2
    rings = [tile.ring(copies, shape, w1.dtype) for shape in ((n, units), (units,), (units, n))]
    x_ring = tile.ring(2, (rows, n), x.dtype)
    # With all hidden units at once, x is done with before the sum is begun, and makes room for it.
    in_place = once and x.dtype is Dtype.FP32
    sums = None if in_place else tile.ring(2, (rows, n), Dtype.FP32)
    hidden = tile.allocate((rows, units), Dtype.FP32)
    rounded = hidden if x.dtype is Dtype.FP32 else tile.allocate((rows, units), x.dtype)
    held: dict[str, View] = {}
    constant: list[View] = []

    def load(item: tuple[Span, Span]) -> tuple[View, list[View]]:
        (r0, r1), (h0, h1) = item
        loaded = constant
        if not once or not constant:
            loaded = [rings[0].take()[:, : h1 - h0], rings[1].take()[: h1 - h0], rings[2].take()[: h1 - h0]]
            for block, source in zip(loaded, (w1[:, h0:h1], b1[h0:h1], w2[h0:h1]), strict=True):
                tile.move(block, source)
            if once:
                constant.extend(loaded)
        if h0 == unit_blocks[0][0]:
            held["x"] = x_ring.take()[: r1 - r0]
            tile.move(held["x"], x[r0:r1])
        return held["x"], loaded

    def run(item: tuple[Span, Span], loaded: tuple[View, list[View]]) -> None:
        (r0, r1), (h0, h1) = item
        block, (first, bias, second) = loaded
        start = h0 == unit_blocks[0][0]
        if start:
            held["sum"] = block if sums is None else sums.take()[: r1 - r0]
        inner, activated = hidden[: r1 - r0, : h1 - h0], rounded[: r1 - r0, : h1 - h0]
        tile.matmul(inner, block, first)
        tile.add(inner, inner, bias)
        tile.gelu(activated, inner)
        tile.matmul(held["sum"], activated, second, accumulate=not start)
        if h1 == unit_blocks[-1][1]:
            tile.move(y[r0:r1], held["sum"])

    pipelined([(r, h) for r in row_blocks for h in unit_blocks], load, run)
