"""The element types of the contract: their numbers, their sizes, and how their rows lie in memory.

MX types (OCP Microscaling Formats v1.0) are rows of blocks: 32 elements share one scale, a power of two in E8M0. A row
of n elements lies as its elements, then its n / 32 scales, a byte each:

    | e0 e1 ... e31 | e32 ... e63 | ... | s0 s1 ... |

Elements of 4 and 6 bits are packed from the lowest bit up: element i takes bits i * width and following of the row.
"""

from __future__ import annotations

import enum
from typing import Any

import ml_dtypes
import numpy as np

MX_BLOCK = 32
"""Elements that share a scale."""


class Dtype(enum.IntEnum):
    """Element types; those past UINT8 came with image minor 1."""

    FP32 = 1
    FP16 = 2
    BF16 = 3
    INT32 = 4
    UINT8 = 5
    INT8 = 6
    FP8_E4M3 = 7
    FP8_E5M2 = 8
    MXFP8_E4M3 = 9
    MXFP8_E5M2 = 10
    MXFP6_E2M3 = 11
    MXFP6_E3M2 = 12
    MXFP4_E2M1 = 13
    MXINT8 = 14


DTYPE_BITS = np.array([0, 32, 16, 16, 32, 8, 8, 8, 8, 8, 8, 6, 6, 4, 8], np.int64)
"""Bits an element, scales aside."""
MX_DTYPES = frozenset(d for d in Dtype if d >= Dtype.MXFP8_E4M3)
FLOATS = frozenset({Dtype.FP32, Dtype.FP16, Dtype.BF16, Dtype.FP8_E4M3, Dtype.FP8_E5M2, *MX_DTYPES})
"""What tensor and vector units take as numbers with a fraction."""
INTEGERS = frozenset({Dtype.INT8, Dtype.INT32})
MINOR_0_DTYPES = frozenset({Dtype.FP32, Dtype.FP16, Dtype.BF16, Dtype.INT32, Dtype.UINT8})
"""What images of version 1.0 have."""

NUMPY_DTYPES: dict[Dtype, np.dtype[Any]] = {
    Dtype.FP32: np.dtype("<f4"), Dtype.FP16: np.dtype("<f2"), Dtype.BF16: np.dtype(ml_dtypes.bfloat16),
    Dtype.INT32: np.dtype("<i4"), Dtype.UINT8: np.dtype("u1"), Dtype.INT8: np.dtype("i1"),
    Dtype.FP8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn), Dtype.FP8_E5M2: np.dtype(ml_dtypes.float8_e5m2),
    **{d: np.dtype("u1") for d in MX_DTYPES},
}
"""What memory of each is in numpy; MX rows are bytes, see `array_shape`."""


def row_bytes(dtype: Dtype, elements: int) -> int:
    """Bytes of a row of so many elements, scales included; of an MX type, a multiple of 32."""
    size = elements * int(DTYPE_BITS[dtype]) // 8
    return size + elements // MX_BLOCK if dtype in MX_DTYPES else size


def array_shape(dtype: Dtype, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The numpy shape of elements of this shape: the last axis of an MX type is the bytes of a row.

    Examples
    --------
    >>> array_shape(Dtype.MXFP4_E2M1, (8, 64)), array_shape(Dtype.BF16, (8, 64))
    ((8, 34), (8, 64))
    """
    return (*shape[:-1], row_bytes(dtype, shape[-1])) if dtype in MX_DTYPES else shape
