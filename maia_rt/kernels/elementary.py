"""Functions that the vector unit lacks, composed of what it has: logarithm, square root, reciprocal, step.

The bits of a positive FP32 number, read as an integer, are nearly linear in its logarithm: the exponent stands above
the fraction. So one SCALE between INT32 and FP32 gives a first guess (of a logarithm, or of a power, by scaling the
bits and reading them back), and Newton's method does the rest. All work on FP32 views of one shape in SRAM, take
positive normal numbers, and write nothing but ``dst`` and ``scratch``, which must not overlap each other or ``x``.
"""

from __future__ import annotations

import math

from maia_rt.contract.program import Dtype
from maia_rt.kernels.tile import TileBuilder
from maia_rt.kernels.view import View

_LN2_OF_BITS = math.log(2) / (1 << 23)
"""What one unit of a number's bits adds to its logarithm, about."""
_LOG_OF_NO_BITS = -(127 - 0.0430) * math.log(2)
"""Bits of the exponent's bias, less the mean of log2(1 + f) - f."""
_ROOT_BITS = 0x5F3759DF
"""What halved bits are taken from to guess a reciprocal square root: off by 3.5 % at most."""
_RECIPROCAL_BITS = 0x7EF311C7
"""What bits are taken from to guess a reciprocal: off by 12 % at most."""
_HUGE = -3.0e38


def logarithm(tile: TileBuilder, dst: View, x: View, scratch: View) -> None:
    """``dst = log x`` for x from 2^-120 to 2^120, off by at most 2^-19 plus a unit in the last place."""
    tile.scale(dst, x.bits(Dtype.INT32), _LN2_OF_BITS, _LOG_OF_NO_BITS)
    for _ in range(3):  # y += x * e^-y - 1: off by 0.04, then e^2 / 2 each time
        tile.scale(scratch, dst, -1.0)
        tile.exp(scratch, scratch)
        tile.multiply(scratch, scratch, x)
        tile.scale(scratch, scratch, 1.0, -1.0)
        tile.add(dst, dst, scratch)


def reciprocal_root(tile: TileBuilder, dst: View, x: View, scratch: View) -> None:
    """``dst = 1 / sqrt x``, relatively off by at most 2^-21; of 0 a large finite number, so that x times it is 0."""
    tile.scale(dst.bits(Dtype.INT32), x.bits(Dtype.INT32), -0.5, float(_ROOT_BITS))
    for _ in range(3):  # y *= 3/2 - x / 2 * y * y: off by 0.035, then 3/2 e^2 each time
        tile.multiply(scratch, x, dst)
        tile.multiply(scratch, scratch, dst)
        tile.scale(scratch, scratch, -0.5, 1.5)
        tile.multiply(dst, dst, scratch)


def reciprocal(tile: TileBuilder, dst: View, x: View, scratch: View) -> None:
    """``dst = 1 / x``, relatively off by at most 2^-21, for x from 2^-125 to 2^125."""
    tile.scale(dst.bits(Dtype.INT32), x.bits(Dtype.INT32), -1.0, float(_RECIPROCAL_BITS))
    for _ in range(4):  # y *= 2 - x * y: off by 0.12, then e^2 each time
        tile.multiply(scratch, x, dst)
        tile.scale(scratch, scratch, -1.0, 2.0)
        tile.multiply(dst, dst, scratch)


def step(tile: TileBuilder, dst: View, x: View, scratch: View) -> None:
    """``dst = 1`` where ``x`` is more than 2^-119, 0 where it is 0; x is not negative, ``scratch`` is INT8.

    A huge multiple of any number saturates at the smallest INT8, -128, and that over -128 is 1 exactly.
    """
    tile.scale(scratch, x, _HUGE)
    tile.scale(dst, scratch, -1.0 / 128)
