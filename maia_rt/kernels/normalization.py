"""Layer norm, add and layer norm in one, and division of rows by their length."""

from __future__ import annotations

from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.rowwise import Block, stream_rows
from maia_rt.kernels.tile import SRAM_ALIGNMENT, TileBuilder
from maia_rt.kernels.view import View


class Constants:
    """Rows that a tile keeps in SRAM while blocks stream through: biases, gamma, beta."""

    def __init__(self, *arguments: View) -> None:
        self._arguments = arguments
        self._held: dict[int, tuple[View, ...]] = {}

    @property
    def nbytes(self) -> int:
        """SRAM needed, in bytes."""
        return sum(a.shape[0] * a.width + SRAM_ALIGNMENT for a in self._arguments)

    def load(self, tile: TileBuilder) -> None:
        """Bring them into a tile."""
        held = []
        for argument in self._arguments:
            view = tile.allocate(argument.shape, argument.dtype)
            tile.move(view, argument)
            held.append(view)
        self._held[tile.number] = tuple(held)

    def of(self, tile: TileBuilder) -> tuple[View, ...]:
        """The rows in a tile's SRAM, in the order given at first."""
        return self._held[tile.number]


def layer_norm(capabilities: Capabilities, rows: int, columns: int, *, epsilon: float, dtype: Dtype = Dtype.FP32,
               name: str = "layer_norm") -> KernelImage:
    """``y = (x - mean) / sqrt(variance + epsilon) * gamma + beta`` over the columns; the variance is the biased one.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    rows, columns : int
        Of x and y.
    epsilon : float
        Keeps rows without variance finite.
    dtype : Dtype
        Of every argument; computed in FP32.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments x (rows, columns), gamma, beta (columns,), y as x (out).
    """
    builder = KernelBuilder(name, capabilities)
    x = builder.argument("x", ArgKind.IN, dtype, (rows, columns))
    constants = Constants(builder.argument("gamma", ArgKind.IN, dtype, (columns,)),
                          builder.argument("beta", ArgKind.IN, dtype, (columns,)))
    y = builder.argument("y", ArgKind.OUT, dtype, (rows, columns))

    def compute(tile: TileBuilder, block: Block) -> View:
        (values,) = block.streams
        gamma, beta = constants.of(tile)
        tile.layernorm(values, values, gamma, beta, epsilon)
        return values

    stream_rows(builder, y.split(0, (1, rows)), [x.split(0, (1, rows))], compute, prepare=constants.load,
                reserve=constants.nbytes)
    return builder.build()


def add_norm(capabilities: Capabilities, parts: int, rows: int, columns: int, *, epsilon: float,
             dtype: Dtype = Dtype.FP32, name: str = "add_norm") -> KernelImage:
    """``y = layer norm of (the sum of parts + bias + residual)``: what follows a matmul, cut or whole.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    parts : int
        How many arrays lie one behind the other in x; see `feed_forward`.
    rows, columns : int
        Of each part, residual and y.
    epsilon : float
        Of the layer norm.
    dtype : Dtype
        Of every argument but x, which is FP32. Computed in FP32, rounded once.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments x (parts, rows, columns), bias (columns,), residual (rows, columns), gamma, beta (columns,),
        y (rows, columns) (out).
    """
    builder = KernelBuilder(name, capabilities)
    x = builder.argument("x", ArgKind.IN, Dtype.FP32, (parts, rows, columns))
    bias = builder.argument("bias", ArgKind.IN, dtype, (columns,))
    residual = builder.argument("residual", ArgKind.IN, dtype, (rows, columns))
    gamma, beta = (builder.argument(n, ArgKind.IN, dtype, (columns,)) for n in ("gamma", "beta"))
    constants = Constants(bias, gamma, beta)
    y = builder.argument("y", ArgKind.OUT, dtype, (rows, columns))
    streams = [x[i].split(0, (1, rows)) for i in range(parts)]
    streams.append(residual.split(0, (1, rows)))

    def compute(tile: TileBuilder, block: Block) -> View:
        bias, gamma, beta = constants.of(tile)
        *values, residual = block.streams
        total = values[0]
        for other in values[1:]:
            tile.add(total, total, other)
        tile.add(total, total, bias)
        tile.add(total, total, residual)
        tile.layernorm(residual, total, gamma, beta, epsilon)
        return residual

    stream_rows(builder, y.split(0, (1, rows)), streams, compute, prepare=constants.load, reserve=constants.nbytes)
    return builder.build()


def normalize(capabilities: Capabilities, rows: int, columns: int, *, floor: float = 1e-12,
              dtype: Dtype = Dtype.FP32, name: str = "normalize") -> KernelImage:
    """Each row divided by its Euclidean length, or by ``floor`` where that is more.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    rows, columns : int
        Of x and y.
    floor : float
        Keeps rows of zeros finite.
    dtype : Dtype
        Of both arguments; computed in FP32.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments x (rows, columns), y as x (out).
    """
    builder = KernelBuilder(name, capabilities)
    x = builder.argument("x", ArgKind.IN, dtype, (rows, columns))
    y = builder.argument("y", ArgKind.OUT, dtype, (rows, columns))

    def compute(tile: TileBuilder, block: Block) -> View:
        (values,) = block.streams
        tile.l2_normalize(values, values, floor)
        return values

    stream_rows(builder, y.split(0, (1, rows)), [x.split(0, (1, rows))], compute)
    return builder.build()
