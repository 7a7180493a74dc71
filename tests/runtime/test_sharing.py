"""More streams than hardware queues: order, waits, faults and figures are each stream's own all the same."""

import contextlib
import random
import threading
import time

import numpy as np
import pytest

import maia_rt
from maia_rt.contract.commands import Opcode, PostOp, WaitOp
from maia_rt.errors import ClosedError, DeviceFault, DeviceTimeout, FaultCode, OutOfQueues
from tests.helpers import tiny_program
from tests.helpers.emulator import running

SEMAPHORE = 1000


@pytest.fixture
def streams(crowded):
    """Six streams on two queues."""
    opened = [crowded.create_stream() for _ in range(6)]
    yield opened
    for stream in opened:
        with contextlib.suppress(DeviceFault):
            stream.close()


@pytest.fixture
def semaphore(crowded):
    """One that is 0 when the test starts, and when it ends."""
    yield SEMAPHORE
    with crowded.create_stream() as last:
        last._submit(Opcode.NOP, post=((SEMAPHORE, PostOp.SET, 0),))


def block(stream, semaphore, value=1):
    return stream._submit(Opcode.NOP, pre=((semaphore, WaitOp.GE, value),), unbounded=True)


def signal(stream, semaphore, value=1):
    return stream._submit(Opcode.NOP, post=((semaphore, PostOp.SET, value),))


def fail(stream):
    return stream._submit(Opcode.TRAP, payload=(77, 0, 0))


def same_queue(streams):
    """Two streams that share a queue."""
    first = streams[0]
    return first, next(other for other in streams[1:] if other.queue is first.queue)


def balanced(statistics):
    return statistics.submitted == (statistics.completed + statistics.failed + statistics.aborted
                                    + statistics.in_flight)


def test_streams_are_spread_evenly_over_the_queues(crowded, streams):
    counts = [len(crowded._queues.streams_on(queue)) for queue in crowded._queues]
    assert counts == [3, 3]


def test_streams_that_share_a_queue_keep_their_order_and_their_figures(crowded, streams):
    with crowded.allocate((6, 64), np.uint8) as buffer:
        for value in range(40):
            for number, stream in enumerate(streams):
                stream.fill(buffer[number:number + 1], value + number)
        events = [stream.record() for stream in streams]
        for event in events:
            event.synchronize()
        assert (buffer.copy_to_host() == 39 + np.arange(6)[:, None]).all()
        for stream in streams:
            statistics = stream.statistics()
            assert (statistics.submitted, statistics.completed, statistics.in_flight) == (40, 40, 0)


def test_threads_that_share_queues_disturb_each_other_in_nothing(crowded, streams):
    failures = []

    def work(number, stream):
        try:
            with crowded.allocate(3000) as buffer:
                for i in range(15):
                    data = np.full(3000, number * 20 + i, np.uint8)
                    stream.copy(buffer, data)
                    back = np.empty_like(data)
                    stream.copy(back, buffer)
                    assert np.array_equal(back, data)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=item) for item in enumerate(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(balanced(stream.statistics()) and stream.statistics().completed == 30 for stream in streams)


def test_a_streams_failure_is_that_streams_alone_on_a_shared_queue_too(crowded, streams):
    broken, other = same_queue(streams)
    with crowded.allocate(64) as buffer:
        other.fill(buffer, 1)
        failed = fail(broken)
        other.fill(buffer[:32], 2)
        broken.fill(buffer, 3)
        other.copy(buffer[32:], buffer[:32])
        timed = other.record(timing=True)
        broken.fill(buffer, 4)
        other.synchronize()
        assert (buffer.copy_to_host(other) == 2).all()
        assert timed.time_ns > 0
        assert other.statistics().aborted == 0
        with pytest.raises(DeviceFault, match=f"{broken.name} on queue") as caught:
            broken.synchronize()
        assert (caught.value.stream, caught.value.sequence) == (broken.name, failed)
        assert len(caught.value.lost) == 3
        statistics = broken.statistics()
        assert (statistics.submitted, statistics.failed, statistics.aborted, statistics.in_flight) == (3, 1, 2, 0)
        assert balanced(broken.queue.statistics())
        assert other.query()


def test_launches_of_survivors_keep_their_arguments(crowded, streams):
    broken, other = same_queue(streams)
    x_host = np.arange(64, dtype=np.float32)
    with crowded.load(tiny_program.image(64)) as program, crowded.allocate((4, 64), np.float32) as x, \
            crowded.allocate(64, np.float32) as zero:
        rows = [x[i:i + 1].view(np.float32, 64) for i in range(4)]
        other.copy(rows[0], x_host)
        other.fill(zero, 0)
        fail(broken)
        for i, factor in enumerate((2.0, 3.0, 5.0)):
            broken.launch(program["axpy"], rows[0], zero, rows[i + 1], 100.0)
            other.launch(program["axpy"], rows[i], zero, rows[i + 1], factor)
        other.synchronize()
        assert np.array_equal(x.copy_to_host(other)[3], x_host * 30)


def test_who_waits_on_the_device_for_a_stream_that_failed_goes_on(crowded, streams):
    broken, other = same_queue(streams)
    third = next(stream for stream in streams if stream.queue is not broken.queue)
    fail(broken)
    lost = broken.record()
    third.wait(lost)
    other.wait(lost)
    third.synchronize(5)
    other.synchronize(5)
    with pytest.raises(DeviceFault, match="TRAP"):
        lost.synchronize()


def test_nobody_needs_to_wait_for_the_stream_that_failed(crowded, streams):
    """The one who waits, waits for another queue, which waits for a survivor on the queue that stopped."""
    broken, other = same_queue(streams)
    third = next(stream for stream in streams if stream.queue is not broken.queue)
    with crowded.allocate(64) as buffer:
        fail(broken)
        other.fill(buffer, 7)
        third.wait(other.record())
        third.copy(buffer[32:], buffer[:32])
        event = third.record()
        deadline = time.monotonic() + 5
        while not event.query():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert (buffer.copy_to_host(third) == 7).all()


def test_an_unbounded_wait_has_its_queue_for_itself(crowded, streams, semaphore):
    waiting, other = same_queue(streams)
    with crowded.allocate(64) as buffer:
        other.fill(buffer, 1)
        other.copy(buffer[:32], buffer[32:])
        block(waiting, semaphore)
        waiting.fill(buffer[:32], 9)
        for value in range(2, 6):
            other.fill(buffer[32:], value)
        other.synchronize(5)
        assert other.queue is not waiting.queue
        assert not waiting.query()
        signal(other, semaphore)
        waiting.synchronize(5)
        assert buffer.copy_to_host().tolist() == [9] * 32 + [5] * 32
        assert other.statistics().submitted == other.statistics().completed == 8


def test_a_signal_behind_a_wait_for_it_is_no_deadlock(crowded, streams, semaphore):
    """Who waits for an event behind an unbounded wait waits as long; its signal must not stand behind that."""
    waiting, _ = same_queue(streams)
    block(waiting, semaphore)
    behind = waiting.record()
    signaller, follower, *_ = (stream for stream in streams if stream.queue is not waiting.queue)
    with pytest.raises(OutOfQueues, match="needs a queue for its stream alone"):
        follower.wait(behind)
    signal(signaller, semaphore)
    waiting.synchronize(5)
    follower.wait(behind)
    follower.synchronize(5)


def test_the_last_queue_is_not_given_to_a_wait(crowded, streams, semaphore):
    first, second = streams[0], next(stream for stream in streams if stream.queue is not streams[0].queue)
    block(first, semaphore)
    before = second.statistics().submitted
    with pytest.raises(OutOfQueues, match="none would be left for stream"):
        block(second, semaphore)
    assert second.statistics().submitted == before
    block(first, semaphore)
    for stream in streams[1:]:
        stream.record(timing=True).synchronize(5)
    signal(second, semaphore)
    first.synchronize(5)
    block(second, semaphore)
    second.synchronize(5)


def test_a_stream_follows_what_it_has_waited_for_to_another_queue(crowded, streams, semaphore):
    """A wait within a queue costs no command; it holds when the stream has to leave the queue."""
    ahead, follower = same_queue(streams)
    with crowded.allocate(8 << 20) as buffer:
        ahead.fill(buffer, 5)
        follower.wait(ahead.record())
        assert follower.statistics().submitted == 0
        block(ahead, semaphore)
        with crowded.allocate(1 << 20) as out:
            follower.copy(out, buffer[-(1 << 20):])
            assert follower.queue is not ahead.queue
            assert (out.copy_to_host(follower) == 5).all()
    signal(follower, semaphore)
    ahead.synchronize(5)


def test_a_stream_that_failed_on_one_queue_and_went_to_another_loses_both(crowded, streams, semaphore):
    broken, neighbour = same_queue(streams)
    gate = next(stream for stream in streams if stream.queue is not broken.queue)
    with crowded.allocate(64) as buffer:
        broken.fill(buffer, 1)
        neighbour.synchronize()
        fail(broken)
        block(neighbour, semaphore)
        broken.fill(buffer, 2)
        moved = broken.record()
        assert broken.queue is gate.queue
        gate.fill(buffer[:32], 3)
        with pytest.raises(DeviceFault, match="TRAP"):
            moved.synchronize(5)
        with pytest.raises(DeviceFault, match="TRAP"):
            broken.synchronize(5)
        gate.synchronize(5)
        lost = broken.recover()
        assert [item.command.split()[0] for item in lost] == ["TRAP", "NOP", "FILL"]
        assert buffer.copy_to_host(gate).tolist() == [3] * 32 + [1] * 32
        broken.fill(buffer, 4)
        broken.synchronize(5)
        statistics = broken.statistics()
        assert balanced(statistics)
        assert (statistics.failed + statistics.aborted, statistics.completed) == (3, 2)
    signal(gate, semaphore)
    neighbour.synchronize(5)


def test_closing_a_stream_leaves_those_that_share_its_queue_alone(crowded, streams, semaphore):
    ending, other = same_queue(streams)
    with crowded.allocate(64) as buffer:
        other.fill(buffer, 1)
        ending.fill(buffer[:1], 2)
        ending.close()
        with pytest.raises(ClosedError, match=f"{ending.name} has been closed"):
            ending.fill(buffer, 3)
        other.fill(buffer[1:2], 3)
        other.synchronize(5)
        assert buffer.copy_to_host(other)[:3].tolist() == [2, 3, 1]
    assert ending.statistics().completed == 1


def test_a_stream_that_never_ends_is_closed_and_its_queue_comes_back(crowded, semaphore):
    stuck, other, third = crowded.create_stream(timeout=0.05), crowded.create_stream(), crowded.create_stream()
    assert third.queue is stuck.queue
    block(stuck, semaphore)
    with pytest.raises(DeviceTimeout):
        stuck.close()
    for stream in (other, third):
        stream.record(timing=True).synchronize(5)
    final = stuck.statistics()
    assert balanced(final)
    assert (final.submitted, final.completed, final.in_flight) == (1, 0, 0)
    fresh = crowded.create_stream()
    fresh.record(timing=True).synchronize(5)
    for stream in (other, third, fresh):
        stream.close()


def test_a_queue_that_comes_free_is_used_by_those_that_had_to_share(crowded):
    streams = [crowded.create_stream() for _ in range(3)]
    sharing = [stream for stream in streams if len(crowded._queues.streams_on(stream.queue)) == 2]
    next(stream for stream in streams if stream not in sharing).close()
    with crowded.allocate(64) as buffer:
        for stream in sharing:
            stream.fill(buffer, 1)
            stream.synchronize()
    assert sharing[0].queue is not sharing[1].queue
    for stream in sharing:
        stream.close()


def test_more_streams_than_the_device_has_queues(device):
    count = device.capabilities.max_queues + 8
    streams = [device.create_stream(entries=4) for _ in range(count)]
    with device.allocate(count) as buffer:
        for number, stream in enumerate(streams):
            stream.fill(buffer[number:number + 1], number)
        fail(streams[-1])
        for stream in streams[:-1]:
            stream.synchronize()
        assert buffer.copy_to_host(streams[0]).tolist() == [number % 256 for number in range(count)]
    with pytest.raises(DeviceFault):
        streams.pop().close()
    for stream in streams:
        stream.close()


@pytest.mark.emulator_process
def test_a_device_with_few_queues_has_many_streams():
    with running("--queues", "1") as (_, paths), maia_rt.open(paths[0]) as device:
        assert device.capabilities.max_queues == 1
        with device.create_stream() as first, device.create_stream() as second, device.allocate(64) as buffer:
            fail(first)
            second.fill(buffer, 3)
            assert (buffer.copy_to_host(second) == 3).all()
            assert len(first.recover()) == 1


@pytest.mark.parametrize("bad, error", [(0, maia_rt.errors.InvalidArgument), (-1, maia_rt.errors.InvalidArgument),
                                        ("2", maia_rt.errors.InvalidType), (2.0, maia_rt.errors.InvalidType)])
def test_a_wrong_number_of_queues_is_refused(own_selector, bad, error):
    with pytest.raises(error, match="max_queues"):
        maia_rt.open(own_selector, max_queues=bad)


@pytest.mark.parametrize("seed", range(6))
def test_faults_on_shared_queues_at_random_against_a_model(crowded, seed, record_property):
    """Streams fill cells of their own; some fail, and are recovered or closed. Others never notice."""
    record_property("seed", seed)
    rng = random.Random(seed)
    streams = [crowded.create_stream() for _ in range(5)]
    cells = 8
    with crowded.allocate((5, cells), np.uint8) as memory:
        streams[0].fill(memory, 0)
        streams[0].synchronize()
        model = np.zeros((5, cells), np.uint8)
        down, events = [False] * 5, []
        for _ in range(120):
            number = rng.randrange(5)
            stream, action = streams[number], rng.random()
            if action < 0.08 and not down[number]:
                with contextlib.suppress(DeviceFault):
                    fail(stream)
                down[number] = True
            elif action < 0.16:
                lost = stream.recover()
                if not lost and down[number]:
                    with pytest.raises(DeviceFault):
                        stream.synchronize(10)
                    lost = stream.recover()
                assert bool(lost) == down[number]
                assert [item.command.split()[0] for item in lost][:1] == ["TRAP"] * bool(lost)
                down[number] = False
            elif action < 0.3:
                other = rng.randrange(5)
                with contextlib.suppress(DeviceFault):
                    stream.wait(streams[other].record(timing=rng.random() < 0.3))
            elif action < 0.4:
                with contextlib.suppress(DeviceFault):
                    events.append((stream.record(timing=rng.random() < 0.5), down[number]))
            else:
                cell, value = rng.randrange(cells), rng.randrange(1, 256)
                with contextlib.suppress(DeviceFault):
                    stream.fill(memory[number:number + 1].view(offset=cell, shape=1), value)
                if not down[number]:
                    model[number, cell] = value
        for stream, failed in zip(streams, down, strict=True):
            with pytest.raises(DeviceFault) if failed else contextlib.nullcontext():
                stream.synchronize(10)
            statistics = stream.statistics()
            assert balanced(statistics)
            assert statistics.in_flight == 0
        for event, failed in events:
            with pytest.raises(DeviceFault, match="TRAP") if failed else contextlib.nullcontext():
                event.synchronize(10)
                assert not event.timing or event.time_ns > 0
        with crowded.create_stream() as reader:
            assert np.array_equal(memory.copy_to_host(reader), model)
    assert all(balanced(queue.statistics()) for queue in crowded._queues)
    for stream in streams:
        with contextlib.suppress(DeviceFault):
            stream.close()
    assert FaultCode.TRAP in set(crowded.faults()["code"]) or not any(down)


def test_a_queue_that_comes_free_does_not_take_a_stream_off_the_one_it_has_claimed(streams, semaphore):
    waiter = streams[-1]
    first = next(stream for stream in streams if stream.queue is waiter.queue)
    others = [stream for stream in streams if stream.queue is not waiter.queue]
    begin = waiter._begin_unbounded

    def begin_and_free_the_other_queue():
        claim = begin()
        for stream in others:
            stream.close()
        return claim

    waiter._begin_unbounded = begin_and_free_the_other_queue
    block(waiter, semaphore)
    signal(first, semaphore)
    waiter.synchronize(20)
    assert first.queue is not waiter.queue


@pytest.mark.parametrize("seed", range(3))
def test_threads_with_faults_unbounded_waits_and_moves_at_random(crowded, seed, record_property):
    """Each thread has a stream and a row; it knows what must be there, whatever the others go through."""
    record_property("seed", seed)
    wrong, marks = [], {}

    def work(number):
        rng = random.Random(100 * seed + number)
        row, want, semaphore = memory[number:number + 1], 0, SEMAPHORE + number
        try:
            with crowded.create_stream(entries=16) as stream, crowded.create_stream(entries=16) as other:
                stream.fill(row, 0)
                for _ in range(60):
                    action = rng.random()
                    if action < 0.08:
                        fail(stream)
                        with contextlib.suppress(DeviceFault):
                            for _ in range(rng.randrange(4)):
                                stream.fill(row, 255)
                        with pytest.raises(DeviceFault, match=f"{stream.name} on queue .* failed: TRAP"):
                            stream.synchronize(20)
                        assert stream.recover()[0].command.startswith("TRAP")
                    elif action < 0.16:
                        with contextlib.suppress(OutOfQueues):
                            stream._submit(Opcode.NOP, pre=((semaphore, WaitOp.ACQUIRE, 1),), unbounded=True)
                            other._submit(Opcode.NOP, post=((semaphore, PostOp.ADD, 1),))
                    elif action < 0.35:
                        marks[number] = stream.record(timing=rng.random() < 0.3)
                    elif action < 0.5:
                        event = marks.get(rng.randrange(5))
                        with contextlib.suppress(OutOfQueues):
                            stream.wait(event or stream.record())
                    elif action < 0.6:
                        stream.synchronize(20)
                        assert (row.copy_to_host(stream) == want).all()
                    else:
                        want = rng.randrange(250)
                        stream.fill(row, want)
                stream.synchronize(20)
                assert (row.copy_to_host(stream) == want).all()
                statistics = stream.statistics()
                assert balanced(statistics)
                assert not statistics.in_flight
        except BaseException as error:
            wrong.append(error)

    with crowded.allocate((5, 32), np.uint8) as memory:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, wrong
