"""Softmax, layer norm, add and layer norm, normalise, mean pooling: each row by itself, against float64.

Tolerances: a sum of n terms in FP32 is off by at most n eps times the sum of magnitudes; each function adds a few
roundings (exp: 2 units; division, square root: half a unit each). Reasons for other factors stand beside them.
"""

from __future__ import annotations

import numpy as np
import pytest

from maia_rt import kernels
from maia_rt.contract.program import Dtype
from tests.helpers.launching import Launcher
from tests.helpers.rounding import EPS, assert_close, exact, random_array

BOTH = pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.BF16])


def softmax(x: np.ndarray, keep: np.ndarray) -> np.ndarray:
    shifted = np.where(keep, x - np.where(keep, x, -np.inf).max(-1, initial=-1e30, keepdims=True), -np.inf)
    e = np.exp(shifted)
    total = e.sum(-1, keepdims=True)
    return e / np.where(total > 0, total, 1)


@BOTH
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("planes, rows, columns", [(1, 1, 1), (3, 5, 17), (2, 256, 256), (17, 1, 33), (1, 700, 9),
                                                   (40, 3, 100)])
def test_softmax(launcher: Launcher, planes: int, rows: int, columns: int, masked: bool, dtype: Dtype) -> None:
    random = np.random.default_rng(rows)
    x = random_array(random, (planes, rows, columns), dtype, 5.0)
    mask = random.random((planes, columns)) < 0.6
    mask[0] = False
    kernel = kernels.softmax(launcher.capabilities, planes, rows, columns, masked=masked, scale=0.3, dtype=dtype)
    got = launcher.launch(kernel, x, *([mask] if masked else []))
    keep = np.broadcast_to(mask[:, None], x.shape) if masked else np.ones(x.shape, bool)
    scale = float(np.float32(0.3))
    want = softmax(exact(x) * scale, keep)
    # The product scale * x is rounded before exp: an error of eps |scale x| in the exponent, twice (value and largest).
    bound = want * EPS * (2 * np.abs(x).astype(np.float64).max(-1, keepdims=True) * scale + columns + 8)
    assert_close(got, want, bound, dtype)
    assert not got[~keep].any(), "what the mask drops is exactly 0"


def test_softmax_of_large_numbers_is_finite(launcher: Launcher) -> None:
    x = np.array([[[3e38, -3e38, 3e38, 0.0]]], np.float32)
    got = launcher.launch(kernels.softmax(launcher.capabilities, 1, 1, 4), x)
    assert got.ravel().tolist() == [0.5, 0.0, 0.5, 0.0]


def norm_bound(x: np.ndarray, gamma: np.ndarray, deviation: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Mean and variance are sums of n terms; what they are off by is divided by the deviation."""
    n = x.shape[-1]
    largest = np.abs(x).max(-1, keepdims=True)
    return (n + 8) * EPS * np.abs(gamma) * (1 + 2 * largest / deviation) + 8 * EPS * np.abs(want)


@BOTH
@pytest.mark.parametrize("rows, columns, epsilon", [(1, 1, 1e-5), (1, 384, 1e-12), (77, 33, 1e-12), (300, 384, 1e-12),
                                                    (5, 3, 0.5)])
def test_layer_norm(launcher: Launcher, rows: int, columns: int, epsilon: float, dtype: Dtype) -> None:
    random = np.random.default_rng(columns)
    x = random_array(random, (rows, columns), dtype, 3.0)
    gamma, beta = random_array(random, (columns,), dtype), random_array(random, (columns,), dtype)
    got = launcher.launch(kernels.layer_norm(launcher.capabilities, rows, columns, epsilon=epsilon, dtype=dtype),
                          x, gamma, beta)
    centred = exact(x) - exact(x).mean(-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon)
    want = centred / deviation * exact(gamma) + exact(beta)
    assert_close(got, want, norm_bound(exact(x), exact(gamma), deviation, want), dtype)


def test_layer_norm_of_a_constant_row_is_beta(launcher: Launcher) -> None:
    x = np.full((2, 64), 7.0, np.float32)
    gamma, beta = np.ones(64, np.float32), np.arange(64, dtype=np.float32)
    got = launcher.launch(kernels.layer_norm(launcher.capabilities, 2, 64, epsilon=1e-12), x, gamma, beta)
    assert np.array_equal(got, np.stack([beta, beta]))


@BOTH
@pytest.mark.parametrize("parts, rows, columns", [(1, 1, 8), (4, 65, 384), (3, 10, 7)])
def test_add_norm(launcher: Launcher, parts: int, rows: int, columns: int, dtype: Dtype) -> None:
    random = np.random.default_rng(parts)
    x = random_array(random, (parts, rows, columns), Dtype.FP32)
    bias, gamma, beta = (random_array(random, (columns,), dtype) for _ in range(3))
    residual = random_array(random, (rows, columns), dtype)
    got = launcher.launch(kernels.add_norm(launcher.capabilities, parts, rows, columns, epsilon=1e-12, dtype=dtype),
                          x, bias, residual, gamma, beta)
    total = exact(x).sum(0) + exact(bias) + exact(residual)
    centred = total - total.mean(-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-12)
    want = centred / deviation * exact(gamma) + exact(beta)
    terms = np.abs(exact(x)).sum(0) + np.abs(exact(bias)) + np.abs(exact(residual))
    moved = 2.5 * (parts + 2) * EPS * terms.max(-1, keepdims=True) / deviation * np.abs(exact(gamma))
    assert_close(got, want, norm_bound(total, exact(gamma), deviation, want) + moved, dtype)


@BOTH
@pytest.mark.parametrize("rows, columns", [(1, 1), (9, 384), (500, 5)])
def test_normalize(launcher: Launcher, rows: int, columns: int, dtype: Dtype) -> None:
    random = np.random.default_rng(rows)
    x = random_array(random, (rows, columns), dtype)
    x[0] = 0
    got = launcher.launch(kernels.normalize(launcher.capabilities, rows, columns, dtype=dtype), x)
    want = exact(x) / np.maximum(np.linalg.norm(exact(x), axis=1, keepdims=True), 1e-12)
    assert_close(got, want, np.abs(want) * (columns + 4) * EPS, dtype)


@BOTH
@pytest.mark.parametrize("normalize_floor", [None, 1e-12])
@pytest.mark.parametrize("sequences, length, columns", [(1, 1, 1), (1, 256, 384), (7, 13, 48), (30, 3, 384)])
def test_mean_pool(launcher: Launcher, sequences: int, length: int, columns: int, normalize_floor: float | None,
                   dtype: Dtype) -> None:
    random = np.random.default_rng(length)
    x = random_array(random, (sequences * length, columns), dtype)
    mask = random.random((sequences, length)) < 0.6
    mask[:, 0] = True
    if sequences > 1:
        mask[1] = False
    kernel = kernels.mean_pool(launcher.capabilities, sequences, length, columns, normalize_floor=normalize_floor,
                               dtype=dtype)
    got = launcher.launch(kernel, x, mask)
    x3 = exact(x).reshape(sequences, length, columns)
    count = np.maximum(mask.sum(1), 1e-9)[:, None]
    want = np.einsum("slc,sl->sc", x3, mask) / count
    bound = (length + 3) * EPS * np.einsum("slc,sl->sc", np.abs(x3), mask) / count
    if normalize_floor is not None:
        norm = np.maximum(np.linalg.norm(want, axis=1, keepdims=True), normalize_floor)
        want = want / norm
        moved = np.where(norm > normalize_floor, np.linalg.norm(bound, axis=1, keepdims=True) / norm, 0)
        bound = np.where(norm > normalize_floor, bound / norm, 0) + np.abs(want) * (moved + (columns + 4) * EPS)
    assert_close(got, want, bound, dtype)
    if sequences > 1:
        assert not got[1].any(), "a sequence without tokens gives zeros"
