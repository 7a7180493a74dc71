"""The loss of a classifier, and its gradient: softmax and cross-entropy in one pass over the logits."""

from __future__ import annotations

from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.errors import ProgramError
from maia_rt.kernels.blocking import Span, blocks, pipelined, row_shares
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.elementary import logarithm
from maia_rt.kernels.tile import SRAM_ALIGNMENT, TileBuilder
from maia_rt.kernels.view import WIDTHS, View

MOST_ROWS = 256
"""Rows in a block, where SRAM allows."""
_ONE = 0x3F800000
"""The bits of 1 in FP32."""


def cross_entropy(capabilities: Capabilities, rows: int, columns: int, *, scale: float = 1.0,
                  dtype: Dtype = Dtype.FP32, name: str = "cross_entropy") -> KernelImage:
    """``loss[r] = log(sum over c of e^x[r, c]) - x[r, label[r]]``; ``dx = scale * (softmax(x) - one hot of label)``.

    A row whose label is none of 0 .. columns - 1, -1 for instance, counts nothing: its loss is 0, and its gradient.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    rows, columns : int
        Of x: samples and classes; fewer than 2^24 classes.
    scale : float
        Of the gradient: 1 over the number of samples, where the loss is their mean.
    dtype : Dtype
        Of x and dx; computed in FP32.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments x (rows, columns), finite, label (rows,) INT32, loss (rows,) FP32 (out), dx as x (out).

    Raises
    ------
    ProgramError
        SRAM does not hold two rows.

    Notes
    -----
    With p the softmax of a row, e^(x - sum of p x) needs no search for the largest x to stay within range: it adds up
    to e^H, where H, the entropy of p, lies between 0 and the logarithm of the number of classes. What remains of the
    loss, sum of p x - x[label], is the gradient times x.
    """
    builder = KernelBuilder(name, capabilities)
    x = builder.argument("x", ArgKind.IN, dtype, (rows, columns))
    label = builder.argument("label", ArgKind.IN, Dtype.INT32, (rows,))
    loss = builder.argument("loss", ArgKind.OUT, Dtype.FP32, (rows,))
    dx = builder.argument("dx", ArgKind.OUT, dtype, (rows, columns))
    fixed = 2 * columns * 4 + 16 * SRAM_ALIGNMENT
    row_bytes = columns * (4 * WIDTHS[dtype] + 3 * 4) + 8 * 4
    most = min(MOST_ROWS, (capabilities.tile_sram_bytes - fixed) // row_bytes)
    if most < 1:
        raise ProgramError(f"kernel {name!r}: a row of {columns} columns needs {row_bytes + fixed} bytes of SRAM",
                           cause=f"a tile has {capabilities.tile_sram_bytes}")
    for number, (start, end) in enumerate(row_shares(rows, capabilities.tiles)):
        _write_share(builder.tile(number), blocks(start, end, most), x, label, loss, dx, scale)
    return builder.build()


def _write_share(tile: TileBuilder, spans: list[Span], x: View, label: View, loss: View, dx: View,
                 scale: float) -> None:
    """One tile's rows, block by block."""
    most = max(end - start for start, end in spans)
    columns = x.shape[1]
    ones = tile.allocate((columns,), Dtype.FP32)
    tile.fill(ones, _ONE)
    across, along = ones.split(0, (1, columns)), ones.split(0, (columns, 1))
    numbers = _count(tile, columns)
    values_ring, label_ring = tile.ring(2, (most, columns), x.dtype), tile.ring(2, (most, 1), Dtype.INT32)
    result_ring, loss_ring = tile.ring(2, (most, columns), x.dtype), tile.ring(2, (most, 1), Dtype.FP32)
    hot_all, slope_all, work_all = (tile.allocate((most, columns), Dtype.FP32) for _ in range(3))
    counts_all, each_all, spare_all = (tile.allocate((most, 1), Dtype.FP32) for _ in range(3))

    def load(span: Span) -> tuple[View, View]:
        start, end = span
        values, labels = values_ring.take()[: end - start], label_ring.take()[: end - start]
        tile.move(labels[:, 0], label[start:end])
        tile.move(values, x[start:end])
        return values, labels

    def run(span: Span, loaded: tuple[View, View]) -> None:
        start, end = span
        values, labels = loaded
        rows = end - start
        hot, slope, work = hot_all[:rows], slope_all[:rows], work_all[:rows]
        counts, each, spare = counts_all[:rows], each_all[:rows], spare_all[:rows]
        losses, result = loss_ring.take()[:rows], result_ring.take()[:rows]
        tile.convert(each, labels)
        tile.matmul(hot, each, across)
        tile.subtract(hot, hot, numbers)
        tile.multiply(hot, hot, hot)
        tile.scale(hot, hot, -1.0, 1.0)
        tile.relu(hot, hot)  # 1 where the column is the label's, and 0 elsewhere, for distances are whole numbers
        tile.matmul(counts, hot, along)  # 1, or 0 where the label is no column's
        tile.softmax(slope, values)
        tile.multiply(work, slope, values)
        tile.subtract(slope, slope, hot)
        tile.matmul(each, work, along)
        tile.matmul(hot, each, across)  # sum of p x, in every column
        tile.subtract(work, values, hot)
        tile.exp(work, work)
        tile.matmul(each, work, along)
        logarithm(tile, losses, each, spare)
        tile.multiply(work, slope, values)
        tile.matmul(each, work, along)
        tile.add(losses, losses, each)
        tile.multiply(losses, losses, counts)
        tile.move(loss[start:end], losses[:, 0])
        tile.matmul(hot, counts, across, alpha=scale)
        tile.multiply(result, slope, hot)
        tile.move(dx[start:end], result)

    pipelined(spans, load, run)


def _count(tile: TileBuilder, columns: int) -> View:
    """A row of 0, 1, 2, ... in SRAM: what is there already, moved on, doubles it."""
    row = tile.allocate((columns,), Dtype.FP32)
    tile.fill(row[:1], 0)
    known = 1
    while known < columns:
        more = min(known, columns - known)
        tile.scale(row[known : known + more], row[:more], 1.0, float(known))
        known += more
    return row
