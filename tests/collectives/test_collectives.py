"""What collectives compute: against float64, within docs/collectives.md's bound, and the same bit for bit."""

import contextlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import maia_rt

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BF16, "float16": np.dtype(np.float16),
          "int32": np.dtype(np.int32)}
# Of one rounding, relative.
UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "int32": 0}
ALGORITHMS = ["direct", "ring"]
MIB = 1 << 20


def random_array(rng, count, dtype, op="sum"):
    if dtype == np.int32:
        return rng.integers(-(2**30), 2**30, count, dtype=np.int32)
    if op == "prod":  # nothing that leaves the range of float16 on the way round a ring
        return (rng.uniform(0.5, 2, count) * rng.choice([-1, 1], count)).astype(dtype)
    return (rng.standard_normal(count) * rng.choice([0.1, 1, 30], count)).astype(dtype)


def reference(arrays, op):
    """The result in float64 (int32: exact, modulo 2^32), and the sum or product of magnitudes that errors relate to."""
    if arrays[0].dtype == np.int32:
        combine = np.add if op == "sum" else np.multiply
        with np.errstate(over="ignore"):
            total = arrays[0]
            for one in arrays[1:]:
                total = combine(total, one)
        return total, np.zeros(total.shape)
    wide = np.stack([one.astype(np.float64) for one in arrays])
    return (wide.sum(0), np.abs(wide).sum(0)) if op == "sum" else (wide.prod(0), np.abs(wide).prod(0))


def bound(scale, dtype, ranks, algorithm):
    """docs/collectives.md, "How exact"."""
    steps = ranks - 1
    if algorithm == "ring":
        return scale * 1.01 * steps * UNITS[dtype] + steps * smallest(dtype)
    own = 0 if dtype == "float32" else UNITS[dtype]
    return scale * 1.01 * (own + steps * UNITS["float32"]) + smallest(dtype)


def smallest(dtype):
    """The type's smallest normal number; bfloat16 has float32's."""
    return float(np.finfo(np.float16 if dtype == "float16" else np.float32).tiny)


@contextlib.contextmanager
def uploaded(ranks, arrays):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(device.upload(array)) for device, array in zip(ranks.devices, arrays, strict=True)]


@contextlib.contextmanager
def allocated(ranks, count, dtype):
    with contextlib.ExitStack() as stack:
        buffers = [stack.enter_context(device.allocate(count, dtype)) for device in ranks.devices]
        for buffer in buffers:
            buffer.device.default_stream.fill(buffer, 0xA5)
        yield buffers


def hosted(buffers):
    return [buffer.copy_to_host() for buffer in buffers]


def check_reduced(got, arrays, op, dtype, algorithm):
    wanted, scale = reference(arrays, op)
    if dtype == "int32":
        np.testing.assert_array_equal(got, wanted)
        return
    error = np.abs(got.astype(np.float64) - wanted)
    allowed = bound(scale, dtype, len(arrays), algorithm)
    assert (error <= allowed).all(), (error - allowed).max()


def check_all_reduce(ranks, arrays, op, algorithm, in_place):
    dtype = arrays[0].dtype.name
    with uploaded(ranks, arrays) as sends, allocated(ranks, arrays[0].size, arrays[0].dtype) as others:
        recvs = sends if in_place else others
        done = ranks.all_reduce(sends, None if in_place else recvs, op, algorithm=algorithm)
        done.synchronize(30)
        got = hosted(recvs)
        assert len({one.tobytes() for one in got}) == 1, "every rank has the same, bit for bit"
        check_reduced(got[0], arrays, op, dtype, done.algorithm)
        if not in_place:
            for kept, array in zip(hosted(sends), arrays, strict=True):
                assert kept.tobytes() == array.tobytes()
        return got[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("count", [1, 7, 64, 4099, 70_001])
def test_all_reduce_is_the_sum_within_the_bound(ranks, count, algorithm):
    rng = np.random.default_rng(count)
    for in_place in (True, False):
        check_all_reduce(ranks, [random_array(rng, count, DTYPES["float32"]) for _ in ranks.devices], "sum", algorithm,
                         in_place)


@pytest.mark.parametrize("op", ["sum", "prod"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_and_operation(ranks, dtype, op):
    rng = np.random.default_rng(5)
    for algorithm in ALGORITHMS:
        check_all_reduce(ranks, [random_array(rng, 1003, DTYPES[dtype], op) for _ in ranks.devices], op, algorithm,
                         False)


@pytest.mark.parametrize("count", [16 * MIB // 4, 16 * MIB // 4 - 3])
def test_sixteen_mib_on_eight_devices(open_devices, count):
    rng = np.random.default_rng(count)
    with maia_rt.Communicator(open_devices(8)) as ranks:
        arrays = [random_array(rng, 1 << 16, DTYPES["float32"]) for _ in ranks.devices]
        check_all_reduce(ranks, [np.resize(array, count) for array in arrays], "sum", "auto", True)


def test_sixty_four_mib_on_two_devices(pair):
    rng = np.random.default_rng(64)
    arrays = [np.resize(random_array(rng, 1 << 16, DTYPES["float32"]), 64 * MIB // 4) for _ in range(2)]
    check_all_reduce(pair, arrays, "sum", "auto", True)
    with uploaded(pair, arrays) as sends, allocated(pair, 2 * arrays[0].size, np.float32) as recvs:
        pair.all_gather(sends, recvs).synchronize(30)
        for got in hosted(recvs):
            np.testing.assert_array_equal(got.reshape(2, -1), arrays)


@pytest.mark.parametrize("nbytes", [1, 3, 4096, 1 * MIB + 1])
def test_bytes_are_moved_whatever_they_are(ranks, nbytes):
    rng = np.random.default_rng(nbytes)
    count = len(ranks)
    arrays = [rng.integers(0, 256, nbytes, dtype=np.uint8) for _ in range(count)]
    whole = np.concatenate(arrays)
    for algorithm in ALGORITHMS:
        with uploaded(ranks, arrays) as sends, allocated(ranks, count * nbytes, None) as gathered:
            plain = [send.view() for send in sends]
            ranks.all_gather(plain, gathered, algorithm=algorithm).synchronize(10)
            for got in hosted(gathered):
                np.testing.assert_array_equal(got, whole)
            root = count - 1
            ranks.broadcast(sends, root, algorithm=algorithm).synchronize(10)
            for got in hosted(sends):
                np.testing.assert_array_equal(got, arrays[root])


def test_all_gather_in_place(ranks):
    count, part = len(ranks), 1001
    arrays = [np.full(part, 10 + rank, np.float32) for rank in range(count)]
    for algorithm in ALGORITHMS:
        with allocated(ranks, count * part, np.float32) as recvs:
            sends = [recv[rank * part : (rank + 1) * part] for rank, recv in enumerate(recvs)]
            for send, array in zip(sends, arrays, strict=True):
                send.device.default_stream.copy(send, array)
            ranks.all_gather(sends, recvs, algorithm=algorithm).synchronize(10)
            for got in hosted(recvs):
                np.testing.assert_array_equal(got, np.concatenate(arrays))


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "apart"])
@pytest.mark.parametrize("part", [1, 333, 40_000])
def test_reduce_scatter_gives_each_rank_its_part(ranks, part, in_place):
    count = len(ranks)
    rng = np.random.default_rng(part)
    arrays = [random_array(rng, count * part, DTYPES["float32"]) for _ in range(count)]
    for algorithm in ALGORITHMS:
        with uploaded(ranks, arrays) as sends, allocated(ranks, part, np.float32) as apart:
            recvs = [send[i * part : (i + 1) * part] for i, send in enumerate(sends)] if in_place else apart
            done = ranks.reduce_scatter(sends, recvs, algorithm=algorithm)
            done.synchronize(10)
            for rank, got in enumerate(hosted(recvs)):
                check_reduced(got, [array[rank * part : (rank + 1) * part] for array in arrays], "sum", "float32",
                              done.algorithm)


@pytest.mark.parametrize("root", [0, -1])
def test_reduce_writes_the_root_alone(ranks, root):
    root %= len(ranks)
    rng = np.random.default_rng(9)
    arrays = [random_array(rng, 5003, DTYPES["float32"]) for _ in ranks.devices]
    with uploaded(ranks, arrays) as sends:
        with ranks.devices[root].allocate(5003, np.float32) as recv:
            ranks.reduce(sends, recv, root).synchronize(10)
            check_reduced(recv.copy_to_host(), arrays, "sum", "float32", "direct")
        ranks.reduce(sends, sends[root], root).synchronize(10)
        for rank, got in enumerate(hosted(sends)):
            if rank != root:
                np.testing.assert_array_equal(got, arrays[rank])


@pytest.mark.parametrize("part", [1, 1000])
def test_all_to_all_transposes(ranks, part):
    count = len(ranks)
    table = np.arange(count * count * part, dtype=np.int32).reshape(count, count, part)
    with uploaded(ranks, [row.ravel() for row in table]) as sends, allocated(ranks, count * part, np.int32) as recvs:
        ranks.all_to_all(sends, recvs).synchronize(10)
        for rank, got in enumerate(hosted(recvs)):
            np.testing.assert_array_equal(got.reshape(count, part), table[:, rank])


def test_a_send_goes_from_one_rank_to_another_in_the_order_of_both_streams(ranks):
    first, last = ranks.devices[0], ranks.devices[-1]
    with (first.create_stream() as a, last.create_stream() as b, first.allocate(1000, np.int32) as x,
          last.allocate(1000, np.int32) as y):
        for turn in range(5):
            a.fill(x, turn, 4)
            ranks.send(x, y, streams=(a, b))
            a.fill(x, 99, 4)
            assert (y.copy_to_host(b) == turn).all()
        ranks.send(y, x).synchronize(10)
        assert (x.copy_to_host() == 4).all()


def test_streams_wait_at_a_barrier_for_all_ranks(ranks):
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(device.create_stream()) for device in ranks.devices]
        gate = stack.enter_context(ranks.devices[-1].create_semaphore())
        streams[-1].wait(gate, 1)
        barrier = ranks.barrier(streams)
        assert not barrier.query() and not any(stream.query() for stream in streams)
        gate.set(1)
        barrier.synchronize(10)


def test_nothing_is_a_collective_too(ranks):
    with allocated(ranks, 0, np.float32) as empty:
        ranks.all_reduce(empty).synchronize(10)
        ranks.all_gather(empty, empty).synchronize(10)


def test_what_streams_do_before_and_after_keeps_its_order(ranks):
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(device.create_stream()) for device in ranks.devices]
        with allocated(ranks, 4096, np.float32) as buffers:
            for _ in range(3):
                for rank, (stream, buffer) in enumerate(zip(streams, buffers, strict=True)):
                    stream.fill(buffer, int(np.float32(rank + 1).view(np.int32)), 4)
                ranks.all_reduce(buffers, streams=streams)
            total = sum(range(1, len(ranks) + 1))
            for stream, buffer in zip(streams, buffers, strict=True):
                assert (buffer.copy_to_host(stream) == total).all()


def test_collectives_on_changing_streams_run_one_after_the_other(pair):
    with contextlib.ExitStack() as stack:
        pairs = [[stack.enter_context(device.create_stream()) for device in pair.devices] for _ in range(3)]
        with allocated(pair, 300, np.float32) as buffers:
            for buffer in buffers:
                buffer.device.default_stream.fill(buffer, int(np.float32(1).view(np.int32)), 4)
            pair.barrier()
            for turn in range(12):
                pair.all_reduce(buffers, streams=pairs[turn % 3])
            pair.barrier().synchronize(10)
            for got in hosted(buffers):
                assert (got == 2.0**12).all()


def test_a_short_ring_and_shared_queues_do_not_deadlock(open_devices):
    with maia_rt.Communicator(open_devices(4, max_queues=4)) as ranks, contextlib.ExitStack() as stack:
        streams = [[stack.enter_context(device.create_stream(entries=4)) for device in ranks.devices] for _ in range(3)]
        with allocated(ranks, 1000, np.int32) as buffers:
            for buffer in buffers:
                buffer.device.default_stream.fill(buffer, 1, 4)
            ranks.barrier()
            for turn in range(9):
                ranks.all_reduce(buffers, streams=streams[turn % 3])
            ranks.barrier().synchronize(20)
            for got in hosted(buffers):
                assert (got == 4**9).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_results_are_the_same_bit_for_bit_from_run_to_run(open_devices, algorithm):
    rng = np.random.default_rng(11)
    arrays = [random_array(rng, 33_333, DTYPES["bfloat16"]) for _ in range(4)]
    seen = set()
    devices = open_devices(4)
    for _ in range(3):
        with maia_rt.Communicator(devices) as ranks:
            seen |= {check_all_reduce(ranks, arrays, "sum", algorithm, True).tobytes() for _ in range(3)}
    assert len(seen) == 1


@seed(20261123)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 20_000), st.sampled_from(sorted(DTYPES)),
       st.sampled_from(["sum", "prod"]), st.booleans(), st.sampled_from(ALGORITHMS), st.integers(0, 2**32 - 1))
def test_random_all_reduces(open_devices, count, elements, dtype, op, in_place, algorithm, number):
    cache = test_random_all_reduces.__dict__.setdefault("cache", {})
    if cache.get("for") is not open_devices:
        cache.clear()
        cache["for"], cache["devices"] = open_devices, open_devices(8)
    rng = np.random.default_rng(number)
    with maia_rt.Communicator(cache["devices"][:count]) as ranks:
        check_all_reduce(ranks, [random_array(rng, elements, DTYPES[dtype], op) for _ in range(count)], op, algorithm,
                         in_place)


def test_times_give_bandwidth_and_its_part_of_the_bound(open_devices):
    with maia_rt.Communicator(open_devices(2), timing=True) as ranks, allocated(ranks, MIB, np.float32) as buffers:
        done = ranks.all_reduce(buffers)
        done.synchronize(10)
        assert done.bytes_moved == 2 * 4 * MIB
        assert done.bandwidth == pytest.approx(done.bytes_moved / done.seconds)
        assert done.bound_fraction == pytest.approx(done.bandwidth / ranks.rate)
    with maia_rt.Communicator(ranks.devices) as ranks, allocated(ranks, 4, np.float32) as buffers:
        done = ranks.all_reduce(buffers)
        with pytest.raises(maia_rt.errors.InvalidArgument, match="timing=True"):
            _ = done.seconds


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_collectives_are_captured_into_one_graph_a_rank(open_devices, tmp_path, algorithm):
    with maia_rt.Communicator(open_devices(4), algorithm=algorithm) as ranks, contextlib.ExitStack() as stack:
        streams = [stack.enter_context(device.create_stream()) for device in ranks.devices]
        with allocated(ranks, 5001, np.float32) as buffers, allocated(ranks, 4 * 5001, np.float32) as gathered:
            with contextlib.ExitStack() as capturing:
                captures = [capturing.enter_context(stream.capture()) for stream in streams]
                for rank, (stream, buffer) in enumerate(zip(streams, buffers, strict=True)):
                    stream.fill(buffer, int(np.float32(rank + 1).view(np.int32)), 4)
                done = ranks.all_reduce(buffers, streams=streams)
                ranks.all_gather(buffers, gathered, streams=streams)
            with pytest.raises(maia_rt.errors.InvalidArgument, match="captured"):
                done.synchronize()
            with streams[0].capture(), pytest.raises(maia_rt.errors.CaptureError, match="all ranks"):
                ranks.barrier(streams)
            graphs = [stack.enter_context(capture.instantiate()) for capture in captures]
            for _ in range(3):
                for buffer in gathered:
                    buffer.device.default_stream.fill(buffer, 0)
                    buffer.device.default_stream.synchronize()
                for graph, stream in zip(graphs, streams, strict=True):
                    graph.launch(stream)
                for stream in streams:
                    stream.synchronize(10)
                for got in hosted(gathered):
                    assert (got == 10).all()
            with pytest.raises(maia_rt.errors.Unsupported, match="not saved"):
                graphs[0].save(tmp_path / "graph")
    with pytest.raises(maia_rt.errors.ClosedError):
        graphs[0].launch(streams[0])
