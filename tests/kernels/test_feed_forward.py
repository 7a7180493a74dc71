"""Two linear layers with GELU between, summed up from their parts, against float64.

Tolerance: the first product's bound, widened by GELU's slope (1.13), goes through the second product,
which adds its own.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from maia_rt import kernels
from maia_rt.contract.program import Dtype
from tests.helpers.launching import Launcher
from tests.helpers.rounding import EPS, UNIT, assert_close, exact, matmul_bound, random_array


@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.BF16])
@pytest.mark.parametrize("m, n, hidden", [(1, 1, 1), (50, 48, 200), (7, 192, 768), (130, 96, 384), (600, 8, 17)])
def test_feed_forward(launcher: Launcher, m: int, n: int, hidden: int, dtype: Dtype) -> None:
    random = np.random.default_rng(m)
    x, w1, b1, w2 = (random_array(random, s, dtype) for s in ((m, n), (n, hidden), (hidden,), (hidden, n)))
    got = launcher.launch(kernels.feed_forward(launcher.capabilities, m, n, hidden, dtype=dtype), x, w1, b1, w2)
    assert got.shape == (kernels.parts_of(launcher.capabilities, hidden), m, n)
    inner = exact(x) @ exact(w1) + exact(b1)
    active = inner / 2 * (1 + np.vectorize(math.erf, otypes=[np.float64])(inner / math.sqrt(2)))
    moved = 1.13 * (matmul_bound(x, w1) + EPS * np.abs(inner)) + 4 * EPS * np.abs(inner)
    if dtype is not Dtype.FP32:
        moved = moved + UNIT[dtype] * (np.abs(active) + moved)
    bound = moved @ np.abs(exact(w2)) + matmul_bound(active, w2)
    assert_close(exact(got).sum(0), active @ exact(w2), bound, Dtype.FP32)
