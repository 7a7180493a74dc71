"""Attention against float64: odd lengths, padding, whole sequences masked out, 256 tokens, more heads than SRAM holds.

Tolerance: scores are sums of ``head size`` products; an error s in the scores moves a probability by at most 2 s of
itself; the result is a mean of values weighted by probabilities, so its error is at most that times the largest value,
plus the rounding of its own sum.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from maia_rt import kernels
from maia_rt.contract.program import Dtype
from maia_rt.errors import ProgramError
from tests.helpers.launching import Launcher
from tests.helpers.rounding import EPS, assert_close, exact, random_array


def reference(qkv: np.ndarray, mask: np.ndarray, heads: int, head_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The result and the bound on its error, both (sequences, length, heads * head size)."""
    sequences, length = mask.shape
    q, k, v = exact(qkv).reshape(sequences, length, 3, heads, head_size).transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(head_size)
    keep = np.broadcast_to((exact(mask) != 0)[:, None, None, :], scores.shape)
    shifted = np.where(keep, scores - np.where(keep, scores, -np.inf).max(-1, initial=-1e30, keepdims=True), -np.inf)
    e = np.exp(shifted)
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total > 0, total, 1)
    magnitude = (np.abs(q) @ np.abs(k).swapaxes(-1, -2) / math.sqrt(head_size)).max(-1, keepdims=True)
    moved = 2 * (head_size + 4) * EPS * magnitude + (2 * length + 16) * EPS
    bound = moved * (p @ np.abs(v))
    shape = (sequences * length, heads * head_size)
    return (p @ v).transpose(0, 2, 1, 3).reshape(shape), bound.transpose(0, 2, 1, 3).reshape(shape)


@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.BF16])
@pytest.mark.parametrize("sequences, length, heads, head_size", [
    (1, 1, 1, 1), (3, 7, 2, 5), (2, 33, 12, 32), (9, 12, 12, 32), (5, 2, 3, 8), (1, 100, 5, 16)])
def test_attention_is_within_the_bound_of_its_sums(
        launcher: Launcher, sequences: int, length: int, heads: int, head_size: int, dtype: Dtype) -> None:
    random = np.random.default_rng(length)
    qkv = random_array(random, (sequences * length, 3 * heads * head_size), dtype)
    mask = random.random((sequences, length)) < 0.7
    mask[0] = False
    mask[-1, 0] = True
    kernel = kernels.attention(launcher.capabilities, sequences, length, heads, head_size, dtype=dtype)
    got = launcher.launch(kernel, qkv, mask)
    want, bound = reference(qkv, mask, heads, head_size)
    assert_close(got, want, bound, dtype)
    if sequences > 1:
        assert not got[:length].any(), "a sequence without tokens gives zeros"


def test_the_longest_sequence_of_the_model(launcher: Launcher) -> None:
    random = np.random.default_rng(1)
    qkv = random_array(random, (256, 3 * 384), Dtype.FP32)
    mask = np.ones((1, 256), bool)
    if launcher.capabilities.tile_sram_bytes < 4 * 256 * 32 * 4:
        with pytest.raises(ProgramError, match="one query over 256 tokens does not fit"):
            kernels.attention(launcher.capabilities, 1, 256, 12, 32)
        return
    got = launcher.launch(kernels.attention(launcher.capabilities, 1, 256, 12, 32), qkv, mask)
    want, bound = reference(qkv, mask, 12, 32)
    assert_close(got, want, bound, Dtype.FP32)


def test_one_kept_token_is_copied_whole(launcher: Launcher) -> None:
    random = np.random.default_rng(2)
    qkv = random_array(random, (6, 3 * 8), Dtype.FP32, 30.0)
    mask = np.array([[0, 0, 0, 1, 0, 0]])
    got = launcher.launch(kernels.attention(launcher.capabilities, 1, 6, 2, 4), qkv, mask)
    assert np.array_equal(got, np.broadcast_to(qkv[3, 16:], (6, 8)))
