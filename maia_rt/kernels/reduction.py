"""Combining several arrays element by element, in a fixed order: what collectives reduce with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from maia_rt.contract.dtype import FLOATS
from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.errors import InvalidArgument, InvalidType
from maia_rt.kernels.blocking import Span, blocks, pipelined, shares
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.operation import Operation
from maia_rt.kernels.tile import TileBuilder
from maia_rt.kernels.view import WIDTHS, View

MOST_ELEMENTS: Final = 1 << 14
"""Elements in a block: enough to make an operation's fixed cost vanish, few enough to stay near a core."""
_FEWEST: Final = 1 << 12
"""Elements that are worth a tile of their own."""

Combine = Callable[[TileBuilder, View, View, View], Operation]
OPERATIONS: Final[dict[str, Combine]] = {
    "sum": lambda tile, dst, a, b: tile.add(dst, a, b),
    "prod": lambda tile, dst, a, b: tile.multiply(dst, a, b),
}
"""What :func:`reduction` combines with, by name."""


def reduction(capabilities: Capabilities, elements: int, *, sources: int = 2, targets: int = 1, operation: str = "sum",
              dtype: Dtype = Dtype.FP32, tiles: int | None = None, name: str = "reduction") -> KernelImage:
    """``y0 = y1 = ... = ((x0 + x1) + x2) + ...``: the order is that of the arguments.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    elements : int
        Length of every argument.
    sources, targets : int
        How many arrays are combined, 2 or more, and how many get the result, 1 or more.
    operation : str
        ``'sum'`` or ``'prod'``.
    dtype : Dtype
        Of all arguments: a float or INT32. Floats are combined in FP32 and rounded once, at the end; INT32 is exact,
        modulo 2^32.
    tiles : int, optional
        How many tiles it may take; by default all that pay.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments x0, x1 ... (in), y0 ... (out), each (elements,), of any alignment that is the element's. A target may
        be a source: each element is read before it is written.

    Raises
    ------
    InvalidArgument
        More arguments than the device takes, or another operation.
    InvalidType
        A dtype that is not combined.

    Examples
    --------
    >>> from maia_rt.contract.program import Capabilities
    >>> device = Capabilities(tiles=4, tile_sram_bytes=1 << 21, tile_semaphores=16, max_args=16, max_kernels=64)
    >>> [arg.name for arg in reduction(device, 1000, sources=3).args]
    ['x0', 'x1', 'x2', 'y0']
    """
    if operation not in OPERATIONS:
        raise InvalidArgument(f"a reduction is one of {', '.join(map(repr, OPERATIONS))}, not {operation!r:.40}")
    if dtype not in REDUCIBLE:
        raise InvalidType(f"arrays of {dtype.name} are not combined",
                          hint=f"convert them to one of {', '.join(sorted(d.name for d in REDUCIBLE))}")
    if sources < 2 or targets < 1:
        raise InvalidArgument(f"kernel {name!r}: {sources} sources and {targets} targets")
    builder = KernelBuilder(name, capabilities)
    width = WIDTHS[dtype]
    xs = [builder.argument(f"x{i}", ArgKind.IN, dtype, (elements,), alignment=width) for i in range(sources)]
    ys = [builder.argument(f"y{i}", ArgKind.OUT, dtype, (elements,), alignment=width) for i in range(targets)]
    # Two blocks for each of two operands under way, and two in FP32 where sums are wider than their terms.
    wide = dtype is not Dtype.FP32 and dtype is not Dtype.INT32 and sources > 2
    fit = capabilities.tile_sram_bytes // (2 * 2 * width + (2 * 4 if wide else 0)) // 64 * 64 - 64
    most = min(MOST_ELEMENTS, fit)
    parts = min(capabilities.tiles if tiles is None else tiles, -(-elements // _FEWEST))
    for number, (start, end) in enumerate(shares(elements, parts, 64)):
        _combine(builder.tile(number), xs, ys, blocks(start, end, most), OPERATIONS[operation], wide)
    return builder.build()


REDUCIBLE: Final = frozenset(d for d in FLOATS if WIDTHS[d]) | {Dtype.INT32}
"""The types that :func:`reduction` combines."""


def _combine(tile: TileBuilder, xs: list[View], ys: list[View], spans: list[Span], combine: Combine,
             wide: bool) -> None:
    """One tile's share: for each block the first source, then every other one as it comes, then out."""
    most = max(end - start for start, end in spans)
    dtype = xs[0].dtype
    firsts, others = tile.ring(2, (most,), dtype), tile.ring(2, (most,), dtype)
    sums = tile.ring(2, (most,), Dtype.FP32) if wide else None
    steps = [(span, number) for span in spans for number in range(1, len(xs))]
    state: dict[Span, View] = {}

    def load(step: tuple[Span, int]) -> tuple[View | None, View]:
        (start, end), number = step
        first = None
        if number == 1:
            first = firsts.take()[: end - start]
            tile.move(first, xs[0][start:end])
        other = others.take()[: end - start]
        tile.move(other, xs[number][start:end])
        return first, other

    def run(step: tuple[Span, int], loaded: tuple[View | None, View]) -> None:
        span, number = step
        (start, end), (first, other) = span, loaded
        last = number == len(xs) - 1
        if first is not None:
            state[span] = first
        held = state[span]
        if last:
            out = other if sums is not None else held
            # The destination may be the first source only; the order of two is the same.
            combine(tile, out, *((other, held) if out is other else (held, other)))
            for y in ys:
                tile.move(y[start:end], out)
            del state[span]
            return
        if sums is not None and number == 1:
            state[span] = sums.take()[: end - start]
        combine(tile, state[span], held, other)

    pipelined(steps, load, run)
