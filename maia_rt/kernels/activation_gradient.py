"""Gradients of activations: what came back to their results, times their slope at what went in."""

from __future__ import annotations

import math
from collections.abc import Sequence

from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.elementary import reciprocal, step
from maia_rt.kernels.elementwise import stream_elements
from maia_rt.kernels.tile import TileBuilder
from maia_rt.kernels.view import View

_TAIL_SLOPE = 0.3275911 / math.sqrt(2)
_TAIL = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
"""Abramowitz and Stegun, 7.1.26: 1 - erf z is e^(-z^2) times this polynomial in 1 / (1 + 0.3275911 z), to 1.5e-7."""


def relu_gradient(capabilities: Capabilities, elements: int, *, dtype: Dtype = Dtype.FP32,
                  name: str = "relu_gradient") -> KernelImage:
    """``dx = dy`` where ``y`` is more than 0, else 0.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    elements : int
        Length of each argument.
    dtype : Dtype
        Of all.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments y, what ReLU gave or what it was given; dy; dx (out), which may be the same memory as dy. Each
        (elements,). A y between 0 and 2^-119 counts in part.

    Examples
    --------
    >>> from maia_rt.contract.program import Capabilities
    >>> device = Capabilities(tiles=4, tile_sram_bytes=1 << 21, tile_semaphores=16, max_args=16, max_kernels=64)
    >>> [arg.name for arg in relu_gradient(device, 1000).args]
    ['y', 'dy', 'dx']
    """
    builder = KernelBuilder(name, capabilities)
    y, dy = (builder.argument(n, ArgKind.IN, dtype, (elements,)) for n in ("y", "dy"))
    dx = builder.argument("dx", ArgKind.OUT, dtype, (elements,))

    def compute(tile: TileBuilder, loaded: Sequence[View], scratch: Sequence[View]) -> Sequence[View]:
        y, dy = loaded
        tile.relu(y, y)
        step(tile, y, y, scratch[0])
        tile.multiply(dy, dy, y)
        return [dy]

    stream_elements(builder, [y, dy], [dx], compute, scratch=[Dtype.INT8])
    return builder.build()


def gelu_gradient(capabilities: Capabilities, elements: int, *, dtype: Dtype = Dtype.FP32,
                  name: str = "gelu_gradient") -> KernelImage:
    """``dx = dy * (P(x) + x * p(x))``, with P and p the normal distribution and its density.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    elements : int
        Length of each argument.
    dtype : Dtype
        Of all; computed in FP32. The slope, which is at most 1.13, is off by at most 2^-20.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments x, what GELU was given; dy; dx (out), which may be the same memory as dy. Each (elements,).
    """
    builder = KernelBuilder(name, capabilities)
    x, dy = (builder.argument(n, ArgKind.IN, dtype, (elements,)) for n in ("x", "dy"))
    dx = builder.argument("dx", ArgKind.OUT, dtype, (elements,))

    def compute(tile: TileBuilder, loaded: Sequence[View], scratch: Sequence[View]) -> Sequence[View]:
        x, dy = loaded
        size, bell, side, tail, ratio, bits = scratch
        tile.relu(side, x)
        tile.scale(size, x, -1.0)
        tile.relu(size, size)
        tile.add(size, size, side)  # |x|
        step(tile, side, side, bits)  # 1 where x > 0
        tile.multiply(bell, size, size)
        tile.scale(bell, bell, -0.5)
        tile.exp(bell, bell)  # e^(-x^2 / 2)
        tile.scale(size, size, _TAIL_SLOPE, 1.0)
        reciprocal(tile, ratio, size, tail)
        tile.scale(tail, ratio, *_TAIL[:2])
        for coefficient in _TAIL[2:]:
            tile.multiply(tail, tail, ratio)
            tile.scale(tail, tail, 1.0, coefficient)
        tile.multiply(tail, tail, ratio)
        tile.multiply(tail, tail, bell)
        tile.scale(tail, tail, 0.5)  # P(-|x|)
        tile.multiply(size, side, tail)
        tile.scale(size, size, -2.0)
        tile.add(size, size, tail)
        tile.add(size, size, side)  # P(x): the tail, or 1 less the tail
        tile.multiply(bell, bell, x)
        tile.scale(bell, bell, 1 / math.sqrt(2 * math.pi))
        tile.add(size, size, bell)
        tile.multiply(dy, dy, size)
        return [dy]

    stream_elements(builder, [x, dy], [dx], compute, scratch=[*[Dtype.FP32] * 5, Dtype.INT8])
    return builder.build()
