"""Kernels that treat every element by itself: GELU, add."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.kernels.blocking import Span, blocks, pipelined, shares
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.tile import TileBuilder
from maia_rt.kernels.view import WIDTHS, View

MOST_ELEMENTS = 1 << 16
"""Elements in a block: enough to make an operation's fixed cost vanish, few enough to overlap with DMA."""
Compute = Callable[[TileBuilder, View, Sequence[View]], object]


def gelu(capabilities: Capabilities, elements: int, *, dtype: Dtype = Dtype.FP32, name: str = "gelu") -> KernelImage:
    """``y = x / 2 * (1 + erf(x / sqrt 2))``.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    elements : int
        Length of both arguments.
    dtype : Dtype
        Of both; computed in FP32.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments x (in), y (out), each (elements,).
    """
    return _flat(capabilities, name, elements, dtype, ("x",), lambda tile, y, sources: tile.gelu(y, sources[0]))


def add(capabilities: Capabilities, elements: int, *, dtype: Dtype = Dtype.FP32, name: str = "add") -> KernelImage:
    """``y = a + b``.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    elements : int
        Length of each argument.
    dtype : Dtype
        Of all; the sum is formed in FP32.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments a, b (in), y (out), each (elements,).
    """
    return _flat(capabilities, name, elements, dtype, ("a", "b"),
                 lambda tile, y, sources: tile.add(y, sources[0], sources[1]))


def _flat(capabilities: Capabilities, name: str, elements: int, dtype: Dtype, names: Sequence[str],
          compute: Compute) -> KernelImage:
    builder = KernelBuilder(name, capabilities)
    sources = [builder.argument(n, ArgKind.IN, dtype, (elements,)) for n in names]
    y = builder.argument("y", ArgKind.OUT, dtype, (elements,))
    fit = capabilities.tile_sram_bytes // (2 * len(names) * WIDTHS[dtype]) // 64 * 64
    for number, (start, end) in enumerate(shares(elements, capabilities.tiles, 64)):
        _stream(builder.tile(number), sources, y, blocks(start, end, min(MOST_ELEMENTS, fit)), compute)
    return builder.build()


def _stream(tile: TileBuilder, sources: Sequence[View], y: View, spans: Sequence[Span], compute: Compute) -> None:
    """One tile's share: each block in, computed in place, out."""
    most = max(end - start for start, end in spans)
    rings = [tile.ring(2, (most,), y.dtype) for _ in sources]

    def load(span: Span) -> list[View]:
        start, end = span
        loaded = [ring.take()[: end - start] for ring in rings]
        for block, source in zip(loaded, sources, strict=True):
            tile.move(block, source[start:end])
        return loaded

    def run(span: Span, loaded: list[View]) -> None:
        compute(tile, loaded[0], loaded)
        tile.move(y[span[0] : span[1]], loaded[0])

    pipelined(spans, load, run)
