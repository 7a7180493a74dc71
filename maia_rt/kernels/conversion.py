"""From one element type to another: quantize, dequantize."""

from __future__ import annotations

from collections.abc import Sequence

from maia_rt.contract.dtype import row_bytes
from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.errors import InvalidType, ProgramError
from maia_rt.kernels.blocking import Span, blocks, largest, pipelined, shares
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.tile import SRAM_ALIGNMENT, Scalar, TileBuilder
from maia_rt.kernels.view import View

MOST_ELEMENTS = 1 << 16
"""Elements in a block of rows, where a row is not longer."""


def convert(capabilities: Capabilities, rows: int, columns: int, source: Dtype, target: Dtype, *, scaled: bool = False,
            name: str = "convert") -> KernelImage:
    """``y = x`` in another type, or ``y = factor * x``: how arrays are quantized and dequantized on the device.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    rows, columns : int
        Shape of both arguments; with an MX type, columns are a multiple of 32.
    source, target : Dtype
        Any but UINT8. How overflow and NaN are rounded: docs/contract.md, "Macro-operations".
    scaled : bool
        Take a factor at launch, as INT8 needs: ``round(factor * x)``.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments x (in), y (out), each (rows, columns), and factor (scalar) where ``scaled``.

    Raises
    ------
    InvalidType
        UINT8, which is moved only.
    InvalidArgument
        Columns that are no multiple of 32 with an MX type.
    ProgramError
        SRAM does not hold two rows of each.
    """
    if Dtype.UINT8 in (source, target):
        raise InvalidType(f"kernel {name!r}: {source.name} to {target.name}", cause="UINT8 is moved only")
    builder = KernelBuilder(name, capabilities)
    x = builder.argument("x", ArgKind.IN, source, (rows, columns))
    y = builder.argument("y", ArgKind.OUT, target, (rows, columns))
    factor = builder.scalar("factor") if scaled else None
    room = capabilities.tile_sram_bytes - 4 * SRAM_ALIGNMENT
    fit = room // (2 * (row_bytes(source, columns) + row_bytes(target, columns)))
    if fit < 1:
        raise ProgramError(f"kernel {name!r}: two rows of {columns} elements do not fit into SRAM",
                           cause=f"a tile has {capabilities.tile_sram_bytes} bytes", hint="use shorter rows")
    most = min(fit, max(1, MOST_ELEMENTS // columns))
    for number, share in enumerate(shares(rows, capabilities.tiles)):
        _write_share(builder.tile(number), blocks(*share, most), x, y, factor)
    return builder.build()


def _write_share(tile: TileBuilder, spans: Sequence[Span], x: View, y: View, factor: Scalar | None) -> None:
    """One tile's rows, a block at a time."""
    shape = (largest(spans), x.shape[1])
    given, made = tile.ring(2, shape, x.dtype), tile.ring(2, shape, y.dtype)

    def load(span: Span) -> View:
        block = given.take()[: span[1] - span[0]]
        tile.move(block, x[span[0] : span[1]])
        return block

    def run(span: Span, block: View) -> None:
        out = made.take()[: span[1] - span[0]]
        if factor is None:
            tile.convert(out, block)
        else:
            tile.scale(out, block, factor)
        tile.move(y[span[0] : span[1]], out)

    pipelined(spans, load, run)
