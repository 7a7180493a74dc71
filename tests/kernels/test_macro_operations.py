"""Single macro-operations on the device beside the interpreter: all opcodes, dtypes, strides and broadcasts.

Tolerance: both compute in FP32 from the same inputs, so what differs is the order of sums and the last bits of exp,
tanh and erf: a few units, and for results of 16 bits one unit where the two fall on either side of a rounding edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

import maia_rt
from maia_rt.contract import program
from maia_rt.contract.program import NUMPY_DTYPES, ArgKind, Dtype, KernelImage
from maia_rt.errors import DeviceFault, FaultCode
from maia_rt.kernels import KernelBuilder, TileBuilder
from maia_rt.kernels.view import View
from tests.helpers import interpreter
from tests.helpers.launching import DeviceLauncher, arguments
from tests.helpers.rounding import EPS, UNIT, exact, random_array

PLANES, ROWS, COLUMNS = 3, 5, 37
FLOATS = [Dtype.FP32, Dtype.FP16, Dtype.BF16]


def compare(launcher: DeviceLauncher, kernel: KernelImage, inputs: list[np.ndarray], units: float = 8) -> np.ndarray:
    """Launch on both; returns the device's result once it is near the interpreter's."""
    arrays, want = arguments(kernel, inputs)
    interpreter.run(kernel, arrays, 1)
    got = launcher.launch(kernel, *inputs)
    dtype = kernel.args[-1].dtype
    scale = np.maximum(np.abs(exact(want)), np.abs(exact(want)).max() * 1e-3)
    allowed = (units * EPS + (2 * UNIT[dtype] if dtype is not Dtype.FP32 else 0)) * scale + 2.0**-23
    assert (np.abs(exact(got) - exact(want)) <= allowed).all()
    return got


def one_operation(launcher: DeviceLauncher, dtypes: tuple[Dtype, Dtype, Dtype], shapes: list[tuple[int, ...]],
                  write: Callable[[TileBuilder, View, list[View]], object]) -> KernelImage:
    """A kernel that brings its inputs into SRAM, does one thing, and takes the last view out."""
    builder = KernelBuilder("one", launcher.capabilities)
    out, *inputs = shapes
    arguments_in = [builder.argument(f"in{i}", ArgKind.IN, d, s)
                    for i, (s, d) in enumerate(zip(inputs, dtypes[1:], strict=False))]
    result = builder.argument("out", ArgKind.OUT, dtypes[0], out)
    tile = builder.tile(0)
    held = [tile.allocate(a.shape, a.dtype) for a in arguments_in]
    for view, argument in zip(held, arguments_in, strict=True):
        tile.move(view, argument)
    dst = tile.allocate(out, dtypes[0])
    write(tile, dst, held)
    tile.move(result, dst)
    return builder.build()


VECTOR: dict[str, Callable[[TileBuilder, View, list[View]], object]] = {
    "add": lambda t, d, s: t.add(d, s[0], s[1]),
    "subtract": lambda t, d, s: t.subtract(d, s[0], s[1]),
    "multiply": lambda t, d, s: t.multiply(d, s[0], s[1]),
    "scale": lambda t, d, s: t.scale(d, s[0], -1.5, 0.25),
    "convert": lambda t, d, s: t.convert(d, s[0]),
    "gelu": lambda t, d, s: t.gelu(d, s[0]),
    "relu": lambda t, d, s: t.relu(d, s[0]),
    "tanh": lambda t, d, s: t.tanh(d, s[0]),
    "exp": lambda t, d, s: t.exp(d, s[0]),
    "softmax": lambda t, d, s: t.softmax(d, s[0], 0.7),
    "l2_normalize": lambda t, d, s: t.l2_normalize(d, s[0], 1e-6),
}


@pytest.mark.parametrize("dtypes", [(d, d, d) for d in FLOATS] + [(Dtype.FP32, Dtype.BF16, Dtype.FP16),
                                                                  (Dtype.BF16, Dtype.FP32, Dtype.FP32)])
@pytest.mark.parametrize("name", VECTOR)
def test_vector_operation(device_launcher: DeviceLauncher, name: str, dtypes: tuple[Dtype, Dtype, Dtype]) -> None:
    random = np.random.default_rng(len(name))
    shape = (PLANES, ROWS, COLUMNS)
    kernel = one_operation(device_launcher, dtypes, [shape, shape, shape], VECTOR[name])
    compare(device_launcher, kernel, [random_array(random, shape, d, 2.0) for d in dtypes[1:]], 16)


@pytest.mark.parametrize("shape", [(COLUMNS,), (ROWS, COLUMNS), (PLANES, 1, COLUMNS), (1, ROWS, COLUMNS)])
def test_sources_are_shown_again_along_rows_and_planes(device_launcher: DeviceLauncher, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(1)
    whole = (PLANES, ROWS, COLUMNS)
    kernel = one_operation(device_launcher, (Dtype.FP32,) * 3, [whole, whole, shape], VECTOR["add"])
    a, b = random_array(random, whole, Dtype.FP32), random_array(random, shape, Dtype.FP32)
    assert np.array_equal(compare(device_launcher, kernel, [a, b]), a + b)


def test_scalars_are_given_at_launch(device: maia_rt.Device, device_launcher: DeviceLauncher) -> None:
    builder = KernelBuilder("affine", device_launcher.capabilities)
    x = builder.argument("x", ArgKind.INOUT, Dtype.FP32, (100,))
    factor, shift = builder.scalar("factor"), builder.scalar("shift")
    tile = builder.tile(0)
    held = tile.allocate((100,), Dtype.FP32)
    tile.move(held, x)
    tile.scale(held, held, factor, shift)
    tile.move(x, held)
    values = np.arange(100, dtype=np.float32)
    with device.load(program.write([builder.build()])) as loaded, device.upload(values) as buffer:
        for a, b in ((2.0, 1.0), (-0.5, 3.0)):
            device_launcher.stream.launch(loaded["affine"], buffer, a, b)
            values = values * np.float32(a) + np.float32(b)
        out = np.empty_like(values)
        device_launcher.stream.copy(out, buffer)
    assert np.array_equal(out, values)


@pytest.mark.parametrize("dtypes", [(Dtype.FP32, Dtype.FP32, Dtype.FP32), (Dtype.BF16, Dtype.BF16, Dtype.BF16),
                                    (Dtype.FP32, Dtype.FP16, Dtype.BF16), (Dtype.FP16, Dtype.FP32, Dtype.BF16)])
@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_matmul_in_all_its_forms(device_launcher: DeviceLauncher, dtypes: tuple[Dtype, Dtype, Dtype],
                                 transpose_a: bool, transpose_b: bool) -> None:
    random = np.random.default_rng(3)
    m, n, k = 7, 11, 29
    a_shape = (PLANES, k, m) if transpose_a else (PLANES, m, k)
    b_shape = (n, k) if transpose_b else (k, n)

    def write(tile: TileBuilder, dst: View, sources: list[View]) -> None:
        for alpha, accumulate in ((1.0, False), (-0.5, True)):
            tile.matmul(dst, *sources, alpha=alpha, accumulate=accumulate, transpose_a=transpose_a,
                        transpose_b=transpose_b)

    kernel = one_operation(device_launcher, dtypes, [(PLANES, m, n), a_shape, b_shape], write)
    inputs = [random_array(random, s, d) for s, d in zip((a_shape, b_shape), dtypes[1:], strict=True)]
    compare(device_launcher, kernel, inputs, 4 * k)


def test_matmul_takes_leading_dimensions_for_parts_of_matrices(device_launcher: DeviceLauncher) -> None:
    def write(tile: TileBuilder, dst: View, sources: list[View]) -> None:
        tile.fill(dst, 0)
        tile.matmul(dst[3:9, 5:16], sources[0][2:8, 4:33], sources[1][1:30, 7:18])

    random = np.random.default_rng(4)
    a, b = random_array(random, (10, 40), Dtype.FP32), random_array(random, (31, 20), Dtype.FP32)
    kernel = one_operation(device_launcher, (Dtype.FP32,) * 3, [(12, 20), a.shape, b.shape], write)
    got = compare(device_launcher, kernel, [a, b], 64)
    outside = np.ones(got.shape, bool)
    outside[3:9, 5:16] = False
    assert not got[outside].any()


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (2, 0, 1, 3), (1, 2, 0, 3), (3, 2, 1, 0)])
def test_moves_of_any_order_of_axes(device_launcher: DeviceLauncher, axes: tuple[int, ...]) -> None:
    x = np.arange(2 * 3 * 4 * 5, dtype=np.int32).reshape(2, 3, 4, 5)
    builder = KernelBuilder("permute", device_launcher.capabilities)
    source = builder.argument("x", ArgKind.IN, Dtype.INT32, x.shape)
    want = np.ascontiguousarray(x.transpose(axes))
    result = builder.argument("y", ArgKind.OUT, Dtype.INT32, want.shape)
    tile = builder.tile(0)
    held = tile.allocate(want.shape, Dtype.INT32)
    tile.move(held, source.permute(*axes))
    tile.move(result, held)
    kernel = builder.build()
    assert np.array_equal(device_launcher.launch(kernel, x), want)
    arrays, out = arguments(kernel, [x])
    interpreter.run(kernel, arrays)
    assert np.array_equal(out, want)


@pytest.mark.parametrize("index", [-1, 10, 2**31 - 1])
def test_gather_outside_its_table_is_a_fault_of_that_stream_alone(
        device: maia_rt.Device, device_launcher: DeviceLauncher, index: int) -> None:
    builder = KernelBuilder("lookup", device_launcher.capabilities)
    ids = builder.argument("ids", ArgKind.IN, Dtype.INT32, (4,))
    table = builder.argument("table", ArgKind.IN, Dtype.FP32, (10, 8))
    y = builder.argument("y", ArgKind.OUT, Dtype.FP32, (4, 8))
    tile = builder.tile(0)
    indices, rows = tile.allocate((4,), Dtype.INT32), tile.allocate((4, 8), Dtype.FP32)
    tile.move(indices, ids)
    tile.gather(rows, table, indices)
    tile.move(y, rows)
    kernel = builder.build()
    values = np.arange(80, dtype=np.float32).reshape(10, 8)
    good = np.array([9, 0, 3, 3], np.int32)
    bad = np.array([9, 0, index, 3], np.int32)
    arrays, _ = arguments(kernel, [bad, values])
    with pytest.raises(interpreter.IndexFault):
        interpreter.run(kernel, arrays)
    with device.create_stream() as stream, device.load(program.write([kernel])) as loaded, \
            device.upload(bad) as given, device.upload(values) as held, device.allocate((4, 8), np.float32) as out:
        stream.launch(loaded["lookup"], given, held, out)
        with pytest.raises(DeviceFault) as caught:
            stream.synchronize()
        assert caught.value.code is FaultCode.PROGRAM
        assert np.array_equal(device_launcher.launch(kernel, good, values), values[good]), "another stream runs on"
        stream.recover()
        stream.copy(given, good)
        stream.launch(loaded["lookup"], given, held, out)
        found = np.empty((4, 8), np.float32)
        stream.copy(found, out)
    assert np.array_equal(found, values[good])


def test_nan_and_infinity_follow_ieee(device_launcher: DeviceLauncher) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3e38], np.float32)
    for name, want in (("relu", [np.nan, np.inf, 0, 0, 0, 1e-45, 3e38]), ("exp", [np.nan, np.inf, 0, 1, 1, 1, np.inf]),
                       ("tanh", [np.nan, 1, -1, 0, 0, 1e-45, 1]), ("convert", x),
                       ("gelu", [np.nan, np.inf, 0, 0, 0, 1e-45, 3e38])):
        kernel = one_operation(device_launcher, (Dtype.FP32, Dtype.FP32, Dtype.FP32), [x.shape, x.shape], VECTOR[name])
        got = device_launcher.launch(kernel, x)
        np.testing.assert_allclose(got, np.array(want, np.float32), rtol=1e-6, atol=1e-37, err_msg=name)


@pytest.mark.parametrize(
    ("name", "function", "relative", "absolute"),
    [("exp", np.exp, 8 * 2.0**-23, 2.0**-126), ("tanh", np.tanh, 8 * 2.0**-23, 2.0**-126),
     ("gelu", lambda x: x / 2 * np.vectorize(math.erfc)(-x / math.sqrt(2)), 2.0**-18, 2.0**-22)],
)
def test_functions_keep_the_accuracy_that_the_contract_states(
        device_launcher: DeviceLauncher, name: str, function: Callable[[np.ndarray], np.ndarray], relative: float,
        absolute: float) -> None:
    x = np.concatenate([np.linspace(-12, 12, 40_001), np.geomspace(1e-30, 80, 2000), -np.geomspace(1e-30, 80, 2000)])
    x = x.astype(np.float32)
    kernel = one_operation(device_launcher, (Dtype.FP32, Dtype.FP32, Dtype.FP32), [x.shape, x.shape], VECTOR[name])
    want = function(x.astype(np.float64))
    error = np.abs(device_launcher.launch(kernel, x).astype(np.float64) - want)
    assert (error <= np.maximum(relative * np.abs(want), absolute)).all()


def test_dtypes_are_those_of_the_contract() -> None:
    assert {NUMPY_DTYPES[d].itemsize for d in FLOATS} == {2, 4}
