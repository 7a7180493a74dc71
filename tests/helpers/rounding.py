"""Bounds on rounding errors, for comparing kernels with float64 references.

Every bound is a worst case, so a failure is a mistake and never bad luck: FP32 sums of k terms in any order are off by
at most about k * eps * (sum of magnitudes); a result rounded to bf16 is off by at most 2^-8 of itself.
"""

from __future__ import annotations

import numpy as np

from maia_rt.contract.program import NUMPY_DTYPES, Dtype

EPS = float(np.finfo(np.float32).eps)
UNIT = {Dtype.FP32: EPS / 2, Dtype.BF16: 2.0**-8, Dtype.FP16: 2.0**-11}
"""Half a unit in the last place: what one rounding costs, relative to the value."""


def random_array(random: np.random.Generator, shape: tuple[int, ...], dtype: Dtype, scale: float = 1.0) -> np.ndarray:
    """Normally distributed values that the dtype can show exactly."""
    return (random.standard_normal(shape) * scale).astype(NUMPY_DTYPES[dtype])


def exact(array: np.ndarray) -> np.ndarray:
    """The same values in float64."""
    return np.asarray(array, np.float64)


def assert_close(got: np.ndarray, want: np.ndarray, bound: np.ndarray | float, dtype: Dtype) -> None:
    """Every element within ``bound`` (absolute, before the last rounding), plus that rounding to ``dtype``."""
    allowed = bound + UNIT[dtype] * (np.abs(want) + bound) + 2.0**-24
    error = np.abs(exact(got) - want)
    assert np.isfinite(exact(got)).all(), "not finite"
    worst = int(np.argmax(error - allowed))
    assert (error <= allowed).all(), (
        f"element {np.unravel_index(worst, error.shape)}: {exact(got).flat[worst]} for {want.flat[worst]}, "
        f"off by {error.flat[worst]:.3g}, allowed {np.broadcast_to(allowed, error.shape).flat[worst]:.3g}")


def matmul_bound(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """For ``a @ b`` accumulated in FP32 in any order: (k + 2) eps |a| @ |b|."""
    return (a.shape[-1] + 2) * EPS * (np.abs(exact(a)) @ np.abs(exact(b)))


