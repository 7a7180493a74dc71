"""The encoder in plain numpy, FP32, written to be fast: what the device is timed beside.

Best practice for numpy: all linear layers of a batch as large BLAS products on every core, weights laid out for them
once, query, key and value in one product, results written in place, and elementwise work cut into blocks that stay in
the cache. It runs the same batches as the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from maia_tools.batches import Batch
from maia_tools.weights import Layer, Weights

BLOCK_ROWS = 64
"""Rows of the feed-forward layer that GELU is applied to at a time: about 400 kB."""


class _LaidOut:
    """A layer with its weights as (inputs, outputs), query, key and value side by side."""

    def __init__(self, layer: Layer) -> None:
        attention = (layer.query, layer.key, layer.value)
        self.layer = layer
        self.qkv = np.ascontiguousarray(np.concatenate([x.weight for x in attention]).T)
        self.qkv_bias = np.concatenate([x.bias for x in attention])
        self.output, self.inner, self.outer = (
            np.ascontiguousarray(x.weight.T) for x in (layer.output, layer.inner, layer.outer))


class PlainEncoder:
    """The encoder with its weights laid out.

    Parameters
    ----------
    weights : Weights
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._layers = [_LaidOut(layer) for layer in weights.layers]

    def encode(self, batches: Sequence[Batch]) -> np.ndarray:
        """Embeddings (sentences, hidden) in FP32, in the order the sentences were given."""
        count = sum(len(b.places) for b in batches)
        out = np.zeros((count, self._weights.shape.hidden), np.float32)
        for batch in batches:
            out[list(batch.places)] = self._batch(batch)
        return out

    def _batch(self, batch: Batch) -> np.ndarray:
        weights, shape = self._weights, self._weights.shape
        sequences, length = batch.shape
        x = weights.word[batch.ids.ravel()]
        x.reshape(sequences, length, -1)[...] += weights.position[:length] + weights.type[0]
        _norm(x, weights.norm.gamma, weights.norm.beta, shape.epsilon)
        hide = ((1 - batch.mask) * np.float32(-1e9))[:, None, None, :]
        padded = bool((batch.mask == 0).any())
        for laid in self._layers:
            layer = laid.layer
            qkv = x @ laid.qkv
            qkv += laid.qkv_bias
            q, k, v = qkv.reshape(sequences, length, 3, shape.heads, shape.head_size).transpose(2, 0, 3, 1, 4)
            scores = np.matmul(q, k.swapaxes(-1, -2))
            scores *= np.float32(1 / math.sqrt(shape.head_size))
            if padded:
                scores += hide
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            context = np.matmul(scores, v).transpose(0, 2, 1, 3).reshape(x.shape)
            attended = context @ laid.output
            attended += layer.output.bias
            attended += x
            x = _norm(attended, layer.output_norm.gamma, layer.output_norm.beta, shape.epsilon)
            hidden = x @ laid.inner
            for start in range(0, len(hidden), BLOCK_ROWS):
                block = hidden[start : start + BLOCK_ROWS]
                block += layer.inner.bias
                _gelu(block)
            fed = hidden @ laid.outer
            fed += layer.outer.bias
            fed += x
            x = _norm(fed, layer.outer_norm.gamma, layer.outer_norm.beta, shape.epsilon)
        tokens = x.reshape(sequences, length, -1)
        pooled: np.ndarray = np.matmul(batch.mask[:, None, :], tokens)[:, 0]
        pooled /= np.maximum(batch.mask.sum(axis=1, keepdims=True), np.float32(1e-9))
        pooled /= np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), np.float32(1e-12))
        return pooled


def _norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, epsilon: float) -> np.ndarray:
    """Layer norm of the rows, in place."""
    x -= x.mean(axis=1, keepdims=True)
    variance = np.einsum("ij,ij->i", x, x)[:, None] / np.float32(x.shape[1])
    x /= np.sqrt(variance + np.float32(epsilon))
    x *= gamma
    x += beta
    return x


_LOG_ODDS = tuple(np.float32(c) for c in (
    1.595768433, 7.266856471e-02, -6.625790858e-05, -1.104809895e-04, 7.938315047e-06, -2.668989397e-07,
    3.611373118e-09))
_FARTHEST = np.float32(31.36)


def _gelu(x: np.ndarray) -> None:
    """``x * Phi(x)`` in place, within 7e-8 plus FP32's own rounding.

    numpy has no erf. But the log-odds of Phi, ``log(Phi(x) / Phi(-x))``, are x times a smooth function of x squared: a
    polynomial of degree 6 up to |x| = 5.6 (our own fit, weighted by what an error costs in the result) and one exp,
    which numpy vectorizes.
    """
    square = x * x
    np.minimum(square, _FARTHEST, out=square)
    odds = square * _LOG_ODDS[-1]
    for coefficient in _LOG_ODDS[-2:0:-1]:
        odds += coefficient
        odds *= square
    odds += _LOG_ODDS[0]
    odds *= x
    np.negative(odds, out=odds)
    np.exp(odds, out=odds)
    odds += np.float32(1)
    x /= odds
