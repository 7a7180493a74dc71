"""Kernels in FP8, MX and INT8: products of any size, quantizing and dequantizing, on every kind of device."""

from __future__ import annotations

import numpy as np
import pytest

import maia_rt
from maia_rt import kernels
from maia_rt.contract import program
from maia_rt.contract.dtype import MX_DTYPES, NUMPY_DTYPES, Dtype
from maia_rt.contract.microscaling import from_mx, to_mx
from maia_rt.errors import InvalidArgument, InvalidType, ProgramError
from tests.helpers.launching import LONE, SMALL, TIGHT, DeviceLauncher, Launcher
from tests.helpers.rounding import UNIT, assert_close, exact, matmul_bound

NARROW = [Dtype.FP8_E4M3, Dtype.FP8_E5M2, *sorted(MX_DTYPES)]


def quantized(x: np.ndarray, dtype: Dtype) -> np.ndarray:
    return to_mx(x, dtype) if dtype in MX_DTYPES else x.astype(NUMPY_DTYPES[dtype])


def values_of(raw: np.ndarray, dtype: Dtype) -> np.ndarray:
    return from_mx(raw, dtype) if dtype in MX_DTYPES else raw.astype(np.float32)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("m, n, k", [(1, 1, 32), (33, 65, 96), (70, 40, 2080)])
def test_product_is_within_the_bound_of_its_sums(launcher: Launcher, m: int, n: int, k: int, dtype: Dtype) -> None:
    random = np.random.default_rng(m + n)
    a, b = (quantized(random.standard_normal(s).astype(np.float32), dtype) for s in ((m, k), (n, k)))
    kernel = kernels.matmul(launcher.capabilities, m, n, k, dtype=dtype, transpose_b=True)
    wide_a, wide_b = values_of(a, dtype), values_of(b, dtype).T
    assert_close(launcher.launch(kernel, a, b), exact(wide_a) @ exact(wide_b), matmul_bound(wide_a, wide_b), Dtype.FP32)


def test_depth_is_cut_between_blocks_where_sram_is_small() -> None:
    kernel = kernels.matmul(TIGHT, 70, 40, 8224, dtype=Dtype.MXFP6_E3M2, transpose_b=True)
    tensor = np.concatenate([s.ops for s in kernel.streams if s.engine == program.Engine.TENSOR])
    assert (tensor["n"][:, 2] % 32 == 0).all() and (tensor["n"][:, 2] < 8224).all()


@pytest.mark.parametrize("transpose_b", [False, True])
def test_int8_product_with_bias_is_exact(launcher: Launcher, transpose_b: bool) -> None:
    random = np.random.default_rng(2)
    m, n, k = 37, 50, 1500
    a, b = (random.integers(-128, 128, s).astype(np.int8) for s in ((m, k), (k, n)))
    bias = random.integers(-1000, 1000, n).astype(np.int32)
    kernel = kernels.matmul(launcher.capabilities, m, n, k, dtype=Dtype.INT8, bias=True, transpose_b=transpose_b)
    got = launcher.launch(kernel, a, b.T if transpose_b else b, bias)
    assert np.array_equal(got, a.astype(np.int64) @ b + bias)


@pytest.mark.parametrize("dtype", [Dtype.FP8_E4M3, Dtype.MXFP4_E2M1])
def test_product_with_bias_and_gelu_rounds_once_to_the_result(launcher: Launcher, dtype: Dtype) -> None:
    random = np.random.default_rng(3)
    a, b = (quantized(random.standard_normal(s).astype(np.float32), dtype) for s in ((20, 64), (48, 64)))
    bias = random.standard_normal(48).astype(NUMPY_DTYPES[Dtype.BF16])
    kernel = kernels.matmul(launcher.capabilities, 20, 48, 64, dtype=dtype, result=Dtype.BF16, bias=True,
                            transpose_b=True)
    wide_a, wide_b = values_of(a, dtype), values_of(b, dtype).T
    want = exact(wide_a) @ exact(wide_b) + exact(bias)
    assert_close(launcher.launch(kernel, a, b, bias), want, matmul_bound(wide_a, wide_b) + UNIT[Dtype.FP32] * abs(want),
                 Dtype.BF16)


@pytest.mark.parametrize("dtype", NARROW)
def test_quantizing_gives_the_bytes_of_the_host_and_dequantizing_their_values(launcher: Launcher, dtype: Dtype) -> None:
    x = (np.random.default_rng(4).standard_normal((37, 160)) * 100).astype(np.float32)
    raw = launcher.launch(kernels.convert(launcher.capabilities, 37, 160, Dtype.FP32, dtype), x)
    want = quantized(np.clip(x, -448, 448) if dtype is Dtype.FP8_E4M3 else x, dtype)
    assert np.array_equal(raw.view(np.uint8), want.view(np.uint8))
    back = launcher.launch(kernels.convert(launcher.capabilities, 37, 160, dtype, Dtype.FP32), raw)
    assert np.array_equal(back, values_of(raw, dtype))


def test_int8_is_quantized_by_a_factor_given_at_launch(device: maia_rt.Device, device_launcher: DeviceLauncher) -> None:
    x = np.linspace(-2, 2, 128, dtype=np.float32).reshape(2, 64)
    image = kernels.convert(device_launcher.capabilities, 2, 64, Dtype.FP32, Dtype.INT8, scaled=True)
    with device.load(program.write([image])) as loaded, device.upload(x) as given, \
            device.allocate((2, 64), np.int8) as out:
        device_launcher.stream.launch(loaded["convert"], given, out, 100.0)
        got = out.copy_to_host(device_launcher.stream)
    assert np.array_equal(got, np.clip(np.rint(x * np.float32(100)), -128, 127))


def test_types_that_do_not_go_together_are_refused() -> None:
    for options, kind in (
        ({"dtype": Dtype.MXFP8_E4M3}, InvalidType), ({"dtype": Dtype.UINT8}, InvalidType),
        ({"dtype": Dtype.INT8, "gelu": True}, InvalidType), ({"dtype": Dtype.INT8, "result": Dtype.FP32}, InvalidType),
        ({"dtype": Dtype.FP32, "result": Dtype.INT32}, InvalidType), ({"dtype": Dtype.INT32}, InvalidType),
        ({"dtype": Dtype.FP32, "result": Dtype.MXINT8}, InvalidType),
    ):
        with pytest.raises(kind):
            kernels.matmul(SMALL, 32, 32, 32, **options)
    with pytest.raises(InvalidArgument, match="k is 33"):
        kernels.matmul(SMALL, 32, 32, 33, dtype=Dtype.MXINT8, transpose_b=True)
    with pytest.raises(InvalidType, match="moved only"):
        kernels.convert(SMALL, 2, 32, Dtype.UINT8, Dtype.FP32)
    with pytest.raises(InvalidArgument, match="MXINT8 of shape"):
        kernels.convert(SMALL, 2, 33, Dtype.FP32, Dtype.MXINT8)
    with pytest.raises(ProgramError, match="do not fit"):
        kernels.convert(LONE, 2, 1 << 20, Dtype.FP32, Dtype.MXINT8)
