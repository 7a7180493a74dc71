"""Streams and events: order, waits on the device, back-pressure, many threads, wrap-around, faults."""

import re
import threading
import time

import numpy as np
import pytest

import maia_rt
from maia_rt._fast.command import Command
from maia_rt.contract.commands import Feature, PostOp, WaitOp
from maia_rt.errors import (
    ClosedError,
    DeviceFault,
    DeviceTimeout,
    FaultCode,
    InvalidArgument,
    QueueFull,
)
from tests.helpers.emulator import eventually
from tests.helpers.stopwatch import promptly

FREE_SEMAPHORE = 1000
"""One that no queue mirrors into."""


def hold(stream):
    """Make a stream wait for a semaphore that the test sets."""
    stream.queue.ring.submit_wait(1, FREE_SEMAPHORE, WaitOp.EQ, 1)


def release(device):
    with device.create_stream() as other:
        other.queue.ring.submit_encoded(Command.nop().post(0, FREE_SEMAPHORE, PostOp.SET, 1))


def break_down(stream):
    """Make a stream fail."""
    return stream.queue.ring.submit_encoded(Command.trap(77))


def test_commands_run_in_order(device, stream):
    with device.allocate(1 << 20) as buffer:
        for value in range(200):
            stream.fill(buffer if value % 2 else buffer[: 1 << 10], value)
        got = buffer.copy_to_host(stream)
        assert (got == 199).all()


def test_query_and_synchronize(device, stream):
    assert stream.query()
    stream.synchronize()
    hold(stream)
    assert not stream.query()
    event = stream.record()
    assert not event.query()
    start = time.monotonic()
    with pytest.raises(DeviceTimeout):
        event.synchronize(0.05)
    promptly(start, 1)
    release(device)
    event.synchronize()
    stream.synchronize()
    assert event.query()
    assert stream.query()


def test_a_timeout_says_what_the_stream_is_at(attached, first_index):
    at = first_index + 1
    with attached.create_stream() as stream:
        hold(stream)
        with pytest.raises(DeviceTimeout, match=rf"queue 0: command {at} was not done within 0.01 s; the device is at "
                                                rf"command {at}: NOP .*pre=\[#1000==1\]"):
            stream.synchronize(0.01)
        release(attached)


def test_an_event_lets_one_stream_wait_for_another(device, stream):
    with device.create_stream() as second, device.allocate(4096) as buffer:
        stream.fill(buffer, 1)
        stream.synchronize()
        hold(stream)
        stream.fill(buffer, 2)
        second.wait(stream.record())
        out = device.allocate(4096)
        second.copy(out, buffer)
        time.sleep(0.02)
        assert not second.query()
        release(device)
        second.synchronize()
        assert (out.copy_to_host(second) == 2).all()
        out.close()


def test_a_wait_for_what_is_done_costs_no_command(device, stream):
    with device.create_stream() as second:
        event = stream.record()
        second.wait(event)
        second.wait(device.create_event())
        second.wait(second.record())
        assert second.statistics().submitted == 0


def test_streams_pass_a_token_round(attached):
    count, rounds = 8, 40
    streams = [attached.create_stream() for _ in range(count)]
    with attached.allocate(4 * (count * rounds + 1)) as buffer:
        hold(streams[0])
        streams[0].fill(buffer[:4], 1, 4)
        for i in range(count * rounds):
            event = streams[i % count].record()
            following = streams[(i + 1) % count]
            following.wait(event)
            following.copy(buffer[4 * i + 4: 4 * i + 8], buffer[4 * i: 4 * i + 4])
        release(attached)
        attached.synchronize()
        assert (buffer.copy_to_host().view(np.uint32) == 1).all()
    for stream in streams:
        stream.close()


def test_timed_events_measure_device_time(device, stream):
    with device.allocate(16 << 20) as buffer:
        start = stream.record(timing=True)
        stream.fill(buffer, 1)
        end = stream.record(device.create_event(timing=True))
        assert 0.05 < end - start < 1000
        assert end.time_ns > start.time_ns
        assert start - end == -(end - start)
        with pytest.raises(InvalidArgument, match="no time"):
            _ = stream.record() - start


def test_more_timed_events_than_the_report_ring_holds(attached):
    with attached.create_stream(entries=4) as stream:
        events = [stream.record(timing=True) for _ in range(100)]
        times = [event.time_ns for event in events]
        assert times == sorted(times)
        assert times[0] > 0


@pytest.mark.parametrize("first", [0, 2**32 - 3, 2**32 - 1, 2**48])
def test_a_short_ring_wraps_and_so_do_its_indices(attached, first):
    with attached.create_stream(entries=4, first_index=first) as stream, attached.allocate(4) as buffer:
        events = []
        for value in range(50):
            stream.fill(buffer, value, 4)
            events.append(stream.record())
        stream.synchronize()
        assert all(event.query() for event in events)
        assert buffer.copy_to_host(stream).view(np.uint32)[0] == 49
        assert stream.queue.ring.head == first + 51


def test_waits_between_streams_pass_2_to_the_32(attached):
    with attached.create_stream(first_index=2**32 - 2) as first, attached.create_stream() as second, \
            attached.allocate(4) as buffer:
        hold(first)
        for value in range(6):
            first.fill(buffer, value, 4)
        second.wait(first.record())
        mark = second.record()
        time.sleep(0.02)
        assert not mark.query()
        release(attached)
        mark.synchronize()
        assert first.query()


def test_a_full_stream_makes_the_program_wait_until_its_deadline(attached):
    with attached.create_stream(entries=4, timeout=0.2) as stream, attached.allocate(4) as buffer:
        hold(stream)
        for _ in range(3):
            stream.fill(buffer, 1)
        start = time.monotonic()
        with pytest.raises(QueueFull, match=r"queue 0: the ring's 4 entries stayed full for 0.2 s"):
            stream.fill(buffer, 1)
        assert promptly(start, 1.5) > 0.15
        release(attached)
        stream.fill(buffer, 1)


def test_many_threads_share_a_stream(device, stream):
    threads, each = 6, 60
    with device.allocate(threads * 5000) as buffer:
        failures = []

        def work(number):
            try:
                part = buffer[number * 5000:(number + 1) * 5000]
                for i in range(each):
                    data = np.full(5000, (number * each + i) % 251, np.uint8)
                    stream.copy(part, data)
                    back = np.empty(5000, np.uint8)
                    stream.copy(back, part)
                    assert np.array_equal(back, data)
            except BaseException as error:
                failures.append(error)

        running = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        assert not failures
        assert stream.statistics().completed == stream.statistics().submitted == 2 * threads * each


def test_a_thread_for_each_stream(attached):
    failures = []

    def work(number):
        try:
            with attached.create_stream() as stream, attached.allocate(100_000) as buffer:
                for i in range(10):
                    data = np.full(100_000, number + i, np.uint8)
                    stream.copy(buffer, data)
                    assert np.array_equal(buffer.copy_to_host(stream), data)
        except BaseException as error:
            failures.append(error)

    running = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failures


def test_a_stream_has_a_queue_of_its_own_while_there_are_any(device):
    limit = device.capabilities.max_queues
    streams = [device.create_stream(entries=4) for _ in range(limit)]
    assert len({stream.queue.id for stream in streams}) == limit
    more = device.create_stream(entries=4)
    assert more.queue in [stream.queue for stream in streams]
    more.close()
    streams.pop(limit // 2).close()
    streams.append(device.create_stream(entries=4))
    assert len({stream.queue.id for stream in streams}) == limit
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("entries", [0, 1, 2, 3, 6, 1 << 16, 1 << 20])
def test_a_stream_of_no_legal_length_is_refused(attached, entries):
    with pytest.raises(InvalidArgument, match="power of two of entries"):
        attached.create_stream(entries=entries)


def test_a_new_stream_on_a_used_queue_disturbs_no_waiter(attached):
    with attached.create_stream() as waiter, attached.allocate(64) as buffer:
        signaller = attached.create_stream()
        hold(waiter)
        hold_signaller = attached.create_event()
        signaller.fill(buffer, 1)
        signaller.record(hold_signaller)
        number, sequence = signaller.queue.id, signaller.queue.ring.head
        waiter.queue.ring.submit_wait(1, number, WaitOp.GE, sequence & 0xFFFFFFFF)
        signaller.close()
        with attached.create_stream() as successor:
            assert successor.queue.id == number
            release(attached)
            waiter.synchronize(5)


def test_a_fault_is_typed_and_names_the_line_that_submitted_it(device, first_index):
    at = first_index + 2
    stream = device.create_stream()
    with device.allocate(64) as buffer:
        stream.copy(buffer, bytes(64))
        break_down(stream)
        stream.fill(buffer, 1)
        with pytest.raises(DeviceFault,
                           match=rf"queue 0: command {at} failed: TRAP at 0x0*4d in TRAP code=77") as caught:
            stream.synchronize()
        assert (caught.value.code, caught.value.queue, caught.value.sequence) == (FaultCode.TRAP, 0, at)
        for call in (lambda: stream.fill(buffer, 1), lambda: stream.copy(buffer, bytes(64)), stream.query,
                     lambda: stream.copy(bytearray(64), buffer), stream.synchronize, lambda: stream.record().query()):
            with pytest.raises(DeviceFault):
                call()
        stream.recover()
        stream.fill(buffer, 5)
        stream.synchronize()
        assert (buffer.copy_to_host(stream) == 5).all()
        buffer_address = buffer.address
    stream.queue.ring.submit(2, 1, 0, buffer_address, 0x7FFF_0000_0000, 64)
    line = r"submitted at .*test_stream\.py:\d+"
    with pytest.raises(DeviceFault, match="ADDRESS at 0x") as caught:
        stream.synchronize()
    assert not re.search(line, str(caught.value)), "queue.submit is below what takes notes"
    stream.recover()
    with device.allocate(64) as buffer:
        stream.fill(maia_rt.Buffer(device, buffer.address + (1 << 47), 64, None, (64,), buffer), 1)
        with pytest.raises(DeviceFault, match=line):
            stream.synchronize()
    stream.recover()
    stream.close()


def test_one_streams_fault_is_that_streams_alone(device, stream):
    other = device.create_stream()
    with device.allocate(1 << 16) as buffer:
        break_down(other)
        for value in range(20):
            stream.fill(buffer, value)
        stream.synchronize()
        with pytest.raises(DeviceFault):
            other.synchronize()
        assert (buffer.copy_to_host(stream) == 19).all()
    with pytest.raises(DeviceFault):
        other.close()
    assert other.closed


def test_waiting_threads_hear_of_a_fault_at_once(attached):
    stream = attached.create_stream()
    hold(stream)
    break_down(stream)
    events = [stream.record() for _ in range(3)]
    heard = []

    def wait(event):
        try:
            event.synchronize(20)
        except DeviceFault as error:
            heard.append(error.code)

    threads = [threading.Thread(target=wait, args=(event,)) for event in events]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    start = time.monotonic()
    release(attached)
    for thread in threads:
        thread.join()
    promptly(start, 2)
    assert heard == [FaultCode.TRAP] * 3
    stream.recover()
    stream.close()


def test_submitted_is_completed_plus_failed_plus_aborted(attached, first_index):
    stream = attached.create_stream()
    with attached.allocate(64) as buffer:
        for _ in range(5):
            stream.fill(buffer, 1)
        hold(stream)
        break_down(stream)
        lost = [stream.record() for _ in range(3) if stream.fill(buffer, 1) is None]
        early = stream.statistics()
        assert early.submitted == early.completed + early.failed + early.aborted + early.in_flight == 10
        release(attached)
        with pytest.raises(DeviceFault):
            stream.synchronize()
        stopped = stream.statistics()
        assert (stopped.submitted, stopped.completed, stopped.failed) == (10, 6, 1)
        assert (stopped.aborted, stopped.in_flight) == (3, 0)
        stream.recover()
        stream.fill(buffer, 1)
        stream.synchronize()
        for event in lost:
            with pytest.raises(DeviceFault, match=f"command {first_index + 7} failed: TRAP"):
                event.synchronize()
        after = stream.statistics()
        assert (after.submitted, after.completed, after.failed, after.aborted, after.in_flight) == (11, 7, 1, 3, 0)
        stream.close()
        assert stream.statistics() == after


def test_a_stream_that_never_ends_is_closed_at_its_deadline(attached):
    stream = attached.create_stream(timeout=0.1)
    hold(stream)
    event = stream.record()
    start = time.monotonic()
    with pytest.raises(DeviceTimeout):
        stream.close()
    promptly(start, 2)
    assert stream.closed
    stream.close()
    with pytest.raises(DeviceFault, match="RESET"):
        event.synchronize()
    final = stream.statistics()
    assert (final.submitted, final.aborted) == (1, 1)


def test_a_closed_stream_says_so(attached):
    stream = attached.create_stream()
    event = stream.record()
    stream.close()
    with attached.allocate(4) as buffer:
        for call in (lambda: stream.fill(buffer, 1), lambda: stream.copy(buffer, bytes(4)), stream.synchronize,
                     stream.query, stream.record, lambda: stream.wait(event),
                     lambda: stream.copy(bytearray(4), buffer)):
            with pytest.raises(ClosedError):
                call()
    assert event.query()
    event.synchronize()


def test_a_stream_nobody_closed_warns_and_gives_its_queue_back(attached):
    stream = attached.create_stream()
    number = stream.queue.id
    with pytest.warns(ResourceWarning, match="a stream was not closed"):
        del stream
    with attached.create_stream() as again:
        assert again.queue.id == number


def test_the_watchdog_feature_is_reachable(attached):
    assert attached._firmware.get_feature(Feature.WATCHDOG_MS) == 10_000
    attached._firmware.set_feature(Feature.WATCHDOG_MS, 5)
    assert attached._firmware.get_feature(Feature.WATCHDOG_MS) == 5


def test_a_command_can_be_aborted(attached, first_index):
    stream = attached.create_stream()
    hold(stream)
    time.sleep(0.01)
    attached._firmware.abort(stream.queue.id, first_index + 1)
    with pytest.raises(DeviceFault, match="ABORTED"):
        stream.synchronize()
    stream.recover()
    assert eventually(lambda: stream.queue.ring.poll() == stream.queue.ring.head)
    with pytest.raises(InvalidArgument, match="ABORT was refused: NOT_FOUND"):
        attached._firmware.abort(stream.queue.id, first_index + 1)
    stream.close()
