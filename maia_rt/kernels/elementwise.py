"""Kernels that treat every element by itself: GELU, add, and what lets others be written in a few lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.errors import ProgramError
from maia_rt.kernels.blocking import Span, blocks, pipelined, shares
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.tile import SRAM_ALIGNMENT, TileBuilder
from maia_rt.kernels.view import WIDTHS, View

MOST_ELEMENTS = 1 << 16
"""Elements in a block: enough to make an operation's fixed cost vanish, few enough to overlap with DMA."""
Compute = Callable[[TileBuilder, Sequence[View], Sequence[View]], Sequence[View]]
"""Of a tile, the sources' blocks and the scratch: writes the operations, returns a block for each result."""


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
    builder = KernelBuilder(name, capabilities)
    x = builder.argument("x", ArgKind.IN, dtype, (elements,))
    y = builder.argument("y", ArgKind.OUT, dtype, (elements,))

    def compute(tile: TileBuilder, loaded: Sequence[View], _scratch: Sequence[View]) -> Sequence[View]:
        tile.gelu(loaded[0], loaded[0])
        return loaded

    stream_elements(builder, [x], [y], compute)
    return builder.build()


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
    builder = KernelBuilder(name, capabilities)
    a, b = (builder.argument(n, ArgKind.IN, dtype, (elements,)) for n in ("a", "b"))
    y = builder.argument("y", ArgKind.OUT, dtype, (elements,))

    def compute(tile: TileBuilder, loaded: Sequence[View], _scratch: Sequence[View]) -> Sequence[View]:
        tile.add(loaded[0], loaded[0], loaded[1])
        return loaded[:1]

    stream_elements(builder, [a, b], [y], compute)
    return builder.build()


def stream_elements(builder: KernelBuilder, sources: Sequence[View], results: Sequence[View], compute: Compute, *,
                    scratch: Sequence[Dtype] = ()) -> None:
    """Write a kernel that brings blocks of elements in, computes, and takes the results out, on every tile.

    Parameters
    ----------
    builder : KernelBuilder
    sources, results : sequence of View
        Arguments (elements,), all of one length; an INOUT argument is in both. The kernel may be launched with one
        buffer for a source and a result: each element is read before it is written.
    compute : callable
        Writes the operations for a block; returns where each result is, of that result's dtype.
    scratch : sequence of Dtype
        Arrays of a block's length that compute may use as it likes.

    Raises
    ------
    ProgramError
        SRAM does not hold 64 elements of everything.
    """
    elements = sources[0].shape[0]
    capabilities = builder.capabilities
    each = sum(2 * s.width for s in sources) + sum(WIDTHS[d] for d in scratch)
    fit = capabilities.tile_sram_bytes // each // SRAM_ALIGNMENT * SRAM_ALIGNMENT
    if not fit:
        raise ProgramError(f"kernel {builder.name!r}: {SRAM_ALIGNMENT} elements need {SRAM_ALIGNMENT * each} bytes",
                           cause=f"a tile has {capabilities.tile_sram_bytes} bytes of SRAM")
    for number, (start, end) in enumerate(shares(elements, capabilities.tiles, SRAM_ALIGNMENT)):
        _stream(builder.tile(number), sources, results, blocks(start, end, min(MOST_ELEMENTS, fit)), compute, scratch)


def _stream(tile: TileBuilder, sources: Sequence[View], results: Sequence[View], spans: Sequence[Span],
            compute: Compute, scratch: Sequence[Dtype]) -> None:
    """One tile's share: each block in, computed, out."""
    most = max(end - start for start, end in spans)
    rings = [tile.ring(2, (most,), s.dtype) for s in sources]
    spare = [tile.allocate((most,), d) for d in scratch]

    def load(span: Span) -> list[View]:
        start, end = span
        loaded = [ring.take()[: end - start] for ring in rings]
        for block, source in zip(loaded, sources, strict=True):
            tile.move(block, source[start:end])
        return loaded

    def run(span: Span, loaded: list[View]) -> None:
        start, end = span
        computed = compute(tile, loaded, [s[: end - start] for s in spare])
        for result, block in zip(results, computed, strict=True):
            tile.move(result[start:end], block)

    pipelined(spans, load, run)
