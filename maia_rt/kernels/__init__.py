"""Kernels that real models need, as functions of a device's capabilities, and the builder to write more."""

from maia_rt.kernels.activation_gradient import gelu_gradient, relu_gradient
from maia_rt.kernels.attention import attention
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.column_sum import column_sum
from maia_rt.kernels.conversion import convert
from maia_rt.kernels.cross_entropy import cross_entropy
from maia_rt.kernels.elementwise import add, gelu
from maia_rt.kernels.embedding import embedding
from maia_rt.kernels.feed_forward import feed_forward, parts_of
from maia_rt.kernels.matmul import matmul
from maia_rt.kernels.normalization import add_norm, layer_norm, normalize
from maia_rt.kernels.optimizer import adam, adam_numbers, sgd
from maia_rt.kernels.pooling import mean_pool
from maia_rt.kernels.projection import matmul_add_norm
from maia_rt.kernels.reduction import reduction
from maia_rt.kernels.softmax import softmax
from maia_rt.kernels.tile import TileBuilder

__all__ = [
    "KernelBuilder",
    "TileBuilder",
    "adam",
    "adam_numbers",
    "add",
    "add_norm",
    "attention",
    "column_sum",
    "convert",
    "cross_entropy",
    "embedding",
    "feed_forward",
    "gelu",
    "gelu_gradient",
    "layer_norm",
    "matmul",
    "matmul_add_norm",
    "mean_pool",
    "normalize",
    "parts_of",
    "reduction",
    "relu_gradient",
    "sgd",
    "softmax",
]
