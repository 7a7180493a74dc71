"""Embedding lookup against float64, at the bounds of its tables, and elementwise kernels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from maia_rt import kernels
from maia_rt.contract.program import Dtype
from tests.helpers.launching import Launcher
from tests.helpers.rounding import EPS, assert_close, exact, random_array


@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.BF16])
@pytest.mark.parametrize("epsilon", [None, 1e-12])
@pytest.mark.parametrize("tokens, columns", [(1, 8), (300, 384), (1030, 4), (2, 64)])
def test_embedding(launcher: Launcher, tokens: int, columns: int, epsilon: float | None, dtype: Dtype) -> None:
    random = np.random.default_rng(tokens)
    entries = (1000, 256, 2)
    ids = np.stack([random.integers(0, e, tokens) for e in entries])
    ids[:, 0] = 0
    ids[:, -1] = np.array(entries) - 1
    tables = [random_array(random, (e, columns), dtype) for e in entries]
    rows = [random_array(random, (columns,), dtype) for _ in range(2 if epsilon is not None else 0)]
    words, positions, types = entries
    kernel = kernels.embedding(launcher.capabilities, tokens, columns, words=words, positions=positions, types=types,
                               epsilon=epsilon, dtype=dtype)
    got = launcher.launch(kernel, ids, *tables, *rows)
    parts = [exact(t)[i] for t, i in zip(tables, ids, strict=True)]
    want = sum(parts, np.zeros(()))
    moved = bound = 2 * EPS * sum((np.abs(p) for p in parts), np.zeros(()))
    if epsilon is not None:
        centred = want - want.mean(-1, keepdims=True)
        deviation = np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon)
        largest = np.abs(want).max(-1, keepdims=True)
        want = centred / deviation * exact(rows[0]) + exact(rows[1])
        bound = (((columns + 8) * EPS * (1 + 2 * largest / deviation) + 2.5 * moved.max(-1, keepdims=True) / deviation)
                 * np.abs(exact(rows[0])) + 8 * EPS * np.abs(want))
    assert_close(got, want, bound, dtype)


@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.BF16, Dtype.FP16])
@pytest.mark.parametrize("elements", [1, 63, 65, 200_001])
def test_gelu_has_the_exact_form(launcher: Launcher, elements: int, dtype: Dtype) -> None:
    x = random_array(np.random.default_rng(elements), (elements,), dtype, 3.0)
    x[0] = -9.0
    got = launcher.launch(kernels.gelu(launcher.capabilities, elements, dtype=dtype), x)
    wide = exact(x)
    erf = np.array([math.erf(v / math.sqrt(2)) for v in wide])
    # erf is right to a few units near 1; where it cancels against 1 the error is one of |x| times those.
    assert_close(got, wide / 2 * (1 + erf), 4 * EPS * np.abs(wide), dtype)


@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.BF16])
@pytest.mark.parametrize("elements", [1, 64, 100_003])
def test_add_rounds_once(launcher: Launcher, elements: int, dtype: Dtype) -> None:
    random = np.random.default_rng(elements)
    a, b = random_array(random, (elements,), dtype), random_array(random, (elements,), dtype)
    got = launcher.launch(kernels.add(launcher.capabilities, elements, dtype=dtype), a, b)
    assert np.array_equal(got, (a.astype(np.float32) + b.astype(np.float32)).astype(got.dtype))
