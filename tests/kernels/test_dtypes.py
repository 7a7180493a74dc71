"""Every element type of the contract on the device: against ml_dtypes where it has the type, else against exact
arithmetic with fractions.
"""

from __future__ import annotations

import doctest
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import maia_rt
from maia_rt.contract import dtype as dtype_module
from maia_rt.contract import microscaling, program, verifier
from maia_rt.contract.dtype import FLOATS, INTEGERS, MX_DTYPES, NUMPY_DTYPES, Dtype, row_bytes
from maia_rt.contract.microscaling import from_mx, to_mx
from maia_rt.contract.program import ArgKind, KernelImage, MacroOp
from maia_rt.errors import InvalidArgument, InvalidType, ProgramError
from maia_rt.kernels import KernelBuilder, TileBuilder
from maia_rt.kernels.view import View
from tests.helpers import interpreter
from tests.helpers.launching import SMALL, DeviceLauncher, arguments
from tests.helpers.rounding import EPS, exact, matmul_bound
from tests.kernels.test_macro_operations import one_operation

MX = sorted(MX_DTYPES)
ELEMENT = {Dtype.MXFP8_E4M3: ml_dtypes.float8_e4m3fn, Dtype.MXFP8_E5M2: ml_dtypes.float8_e5m2,
           Dtype.MXFP6_E2M3: ml_dtypes.float6_e2m3fn, Dtype.MXFP6_E3M2: ml_dtypes.float6_e3m2fn,
           Dtype.MXFP4_E2M1: ml_dtypes.float4_e2m1fn}


def convert(tile: TileBuilder, dst: View, sources: list[View]) -> object:
    return tile.convert(dst, sources[0])


def converted(launcher: DeviceLauncher, values: np.ndarray, source: Dtype, target: Dtype,
              shape: tuple[int, ...]) -> np.ndarray:
    """CONVERT on the device; the interpreter agrees bit for bit."""
    kernel = one_operation(launcher, (target, source, source), [shape, shape], convert)
    arrays, want = arguments(kernel, [values])
    with np.errstate(all="ignore"):
        interpreter.run(kernel, arrays)
    got = launcher.launch(kernel, values)
    assert same(got, want)
    return got


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bit for bit, any NaN for any other."""
    if a.dtype.kind in "iu":
        return np.array_equal(a, b)
    nan = np.isnan(a.astype(np.float32))
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return (np.array_equal(nan, np.isnan(b.astype(np.float32)))
            and np.array_equal(a.view(bits)[~nan], b.view(bits)[~nan]))


def edges(dtype: Dtype) -> np.ndarray:
    """Every number of an 8-bit type, the middle of each neighbouring pair, and a float32 to either side of each."""
    codes = np.arange(256, dtype=np.uint8).view(NUMPY_DTYPES[dtype]).astype(np.float32)
    numbers = np.unique(codes[np.isfinite(codes)])
    middles = (numbers[1:] + numbers[:-1]) / 2
    around = np.concatenate([numbers, middles])
    beside = [np.nextafter(around, np.float32(far)) for far in (np.inf, -np.inf)]
    special = [np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e38, -3e38, 463.9, 464, 464.1, 61439, 61440, 61441]
    values = np.concatenate([around, *beside, special])
    return np.resize(values.astype(np.float32), (-(-values.size // 32) * 32,))


@pytest.mark.parametrize("dtype", [Dtype.FP8_E4M3, Dtype.FP8_E5M2])
def test_fp8_rounds_as_ml_dtypes_does_but_e4m3_saturates(device_launcher: DeviceLauncher, dtype: Dtype) -> None:
    x = edges(dtype)
    got = converted(device_launcher, x, Dtype.FP32, dtype, x.shape)
    with np.errstate(all="ignore"):
        want = (np.clip(x, -448, 448) if dtype is Dtype.FP8_E4M3 else x).astype(NUMPY_DTYPES[dtype])
    assert same(got, want)


@pytest.mark.parametrize("dtype", [Dtype.FP8_E4M3, Dtype.FP8_E5M2])
def test_every_code_of_fp8_widens_as_ml_dtypes_does(device_launcher: DeviceLauncher, dtype: Dtype) -> None:
    codes = np.arange(256, dtype=np.uint8).view(NUMPY_DTYPES[dtype])
    assert same(converted(device_launcher, codes, dtype, Dtype.FP32, (256,)), codes.astype(np.float32))


@pytest.mark.parametrize("dtype", [Dtype.FP16, Dtype.BF16])
def test_floats_of_16_bits_round_as_ml_dtypes_does(device_launcher: DeviceLauncher, dtype: Dtype) -> None:
    bits = np.random.default_rng(5).integers(0, 1 << 32, 8192, dtype=np.uint64).astype(np.uint32)
    x = bits.view(np.float32)
    with np.errstate(all="ignore"):
        assert same(converted(device_launcher, x, Dtype.FP32, dtype, x.shape), x.astype(NUMPY_DTYPES[dtype]))


def quantized_exactly(block: list[float], dtype: Dtype) -> list[Fraction]:
    """A block through an MX type, by the specification's words in exact arithmetic."""
    if dtype is Dtype.MXINT8:
        numbers = [Fraction(i, 64) for i in range(-127, 128)]
        emax = 0
    else:
        codes = np.arange(1 << int(dtype_module.DTYPE_BITS[dtype]), dtype=np.uint8).view(ELEMENT[dtype]).astype(float)
        numbers = sorted({Fraction(float(c)) for c in codes if np.isfinite(c)})
        emax = {8: 8, 15: 15, 2: 2, 4: 4}[int(np.floor(np.log2(float(max(numbers)))))]
    amax = max(abs(Fraction(v)) for v in block)
    exponent = -127
    if amax:
        exponent = amax.numerator.bit_length() - amax.denominator.bit_length()
        exponent -= amax < Fraction(2) ** exponent
        exponent = max(-127, exponent - emax)
    scale = Fraction(2) ** exponent
    out = []
    for value in block:
        wanted = Fraction(value) / scale
        nearest = min(abs(n - wanted) for n in numbers)
        best = [n for n in numbers if abs(n - wanted) == nearest]
        if len(best) == 2:  # a tie goes to the even code: the one whose place among the positive numbers is even
            places = sorted(abs(n) for n in numbers if n >= 0)
            best = [n for n in best if places.index(abs(n)) % 2 == 0]
        out.append(best[0] * scale)
    return out


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32),
       st.sampled_from(MX))
def test_mx_blocks_on_the_host_are_those_of_exact_arithmetic(block: list[float], dtype: Dtype) -> None:
    with np.errstate(all="ignore"):
        got = from_mx(to_mx(np.array(block, np.float32), dtype), dtype)
    assert [Fraction(float(g)) for g in got] == quantized_exactly(block, dtype)


def hard_blocks(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """Blocks of all magnitudes, some zero, some subnormal, with ties, a NaN and an infinity."""
    random = np.random.default_rng(seed)
    rows, columns = shape
    blocks = rows * columns // 32
    x = random.standard_normal((blocks, 32)) * 2.0 ** random.integers(-149, 127, (blocks, 1)).astype(np.float64)
    x[:4] = random.integers(-16, 17, (4, 32)) / 4
    x[4] = 0
    x[5] = np.exp2(random.integers(-149, 127, 32).astype(np.float64))
    x[6], x[7] = 3.4028234e38, 1e-45
    with np.errstate(all="ignore"):
        x = x.astype(np.float32)
    x[8, 3], x[9, 7] = np.nan, -np.inf
    return x.reshape(shape)


@pytest.mark.parametrize("dtype", MX)
def test_the_device_quantizes_and_dequantizes_mx_bit_for_bit_as_the_host(device_launcher: DeviceLauncher,
                                                                        dtype: Dtype) -> None:
    x = hard_blocks(int(dtype), (9, 160))
    with np.errstate(all="ignore"):
        raw = to_mx(x, dtype)
        assert np.array_equal(converted(device_launcher, x, Dtype.FP32, dtype, x.shape), raw)
        assert same(converted(device_launcher, raw, dtype, Dtype.FP32, x.shape), from_mx(raw, dtype))


@pytest.mark.parametrize("dtype", MX)
def test_any_bytes_are_mx_rows(device_launcher: DeviceLauncher, dtype: Dtype) -> None:
    raw = np.random.default_rng(7).integers(0, 256, (64, row_bytes(dtype, 96)), dtype=np.uint8)
    raw[0, -3:], raw[1, -3:] = 255, 0
    got = converted(device_launcher, raw, dtype, Dtype.FP32, (64, 96))
    assert same(got, from_mx(raw, dtype))
    assert np.isnan(got[0]).all()


def test_a_block_with_nan_or_infinity_gets_the_scale_that_is_nan() -> None:
    x = np.ones((3, 64), np.float32)
    x[0, 1], x[1, 40] = np.nan, np.inf
    raw = to_mx(x, Dtype.MXFP8_E4M3)
    assert raw[:, 64:].tolist() == [[255, 119], [119, 255], [119, 119]]
    back = from_mx(raw, Dtype.MXFP8_E4M3)
    assert np.isnan(back).sum() == 64 and (back[2] == 1).all()


@pytest.mark.parametrize("target", sorted(INTEGERS))
def test_conversion_to_integers_rounds_to_nearest_even_and_saturates(device_launcher: DeviceLauncher,
                                                                    target: Dtype) -> None:
    limits = np.iinfo(NUMPY_DTYPES[target])
    x = np.array([0.5, 1.5, -0.5, -1.5, 2.5, 126.5, 127.5, -128.5, 300, -300, 1e20, -1e20, np.inf, -np.inf, np.nan,
                  0.49], np.float32)
    got = converted(device_launcher, x, Dtype.FP32, target, x.shape)
    want = [0, 2, 0, -2, 2, 126, 128, -128, 300, -300, 10**20, -(10**20), 10**20, -(10**20), 0, 0]
    assert got.tolist() == [min(max(w, limits.min), limits.max) for w in want]


def test_integers_convert_among_themselves_exactly(device_launcher: DeviceLauncher) -> None:
    wide = np.array([0, -1, 127, 128, -128, -129, 2**31 - 1, -(2**31), 2**24 + 1], np.int32)
    assert converted(device_launcher, wide, Dtype.INT32, Dtype.INT8, wide.shape).tolist() == [
        0, -1, 127, 127, -128, -128, 127, -128, 127]
    small = np.arange(-128, 128, dtype=np.int8)
    assert np.array_equal(converted(device_launcher, small, Dtype.INT8, Dtype.INT32, small.shape), small)
    floats = converted(device_launcher, wide, Dtype.INT32, Dtype.FP32, wide.shape)
    assert np.array_equal(floats, wide.astype(np.float32))
    assert np.array_equal(converted(device_launcher, wide, Dtype.INT32, Dtype.INT32, wide.shape), wide)


@pytest.mark.parametrize("name", ["add", "subtract", "multiply"])
def test_int32_sums_and_products_are_exact_modulo_2_32(device_launcher: DeviceLauncher, name: str) -> None:
    random = np.random.default_rng(8)
    a, b = (random.integers(-(2**31), 2**31, (6, 37)).astype(np.int32) for _ in range(2))
    kernel = one_operation(device_launcher, (Dtype.INT32,) * 3, [(6, 37)] * 3,
                           lambda t, d, s: getattr(t, name)(d, s[0], s[1]))
    with np.errstate(over="ignore"):
        want = {"add": a + b, "subtract": a - b, "multiply": a * b}[name]
    assert np.array_equal(device_launcher.launch(kernel, a, b), want)


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_int8_matmul_is_exact(device_launcher: DeviceLauncher, transpose_a: bool, transpose_b: bool) -> None:
    random = np.random.default_rng(9)
    m, n, k = 5, 7, 2500  # three of the pieces in which sums stay exact in binary32
    a, b = random.integers(-128, 128, (m, k)).astype(np.int8), random.integers(-128, 128, (k, n)).astype(np.int8)
    a[0], b[:, 0] = -128, -128
    shapes = [(m, n), (k, m) if transpose_a else (m, k), (n, k) if transpose_b else (k, n)]

    def write(tile: TileBuilder, dst: View, sources: list[View]) -> None:
        for accumulate in (False, True):
            tile.matmul(dst, *sources, accumulate=accumulate, transpose_a=transpose_a, transpose_b=transpose_b)

    kernel = one_operation(device_launcher, (Dtype.INT32, Dtype.INT8, Dtype.INT8), shapes, write)
    got = device_launcher.launch(kernel, a.T if transpose_a else a, b.T if transpose_b else b)
    assert np.array_equal(got, 2 * (a.astype(np.int64) @ b.astype(np.int64)))


def values_of(raw: np.ndarray, dtype: Dtype) -> np.ndarray:
    return from_mx(raw, dtype) if dtype in MX_DTYPES else raw.astype(np.float32)


def quantized(x: np.ndarray, dtype: Dtype) -> np.ndarray:
    return to_mx(x, dtype) if dtype in MX_DTYPES else x.astype(NUMPY_DTYPES[dtype])


@pytest.mark.parametrize("dtypes", [*((d, d) for d in (Dtype.FP8_E4M3, Dtype.FP8_E5M2, *MX)),
                                    (Dtype.FP32, Dtype.MXFP4_E2M1), (Dtype.MXFP8_E4M3, Dtype.BF16)])
def test_matmul_of_narrow_floats_is_within_the_bound_of_its_sums(device_launcher: DeviceLauncher,
                                                                dtypes: tuple[Dtype, Dtype]) -> None:
    random = np.random.default_rng(10)
    m, n, k = 9, 64, 96
    a, b = (quantized(random.standard_normal(s).astype(np.float32), d)
            for s, d in zip(((m, k), (n, k)), dtypes, strict=True))
    kernel = one_operation(device_launcher, (Dtype.FP32, *dtypes), [(m, n), (m, k), (n, k)],
                           lambda t, d, s: t.matmul(d, *s, transpose_b=True))
    wide_a, wide_b = values_of(a, dtypes[0]), values_of(b, dtypes[1])
    error = np.abs(exact(device_launcher.launch(kernel, a, b)) - exact(wide_a) @ exact(wide_b).T)
    assert (error <= matmul_bound(wide_a, wide_b.T)).all()


@pytest.mark.parametrize("dtype", [Dtype.FP8_E4M3, *MX])
def test_a_product_accumulates_into_a_narrow_result(device_launcher: DeviceLauncher, dtype: Dtype) -> None:
    a = np.arange(-16, 16, dtype=np.float32).reshape(4, 8) / 4
    b = np.eye(8, 32, dtype=np.float32)

    def write(tile: TileBuilder, dst: View, sources: list[View]) -> None:
        tile.matmul(dst, *sources)
        tile.matmul(dst, *sources, accumulate=True)

    kernel = one_operation(device_launcher, (dtype, Dtype.FP32, Dtype.FP32), [(4, 32), a.shape, b.shape], write)
    once = values_of(quantized(a @ b, dtype), dtype)
    assert same(device_launcher.launch(kernel, a, b), quantized(once + a @ b, dtype))


VECTOR = {"add": lambda t, d, s: t.add(d, s[0], s[1]), "scale": lambda t, d, s: t.scale(d, s[0], -1.5, 0.25),
          "relu": lambda t, d, s: t.relu(d, s[0]), "gelu": lambda t, d, s: t.gelu(d, s[0]),
          "softmax": lambda t, d, s: t.softmax(d, s[0], 0.7),
          "l2_normalize": lambda t, d, s: t.l2_normalize(d, s[0], 1e-6),
          "layernorm": lambda t, d, s: t.layernorm(d, s[0], s[1][0, 0], s[1][0, 1], 1e-5)}


@pytest.mark.parametrize("dtype", [Dtype.FP8_E4M3, Dtype.FP8_E5M2, *MX])
@pytest.mark.parametrize("name", VECTOR)
def test_vector_operations_take_narrow_floats(device_launcher: DeviceLauncher, name: str, dtype: Dtype) -> None:
    random = np.random.default_rng(11)
    shape = (2, 3, 64)
    a, b = (quantized(random.standard_normal(shape).astype(np.float32), dtype) for _ in range(2))
    kernel = one_operation(device_launcher, (Dtype.FP32, dtype, dtype), [shape] * 3, VECTOR[name])
    arrays, want = arguments(kernel, [a, b])
    interpreter.run(kernel, arrays)
    got = device_launcher.launch(kernel, a, b)
    assert np.abs(got - want).max() <= 64 * EPS * max(1.0, np.abs(want).max())


def test_scale_dequantizes_integers_and_quantizes_to_them(device_launcher: DeviceLauncher) -> None:
    sums = np.array([0, 7, -1000, 123456], np.int32)
    kernel = one_operation(device_launcher, (Dtype.FP32, Dtype.INT32, Dtype.INT32), [(4,), (4,)],
                           lambda t, d, s: t.scale(d, s[0], 0.25))
    assert device_launcher.launch(kernel, sums).tolist() == [0, 1.75, -250, 30864]
    x = np.array([0.1, -0.26, 40, -40], np.float32)
    kernel = one_operation(device_launcher, (Dtype.INT8, Dtype.FP32, Dtype.FP32), [(4,), (4,)],
                           lambda t, d, s: t.scale(d, s[0], 10.0))
    assert device_launcher.launch(kernel, x).tolist() == [1, -3, 127, -128]


def test_rows_of_mx_move_and_gather_with_their_scales(device_launcher: DeviceLauncher) -> None:
    builder = KernelBuilder("rows", device_launcher.capabilities)
    table = builder.argument("table", ArgKind.IN, Dtype.MXFP4_E2M1, (10, 64))
    ids = builder.argument("ids", ArgKind.IN, Dtype.INT32, (3,))
    y = builder.argument("y", ArgKind.OUT, Dtype.MXFP4_E2M1, (3, 64))
    tile = builder.tile(0)
    indices, rows = tile.allocate((3,), Dtype.INT32), tile.allocate((3, 64), Dtype.MXFP4_E2M1)
    tile.move(indices, ids)
    tile.gather(rows, table, indices)
    tile.move(rows[1:2], table[7:8])
    tile.move(y, rows)
    raw = to_mx(np.random.default_rng(1).standard_normal((10, 64)), Dtype.MXFP4_E2M1)
    got = device_launcher.launch(builder.build(), raw, np.array([9, 0, 4], np.int32))
    assert np.array_equal(got, raw[[9, 7, 4]])


# What is refused -----------------------------------------------------------------------------------------------------


def test_mistakes_in_types_are_refused_where_they_are_written() -> None:
    builder = KernelBuilder("k", SMALL)
    tile = builder.tile(0)
    mx, floats = tile.allocate((32, 64), Dtype.MXFP8_E4M3), tile.allocate((32, 64), Dtype.FP32)
    int8, int32 = tile.allocate((32, 64), Dtype.INT8), tile.allocate((32, 64), Dtype.INT32)
    square, raw = tile.allocate((32, 32), Dtype.FP32), tile.allocate((32, 64), Dtype.UINT8)
    for write, kind, text in (
        (lambda: builder.argument("x", ArgKind.IN, Dtype.MXINT8, (4, 33)), InvalidArgument, "MXINT8 of shape"),
        (lambda: tile.allocate((31,), Dtype.MXFP4_E2M1), InvalidArgument, "MXFP4_E2M1 of shape"),
        (lambda: mx[:, :32], InvalidArgument, "is not cut"), (lambda: mx[0, 3], InvalidArgument, "is not cut"),
        (lambda: mx.split(1, (2, 32)), InvalidArgument, "is not split"),
        (lambda: mx.permute(1, 0), InvalidArgument, "stays the last axis"),
        (lambda: floats.raw, InvalidArgument, "no raw form"),
        (lambda: mx.first(33, 64), InvalidArgument, "no room"),
        (lambda: tile.matmul(square, floats, mx.first(64, 32)), InvalidType, "MXFP8_E4M3"),
        (lambda: tile.matmul(square, int8, int8, transpose_b=True), InvalidType, "INT8 by INT8 into FP32"),
        (lambda: tile.matmul(int32[:, :32], int8, int8, transpose_b=True, alpha=2.0), InvalidArgument, "not scaled"),
        (lambda: tile.add(int32, int32, floats), InvalidType, "ADD of INT32"),
        (lambda: tile.gelu(floats, int32), InvalidType, "GELU of FP32, INT32"),
        (lambda: tile.convert(floats, raw), InvalidType, "UINT8"),
        (lambda: tile.move(mx, raw), InvalidType, "move from UINT8 to MXFP8_E4M3"),
        (lambda: tile.mean_rows(floats[:1], floats.split(0, (1, 32)), tile.allocate((1, 32), Dtype.MXINT8), 1.0),
         InvalidType, "weights of rows are not MX"),
    ):
        with pytest.raises(kind) as caught:
            write()
        assert text in str(caught.value)


def refused_operation(opcode: MacroOp, dtypes: tuple[int, ...], flags: int = 0,
                      n: tuple[int, int, int] = (32, 32, 32), scalar: int = 0x3F800000) -> str:
    """What the verifier says of one operation with these operand types."""
    builder = KernelBuilder("k", SMALL)
    tile = builder.tile(0)
    a = tile.allocate((256, 256), Dtype.FP32)
    if opcode is MacroOp.MATMUL:
        tile.matmul(a[:32, :32], a[:32, :32], a[:32, :32])
    elif opcode is MacroOp.MEAN_ROWS:
        tile.mean_rows(a[:32, :32], a[:, :32].split(0, (32, 8)), a[:32, :8], 1.0)
    elif opcode is MacroOp.ADD:
        tile.add(a[:32, :32], a[:32, :32], a[:32, :32])
    else:
        tile.gelu(a[:32, :32], a[:32, :32])
    image = builder.build()
    ops = image.streams[0].ops
    ops["opcode"], ops["flags"], ops["n"], ops["scalar"][:, 0] = opcode, flags, n, scalar
    for slot, dtype in enumerate(dtypes):
        ops["operand"]["dtype"][:, slot] = dtype
    with pytest.raises(ProgramError) as caught:
        verifier.verify(program.read(program.write([image])), SMALL)
    return str(caught.value)


@pytest.mark.parametrize(("opcode", "dtypes", "flags", "n", "text"), [
    (MacroOp.MATMUL, (1, 9, 1), 1, (32, 32, 32), "a.dtype: is MX, whose blocks run along k"),
    (MacroOp.MATMUL, (1, 1, 13), 0, (32, 32, 32), "b.dtype: is MX, whose blocks run along k"),
    (MacroOp.MATMUL, (1, 9, 9), 2, (32, 32, 31), "a: has MX rows that are no multiple of 32"),
    (MacroOp.MATMUL, (9, 1, 1), 0, (32, 31, 32), "dst: has MX rows that are no multiple of 32"),
    (MacroOp.MATMUL, (1, 6, 6), 0, (32, 32, 32), "is not INT8 times INT8 into INT32"),
    (MacroOp.MATMUL, (4, 6, 7), 0, (32, 32, 32), "is not INT8 times INT8 into INT32"),
    (MacroOp.ADD, (4, 4, 1), 0, (32, 32, 1), "mixes integers"),
    (MacroOp.ADD, (6, 6, 6), 0, (32, 32, 1), "mixes integers"),
    (MacroOp.GELU, (1, 4), 0, (32, 32, 1), "is an integer, which this does not take"),
    (MacroOp.GELU, (5, 1), 0, (32, 32, 1), "dst.dtype: is no type that this device"),
    (MacroOp.GELU, (1, 15), 0, (32, 32, 1), "a.dtype: is no type that this device"),
    (MacroOp.MEAN_ROWS, (1, 1, 9), 0, (32, 32, 2), "b.dtype: is MX"),
])
def test_the_verifier_names_what_is_wrong_with_a_type(opcode: MacroOp, dtypes: tuple[int, ...], flags: int,
                                                      n: tuple[int, int, int], text: str) -> None:
    said = refused_operation(opcode, dtypes, flags, n)
    assert "kernel 'k' tile 0" in said and opcode.name in said and text in said


def test_integer_products_are_not_scaled() -> None:
    assert "scalar[0]: is not 1" in refused_operation(MacroOp.MATMUL, (4, 6, 6), scalar=0x40000000)


def test_images_that_need_nothing_new_stay_1_0_and_1_0_has_nothing_new() -> None:
    def image(dtype: Dtype) -> bytes:
        builder = KernelBuilder("k", SMALL)
        x = builder.argument("x", ArgKind.OUT, dtype, (32,))
        tile = builder.tile(0)
        tile.move(x, tile.allocate((32,), dtype))
        return program.write([builder.build()])

    def versioned(raw: bytes, minor: int) -> bytes:
        changed = bytearray(raw)
        changed[10], changed[24:28] = minor, bytes(4)
        changed[24:28] = program.zlib.crc32(changed).to_bytes(4, "little")
        return bytes(changed)

    assert [image(d)[10] for d in Dtype] == [int(d > Dtype.UINT8) for d in Dtype]
    old = program.read(image(Dtype.BF16))
    verifier.verify(old, SMALL)
    assert old.minor == 0
    verifier.verify(program.read(versioned(image(Dtype.BF16), 1)), SMALL)
    with pytest.raises(ProgramError, match="INT8 came with images of version"):
        program.read(versioned(image(Dtype.INT8), 0))
    with pytest.raises(ProgramError, match=r"reads 1\.0 to 1\.1"):
        program.read(versioned(image(Dtype.INT8), 2))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([int(o) for o in MacroOp]), st.tuples(*(st.integers(0, 16) for _ in range(4))),
       st.tuples(*(st.sampled_from([1, 2, 31, 32, 33, 64, 1 << 24]) for _ in range(3))),
       st.sampled_from([0, 1, 2, 4, 6]), st.sampled_from([0, 1, 33, 34, 64, 128, 256, 1 << 20]))
def test_any_types_are_refused_or_harmless(opcode: int, dtypes: tuple[int, ...], n: tuple[int, int, int], flags: int,
                                           stride: int) -> None:
    builder = KernelBuilder("k", SMALL)
    tile = builder.tile(0)
    a = tile.allocate((64, 64), Dtype.FP32)
    tile.add(a, a, a)
    built = builder.build()
    ops = built.streams[0].ops
    engine = program.engine_of(opcode)
    ops["opcode"], ops["flags"], ops["n"], ops["batch"] = opcode, flags, n, int(opcode == MacroOp.MATMUL)
    slots = [s for s in range(4) if opcode in verifier.OPERANDS[s]]
    for slot in range(4):
        record = ops["operand"][:, slot]
        record[...] = np.zeros((), program.OPERAND)
        if slot in slots:
            record["space"], record["dtype"], record["row_stride"] = 1, dtypes[slot], stride
    kernel = KernelImage("k", (), (program.Stream(0, engine, ops),), 1, built.sram_bytes, built.tile_semaphores)
    try:
        verifier.verify(program.read(program.write([kernel])), SMALL)
    except ProgramError as error:
        assert "kernel 'k'" in str(error)
        return
    if max(n) <= 64:
        with np.errstate(all="ignore"):
            interpreter.run(kernel, [])


def test_a_kernel_takes_mx_arguments_as_bytes_of_its_row_shape(device: maia_rt.Device) -> None:
    builder = KernelBuilder("copy", device.capabilities.program)
    x = builder.argument("x", ArgKind.IN, Dtype.MXFP8_E5M2, (4, 64))
    y = builder.argument("y", ArgKind.OUT, Dtype.FP8_E4M3, (4, 64))
    tile = builder.tile(0)
    held, out = tile.allocate((4, 64), Dtype.MXFP8_E5M2), tile.allocate((4, 64), Dtype.FP8_E4M3)
    tile.move(held, x)
    tile.convert(out, held)
    tile.move(y, out)
    values = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32)
    raw = maia_rt.to_mx(values, Dtype.MXFP8_E5M2)
    with device.load(program.write([builder.build()])) as loaded, device.upload(raw) as given, \
            device.allocate((4, 64), ml_dtypes.float8_e4m3fn) as result, device.create_stream() as stream:
        stream.launch(loaded["copy"], given, result)
        got = result.copy_to_host(stream)
        with device.allocate((4, 64), np.uint8) as wrong, pytest.raises(InvalidArgument, match="to_mx"):
            stream.launch(loaded["copy"], wrong, result)
        with device.allocate((4, 64), np.uint8) as wrong, pytest.raises(InvalidArgument, match="float8_e4m3fn"):
            stream.launch(loaded["copy"], given, wrong)
    assert same(got, maia_rt.from_mx(raw, Dtype.MXFP8_E5M2).astype(ml_dtypes.float8_e4m3fn))


@pytest.mark.parametrize("bad", ["x", None, [[1, 2]], np.zeros((4, 31)), np.float32(1), np.zeros((0, 32))])
def test_the_host_conversions_refuse_what_they_cannot_take(bad: object) -> None:
    with pytest.raises((InvalidArgument, InvalidType)):
        to_mx(bad, Dtype.MXFP4_E2M1)
    with pytest.raises((InvalidArgument, InvalidType)):
        from_mx(bad, Dtype.MXFP4_E2M1)  # type: ignore[arg-type]
    for dtype in (Dtype.FP32, 9, "mxfp4"):
        with pytest.raises(InvalidType, match="no MX type"):
            to_mx(np.zeros((1, 32)), dtype)  # type: ignore[arg-type]


def test_types_of_the_contract_are_all_named_here() -> None:
    assert FLOATS | INTEGERS | {Dtype.UINT8} == set(Dtype)
    assert maia_rt.Dtype is Dtype


@pytest.mark.parametrize("module", [dtype_module, microscaling])
def test_examples_in_docstrings_print_what_they_say(module) -> None:
    assert doctest.testmod(module).failed == 0
