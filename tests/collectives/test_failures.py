"""A rank that fails in the middle: all others get a typed error that names it, soon, and nobody hangs."""

import contextlib
import time

import numpy as np
import pytest

import maia_rt
from maia_rt.errors import ClosedError, DeviceFault, DeviceLost, RankFailed
from tests.helpers.emulator import running

SOON = 10.0


@contextlib.contextmanager
def processes(count):
    """Devices with an emulator each: (process, device) pairs. A process that a test kills is reaped here."""
    with contextlib.ExitStack() as stack:
        pairs = []
        for _ in range(count):
            process, (path,) = stack.enter_context(mortal_emulator())
            pairs.append((process, stack.enter_context(maia_rt.open(path))))
        yield pairs


@contextlib.contextmanager
def mortal_emulator():
    """As `running`, of a process that the test may kill."""
    made = running()
    process, paths = made.__enter__()
    try:
        yield process, paths
    finally:
        if process.poll() is None:
            made.__exit__(None, None, None)
        else:
            with contextlib.suppress(AssertionError):
                made.__exit__(None, None, None)


def started(ranks, stack, gate_rank):
    """A collective that cannot end: rank `gate_rank` stands at a gate. Returns streams, buffers, gate."""
    streams = [device.create_stream() for device in ranks.devices]
    for stream in streams:
        stack.callback(end, stream)
    buffers = [stack.enter_context(device.upload(np.ones(1000, np.float32))) for device in ranks.devices]
    gate = stack.enter_context(ranks.devices[gate_rank].create_semaphore())
    streams[gate_rank].wait(gate, 1)
    return streams, buffers, gate


def end(stream):
    with contextlib.suppress(DeviceLost):
        stream.close()


@pytest.mark.parametrize("count", [2, 4])
def test_a_device_killed_in_the_middle_is_named_on_all_ranks(count):
    with processes(count) as pairs, contextlib.ExitStack() as stack:
        devices = [device for _, device in pairs]
        ranks = stack.enter_context(maia_rt.Communicator(devices))
        streams, buffers, _ = started(ranks, stack, count - 1)
        done = ranks.all_reduce(buffers, streams=streams)
        process, dead = pairs[-1]
        process.kill()
        process.wait()
        start = time.monotonic()
        for stream in streams[:-1]:
            with pytest.raises(RankFailed, match=f"rank {count - 1}, .* failed") as caught:
                stream.synchronize(30)
            assert caught.value.rank == count - 1 and caught.value.culprit == dead.name
            assert isinstance(caught.value.__cause__, DeviceLost)
        with pytest.raises(DeviceLost):
            streams[-1].synchronize(30)
        assert time.monotonic() - start < SOON
        with pytest.raises((RankFailed, DeviceLost)):
            done.synchronize(10)
        assert ranks.failed
        with pytest.raises(ClosedError, match=f"rank {count - 1}"):
            ranks.barrier()
        ranks.close()
        for stream in streams[:-1]:
            assert len(stream.recover()) >= 1
        if count > 2:
            with maia_rt.Communicator(devices[:-1]) as rest:
                rest.all_reduce(buffers[:-1], streams=streams[:-1]).synchronize(10)
                assert (buffers[0].copy_to_host() == count - 1).all()


def test_a_fault_of_one_ranks_stream_is_the_others_error(open_devices):
    with maia_rt.Communicator(open_devices(4)) as ranks, contextlib.ExitStack() as stack:
        streams, buffers, gate = started(ranks, stack, 1)
        ranks.devices[1].inject("fault:code=ECC,opcodes=LAUNCH+SIGNAL_REMOTE")
        ranks.all_reduce(buffers, streams=streams)
        gate.set(1)
        for rank, stream in enumerate(streams):
            with pytest.raises(DeviceFault) as caught:
                stream.synchronize(SOON)
            if rank != 1:
                assert isinstance(caught.value, RankFailed) and caught.value.rank == 1
                assert isinstance(caught.value.__cause__, DeviceFault)
            else:
                assert caught.value.code.name == "ECC"
        assert ranks.failed
        ranks.close()
        for stream in streams:
            stream.recover()
        with maia_rt.Communicator(ranks.devices) as again:
            again.all_reduce(buffers, streams=streams).synchronize(SOON)


def test_an_aborted_rank_ends_the_collective_everywhere(open_devices):
    with maia_rt.Communicator(open_devices(2)) as ranks, contextlib.ExitStack() as stack:
        streams, _, _ = started(ranks, stack, 0)
        ranks.barrier(streams)
        streams[0].abort()
        with pytest.raises(RankFailed, match="rank 0"):
            streams[1].synchronize(SOON)
        for stream in streams:
            stream.recover()


def test_a_stream_that_stands_still_is_refused_before_anything_is_submitted(open_devices):
    with maia_rt.Communicator(open_devices(2)) as ranks, contextlib.ExitStack() as stack:
        streams, buffers, _ = started(ranks, stack, 0)
        streams[0].abort()
        with pytest.raises(DeviceFault):
            streams[0].synchronize(SOON)
        with pytest.raises(DeviceFault):
            ranks.all_reduce(buffers, streams=streams)
        streams[0].recover()
        ranks.all_reduce(buffers, streams=streams).synchronize(SOON)
        assert not ranks.failed and (buffers[1].copy_to_host() == 2).all()


def test_a_fault_after_the_collective_is_not_the_collectives(open_devices):
    with maia_rt.Communicator(open_devices(2)) as ranks, contextlib.ExitStack() as stack:
        streams, buffers, gate = started(ranks, stack, 0)
        gate.set(1)
        ranks.all_reduce(buffers, streams=streams).synchronize(SOON)
        streams[0].wait(gate, 99)
        streams[0].abort()
        with pytest.raises(DeviceFault):
            streams[0].synchronize(SOON)
        time.sleep(0.2)
        assert not ranks.failed
        streams[0].recover()
        ranks.barrier(streams).synchronize(SOON)


def test_a_device_that_closes_in_the_middle_is_named(open_devices):
    devices = open_devices(2)
    with maia_rt.Communicator(devices) as ranks, contextlib.ExitStack() as stack:
        survivor = stack.enter_context(devices[0].create_stream())
        other = devices[1].create_stream()
        gate = devices[1].create_semaphore()
        other.wait(gate, 1)
        ranks.barrier([survivor, other])
        devices[1].close()
        with pytest.raises(RankFailed, match="rank 1"):
            survivor.synchronize(SOON)
        survivor.recover()
