"""Sums of columns: the gradient of a bias, which was added to every row."""

from __future__ import annotations

from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.errors import ProgramError
from maia_rt.kernels.blocking import Span, blocks, halvings, largest, pipelined, shares
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.tile import SRAM_ALIGNMENT, TileBuilder
from maia_rt.kernels.view import WIDTHS, View

MOST_ROWS = 1024
"""Rows in a block, where SRAM allows."""
_ONE = 0x3F800000
"""The bits of 1 in FP32."""


def column_sum(capabilities: Capabilities, rows: int, columns: int, *, dtype: Dtype = Dtype.FP32,
               result: Dtype = Dtype.FP32, name: str = "column_sum") -> KernelImage:
    """``y[c] = sum over r of x[r, c]``, in an order that depends on the shape and the device alone.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    rows, columns : int
        Of x.
    dtype : Dtype
        Of x: a floating type, not MX.
    result : Dtype
        Of y; summed in FP32, rounded once.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments x (rows, columns), y (columns,) (out).

    Raises
    ------
    ProgramError
        SRAM does not hold a row of a tile's share of the columns.
    """
    builder = KernelBuilder(name, capabilities)
    x = builder.argument("x", ArgKind.IN, dtype, (rows, columns))
    y = builder.argument("y", ArgKind.OUT, result, (columns,))
    spans = shares(columns, capabilities.tiles, 16)
    share = largest(spans)
    fixed = share * (4 + WIDTHS[result]) + 6 * SRAM_ALIGNMENT
    fitting = [r for r in halvings(min(rows, MOST_ROWS))
               if fixed + r * (4 + 2 * share * WIDTHS[dtype]) <= capabilities.tile_sram_bytes]
    if not fitting:
        raise ProgramError(f"kernel {name!r}: a row of {share} columns does not fit into SRAM",
                           cause=f"a tile has {capabilities.tile_sram_bytes} bytes")
    for number, span in enumerate(spans):
        _write_share(builder.tile(number), span, blocks(0, rows, fitting[0]), x, y)
    return builder.build()


def _write_share(tile: TileBuilder, span: Span, row_blocks: list[Span], x: View, y: View) -> None:
    """One tile's columns: a row of ones times each block of rows, added up."""
    first, last = span
    most = largest(row_blocks)
    ones = tile.allocate((1, most), Dtype.FP32)
    tile.fill(ones, _ONE)
    ring = tile.ring(2, (most, last - first), x.dtype)
    total = tile.allocate((1, last - first), Dtype.FP32)

    def load(rows: Span) -> View:
        block = ring.take()[: rows[1] - rows[0]]
        tile.move(block, x[rows[0] : rows[1], first:last])
        return block

    def run(rows: Span, block: View) -> None:
        tile.matmul(total, ones[:, : rows[1] - rows[0]], block, accumulate=rows[0] > 0)

    pipelined(row_blocks, load, run)
    result = total
    if y.dtype is not Dtype.FP32:
        result = tile.allocate((1, last - first), y.dtype)
        tile.convert(result, total)
    tile.move(y[first:last], result[0])
