"""What a failure tells, how a stream goes on after one, and how soon everybody who waits hears of it."""

import os
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest

import maia_rt
from maia_rt.contract.commands import Opcode, PostOp, WaitOp
from maia_rt.errors import (
    ClosedError,
    DeviceFault,
    DeviceLost,
    DeviceTimeout,
    FaultCode,
    InvalidArgument,
    InvalidType,
    MaiaError,
)
from tests.helpers.stopwatch import promptly

SEMAPHORE = 1000
AT_ONCE = 1.0
"""Seconds within which who waits hears of a failure; the emulator under a busy test run needs some of them itself."""


@pytest.fixture
def held(attached):
    """Streams whose first command waits for a semaphore; it is signalled at the end."""
    opened = [attached.create_stream() for _ in range(3)]
    for stream in opened:
        stream._submit(Opcode.NOP, pre=((SEMAPHORE, WaitOp.EQ, 1),), unbounded=True)
    yield opened
    if attached.closed:
        return
    with attached.create_stream() as other:
        other._submit(Opcode.NOP, post=((SEMAPHORE, PostOp.SET, 1),))
        other.synchronize()
        for stream in opened:
            if not stream.closed:
                stream.recover()
                stream.synchronize()
                stream.close()
        other._submit(Opcode.NOP, post=((SEMAPHORE, PostOp.SET, 0),))


def waiting(*calls):
    """Threads that each make a call; returns what ends them and what they heard."""
    heard = []

    def run(call):
        try:
            call()
            heard.append((time.monotonic(), None))
        except BaseException as error:
            heard.append((time.monotonic(), error))

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    if heard:
        promptly(began, 0.2)
    assert not heard

    def ended(start):
        for thread in threads:
            thread.join(10)
        assert len(heard) == len(threads)
        promptly(start, AT_ONCE, max(at for at, _ in heard))
        return [error for _, error in heard]

    return ended


def here(error):
    return error.where.startswith(__file__)


def test_a_fault_names_stream_line_and_buffer(device):
    with device.create_stream() as stream, device.allocate(4096, np.float32) as buffer:
        stream.fill(maia_rt.Buffer(device, buffer.address, (1 << 40), None, (1 << 40,), buffer), 1)
        with pytest.raises(DeviceFault) as caught:
            stream.synchronize()
        fault = caught.value
        assert fault.code == FaultCode.ADDRESS
        assert fault.stream == stream.name == f"stream {stream.number}"
        assert here(fault)
        assert fault.command.startswith("FILL")
        assert [lost.sequence for lost in fault.lost] == [fault.sequence]
        for part in (fault.stream, fault.where, fault.command, f"{fault.address:#018x}"):
            assert part in str(fault)
        stream.recover()


@pytest.mark.parametrize("distance, text", [
    (-64, r"64 bytes before <Buffer float32 \(16, 4\) at 0x"),
    (256, r"0 bytes past the end of <Buffer float32 \(16, 4\) at 0x"),
    (320, r"64 bytes past the end of <Buffer float32 \(16, 4\) at 0x"),
    (32, r"32 bytes into <Buffer float32 \(16, 4\) at 0x"),
])
def test_an_address_is_told_by_the_buffer_it_hits_or_nearly_hits(attached, distance, text):
    with attached.allocate((16, 4), np.float32) as buffer:
        found = attached._addresses.describe(buffer.address + distance)
        assert re.match(text, found), found
        assert attached._addresses.describe(buffer.address + (1 << 30)) == ""


def test_an_address_in_a_buffer_that_was_closed_says_so(attached):
    buffer = attached.allocate((16, 4), np.float32)
    address = buffer.address
    buffer.close()
    assert attached._addresses.describe(address + 5).endswith(", which was closed")
    assert attached._addresses.describe(address + 5).startswith("5 bytes into <Buffer float32 (16, 4) at ")


def test_the_fault_of_a_command_past_a_buffers_end_names_the_buffer(attached):
    capabilities = attached.capabilities
    end = capabilities.hbm_base + capabilities.hbm_bytes
    with attached.create_stream() as stream, \
            attached.allocate(attached.memory().largest_free - (1 << 16), np.uint8) as buffer:
        stream.fill(maia_rt.Buffer(attached, buffer.address, end - buffer.address + 64, None, (1,), buffer), 1)
        with pytest.raises(DeviceFault, match=r"bytes (into|past the end of) <Buffer uint8") as caught:
            stream.synchronize()
        assert caught.value.buffer
        stream.recover()


def test_recover_lists_what_was_lost_command_by_command(device, first_index):
    stream = device.create_stream()
    with device.allocate(64) as buffer:
        stream.fill(buffer, 1)
        stream._submit(Opcode.TRAP, payload=(5, 0, 0))
        stream.fill(buffer, 2)
        stream.copy(buffer[:32], buffer[32:])
        with pytest.raises(DeviceFault):
            stream.synchronize()
        with pytest.raises(DeviceFault):
            stream.fill(buffer, 3)
        lost = stream.recover()
        assert [item.sequence for item in lost] == [first_index + n for n in (2, 3, 4)]
        assert [item.command.split()[0] for item in lost] == ["TRAP", "FILL", "COPY"]
        assert all(here(item) for item in lost)
        assert "FILL" in repr(lost[1])
        assert lost[1].where in repr(lost[1])
        assert stream.recover() == []
        assert stream.query()
        stream.synchronize()
        stream.fill(buffer, 7)
        stream.synchronize()
        assert (buffer.copy_to_host(stream) == 7).all()
    stream.close()


def test_a_stream_goes_on_after_many_failures(attached):
    with attached.create_stream(entries=8) as stream, attached.allocate(64) as buffer:
        for value in range(1, 25):
            stream._submit(Opcode.TRAP)
            with pytest.raises(DeviceFault):
                while True:
                    stream.fill(buffer, 200)
            assert 1 <= len(stream.recover()) <= 8
            stream.fill(buffer, value)
            assert (buffer.copy_to_host(stream) == value).all()
        statistics = stream.statistics()
        assert (statistics.failed, statistics.in_flight) == (24, 0)
        assert statistics.submitted == statistics.completed + statistics.failed + statistics.aborted


def test_recovering_a_stream_that_has_not_failed_changes_nothing(attached):
    with attached.create_stream() as stream, attached.allocate(64) as buffer:
        stream.fill(buffer, 3)
        assert stream.recover() == []
        assert (buffer.copy_to_host(stream) == 3).all()
    with pytest.raises(ClosedError):
        stream.recover()
    with pytest.raises(ClosedError):
        stream.abort()


def test_the_line_is_that_of_the_program_however_deep_the_call(attached):
    def here_and_now():
        return sys._getframe(1).f_lineno

    with attached.create_stream() as stream, attached.allocate(64) as buffer:
        stream._submit(Opcode.TRAP)
        lines = [here_and_now()]
        stream.copy(buffer, bytes(range(64)))
        lines.append(here_and_now())
        [stream.fill(buffer, value) for value in [1]]
        lines.append(here_and_now())
        max((stream.fill(buffer, 2) or 0) for _ in range(1))
        lines.append(here_and_now())
        with pytest.raises(DeviceFault):
            stream.synchronize()
        assert [lost.where for lost in stream.recover()] == [f"{__file__}:{line - 1}" for line in lines]


def test_without_sites_an_error_knows_no_line(own_selector):
    with maia_rt.open(own_selector, sites=False) as device, device.create_stream() as stream:
        stream._submit(Opcode.TRAP)
        with pytest.raises(DeviceFault) as caught:
            stream.synchronize()
        assert caught.value.where == ""
        assert [lost.where for lost in stream.recover()] == [""]


def test_what_a_stream_is_at_is_aborted(held):
    stream = held[0]
    assert stream.abort()
    with pytest.raises(DeviceFault, match="ABORTED") as caught:
        stream.synchronize(5)
    assert caught.value.code == FaultCode.ABORTED
    assert len(stream.recover()) == 1
    assert not stream.abort()
    stream.synchronize()


def test_the_command_before_an_event_is_aborted_and_those_before_it_run(attached, held):
    stream = held[0]
    with attached.allocate(64) as buffer:
        stream.fill(buffer, 1)
        before = stream.record()
        stream.fill(buffer, 2)
        middle = stream.record()
        stream.fill(buffer, 3)
        assert stream.abort(middle)
        assert not before.query()
        with attached.create_stream() as other:
            other._submit(Opcode.NOP, post=((SEMAPHORE, PostOp.SET, 1),))
        before.synchronize(5)
        with pytest.raises(DeviceFault, match="ABORTED"):
            middle.synchronize(5)
        assert [item.command.split()[0] for item in stream.recover()] == ["FILL", "FILL"]
        assert not stream.abort(before)
        assert (buffer.copy_to_host(stream) == 1).all()


def test_what_cannot_be_aborted_is_refused(attached, held):
    stream, other, _ = held
    for bad, error in ((5, InvalidType), ("x", InvalidType), (attached.create_event(), InvalidArgument),
                       (other.record(), InvalidArgument)):
        with pytest.raises(error):
            stream.abort(bad)
    assert not stream.query()


def test_every_thread_that_waits_for_a_stream_hears_of_its_fault_at_once(held):
    stream, *others = held
    stream._submit(Opcode.TRAP)
    events = [stream.record() for _ in range(3)]
    ended = waiting(*(event.synchronize for event in events), stream.synchronize)
    start = time.monotonic()
    stream.abort()
    errors = ended(start)
    assert [type(error) for error in errors] == [DeviceFault] * 4
    assert {error.code for error in errors} == {FaultCode.ABORTED}
    assert not any(other.query() for other in others)


def test_every_thread_that_waits_hears_of_a_reset_at_once(attached, held):
    ended = waiting(*(stream.synchronize for stream in held), *(stream.record().synchronize for stream in held))
    start = time.monotonic()
    attached.reset()
    assert all(isinstance(error, ClosedError | DeviceFault) for error in ended(start))


@pytest.mark.emulator_process
def test_every_thread_that_waits_hears_of_a_device_that_vanishes_at_once(embedded):
    streams = [embedded.create_stream() for _ in range(3)]
    for stream in streams:
        stream._submit(Opcode.NOP, pre=((SEMAPHORE, WaitOp.EQ, 1),), unbounded=True)
    ended = waiting(*(stream.synchronize for stream in streams for _ in range(2)))
    start = time.monotonic()
    os.kill(embedded.emulator_pid, signal.SIGKILL)
    assert [type(error) for error in ended(start)] == [DeviceLost] * 6
    for stream in streams:
        with pytest.raises(MaiaError):
            stream.close()


def test_every_thread_that_waits_has_its_own_deadline(held):
    stream = held[0]
    start = time.monotonic()
    ended = waiting(*(lambda: stream.synchronize(0.3) for _ in range(3)))
    assert [type(error) for error in ended(start)] == [DeviceTimeout] * 3


def test_threads_that_submit_while_their_stream_fails_all_hear_of_it(attached):
    with attached.create_stream() as stream, attached.create_stream() as other, attached.allocate(64) as buffer:
        stop = threading.Event()
        heard = []

        def submit():
            try:
                while not stop.is_set():
                    stream.fill(buffer, 1)
            except DeviceFault as error:
                heard.append(error)

        threads = [threading.Thread(target=submit) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        stream._submit(Opcode.TRAP)
        for thread in threads:
            thread.join(10)
        stop.set()
        assert len(heard) == 4
        assert {error.code for error in heard} == {FaultCode.TRAP}
        assert stream.recover()
        stream.synchronize()
        statistics = stream.statistics()
        assert statistics.submitted == statistics.completed + statistics.failed + statistics.aborted
        assert (statistics.failed, statistics.in_flight) == (1, 0)
        other.synchronize()
