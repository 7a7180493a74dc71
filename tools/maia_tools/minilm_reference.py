"""The encoder in float64, one sentence at a time without padding: what every other result is measured against.

Written from the model's definition and sharing nothing with the kernels or the fast numpy version but the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from maia_tools.tokens import Sentence
from maia_tools.weights import Layer, Linear, Norm, Weights


def encode(weights: Weights, sentences: Sequence[Sentence],
           advance: Callable[[int], object] = lambda done: None) -> np.ndarray:
    """Embeddings in float64.

    Parameters
    ----------
    weights : Weights
    sentences : sequence of Sentence
    advance : callable
        Called with 1 after each sentence.

    Returns
    -------
    ndarray of float64
        (sentences, hidden), each row of length 1.
    """
    out = np.zeros((len(sentences), weights.shape.hidden))
    for row, sentence in enumerate(sentences):
        out[row] = _embed(weights, sentence.ids)
        advance(1)
    return out


def _embed(weights: Weights, ids: np.ndarray) -> np.ndarray:
    x = weights.word[ids].astype(np.float64) + weights.position[: len(ids)] + weights.type[0]
    x = _norm(x, weights.norm, weights.shape.epsilon)
    for layer in weights.layers:
        x = _layer(x, layer, weights.shape.heads, weights.shape.epsilon)
    pooled = x.mean(axis=0)
    unit: np.ndarray = pooled / np.linalg.norm(pooled)
    return unit


def _layer(x: np.ndarray, layer: Layer, heads: int, epsilon: float) -> np.ndarray:
    tokens, hidden = x.shape
    size = hidden // heads
    query, key, value = (_linear(x, part).reshape(tokens, heads, size)
                         for part in (layer.query, layer.key, layer.value))
    context = np.empty_like(query)
    for head in range(heads):
        scores = query[:, head] @ key[:, head].T / math.sqrt(size)
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        context[:, head] = powers / powers.sum(axis=1, keepdims=True) @ value[:, head]
    x = _norm(x + _linear(context.reshape(tokens, hidden), layer.output), layer.output_norm, epsilon)
    return _norm(x + _linear(_gelu(_linear(x, layer.inner)), layer.outer), layer.outer_norm, epsilon)


def _linear(x: np.ndarray, linear: Linear) -> np.ndarray:
    y: np.ndarray = x @ linear.weight.T.astype(np.float64) + linear.bias
    return y


def _norm(x: np.ndarray, norm: Norm, epsilon: float) -> np.ndarray:
    centred = x - x.mean(axis=1, keepdims=True)
    y: np.ndarray = centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + epsilon) * norm.gamma + norm.beta
    return y


def _gelu(x: np.ndarray) -> np.ndarray:
    """With the C library's erf, value by value: right to the last bit or two of float64."""
    erf = np.fromiter(map(math.erf, (x / math.sqrt(2)).ravel().tolist()), np.float64, x.size).reshape(x.shape)
    y: np.ndarray = x / 2 * (1 + erf)
    return y
