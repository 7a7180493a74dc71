"""Functions of the program that run in a stream's order, on a thread of the device's own."""

import threading
import time

import numpy as np
import pytest

import maia_rt
from maia_rt.contract.commands import Opcode
from maia_rt.errors import CallbackError, ClosedError, DeadlockError, DeviceFault, DeviceTimeout, InvalidType
from tests.helpers.stopwatch import promptly


def boom():
    raise ValueError("boom")


def test_a_function_runs_when_all_before_it_is_done_and_what_follows_waits_for_it(device, stream):
    with device.allocate_host(1024, np.uint8) as host, device.allocate(1024, np.uint8) as buffer:
        host.array[:] = 0
        seen = []

        def look(step):
            time.sleep(0.02)
            seen.append((step, int(host.array[0]), threading.current_thread().name))
            host.array[:] = step

        stream.fill(host, 1)
        stream.call(look, 2)
        stream.copy(buffer, host)
        stream.call(look, 3)
        stream.copy(buffer[:1], host[:1])
        stream.synchronize(10)
        assert [step[:2] for step in seen] == [(2, 1), (3, 2)]
        assert {step[2] for step in seen} == {"maia-callbacks"}
        assert list(buffer.copy_to_host()[:2]) == [3, 2]


def test_functions_of_many_streams_are_called_in_each_ones_order(attached):
    streams = [attached.create_stream() for _ in range(4)]
    seen = [[] for _ in streams]
    for i in range(20):
        for stream, mine in zip(streams, seen, strict=True):
            stream.call(mine.append, i)
    for stream in streams:
        stream.synchronize(10)
        stream.close()
    assert seen == [list(range(20))] * 4


def test_the_thread_is_made_at_the_first_call_and_ends_with_the_device(own_selector):
    def named():
        return [thread for thread in threading.enumerate() if thread.name == "maia-callbacks"]

    with maia_rt.open(own_selector) as opened, opened.create_stream() as first, opened.create_stream() as second:
        assert not named()
        first.call(len, ())
        second.call(len, ())
        assert len(named()) == 1
    assert not named()


def test_a_function_is_called_while_another_thread_sits_in_synchronize(device, stream):
    called = threading.Event()
    stream.call(time.sleep, 0.05)
    stream.call(called.set)
    stream.synchronize(10)
    assert called.is_set()


def test_functions_are_called_while_the_program_submits_into_a_full_ring(attached):
    with attached.create_stream(entries=16) as stream:
        seen = []
        for i in range(60):
            stream._submit(Opcode.NOP)
            stream.call(seen.append, i)
        stream.synchronize(10)
        assert seen == list(range(60))


def test_a_function_may_submit_to_other_streams_and_to_its_own(attached):
    with attached.create_stream() as stream, attached.create_stream() as other, \
            attached.allocate(64, np.uint8) as buffer:
        def submit():
            other.fill(buffer, 5)
            other.synchronize(5)
            stream.fill(buffer[:8], 6)
            stream.call(later.append, 1)

        later = []
        stream.call(submit)
        stream.synchronize(10)
        stream.synchronize(10)
        assert list(buffer.copy_to_host()[[0, 8]]) == [6, 5]
        assert later == [1]


def test_waiting_for_its_own_stream_in_a_function_is_an_error_and_no_deadlock(attached):
    with attached.create_stream() as stream:
        caught = []

        def wait():
            for call in (stream.synchronize, stream.record().synchronize, attached.synchronize):
                with pytest.raises(DeadlockError, match=f"called waits for {stream.name}") as error:
                    call()
                caught.append(error.value)

        start = time.monotonic()
        stream.call(wait)
        stream.synchronize(10)
        assert len(caught) == 3
        promptly(start, 5)


def test_waiting_for_a_stream_whose_call_is_to_come_is_an_error_too(attached):
    with attached.create_stream() as first, attached.create_stream() as second:
        go = threading.Event()

        def wait():
            go.wait(5)
            second.synchronize()

        first.call(wait)
        second.call(len, ())
        go.set()
        with pytest.raises(CallbackError) as caught:
            first.synchronize(10)
        assert isinstance(caught.value.__cause__, DeadlockError)
        first.recover()
        second.synchronize(10)


def test_an_exception_fails_the_stream_and_what_follows_does_not_run(device):
    with device.create_stream() as stream, device.create_stream() as other, device.allocate(64, np.uint8) as buffer:
        seen, go = [], threading.Event()
        stream.fill(buffer, 1)
        stream.call(go.wait, 10)
        stream.call(boom)
        stream.fill(buffer, 2)
        stream.call(seen.append, 1)
        event = stream.record()
        go.set()
        with pytest.raises(CallbackError, match="a function raised ValueError: boom") as caught:
            stream.synchronize(10)
        error = caught.value
        assert isinstance(error, DeviceFault)
        assert isinstance(error.__cause__, ValueError)
        assert error.__cause__.__traceback__.tb_frame.f_code is boom.__code__
        assert error.stream == stream.name
        assert error.where.startswith(__file__)
        with pytest.raises(CallbackError):
            event.synchronize()
        with pytest.raises(CallbackError):
            stream.fill(buffer, 3)
        assert other.query()
        assert (buffer.copy_to_host(other) == 1).all()
        lost = stream.recover()
        assert len(lost) == 3
        stream.call(seen.append, 2)
        stream.synchronize(10)
        assert seen == [2]
        statistics = stream.statistics()
        assert statistics.submitted == statistics.completed + statistics.failed + statistics.aborted


def test_a_function_after_a_fault_is_never_called(attached):
    with attached.create_stream() as stream:
        seen = []
        stream._submit(Opcode.TRAP, payload=(77, 0, 0))
        stream.call(seen.append, 1)
        with pytest.raises(DeviceFault) as caught:
            stream.synchronize(10)
        assert not isinstance(caught.value, CallbackError)
        stream.recover()
        stream.call(seen.append, 2)
        stream.synchronize(10)
        assert seen == [2]


def test_calls_on_shared_queues_hold_up_nobody_else(crowded):
    streams = [crowded.create_stream() for _ in range(4)]
    go = threading.Event()
    streams[0].call(go.wait, 10)
    for stream in streams[1:]:
        stream._submit(Opcode.NOP)
        stream.synchronize(5)
    assert not streams[0].query()
    go.set()
    for stream in streams:
        stream.synchronize(5)
        stream.close()


def test_closing_the_device_calls_what_is_outstanding(own_selector):
    seen = []
    with maia_rt.open(own_selector) as opened:
        stream = opened.create_stream()
        stream.call(time.sleep, 0.02)
        stream.call(seen.append, 1)
    assert seen == [1]


def test_closing_the_device_in_a_function_ends_it(own_selector):
    opened = maia_rt.open(own_selector)
    stream = opened.create_stream()
    done = threading.Event()

    def close():
        opened.close()
        done.set()

    stream.call(close)
    assert done.wait(10)
    assert opened.closed
    assert stream.closed


def test_a_reset_forgets_calls(attached):
    stream, seen = attached.create_stream(), []
    with attached.create_semaphore() as semaphore:
        stream.wait(semaphore, 1)
        stream.call(seen.append, 1)
        attached.reset()
    with attached.create_stream() as again:
        again.call(seen.append, 2)
        again.synchronize(10)
    assert seen == [2]


def test_wrong_calls_are_refused(attached):
    stream = attached.create_stream()
    for wrong in (None, 5, "print"):
        with pytest.raises(InvalidType, match="calls a function"):
            stream.call(wrong)
    stream.call(len)  # without what it needs
    with pytest.raises(CallbackError) as caught:
        stream.synchronize(10)
    assert isinstance(caught.value.__cause__, TypeError)
    stream.recover()
    stream.close()
    with pytest.raises(ClosedError):
        stream.call(len, ())


def test_a_streams_semaphore_goes_with_it(attached):
    free = len(attached._free_semaphores._free)
    for _ in range(3):
        with attached.create_stream() as stream:
            stream.call(len, ())
            stream.synchronize(10)
    attached._reclaimer.collect()
    assert len(attached._free_semaphores._free) == free


def test_a_time_out_says_that_a_function_has_not_returned(attached):
    with attached.create_stream() as stream:
        go = threading.Event()

        def slow():
            go.wait(10)

        stream.call(slow)
        stream.call(len, ())
        with pytest.raises(DeviceTimeout, match="waits for a function that it called") as caught:
            stream.synchronize(0.1)
        assert caught.value.report.verdict is maia_rt.HangVerdict.WAITING
        go.set()
        stream.synchronize(10)


def test_an_aborted_call_is_told_as_that_and_its_function_returns_to_nobody(attached):
    with attached.create_stream() as stream:
        go = threading.Event()
        stream.call(go.wait, 10)
        while stream.query():
            time.sleep(0.001)
        assert stream.abort()
        with pytest.raises(DeviceFault, match="ABORTED"):
            stream.synchronize(10)
        stream.recover()
        go.set()
        seen = []
        stream.call(seen.append, 1)
        stream.synchronize(10)
        assert seen == [1]
