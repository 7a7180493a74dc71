"""Softmax over rows, with a mask."""

from __future__ import annotations

from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.rowwise import Block, stream_rows
from maia_rt.kernels.tile import TileBuilder
from maia_rt.kernels.view import View


def softmax(capabilities: Capabilities, planes: int, rows: int, columns: int, *, masked: bool = False,
            scale: float = 1.0, dtype: Dtype = Dtype.FP32, name: str = "softmax") -> KernelImage:
    """Softmax of ``scale * x`` over the columns.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    planes, rows, columns : int
        Of x and y.
    masked : bool
        Take a mask: one row for each plane. Where it is 0 the result is exactly 0; a row with no column kept is all 0.
    scale : float
        Multiplies x.
    dtype : Dtype
        Of every argument; computed in FP32.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments x (planes, rows, columns), mask (planes, columns) where masked, y as x (out).
    """
    builder = KernelBuilder(name, capabilities)
    x = builder.argument("x", ArgKind.IN, dtype, (planes, rows, columns))
    masks = [builder.argument("mask", ArgKind.IN, dtype, (planes, columns))] if masked else []
    y = builder.argument("y", ArgKind.OUT, dtype, (planes, rows, columns))

    def compute(tile: TileBuilder, block: Block) -> View:
        (values,) = block.streams
        mask = block.masks[0].split(0, (values.shape[0], 1)) if block.masks else None
        tile.softmax(values, values, scale, mask)
        return values

    stream_rows(builder, y, [x], compute, masks=masks)
    return builder.build()
