"""A linear layer, the residual and the layer norm after it, in one: rows over the tiles, each with the whole weight."""

from __future__ import annotations

from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.errors import ProgramError
from maia_rt.kernels.blocking import Span, blocks, largest, pipelined, row_shares
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.matmul import Blocking, plan
from maia_rt.kernels.normalization import Constants
from maia_rt.kernels.tile import SRAM_ALIGNMENT, TileBuilder
from maia_rt.kernels.view import WIDTHS, View


def matmul_add_norm(capabilities: Capabilities, m: int, n: int, k: int, *, epsilon: float, transpose_b: bool = False,
                    dtype: Dtype = Dtype.FP32, name: str = "matmul_add_norm") -> KernelImage:
    """``y = layer norm of (a @ b + bias + residual)``.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    m, n, k : int
        a is (m, k), b is (k, n), y is (m, n).
    epsilon : float
        Of the layer norm.
    transpose_b : bool
        b is stored as (n, k).
    dtype : Dtype
        Of every argument; computed in FP32, rounded once.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments a, b, bias (n,), residual (m, n), gamma, beta (n,), y (m, n) (out).

    Raises
    ------
    ProgramError
        SRAM does not hold the smallest blocks; use `matmul` and `add_norm`.
    """
    builder = KernelBuilder(name, capabilities)
    a = builder.argument("a", ArgKind.IN, dtype, (m, k))
    b = builder.argument("b", ArgKind.IN, dtype, (n, k) if transpose_b else (k, n))
    bias = builder.argument("bias", ArgKind.IN, dtype, (n,))
    residual = builder.argument("residual", ArgKind.IN, dtype, (m, n))
    gamma, beta = (builder.argument(x, ArgKind.IN, dtype, (n,)) for x in ("gamma", "beta"))
    y = builder.argument("y", ArgKind.OUT, dtype, (m, n))
    constants = Constants(bias, gamma, beta)
    width = WIDTHS[dtype]
    spans = row_shares(m, capabilities.tiles)
    blocking = plan(largest(spans), n, k, width, capabilities.tile_sram_bytes - constants.nbytes - 4 * SRAM_ALIGNMENT,
                    n * width, True)
    if blocking is None:
        raise ProgramError(f"kernel {name!r}: no block of a {m} x {n} x {k} product with whole rows fits into SRAM",
                           cause=f"a tile has {capabilities.tile_sram_bytes} bytes", hint="use matmul, then add_norm")
    for number, span in enumerate(spans):
        tile = builder.tile(number)
        constants.load(tile)
        _write_share(tile, span, blocking, a, b, residual, constants.of(tile), y, epsilon, transpose_b)
    return builder.build()


def _write_share(tile: TileBuilder, row_span: Span, blocking: Blocking, a: View, b: View, residual: View,
                 constants: tuple[View, ...], y: View, epsilon: float, transpose_b: bool) -> None:
    row_blocks = blocks(*row_span, blocking.rows)
    depth_blocks = blocks(0, a.shape[1], blocking.depth)
    rows, depth, columns = largest(row_blocks), largest(depth_blocks), y.shape[1]
    once = len(depth_blocks) == 1
    bias, gamma, beta = constants
    b_ring = tile.ring(1 if once else 2, (columns, depth) if transpose_b else (depth, columns), b.dtype)
    a_ring = tile.ring(2, (rows, depth), a.dtype)
    sums = tile.ring(2, (rows, columns), Dtype.FP32)
    others = tile.ring(2, (rows, columns), y.dtype)
    held: dict[str, View] = {}

    def load(item: tuple[Span, Span]) -> tuple[View, View]:
        (r0, r1), (k0, k1) = item
        if not once or r0 == row_span[0]:
            held["b"] = b_ring.take()
            held["b"] = held["b"][:, : k1 - k0] if transpose_b else held["b"][: k1 - k0]
            tile.move(held["b"], b[:, k0:k1] if transpose_b else b[k0:k1])
        block = a_ring.take()[: r1 - r0, : k1 - k0]
        tile.move(block, a[r0:r1, k0:k1])
        return block, held["b"]

    def run(item: tuple[Span, Span], loaded: tuple[View, View]) -> None:
        (r0, r1), (k0, k1) = item
        if k0 == 0:
            held["sum"] = sums.take()[: r1 - r0]
            held["other"] = others.take()[: r1 - r0]
            tile.move(held["other"], residual[r0:r1])
        total, other = held["sum"], held["other"]
        tile.matmul(total, *loaded, accumulate=k0 > 0, transpose_b=transpose_b)
        if k1 < a.shape[1]:
            return
        tile.add(total, total, bias)
        tile.add(total, total, other)
        tile.layernorm(other, total, gamma, beta, epsilon)
        tile.move(y[r0:r1], other)

    pipelined([(r, d) for r in row_blocks for d in depth_blocks], load, run)
