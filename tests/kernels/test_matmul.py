"""Matrix products of any size, against float64.

Tolerance: the worst case of FP32 accumulation in any order (tests/helpers/rounding.py), plus one rounding to the
result's dtype. GELU's slope is at most 1.13, so it widens the product's error by no more than that, plus a few units of
its own.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from maia_rt import kernels
from maia_rt.contract.program import Dtype
from tests.helpers.launching import Launcher
from tests.helpers.rounding import EPS, assert_close, exact, matmul_bound, random_array

SHAPES = [(1, 1, 1), (1, 17, 3), (5, 1, 129), (33, 65, 17), (128, 48, 96), (7, 300, 1), (300, 3, 40), (64, 1152, 48),
          (40, 24, 2100), (257, 130, 70)]


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.BF16])
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_product_is_within_the_bound_of_its_sums(launcher: Launcher, m: int, n: int, k: int, dtype: Dtype) -> None:
    random = np.random.default_rng(m * 7 + n)
    a, b = random_array(random, (m, k), dtype), random_array(random, (k, n), dtype)
    got = launcher.launch(kernels.matmul(launcher.capabilities, m, n, k, dtype=dtype), a, b)
    assert_close(got, exact(a) @ exact(b), matmul_bound(a, b), dtype)


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes_with_bias_gelu_and_stored_transposed(launcher: Launcher, seed: int) -> None:
    random = np.random.default_rng(seed)
    m, n, k = (int(x) for x in random.integers(1, 200, 3))
    dtype = (Dtype.FP32, Dtype.BF16, Dtype.FP16)[seed % 3]
    a, b, bias = (random_array(random, s, dtype) for s in ((m, k), (n, k), (n,)))
    kernel = kernels.matmul(launcher.capabilities, m, n, k, bias=True, gelu=True, transpose_b=True, dtype=dtype)
    got = launcher.launch(kernel, a, b, bias)
    x = exact(a) @ exact(b).T + exact(bias)
    bound = matmul_bound(a, b.T) + EPS * np.abs(x)
    assert_close(got, x / 2 * (1 + erf(x / math.sqrt(2))), 1.13 * bound + 4 * EPS * np.abs(x), dtype)


def test_multiply_adds_are_those_of_the_shape(launcher: Launcher) -> None:
    assert kernels.matmul(launcher.capabilities, 37, 129, 1000).macs == 37 * 129 * 1000


def test_small_device_keeps_the_weight_of_a_transformer_in_place(launcher: Launcher) -> None:
    kernel = kernels.matmul(launcher.capabilities, 300, 1152, 384, transpose_b=True, bias=True)
    assert len({s.tile for s in kernel.streams}) >= 0.9 * launcher.capabilities.tiles


@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.BF16])
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (30, 24, 24), (133, 48, 600), (3, 384, 384)])
def test_matmul_add_norm_is_the_three_in_a_row(launcher: Launcher, m: int, n: int, k: int, dtype: Dtype) -> None:
    random = np.random.default_rng(n)
    a, b, bias, residual, gamma, beta = (
        random_array(random, s, dtype) for s in ((m, k), (n, k), (n,), (m, n), (n,), (n,)))
    epsilon = 1e-12 if n > 1 else 1e-5
    kernel = kernels.matmul_add_norm(launcher.capabilities, m, n, k, epsilon=epsilon, transpose_b=True, dtype=dtype)
    got = launcher.launch(kernel, a, b, bias, residual, gamma, beta)
    x = exact(a) @ exact(b).T + exact(bias) + exact(residual)
    deviation = np.sqrt(x.var(axis=1, keepdims=True) + epsilon)
    want = (x - x.mean(axis=1, keepdims=True)) / deviation * exact(gamma) + exact(beta)
    # A change of the input changes the output by at most twice that over the deviation, times gamma.
    moved = (matmul_bound(a, b.T) + 4 * EPS * np.abs(x)).max(axis=1, keepdims=True)
    bound = np.abs(exact(gamma)) * (2.5 * moved / deviation + (n + 8) * EPS * np.abs(x).max(axis=1, keepdims=True)
                                    / deviation) + 4 * EPS * np.abs(want)
    assert_close(got, want, bound, dtype)
