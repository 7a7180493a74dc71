"""Steps of optimizers: SGD with momentum, and Adam. Parameters and their state stay in FP32, changed in place.

All of a model's parameters may lie end to end in one buffer: then a step is one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.errors import InvalidArgument
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.elementary import reciprocal, reciprocal_root
from maia_rt.kernels.elementwise import stream_elements
from maia_rt.kernels.tile import TileBuilder
from maia_rt.kernels.view import View


def sgd(capabilities: Capabilities, elements: int, *, nesterov: bool = False, dtype: Dtype = Dtype.FP32,
        name: str = "sgd") -> KernelImage:
    """``v = momentum * v + g + decay * w``, then ``w -= rate * v``.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    elements : int
        Length of each buffer.
    nesterov : bool
        ``w -= rate * (g + decay * w + momentum * v)`` instead, with the new v.
    dtype : Dtype
        Of the gradient; w and v are FP32.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments w, v (elements,) (both in and out), g (elements,), and the numbers rate, momentum, decay.

    Examples
    --------
    >>> from maia_rt.contract.program import Capabilities
    >>> device = Capabilities(tiles=4, tile_sram_bytes=1 << 21, tile_semaphores=16, max_args=16, max_kernels=64)
    >>> [arg.name for arg in sgd(device, 1000).args]
    ['w', 'v', 'g', 'rate', 'momentum', 'decay']
    """
    builder = KernelBuilder(name, capabilities)
    w, v = (builder.argument(n, ArgKind.INOUT, Dtype.FP32, (elements,)) for n in ("w", "v"))
    g = builder.argument("g", ArgKind.IN, dtype, (elements,))
    rate, momentum, decay = (builder.scalar(n) for n in ("rate", "momentum", "decay"))

    def compute(tile: TileBuilder, loaded: Sequence[View], scratch: Sequence[View]) -> Sequence[View]:
        w, v, g = loaded
        (slope, change) = scratch
        tile.scale(slope, w, decay)
        tile.add(slope, slope, g)
        tile.scale(v, v, momentum)
        tile.add(v, v, slope)
        if nesterov:
            tile.scale(change, v, momentum)
            tile.add(change, change, slope)
            tile.scale(change, change, rate)
        else:
            tile.scale(change, v, rate)
        tile.subtract(w, w, change)
        return [w, v]

    stream_elements(builder, [w, v, g], [w, v], compute, scratch=[Dtype.FP32] * 2)
    return builder.build()


def adam(capabilities: Capabilities, elements: int, *, beta1: float = 0.9, beta2: float = 0.999,
         epsilon: float = 1e-8, dtype: Dtype = Dtype.FP32, name: str = "adam") -> KernelImage:
    """Adam, and AdamW where ``decay`` is not 0.

    ``m = beta1 * m + (1 - beta1) * g``, ``v = beta2 * v + (1 - beta2) * g * g``, then
    ``w -= decay * w + rate * m / (sqrt(correction * v) + epsilon)``.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    elements : int
        Length of each buffer.
    beta1, beta2 : float
        What is kept of the means of gradients and of their squares; at least 0 and below 1.
    epsilon : float
        Keeps the quotient finite where gradients are 0: more than 0.
    dtype : Dtype
        Of the gradient; w, m and v are FP32.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments w, m, v (elements,) (each in and out), g (elements,), and the numbers rate, correction, decay: see
        `adam_numbers`.

    Raises
    ------
    InvalidArgument
        Numbers out of range.
    """
    _check_betas(beta1, beta2)
    if not 2.0**-120 <= epsilon < 1.0:
        raise InvalidArgument(f"epsilon is {epsilon}", cause="it is between 2^-120 and 1")
    builder = KernelBuilder(name, capabilities)
    w, m, v = (builder.argument(n, ArgKind.INOUT, Dtype.FP32, (elements,)) for n in ("w", "m", "v"))
    g = builder.argument("g", ArgKind.IN, dtype, (elements,))
    rate, correction, decay = (builder.scalar(n) for n in ("rate", "correction", "decay"))

    def compute(tile: TileBuilder, loaded: Sequence[View], scratch: Sequence[View]) -> Sequence[View]:
        w, m, v, g = loaded
        a, b, c = scratch
        tile.scale(m, m, beta1)
        tile.scale(a, g, 1.0 - beta1)
        tile.add(m, m, a)
        tile.scale(v, v, beta2)
        tile.multiply(a, g, g)
        tile.scale(a, a, 1.0 - beta2)
        tile.add(v, v, a)
        tile.scale(a, v, correction)
        reciprocal_root(tile, b, a, c)
        tile.multiply(a, a, b)
        tile.scale(a, a, 1.0, epsilon)
        reciprocal(tile, b, a, c)
        tile.multiply(b, b, m)
        tile.scale(b, b, rate)
        tile.scale(c, w, decay)
        tile.subtract(w, w, c)
        tile.subtract(w, w, b)
        return [w, m, v]

    stream_elements(builder, [w, m, v, g], [w, m, v], compute, scratch=[Dtype.FP32] * 3)
    return builder.build()


def adam_numbers(step: int, rate: float, *, beta1: float = 0.9, beta2: float = 0.999,
                 weight_decay: float = 0.0) -> tuple[float, float, float]:
    """The numbers that a launch of `adam` takes.

    Parameters
    ----------
    step : int
        Counted from 1.
    rate : float
        The learning rate.
    beta1, beta2 : float
        As the kernel's.
    weight_decay : float
        Of AdamW: the part of each parameter, times the rate, that is taken off at each step.

    Returns
    -------
    rate, correction, decay : float
        ``rate / (1 - beta1**step)``, ``1 / (1 - beta2**step)``, ``rate * weight_decay``.

    Raises
    ------
    InvalidArgument
        A step below 1; betas out of range.

    Examples
    --------
    >>> adam_numbers(1, 0.001, beta1=0.5, beta2=0.75)
    (0.002, 4.0, 0.0)
    """
    _check_betas(beta1, beta2)
    if step < 1:
        raise InvalidArgument(f"step {step}", cause="steps are counted from 1")
    return rate / (1.0 - beta1**step), 1.0 / (1.0 - beta2**step), rate * weight_decay


def _check_betas(*betas: float) -> None:
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise InvalidArgument(f"betas are {betas}", cause="each is at least 0 and below 1")
