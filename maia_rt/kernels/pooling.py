"""Mean of a sequence's tokens, with padding masked out, and the division by its length that may follow."""

from __future__ import annotations

from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.errors import ProgramError
from maia_rt.kernels.blocking import Span, blocks, halvings, largest, pipelined, shares
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.tile import SRAM_ALIGNMENT, TileBuilder
from maia_rt.kernels.view import WIDTHS, View


def mean_pool(capabilities: Capabilities, sequences: int, length: int, columns: int, *, floor: float = 1e-9,
              normalize_floor: float | None = None, dtype: Dtype = Dtype.FP32, name: str = "mean_pool") -> KernelImage:
    """``sum of mask * x / max(sum of mask, floor)`` over each sequence's tokens.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    sequences, length, columns : int
        Of x; sequences are padded to ``length`` tokens.
    floor : float
        Keeps a sequence without tokens at zeros.
    normalize_floor : float or None
        Divide each mean by its Euclidean length, or by this where it is more; None leaves it as it is.
    dtype : Dtype
        Of every argument; computed in FP32, rounded once.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments x (sequences * length, columns), mask (sequences, length), y (sequences, columns) (out).

    Raises
    ------
    ProgramError
        SRAM does not hold one column of a sequence twice, and a row of y.
    """
    builder = KernelBuilder(name, capabilities)
    x = builder.argument("x", ArgKind.IN, dtype, (sequences * length, columns)).split(0, (sequences, length))
    mask = builder.argument("mask", ArgKind.IN, dtype, (sequences, length))
    y = builder.argument("y", ArgKind.OUT, dtype, (sequences, columns))
    width = WIDTHS[dtype]
    spans = shares(sequences, capabilities.tiles)

    def need(group: int, part: int) -> int:
        return (2 * group * length * part * width + 2 * group * (length * width + columns * (4 + width))
                + 8 * SRAM_ALIGNMENT)

    choices = [(g, columns) for g in halvings(largest(spans))] + [(1, p) for p in halvings(columns)[1:]]
    fitting = [c for c in choices if need(*c) <= capabilities.tile_sram_bytes]
    if not fitting:
        raise ProgramError(f"kernel {name!r}: a sequence of {length} tokens does not fit into SRAM",
                           cause=f"a tile has {capabilities.tile_sram_bytes} bytes")
    group, part = fitting[0]
    for number, span in enumerate(spans):
        _write_share(builder.tile(number), blocks(*span, group), blocks(0, columns, part), x, mask, y, floor,
                     normalize_floor)
    return builder.build()


def _write_share(tile: TileBuilder, groups: list[Span], parts: list[Span], x: View, mask: View, y: View, floor: float,
                 normalize_floor: float | None) -> None:
    """One tile's sequences, group by group, and part by part of the columns where a sequence is too long."""
    most, width, length, columns = largest(groups), largest(parts), x.shape[1], y.shape[1]
    ring = tile.ring(2, (most * length * width,), x.dtype)
    mask_ring = tile.ring(2, (most, length), mask.dtype)
    means = tile.ring(2, (most, columns), Dtype.FP32)
    results = means if y.dtype is Dtype.FP32 else tile.ring(2, (most, columns), y.dtype)
    held: dict[str, View] = {}

    def load(item: tuple[Span, Span]) -> tuple[View, View]:
        (first, last), (c0, c1) = item
        if c0 == 0:
            held["mask"] = mask_ring.take()[: last - first]
            tile.move(held["mask"], mask[first:last])
        block = ring.take()[: (last - first) * length * (c1 - c0)].split(0, (last - first, length, c1 - c0))
        tile.move(block, x[first:last, :, c0:c1])
        return block, held["mask"]

    def run(item: tuple[Span, Span], loaded: tuple[View, View]) -> None:
        (first, last), (c0, c1) = item
        if c0 == 0:
            held["mean"] = means.take()[: last - first]
        mean = held["mean"]
        tile.mean_rows(mean[:, c0:c1], *loaded, floor)
        if c1 < columns:
            return
        result = mean if results is means else results.take()[: last - first]
        if normalize_floor is not None:
            tile.l2_normalize(result, mean, normalize_floor)
        elif result is not mean:
            tile.convert(result, mean)
        tile.move(y[first:last], result)

    pipelined([(g, p) for g in groups for p in parts], load, run)
