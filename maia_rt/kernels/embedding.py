"""Embedding lookup: word, position and token type gathered and added, with the layer norm that follows."""

from __future__ import annotations

from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.errors import ProgramError
from maia_rt.kernels.blocking import Span, blocks, largest, pipelined, shares
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.normalization import Constants
from maia_rt.kernels.tile import SRAM_ALIGNMENT, TileBuilder
from maia_rt.kernels.view import WIDTHS, View

MOST_ROWS = 256
"""Rows in a block, where SRAM allows."""


def embedding(capabilities: Capabilities, tokens: int, columns: int, *, words: int, positions: int, types: int,
              epsilon: float | None = None, dtype: Dtype = Dtype.FP32, name: str = "embedding") -> KernelImage:
    """``word[ids[0]] + position[ids[1]] + type[ids[2]]``, then a layer norm unless ``epsilon`` is None.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    tokens, columns : int
        Of y.
    words, positions, types : int
        Entries of the three tables. An index past them is a PROGRAM fault of the launch.
    epsilon : float or None
        Of the layer norm; None leaves it out, and its arguments.
    dtype : Dtype
        Of tables and y; summed in FP32.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments ids (3, tokens) INT32, word (words, columns), position (positions, columns), type (types, columns),
        gamma, beta (columns,) where there is a layer norm, y (tokens, columns) (out).
    """
    builder = KernelBuilder(name, capabilities)
    ids = builder.argument("ids", ArgKind.IN, Dtype.INT32, (3, tokens))
    tables = [builder.argument(n, ArgKind.IN, dtype, (entries, columns))
              for n, entries in (("word", words), ("position", positions), ("type", types))]
    rows = [builder.argument(n, ArgKind.IN, dtype, (columns,)) for n in ("gamma", "beta") if epsilon is not None]
    constants = Constants(*rows)
    y = builder.argument("y", ArgKind.OUT, dtype, (tokens, columns))
    row_bytes = 2 * (3 * columns * WIDTHS[dtype] + 3 * 4) + columns * 4
    most = min(MOST_ROWS, (capabilities.tile_sram_bytes - constants.nbytes - 9 * SRAM_ALIGNMENT) // row_bytes)
    if most < 1:
        raise ProgramError(f"kernel {name!r}: a row of {columns} columns does not fit into SRAM",
                           cause=f"a tile has {capabilities.tile_sram_bytes} bytes")
    for number, (start, end) in enumerate(shares(tokens, capabilities.tiles)):
        tile = builder.tile(number)
        constants.load(tile)
        _write_share(tile, blocks(start, end, most), ids, tables, constants, y, epsilon)
    return builder.build()


def _write_share(tile: TileBuilder, spans: list[Span], ids: View, tables: list[View], constants: Constants, y: View,
                 epsilon: float | None) -> None:
    most = largest(spans)
    columns = y.shape[1]
    index_rings = [tile.ring(2, (most,), Dtype.INT32) for _ in tables]
    rings = [tile.ring(2, (most, columns), y.dtype) for _ in tables]
    total = None if y.dtype is Dtype.FP32 else tile.allocate((most, columns), Dtype.FP32)

    def load(span: Span) -> list[View]:
        start, end = span
        gathered = []
        for i, table in enumerate(tables):
            indices = index_rings[i].take()[: end - start]
            rows = rings[i].take()[: end - start]
            tile.move(indices, ids[i, start:end])
            tile.gather(rows, table, indices)
            gathered.append(rows)
        return gathered

    def run(span: Span, gathered: list[View]) -> None:
        start, end = span
        word, position, kind = gathered
        held = word if total is None else total[: end - start]
        tile.add(held, word, position)
        if epsilon is None:
            tile.add(word, held, kind)
        else:
            gamma, beta = constants.of(tile)
            tile.add(held, held, kind)
            tile.layernorm(word, held, gamma, beta, epsilon)
        tile.move(y[start:end], word)

    pipelined(spans, load, run)
