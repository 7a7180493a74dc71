"""How work is cut: shares for tiles, blocks for SRAM, and the order that keeps every engine busy.

All choices follow from Capabilities; nothing here knows a particular device. The rates only weigh one way of cutting
against another, so they need to be right to a factor of two, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Span = tuple[int, int]

BYTES_PER_NS = 8.0
"""Of a tile's DMA."""
MEMORY_BYTES_PER_NS = 32.0
"""Of the memory that all tiles share."""
MACS_PER_NS = 70.0
"""Of a tile's tensor unit in FP32."""
PACK_PER_NS = 2.5
"""Elements of its operands that a tensor unit lays out, or adds to, anew in each MATMUL."""
OPERATION_NS = 3000.0
"""What any operation costs beside its work, its share of building and loading the kernel included."""


def shares(total: int, parts: int, multiple: int = 1) -> list[Span]:
    """Cut 0 .. total into at most ``parts`` spans of nearly one size, none empty.

    Parameters
    ----------
    total, parts : int
    multiple : int
        Every span but the last starts and ends at a multiple of this.

    Returns
    -------
    list of (int, int)
        Start and end of each span.

    Examples
    --------
    >>> shares(10, 4)
    [(0, 3), (3, 6), (6, 8), (8, 10)]
    >>> shares(2, 4)
    [(0, 1), (1, 2)]
    """
    units = -(-total // multiple)
    parts = min(parts, units)
    spans = []
    start = 0
    for part in range(parts):
        size = units // parts + (1 if part < units % parts else 0)
        end = min(total, (start + size * multiple))
        spans.append((start, end))
        start = end
    return spans


LEAST_ROWS = 32
"""Rows that are worth a tile of their own where each tile has to bring in the same weights."""


def row_shares(rows: int, tiles: int) -> list[Span]:
    """Cut rows over as many of the tiles as pay."""
    return shares(rows, min(tiles, -(-rows // LEAST_ROWS)))


def blocks(start: int, end: int, size: int) -> list[Span]:
    """Cut a span into the fewest blocks of at most ``size``, all of nearly one size.

    Examples
    --------
    >>> blocks(100, 110, 4)
    [(100, 104), (104, 107), (107, 110)]
    """
    return [(start + a, start + b) for a, b in shares(end - start, -(-(end - start) // size))]


def largest(span: Iterable[Span]) -> int:
    """The longest of some spans."""
    return max(end - start for start, end in span)


def halvings(total: int, smallest: int = 1) -> list[int]:
    """``total``, and what remains of it halved (rounded up) again and again, down to ``smallest``."""
    sizes = [total]
    while sizes[-1] > smallest:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def pipelined(items: Iterable[Item], load: Callable[[Item], Loaded], run: Callable[[Item, Loaded], None]) -> None:
    """Write ``load`` of each item before ``run`` of the one before it, so that DMA stays ahead of other engines."""
    ahead: tuple[Item, Loaded] | None = None
    for item in items:
        loaded = load(item)
        if ahead is not None:
            run(*ahead)
        ahead = (item, loaded)
    if ahead is not None:
        run(*ahead)


Region = tuple[Span, Span]
"""A span of planes and a span of rows."""


def region_shares(planes: int, rows: int, parts: int) -> list[Region]:
    """Cut planes x rows into at most ``parts`` regions: by planes where there are enough, else by rows as well."""
    plane_spans = shares(planes, parts)
    row_spans = shares(rows, max(1, parts // len(plane_spans)))
    return [(p, r) for p in plane_spans for r in row_spans]


def region_blocks(region: Region, most_rows: int) -> list[Region]:
    """Cut a region into blocks of at most ``most_rows`` rows in all: several whole planes, or part of one."""
    (first, last), (start, end) = region
    rows = end - start
    if rows <= most_rows:
        return [(p, (start, end)) for p in blocks(first, last, most_rows // rows)]
    return [((p, p + 1), r) for p in range(first, last) for r in blocks(start, end, most_rows)]
