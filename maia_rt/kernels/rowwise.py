"""Blocks of rows through every tile: what the kernels that treat each row by itself have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maia_rt.errors import ProgramError
from maia_rt.kernels.blocking import Region, pipelined, region_blocks, region_shares
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.tile import TileBuilder
from maia_rt.kernels.view import View

MOST_ROWS = 256
"""Rows in a block, where SRAM allows."""


@dataclass(frozen=True)
class Block:
    """What is in SRAM of one region: ``streams`` (planes, rows, columns) and ``masks`` (planes, columns)."""

    streams: tuple[View, ...]
    masks: tuple[View, ...]


def stream_rows(builder: KernelBuilder, y: View, streams: Sequence[View], compute: Callable[[TileBuilder, Block], View],
                *, masks: Sequence[View] = (), prepare: Callable[[TileBuilder], object] = lambda tile: None,
                reserve: int = 0) -> None:
    """Write a kernel that brings blocks of rows in, computes, and takes the result out, on every tile.

    Parameters
    ----------
    builder : KernelBuilder
    y : View
        The result (planes, rows, columns), an argument.
    streams : sequence of View
        Arguments (planes, rows, their own columns).
    compute : callable
        Writes the operations for a block; returns where the result is.
    masks : sequence of View
        Arguments (planes, their own columns): one row for each plane.
    prepare : callable
        Called once a tile, before its first block; may allocate ``reserve`` bytes.
    reserve : int
        Bytes of SRAM to leave for it.

    Raises
    ------
    ProgramError
        SRAM does not hold two rows of everything.
    """
    planes, rows, _ = y.shape
    capabilities = builder.capabilities
    row_bytes = sum(2 * s.shape[2] * s.width for s in streams)
    mask_bytes = sum(2 * m.shape[1] * m.width for m in masks)
    rings = 2 * (len(streams) + len(masks))
    room = capabilities.tile_sram_bytes - reserve - 64 * rings
    # A block of many planes holds a mask row for each of them, one of a single plane one mask row.
    most = min(MOST_ROWS, (room // (row_bytes + mask_bytes)) if rows == 1 else (room - mask_bytes) // row_bytes)
    if rows > 1 and most >= 2 * rows:
        most = min(MOST_ROWS, room // (row_bytes * rows + mask_bytes) * rows)
    if most < 1:
        raise ProgramError(f"kernel {builder.name!r}: a row needs {row_bytes + mask_bytes + reserve} bytes of SRAM",
                           cause=f"a tile has {capabilities.tile_sram_bytes}", hint="cut the rows")
    for number, region in enumerate(region_shares(planes, rows, capabilities.tiles)):
        tile = builder.tile(number)
        prepare(tile)
        _tile_rows(tile, y, streams, masks, region_blocks(region, most), compute)


def _tile_rows(tile: TileBuilder, y: View, streams: Sequence[View], masks: Sequence[View], regions: Sequence[Region],
               compute: Callable[[TileBuilder, Block], View]) -> None:
    most_planes = max(p[1] - p[0] for p, _ in regions)
    most_rows = max((p[1] - p[0]) * (r[1] - r[0]) for p, r in regions)
    stream_rings = [tile.ring(2, (most_rows, s.shape[2]), s.dtype) for s in streams]
    mask_rings = [tile.ring(2, (most_planes, m.shape[1]), m.dtype) for m in masks]

    def load(region: Region) -> Block:
        (first, last), (start, end) = region
        count = last - first
        streamed = tuple(ring.take()[: count * (end - start)].split(0, (count, end - start)) for ring in stream_rings)
        masked = tuple(ring.take()[:count] for ring in mask_rings)
        for block, source in zip(streamed, streams, strict=True):
            tile.move(block, source[first:last, start:end])
        for block, source in zip(masked, masks, strict=True):
            tile.move(block, source[first:last])
        return Block(streamed, masked)

    def run(region: Region, block: Block) -> None:
        (first, last), (start, end) = region
        tile.move(y[first:last, start:end], compute(tile, block))

    pipelined(regions, load, run)
