"""The kernel builder: what it orders, what it refuses, how it cuts."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from maia_rt.contract import program, verifier
from maia_rt.contract.program import ArgKind, Dtype, Engine
from maia_rt.errors import InvalidArgument, InvalidType, ProgramError
from maia_rt.kernels import KernelBuilder, blocking, builder
from maia_rt.kernels.blocking import blocks, region_blocks, region_shares, shares
from tests.helpers import interpreter
from tests.helpers.launching import SMALL, TIGHT


def waits(operation) -> dict[Engine, int]:
    return {Engine(engine): producer.position for engine, producer in operation.waits.items()}


def test_an_operation_waits_for_the_engines_that_wrote_or_read_what_it_touches() -> None:
    builder = KernelBuilder("k", SMALL)
    x = builder.argument("x", ArgKind.IN, Dtype.FP32, (8, 8))
    y = builder.argument("y", ArgKind.OUT, Dtype.FP32, (8, 8))
    tile = builder.tile(0)
    a, b = tile.allocate((8, 8), Dtype.FP32), tile.allocate((8, 8), Dtype.FP32)
    assert waits(tile.move(a, x)) == {}
    assert waits(tile.matmul(b, a, a)) == {Engine.DMA: 0}
    assert waits(tile.add(b, b, a)) == {Engine.TENSOR: 0, Engine.DMA: 0}
    assert waits(tile.move(y, b)) == {Engine.VECTOR: 0}
    # The matmul and the add read a; the add came after the matmul, and DMA has waited for the add already.
    assert waits(tile.move(a, x)) == {Engine.TENSOR: 0}
    kernel = builder.build()
    verifier.verify(program.read(program.write([kernel])), SMALL)
    assert all((s.ops["pre"]["op"] != 0).sum(axis=1).max() <= 2 for s in kernel.streams)


def test_after_orders_what_shares_no_memory() -> None:
    builder = KernelBuilder("k", SMALL)
    tile = builder.tile(0)
    a, b = tile.allocate((4,), Dtype.FP32), tile.allocate((4,), Dtype.FP32)
    first = tile.fill(a, 0)
    assert waits(tile.scale(b, b, 2.0, after=[first])) == {Engine.DMA: 0}
    other = builder.tile(1)
    with pytest.raises(InvalidArgument, match="another tile"):
        other.fill(other.allocate((4,), Dtype.FP32), 0, after=[first])


def test_a_block_is_not_used_once_its_ring_has_handed_it_out_again() -> None:
    tile = KernelBuilder("k", SMALL).tile(0)
    ring = tile.ring(2, (4,), Dtype.FP32)
    old = ring.take()
    ring.take()
    ring.take()
    with pytest.raises(InvalidArgument, match="handed that SRAM out again"):
        tile.relu(old, old)


def test_every_semaphore_wait_can_be_met_whatever_order_engines_run_in() -> None:
    builder = KernelBuilder("k", SMALL)
    x = builder.argument("x", ArgKind.IN, Dtype.FP32, (64, 16))
    y = builder.argument("y", ArgKind.OUT, Dtype.FP32, (64, 16))
    tile = builder.tile(0)
    ring = tile.ring(2, (8, 16), Dtype.FP32)
    for start in range(0, 64, 8):
        block = ring.take()
        tile.move(block, x[start : start + 8])
        tile.scale(block, block, 3.0)
        tile.move(y[start : start + 8], block)
    kernel = builder.build()
    values = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    for seed in range(20):
        out = np.zeros_like(values)
        interpreter.run(kernel, [values, out], seed)
        assert np.array_equal(out, values * 3)


def test_sram_arguments_and_tiles_end_where_the_device_ends() -> None:
    builder = KernelBuilder("k", TIGHT)
    with pytest.raises(ProgramError, match="bytes of SRAM in tile 0"):
        builder.tile(0).allocate((TIGHT.tile_sram_bytes + 1,), Dtype.UINT8)
    with pytest.raises(InvalidArgument, match="tile 3 of 3"):
        builder.tile(3)
    for i in range(TIGHT.max_args):
        builder.argument(f"a{i}", ArgKind.IN, Dtype.FP32, (1,))
    with pytest.raises(InvalidArgument, match="one too many"):
        builder.scalar("b")
    with pytest.raises(ProgramError, match="no operations"):
        builder.build()


def test_mistakes_are_refused_where_they_are_written() -> None:
    builder = KernelBuilder("k", SMALL)
    x = builder.argument("x", ArgKind.IN, Dtype.FP32, (8, 8))
    tile = builder.tile(0)
    a, h = tile.allocate((8, 8), Dtype.FP32), tile.allocate((8, 8), Dtype.FP16)
    with pytest.raises(InvalidArgument, match="only DMA reaches arguments"):
        tile.add(a, a, x)
    with pytest.raises(InvalidType, match="FP32 to FP16"):
        tile.move(h, x)
    with pytest.raises(InvalidArgument, match="matmul of"):
        tile.matmul(a, a[:, :4], a)
    with pytest.raises(InvalidArgument, match="side by side"):
        tile.relu(a.permute(1, 0), a)
    with pytest.raises(InvalidArgument, match="cannot become"):
        tile.add(a, a, a[:3])
    with pytest.raises(InvalidArgument, match="empty or has a step"):
        a[4:4]
    with pytest.raises(InvalidArgument, match="shape"):
        builder.argument("empty", ArgKind.IN, Dtype.FP32, (0, 3))


@pytest.mark.parametrize("seed", range(5))
def test_shares_and_blocks_cover_everything_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    total, parts, multiple = int(random.integers(1, 500)), int(random.integers(1, 70)), int(random.integers(1, 20))
    spans = shares(total, parts, multiple)
    assert [i for a, b in spans for i in range(a, b)] == list(range(total))
    assert len(spans) <= parts
    assert all(a % multiple == 0 for a, _ in spans)
    planes, rows = int(random.integers(1, 30)), int(random.integers(1, 40))
    cells = [(p, r) for region in region_shares(planes, rows, parts)
             for (p0, p1), (r0, r1) in region_blocks(region, multiple) for p in range(p0, p1) for r in range(r0, r1)]
    assert sorted(cells) == [(p, r) for p in range(planes) for r in range(rows)]
    assert max(b - a for a, b in blocks(0, total, multiple)) <= multiple


@pytest.mark.parametrize("module", [builder, blocking])
def test_examples_in_docstrings_print_what_they_say(module) -> None:
    assert doctest.testmod(module).failed == 0
