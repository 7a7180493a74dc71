"""The encoder as launches: which kernels, on which buffers, in which order. Nothing here touches a device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maia_rt import kernels
from maia_rt.contract.program import Capabilities, Dtype, KernelImage
from maia_tools.weights import Linear, Shape, Weights

MEAN_FLOOR = 1e-9
NORM_FLOOR = 1e-12
"""What sentence-transformers divides by at least, in pooling and in normalising."""


@dataclass(frozen=True)
class Launch:
    """A kernel by its name, and its arguments by the names of buffers."""

    kernel: str
    buffers: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All that a batch of one shape needs.

    Attributes
    ----------
    kernels : tuple of KernelImage
    launches : tuple of Launch
        In order; each reads what earlier ones wrote.
    buffers : dict of str to (Dtype, shape)
        Every buffer but the weights: the inputs ``ids`` and ``mask``, the result ``embeddings``, and what is between.
    """

    kernels: tuple[KernelImage, ...]
    launches: tuple[Launch, ...]
    buffers: dict[str, tuple[Dtype, tuple[int, ...]]]

    @property
    def macs(self) -> int:
        """Multiply-adds of the tensor units for one batch."""
        each = {k.name: k.macs for k in self.kernels}
        return sum(each[launch.kernel] for launch in self.launches)


def plan(shape: Shape, capabilities: Capabilities, sequences: int, length: int) -> Plan:
    """The launches for a batch.

    Parameters
    ----------
    shape : Shape
        Of the model.
    capabilities : Capabilities
        Of the device.
    sequences, length : int
        Of the batch.

    Returns
    -------
    Plan
        Five launches a layer, and one before and one after. Weights go by the names that `parameters` gives them.
    """
    tokens, hidden = sequences * length, shape.hidden
    parts = kernels.parts_of(capabilities, shape.inner)
    built = (
        kernels.embedding(capabilities, tokens, hidden, words=shape.words, positions=shape.positions,
                          types=shape.types, epsilon=shape.epsilon),
        kernels.matmul(capabilities, tokens, 3 * hidden, hidden, bias=True, name="query_key_value"),
        kernels.attention(capabilities, sequences, length, shape.heads, shape.head_size),
        kernels.matmul_add_norm(capabilities, tokens, hidden, hidden, epsilon=shape.epsilon),
        kernels.feed_forward(capabilities, tokens, hidden, shape.inner),
        kernels.add_norm(capabilities, parts, tokens, hidden, epsilon=shape.epsilon),
        kernels.mean_pool(capabilities, sequences, length, hidden, floor=MEAN_FLOOR, normalize_floor=NORM_FLOOR),
    )
    launches = [Launch("embedding", ("ids", "word", "position", "type", "norm.gamma", "norm.beta", "x"))]
    for i in range(shape.layers):
        at = f"layer{i}"
        launches += [
            Launch("query_key_value", ("x", f"{at}.qkv.weight", f"{at}.qkv.bias", "qkv")),
            Launch("attention", ("qkv", "mask", "context")),
            Launch("matmul_add_norm", ("context", f"{at}.output.weight", f"{at}.output.bias", "x",
                                       f"{at}.output_norm.gamma", f"{at}.output_norm.beta", "attended")),
            Launch("feed_forward", ("attended", f"{at}.inner.weight", f"{at}.inner.bias", f"{at}.outer.weight",
                                    "parts")),
            Launch("add_norm", ("parts", f"{at}.outer.bias", "attended", f"{at}.outer_norm.gamma",
                                f"{at}.outer_norm.beta", "x")),
        ]
    launches.append(Launch("mean_pool", ("x", "mask", "embeddings")))
    buffers = {
        "ids": (Dtype.INT32, (3, tokens)), "mask": (Dtype.FP32, (sequences, length)),
        "x": (Dtype.FP32, (tokens, hidden)), "qkv": (Dtype.FP32, (tokens, 3 * hidden)),
        "context": (Dtype.FP32, (tokens, hidden)), "attended": (Dtype.FP32, (tokens, hidden)),
        "parts": (Dtype.FP32, (parts, tokens, hidden)), "embeddings": (Dtype.FP32, (sequences, hidden)),
    }
    return Plan(built, tuple(launches), buffers)


def parameters(weights: Weights) -> dict[str, np.ndarray]:
    """The weights as the kernels take them, by name: (inputs, outputs), with query, key and value side by side."""
    named = {"word": weights.word, "position": weights.position, "type": weights.type,
             "norm.gamma": weights.norm.gamma, "norm.beta": weights.norm.beta}
    for i, layer in enumerate(weights.layers):
        at = f"layer{i}"
        attention = (layer.query, layer.key, layer.value)
        qkv = Linear(np.concatenate([x.weight for x in attention]), np.concatenate([x.bias for x in attention]))
        for name, linear in (("qkv", qkv), ("output", layer.output), ("inner", layer.inner), ("outer", layer.outer)):
            named[f"{at}.{name}.weight"] = np.ascontiguousarray(linear.weight.T)
            named[f"{at}.{name}.bias"] = linear.bias
        for name, norm in (("output_norm", layer.output_norm), ("outer_norm", layer.outer_norm)):
            named[f"{at}.{name}.gamma"], named[f"{at}.{name}.beta"] = norm.gamma, norm.beta
    return named


def inputs(ids: np.ndarray) -> np.ndarray:
    """The ``ids`` buffer (3, tokens) of a batch's token ids: words, positions, and token types, which are all 0."""
    sequences, length = ids.shape
    out = np.zeros((3, sequences * length), np.int32)
    out[0] = ids.ravel()
    out[1] = np.tile(np.arange(length, dtype=np.int32), sequences)
    return out
