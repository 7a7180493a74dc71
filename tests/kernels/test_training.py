"""What a backward pass and an optimizer need, against float64.

Tolerances: each FP32 operation is off by EPS / 2 of its result; the functions that elementary.py composes are off by
what it states, which is tested here by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from maia_rt import kernels
from maia_rt.contract.program import ArgKind, Dtype
from maia_rt.errors import InvalidArgument, InvalidType, ProgramError
from maia_rt.kernels import elementary
from maia_rt.kernels.elementwise import stream_elements
from tests.helpers.launching import SMALL, TIGHT, Launcher
from tests.helpers.rounding import EPS, assert_close, exact, matmul_bound, random_array

BOTH = pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.BF16])
ELEMENTS = pytest.mark.parametrize("elements, dtype", [(1, Dtype.BF16), (1797, Dtype.FP32), (4801, Dtype.BF16),
                                                       (20_001, Dtype.FP32)])
LOWEST = float(np.finfo(np.float32).tiny)


def compose(launcher: Launcher, function: Callable[..., None], x: np.ndarray,
            scratch: Dtype = Dtype.FP32) -> np.ndarray:
    """A function of elementary.py, as a kernel."""
    builder = kernels.KernelBuilder("function", launcher.capabilities)
    source = builder.argument("x", ArgKind.IN, Dtype.FP32, x.shape)
    result = builder.argument("y", ArgKind.OUT, Dtype.FP32, x.shape)

    def write(tile: kernels.TileBuilder, loaded: Sequence, spare: Sequence) -> Sequence:
        function(tile, spare[0], loaded[0], spare[1])
        return spare[:1]

    stream_elements(builder, [source], [result], write, scratch=[Dtype.FP32, scratch])
    return launcher.launch(builder.build(), x)


def magnitudes(low: float, high: float) -> np.ndarray:
    """Numbers whose logarithms are spread evenly, and the powers of two with their neighbours."""
    spread = np.exp(np.linspace(math.log(low), math.log(high), 20_000)).astype(np.float32)
    powers = 2.0 ** np.arange(math.ceil(math.log2(low)) + 1, math.floor(math.log2(high)))
    powers = powers.astype(np.float32)
    beside = [np.nextafter(powers, np.float32(to)) for to in (0, np.inf)]
    return np.concatenate([spread, powers, *beside])


def test_logarithm_is_within_its_bound(launcher: Launcher) -> None:
    x = magnitudes(2.0**-120, 2.0**120)
    want = np.log(exact(x))
    got = compose(launcher, elementary.logarithm, x)
    assert (np.abs(got - want) <= 2.0**-19 + EPS * np.abs(want)).all()


def test_reciprocal_root_is_within_its_bound_over_all_normal_numbers(launcher: Launcher) -> None:
    x = magnitudes(2.0**-125, 2.0**127)
    got = compose(launcher, elementary.reciprocal_root, x)
    assert np.abs(exact(got) * np.sqrt(exact(x)) - 1).max() <= 2.0**-21
    got = compose(launcher, elementary.reciprocal_root, np.zeros(3, np.float32))
    assert np.isfinite(got).all(), "so that the root of 0, which is 0 times this, is 0"


def test_reciprocal_is_within_its_bound(launcher: Launcher) -> None:
    x = magnitudes(2.0**-125, 2.0**125)
    got = compose(launcher, elementary.reciprocal, x)
    assert np.abs(exact(got) * exact(x) - 1).max() <= 2.0**-21


def test_step_is_exactly_0_or_1(launcher: Launcher) -> None:
    x = np.concatenate([[0.0], magnitudes(2.0**-119, 2.0**127)]).astype(np.float32)
    got = compose(launcher, elementary.step, x, Dtype.INT8)
    assert got[0] == 0 and (got[1:] == 1).all()


@BOTH
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (65, 10, 1797), (130, 300, 7)])
def test_weight_gradient_is_a_product_with_the_first_factor_transposed(launcher: Launcher, m: int, n: int, k: int,
                                                                       dtype: Dtype) -> None:
    random = np.random.default_rng(m)
    x, dy = random_array(random, (k, m), dtype), random_array(random, (k, n), dtype)
    kernel = kernels.matmul(launcher.capabilities, m, n, k, transpose_a=True, dtype=dtype, result=Dtype.FP32)
    assert_close(launcher.launch(kernel, x, dy), exact(x).T @ exact(dy), matmul_bound(x.T, dy), Dtype.FP32)


def test_both_factors_may_be_stored_transposed(launcher: Launcher) -> None:
    random = np.random.default_rng(3)
    a, b = random_array(random, (70, 33), Dtype.FP32), random_array(random, (29, 70), Dtype.FP32)
    kernel = kernels.matmul(launcher.capabilities, 33, 29, 70, transpose_a=True, transpose_b=True)
    assert_close(launcher.launch(kernel, a, b), exact(a).T @ exact(b).T, matmul_bound(a.T, b.T), Dtype.FP32)


@BOTH
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (33, 65, 17), (300, 10, 128)])
def test_matmul_with_relu(launcher: Launcher, m: int, n: int, k: int, bias: bool, dtype: Dtype) -> None:
    random = np.random.default_rng(k)
    a, b, row = (random_array(random, s, dtype) for s in ((m, k), (k, n), (n,)))
    kernel = kernels.matmul(launcher.capabilities, m, n, k, bias=bias, relu=True, dtype=dtype)
    want = exact(a) @ exact(b) + (exact(row) if bias else 0)
    got = launcher.launch(kernel, a, b, *([row] if bias else []))
    assert_close(got, np.maximum(want, 0), matmul_bound(a, b) + EPS * np.abs(want), dtype)


def test_a_product_that_makes_no_sense_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match="GELU and ReLU"):
        kernels.matmul(SMALL, 8, 8, 8, gelu=True, relu=True)
    with pytest.raises(InvalidType, match="stored as"):
        kernels.matmul(SMALL, 32, 32, 32, dtype=Dtype.MXFP8_E4M3, transpose_a=True, transpose_b=True)
    with pytest.raises(InvalidType, match="activated"):
        kernels.matmul(SMALL, 32, 32, 32, dtype=Dtype.INT8, relu=True)


@BOTH
@pytest.mark.parametrize("rows, columns", [(1, 1), (1797, 10), (37, 129), (2500, 1), (3, 3000)])
def test_column_sum(launcher: Launcher, rows: int, columns: int, dtype: Dtype) -> None:
    x = random_array(np.random.default_rng(rows), (rows, columns), dtype)
    kernel = kernels.column_sum(launcher.capabilities, rows, columns, dtype=dtype, result=dtype)
    got = launcher.launch(kernel, x)
    assert_close(got, exact(x).sum(0), (rows + 2) * EPS * np.abs(exact(x)).sum(0), dtype)


@ELEMENTS
def test_relu_gradient_is_exact(launcher: Launcher, elements: int, dtype: Dtype) -> None:
    random = np.random.default_rng(elements)
    y, dy = (random_array(random, (elements,), dtype) for _ in range(2))
    y[::3] = 0
    got = launcher.launch(kernels.relu_gradient(launcher.capabilities, elements, dtype=dtype), y, dy)
    assert np.array_equal(exact(got), np.where(exact(y) > 0, exact(dy), 0))


@ELEMENTS
def test_gelu_gradient(launcher: Launcher, elements: int, dtype: Dtype) -> None:
    random = np.random.default_rng(elements)
    x, dy = random_array(random, (elements,), dtype, 3.0), random_array(random, (elements,), dtype)
    x[: elements // 9] = np.linspace(-40, 40, elements // 9)
    x[: elements // 50] = 0
    got = launcher.launch(kernels.gelu_gradient(launcher.capabilities, elements, dtype=dtype), x, dy)
    slope = ((1 + np.vectorize(math.erf, otypes=[np.float64])(exact(x) / math.sqrt(2))) / 2
             + exact(x) * np.exp(-np.square(exact(x)) / 2) / math.sqrt(2 * math.pi))
    assert_close(got, exact(dy) * slope, np.abs(exact(dy)) * 2.0**-20, dtype)


def test_gelu_gradient_far_out_is_0_or_1(launcher: Launcher) -> None:
    x = np.array([1e4, 3e38, -1e4, -3e38], np.float32)
    got = launcher.launch(kernels.gelu_gradient(launcher.capabilities, 4), x, np.full(4, 2, np.float32))
    assert got.tolist() == [2, 2, 0, 0]


@BOTH
@pytest.mark.parametrize("rows, columns, size", [(1, 1, 1.0), (64, 10, 3.0), (77, 33, 30.0), (300, 10, 1e3),
                                                 (5, 700, 1.0)])
def test_cross_entropy_and_its_gradient(launcher: Launcher, rows: int, columns: int, size: float, dtype: Dtype) -> None:
    random = np.random.default_rng(columns)
    x = random_array(random, (rows, columns), dtype, size)
    label = random.integers(0, columns, rows).astype(np.int32)
    scale = 1 / rows
    kernel = kernels.cross_entropy(launcher.capabilities, rows, columns, scale=scale, dtype=dtype)
    got = launcher.launch_all(kernel, x, label)
    largest = exact(x).max(1, keepdims=True)
    total = np.exp(exact(x) - largest).sum(1, keepdims=True)
    loss = (np.log(total) + largest)[:, 0] - exact(x)[np.arange(rows), label]
    p = np.exp(exact(x) - largest) / total
    hot = np.arange(columns) == label[:, None]
    # The mean of x under p, and softmax itself, are sums of n terms; the exponents carry an error of EPS |x|.
    terms = (columns + 12) * EPS * np.abs(exact(x)).max(1)
    assert_close(got["loss"], loss, 4 * terms + 2.0**-18, Dtype.FP32)
    wrong = p * EPS * (2 * np.abs(exact(x)).max(1, keepdims=True) + columns + 8) + 4 * EPS
    assert_close(got["dx"], scale * (p - hot), scale * wrong, dtype)


@pytest.mark.parametrize("spread", [88.0, 500.0, 1e30])
def test_cross_entropy_of_a_class_without_any_probability_is_finite(launcher: Launcher, spread: float) -> None:
    x = np.array([[0.0, spread, 0.0]], np.float32)
    kernel = kernels.cross_entropy(launcher.capabilities, 1, 3)
    got = launcher.launch_all(kernel, x, np.array([2], np.int32))
    assert got["loss"][0] == np.float32(spread)
    assert got["dx"].tolist() == [[0, 1, -1]] or spread < 100


@pytest.mark.parametrize("label", [-1, -100, 5, 2**31 - 1, -(2**31)])
def test_a_row_whose_label_is_no_class_counts_nothing(launcher: Launcher, label: int) -> None:
    x = random_array(np.random.default_rng(0), (3, 5), Dtype.FP32)
    got = launcher.launch_all(kernels.cross_entropy(launcher.capabilities, 3, 5), x, np.array([4, label, 0], np.int32))
    assert got["loss"][1] == 0 and not got["dx"][1].any()
    assert got["loss"][[0, 2]].all() and got["dx"][[0, 2]].all()


@ELEMENTS
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_momentum(launcher: Launcher, elements: int, nesterov: bool, dtype: Dtype) -> None:
    random = np.random.default_rng(elements)
    w, v = (random_array(random, (elements,), Dtype.FP32) for _ in range(2))
    g = random_array(random, (elements,), dtype)
    rate, momentum, decay = (float(np.float32(x)) for x in (0.05, 0.9, 1e-3))
    kernel = kernels.sgd(launcher.capabilities, elements, nesterov=nesterov, dtype=dtype)
    got = launcher.launch_all(kernel, w, v, g, rate, momentum, decay)
    slope = exact(g) + decay * exact(w)
    speed = momentum * exact(v) + slope
    want = exact(w) - rate * (slope + momentum * speed if nesterov else speed)
    terms = np.abs(exact(g)) + np.abs(exact(w)) + np.abs(exact(v))
    assert_close(got["v"], speed, 3 * EPS * terms, Dtype.FP32)
    assert_close(got["w"], want, 3 * EPS * terms, Dtype.FP32)


@ELEMENTS
@pytest.mark.parametrize("step, decay", [(1, 0.0), (10, 0.01)])
def test_adam(launcher: Launcher, elements: int, step: int, decay: float, dtype: Dtype) -> None:
    random = np.random.default_rng(elements)
    w, m = (random_array(random, (elements,), Dtype.FP32) for _ in range(2))
    v = np.square(random_array(random, (elements,), Dtype.FP32))
    g = random_array(random, (elements,), dtype)
    g[::5] *= np.asarray(1e-12, g.dtype)
    if step == 1:
        m, v = np.zeros_like(m), np.zeros_like(v)
    numbers = kernels.adam_numbers(step, 0.01, weight_decay=decay)
    got = launcher.launch_all(kernels.adam(launcher.capabilities, elements, dtype=dtype), w, m, v, g, *numbers)
    want = adam(exact(w), exact(m), exact(v), exact(g), step, 0.01, decay)
    terms = np.abs(exact(m)) + np.abs(exact(g))
    assert_close(got["m"], want[1], 4 * EPS * terms, Dtype.FP32)
    assert_close(got["v"], want[2], 6 * EPS * want[2], Dtype.FP32)
    # 1 - beta2 is a float64 here and rounded to FP32 in the kernel; the quotient adds both bounds of elementary.py.
    change = np.abs(exact(w) - want[0])
    allowed = (2.0**-18 * change + 8 * EPS * 0.01 * terms / (1 - 0.9**step) / (np.sqrt(want[2]) + 1e-8)
               + 2 * EPS * np.abs(exact(w)))
    assert_close(got["w"], want[0], allowed, Dtype.FP32)


def adam(w: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray, step: int, rate: float,
         decay: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As in the paper, with its corrections of m and v, and AdamW's decay."""
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * np.square(g)
    change = rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return w - rate * decay * w - change, m, v


def test_adam_of_nothing_changes_nothing(launcher: Launcher) -> None:
    w, zero = np.arange(5, dtype=np.float32), np.zeros(5, np.float32)
    kernel = kernels.adam(launcher.capabilities, 5)
    got = launcher.launch_all(kernel, w, zero, zero, zero, *kernels.adam_numbers(1, 0.1))
    assert np.array_equal(got["w"], w) and not got["m"].any() and not got["v"].any()


@pytest.mark.parametrize("options", [{"beta1": 1.0}, {"beta2": -0.1}, {"epsilon": 0.0}, {"epsilon": math.nan},
                                     {"beta1": math.nan}])
def test_adam_refuses_numbers_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument):
        kernels.adam(SMALL, 8, **options)


def test_adam_numbers_count_steps_from_1() -> None:
    with pytest.raises(InvalidArgument, match="step 0"):
        kernels.adam_numbers(0, 0.1)
    with pytest.raises(InvalidArgument, match="betas"):
        kernels.adam_numbers(1, 0.1, beta1=1.5)


@pytest.mark.parametrize("build", [lambda: kernels.cross_entropy(TIGHT, 4, 10_000),
                                   lambda: kernels.column_sum(TIGHT, 4, 100_000)])
def test_rows_past_sram_are_refused_with_its_size(build: Callable[[], object]) -> None:
    with pytest.raises(ProgramError, match="SRAM") as refused:
        build()
    assert str(TIGHT.tile_sram_bytes) in str(refused.value)


def test_bits_of_another_width_are_refused() -> None:
    view = kernels.KernelBuilder("k", SMALL).tile(0).allocate((4,), Dtype.FP32)
    assert view.bits(Dtype.INT32).bits(Dtype.FP32).dtype is Dtype.FP32
    for dtype in (Dtype.BF16, Dtype.MXFP8_E4M3):
        with pytest.raises(InvalidArgument, match="width"):
            view.bits(dtype)
