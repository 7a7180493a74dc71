"""Arrays as MX rows and back, on the host (OCP Microscaling Formats v1.0, sections 5 and 6.3).

The same conversion as the device's CONVERT, bit for bit: the scale of 32 elements is 2^(floor(log2(amax)) - emax), at
least 2^-127, with amax the block's largest magnitude and emax the exponent of the element type's largest number;
elements are rounded to nearest even and saturate. A block with a NaN or an infinity gets the scale 0xff, which is NaN.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from maia_rt.contract.dtype import DTYPE_BITS, MX_BLOCK, MX_DTYPES, Dtype
from maia_rt.errors import InvalidArgument, InvalidType

_NAN_SCALE = 255
_ELEMENTS: dict[Dtype, np.dtype[Any]] = {
    Dtype.MXFP8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn), Dtype.MXFP8_E5M2: np.dtype(ml_dtypes.float8_e5m2),
    Dtype.MXFP6_E2M3: np.dtype(ml_dtypes.float6_e2m3fn), Dtype.MXFP6_E3M2: np.dtype(ml_dtypes.float6_e3m2fn),
    Dtype.MXFP4_E2M1: np.dtype(ml_dtypes.float4_e2m1fn),
}
_INT8_STEP = 64.0
"""MXINT8 elements are 8-bit integers over this."""
_LARGEST: dict[Dtype, tuple[float, int]] = {
    Dtype.MXFP8_E4M3: (448.0, 8), Dtype.MXFP8_E5M2: (57344.0, 15), Dtype.MXFP6_E2M3: (7.5, 2),
    Dtype.MXFP6_E3M2: (28.0, 4), Dtype.MXFP4_E2M1: (6.0, 2), Dtype.MXINT8: (127 / _INT8_STEP, 0),
}
"""Each element type's largest number, and its exponent."""


def to_mx(array: npt.ArrayLike, dtype: Dtype) -> npt.NDArray[np.uint8]:
    """Quantize an array to an MX type.

    Parameters
    ----------
    array : array-like
        Shape (..., n), n a multiple of 32; taken as float32.
    dtype : Dtype
        An MX type.

    Returns
    -------
    ndarray of uint8
        Shape (..., row bytes): each row's elements, then its n / 32 scales; what a kernel's MX argument takes.

    Raises
    ------
    InvalidType
        `dtype` is no MX type, or the array holds no numbers.
    InvalidArgument
        Rows that are no multiple of 32.

    Examples
    --------
    >>> import numpy as np
    >>> raw = to_mx(np.ones((2, 32)), Dtype.MXFP4_E2M1)
    >>> raw.shape, int(raw[0, -1])
    ((2, 17), 125)
    >>> bool((from_mx(raw, Dtype.MXFP4_E2M1) == 1).all())
    True
    """
    _check(dtype)
    try:
        values = np.asarray(array, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidType("to_mx takes an array of numbers", cause=str(error)) from None
    if not values.ndim or not values.size or values.shape[-1] % MX_BLOCK:
        raise InvalidArgument(f"to_mx of shape {values.shape}", cause=f"MX rows are blocks of {MX_BLOCK}",
                              hint=f"make the last axis a multiple of {MX_BLOCK}")
    blocks = np.ascontiguousarray(values).reshape(*values.shape[:-1], -1, MX_BLOCK)
    exponent = (np.abs(blocks).view(np.uint32).max(axis=-1) >> 23).astype(np.int32)
    scale = np.where(exponent == _NAN_SCALE, _NAN_SCALE, np.maximum(exponent - _LARGEST[dtype][1], 0))
    finite = np.where((scale == _NAN_SCALE)[..., None], np.float32(0), blocks)
    codes = _codes(np.ldexp(finite, (127 - scale)[..., None]), dtype).reshape(values.shape)
    return np.concatenate([_packed(codes, int(DTYPE_BITS[dtype])), scale.astype(np.uint8)], axis=-1)


def from_mx(raw: npt.NDArray[np.uint8], dtype: Dtype) -> npt.NDArray[np.float32]:
    """The numbers in MX rows, exactly; what is past float32 is infinity.

    Parameters
    ----------
    raw : ndarray of uint8
        Shape (..., row bytes).
    dtype : Dtype
        An MX type.

    Returns
    -------
    ndarray of float32
        Shape (..., n).

    Raises
    ------
    InvalidType
        `dtype` is no MX type, or `raw` is no array of bytes.
    InvalidArgument
        Rows of a length that no blocks have.
    """
    _check(dtype)
    if not isinstance(raw, np.ndarray) or raw.dtype != np.uint8:
        raise InvalidType("from_mx takes an ndarray of uint8", hint="pass what to_mx or the device wrote")
    bits = int(DTYPE_BITS[dtype])
    block = MX_BLOCK * bits // 8
    if not raw.ndim or not raw.shape[-1] or raw.shape[-1] % (block + 1):
        raise InvalidArgument(f"from_mx of shape {raw.shape}", cause=f"a block of {dtype.name} has {block + 1} bytes")
    count = raw.shape[-1] // (block + 1)
    codes = _unpacked(raw[..., : count * block], bits)
    if dtype is Dtype.MXINT8:
        values = codes.view(np.int8).astype(np.float32) / np.float32(_INT8_STEP)
    else:
        values = codes.view(_ELEMENTS[dtype]).astype(np.float32)
    scale = raw[..., count * block :].astype(np.int32)[..., None]
    with np.errstate(over="ignore"):
        out = np.ldexp(values.reshape(*raw.shape[:-1], count, MX_BLOCK), scale - 127)
    return np.where(scale == _NAN_SCALE, np.float32(np.nan), out).astype(np.float32).reshape(*raw.shape[:-1], -1)


def _check(dtype: Dtype) -> None:
    if not isinstance(dtype, Dtype) or dtype not in MX_DTYPES:
        raise InvalidType(f"{dtype!r} is no MX type", hint=f"one of {', '.join(d.name for d in sorted(MX_DTYPES))}")


def _codes(scaled: npt.NDArray[np.float32], dtype: Dtype) -> npt.NDArray[np.uint8]:
    """Elements, one a byte."""
    rounded: npt.NDArray[Any]
    if dtype is Dtype.MXINT8:
        rounded = np.clip(np.rint(scaled * np.float32(_INT8_STEP)), -127, 127).astype(np.int8)
    else:
        most = _LARGEST[dtype][0]
        rounded = np.clip(scaled, -most, most).astype(_ELEMENTS[dtype])
    codes: npt.NDArray[np.uint8] = rounded.view(np.uint8)
    return codes


def _packed(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return codes
    if bits == 4:
        return np.asarray(codes[..., 0::2] | codes[..., 1::2] << 4, np.uint8)
    four = codes.reshape(*codes.shape[:-1], -1, 4).astype(np.uint32)
    word = four[..., 0] | four[..., 1] << 6 | four[..., 2] << 12 | four[..., 3] << 18
    return np.stack([word >> 8 * i & 255 for i in range(3)], axis=-1).astype(np.uint8).reshape(*codes.shape[:-1], -1)


def _unpacked(raw: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return np.ascontiguousarray(raw)
    if bits == 4:
        return np.stack([raw & 15, raw >> 4], axis=-1).astype(np.uint8).reshape(*raw.shape[:-1], -1)
    three = raw.reshape(*raw.shape[:-1], -1, 3).astype(np.uint32)
    word = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16
    return np.stack([word >> 6 * i & 63 for i in range(4)], axis=-1).astype(np.uint8).reshape(*raw.shape[:-1], -1)
