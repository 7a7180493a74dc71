"""Order between streams of two devices: events, streams, semaphores, and what becomes of it when one of them fails."""

import contextlib
import os
import signal
import threading
import time
import types

import numpy as np
import pytest

import maia_rt
from maia_rt.errors import CaptureError, ClosedError, DeviceFault, DeviceLost, InvalidArgument, MaiaError, PeerFault

# What a test does not close is closed with its device; the collector may come by before.
pytestmark = [pytest.mark.emulator_process,
              pytest.mark.filterwarnings("ignore:a buffer of .* was not closed:ResourceWarning")]


@pytest.fixture
def pair(embedded, other_device):
    return embedded, other_device


@pytest.fixture
def ends(pair):
    """A stream on each of two devices: who waits, and whom it waits for."""
    with pair[0].create_stream() as waiter, pair[1].create_stream() as source:
        yield waiter, source


@pytest.fixture(params=["direct", "staged"])
def way(request, pair, monkeypatch):
    """Once with a direct path between the devices, and once without."""
    if request.param == "staged":
        for device in pair:
            monkeypatch.setattr(type(device.transport), "region_file", lambda self, region: (-1, 0))
    assert pair[1].peer(pair[0]).kind == request.param
    return request.param


def hold(stream):
    """Have a stream wait for a semaphore of its own device."""
    semaphore = stream.device.create_semaphore()
    stream.wait(semaphore, 1)
    return semaphore


def is_waiting(stream):
    time.sleep(0.05)
    return not stream.query()


def test_a_stream_waits_for_another_devices_event(way, ends):
    waiter, source = ends
    with hold(source) as gate:
        waiter.wait(source.record())
        assert is_waiting(waiter)
        gate.add(1)
        waiter.synchronize()
        assert source.query()


def test_a_stream_waits_for_all_of_another_devices_stream_again_and_again(way, ends):
    waiter, source = ends
    data = source.device.allocate_host(1, np.uint32)
    seen = waiter.device.allocate_host(1, np.uint32)
    for turn in range(20):
        source.fill(data, turn, 4)
        waiter.wait(source)
        waiter.fill(seen, turn, 4)
        waiter.synchronize()
        assert data.array[0] == turn
    data.close()
    seen.close()


def test_what_is_done_or_was_never_recorded_is_not_waited_for(ends):
    waiter, source = ends
    before = waiter.statistics().submitted
    waiter.wait(source.device.create_event())
    event = source.record()
    source.synchronize()
    waiter.wait(event)
    assert waiter.statistics().submitted == before


def test_many_streams_wait_for_one_event_with_one_signal(pair):
    device, other = pair
    assert other.peer(device).kind == "direct"
    with contextlib.ExitStack() as stack:
        waiters = [stack.enter_context(device.create_stream()) for _ in range(3)]
        source = stack.enter_context(other.create_stream())
        gate = stack.enter_context(hold(source))
        event = source.record()
        before = source.statistics().submitted
        for waiter in waiters:
            waiter.wait(event)
        assert source.statistics().submitted == before + 1
        gate.add(1)
        for waiter in waiters:
            waiter.synchronize()


def test_a_wait_behind_the_event_does_not_hold_the_waiter_up(way, ends):
    # The event's stream then waits for the very stream that waits for the event: a signal behind that came never.
    waiter, source = ends
    with hold(source) as gate, source.device.create_semaphore() as later:
        event = source.record()
        source.wait(later, 1)
        waiter.wait(event)
        waiter.signal(later)
        gate.add(1)
        waiter.synchronize()
        source.synchronize()


def test_a_stream_signals_another_devices_semaphore(way, ends):
    waiter, source = ends
    with hold(source) as gate, waiter.device.create_semaphore(2**32 - 1) as semaphore:
        waiter.wait(semaphore, 1)
        source.signal(semaphore, 2)
        assert is_waiting(waiter)
        gate.add(1)
        waiter.synchronize()
        source.signal(semaphore, 77, op="set")
        semaphore.wait(77, op="eq")


def test_rings_of_waits_between_two_devices_end(way, ends):
    waiter, source = ends
    for _ in range(30):
        waiter.wait(source)
        source.wait(waiter)
    waiter.synchronize()
    source.synchronize()


@pytest.mark.parametrize("pushed", [True, False])
def test_a_failure_is_the_waiters_too_and_names_the_other_device(pair, ends, pushed):
    waiter, source = ends
    other = pair[1]
    with pair[0].create_stream() as bystander, hold(source) as gate, other.create_semaphore() as never:
        other.inject("fault:code=ECC,opcodes=FILL")
        source.fill(other.allocate(64), 0)
        event = source.record()
        if not pushed:
            source.wait(never, 1)
        waiter.wait(event)
        gate.add(1)
        began = time.monotonic()
        with pytest.raises(PeerFault, match=f"process {other.emulator_pid}.*ECC") as caught:
            waiter.synchronize()
        assert time.monotonic() - began < 10
        assert isinstance(caught.value.__cause__, DeviceFault) and caught.value.peer.startswith(other.name)
        assert caught.value.where.startswith(__file__)
        bystander.synchronize()
        assert waiter.recover() and source.recover()
        waiter.wait(source)
        waiter.synchronize()


def test_an_event_that_is_lost_already_is_refused_and_the_waiter_stays_whole(ends):
    waiter, source = ends
    source.device.inject("fault:code=ECC,opcodes=FILL")
    source.fill(source.device.allocate(64), 0)
    event = source.record()
    with pytest.raises(DeviceFault):
        source.synchronize()
    with pytest.raises(PeerFault):
        waiter.wait(event)
    source.recover()
    with pytest.raises(PeerFault):
        waiter.wait(event)
    waiter.wait(source)
    waiter.synchronize()


def test_what_a_recovered_stream_pushes_wakes_nobody_who_waited_for_what_it_lost(ends):
    waiter, source = ends
    with waiter.device.create_stream() as second, hold(source) as gate:
        source.device.inject("fault:code=ECC,opcodes=FILL")
        source.fill(source.device.allocate(64), 0)
        waiter.wait(source)
        gate.add(1)
        with pytest.raises(DeviceFault):
            source.synchronize()
        source.recover()
        second.wait(source)
        second.synchronize()
        with pytest.raises(PeerFault):
            waiter.synchronize()
        waiter.recover()


def test_only_the_signal_was_lost_and_the_event_is_still_told(ends):
    waiter, source = ends
    other = source.device
    with hold(source) as gate:
        event = source.record()
        other.inject("fault:code=ECC,opcodes=FILL")
        source.fill(other.allocate(64), 0)
        waiter.wait(event)
        gate.add(1)
        waiter.synchronize()
        with pytest.raises(DeviceFault):
            source.synchronize()
        source.recover()


def test_a_device_that_is_killed_is_told_to_its_waiters(pair):
    device, other = pair
    with device.create_stream() as waiter, device.create_stream() as bystander:
        source = other.create_stream()
        gate = hold(source)
        waiter.wait(source)
        os.kill(other.emulator_pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(PeerFault, match=f"process {other.emulator_pid}") as caught:
            waiter.synchronize()
        assert time.monotonic() - began < 10
        assert isinstance(caught.value.__cause__, DeviceLost)
        bystander.synchronize()
        waiter.recover()
        waiter.synchronize()
        gate.close()


def test_a_device_that_is_closed_is_told_to_its_waiters(pair):
    device, other = pair
    with device.create_stream() as waiter:
        source = other.create_stream(timeout=0.1)
        with hold(source):
            waiter.wait(source)
        other.close()
        with pytest.raises(PeerFault):
            waiter.synchronize()
        waiter.recover()


def test_a_queue_that_another_thread_closes_at_the_same_moment_is_quiet(embedded, monkeypatch):
    stream = embedded.create_stream()
    queue, sequence = stream._mark()
    embedded.close()
    monkeypatch.setattr(queue, "ring", types.SimpleNamespace(closed=False, wait=queue.ring.wait))
    assert queue.quiet(sequence)


def test_a_waiter_that_is_closed_leaves_the_other_device_whole(pair):
    device, other = pair
    with other.create_stream() as source, hold(source) as gate:
        waiter = device.create_stream(timeout=0.1)
        waiter.wait(source)
        threading.Timer(0.2, gate.add).start()
        device.close()
        source.synchronize()


def test_a_reset_waiter_waits_anew(pair):
    device, other = pair
    with other.create_stream() as source:
        with device.create_stream() as waiter:
            waiter.wait(source)
        device.reset()
        with device.create_stream() as waiter:
            waiter.wait(source)
            waiter.synchronize()


def test_a_hang_report_names_the_command_of_the_other_device(ends):
    waiter, source = ends
    with hold(source) as gate:
        waiter.wait(source)
        report = waiter.device.hang_report()
        assert report.verdict is maia_rt.HangVerdict.UNSIGNALLED
        assert f"of {source.device.name} (process {source.device.emulator_pid}), submitted at {__file__}" in str(report)
        gate.add(1)
        waiter.synchronize()


def test_more_waits_than_semaphores_take_one_each_stream(ends):
    waiter, source = ends
    for _ in range(waiter.device.capabilities.semaphores + 10):
        waiter.wait(source)
    waiter.synchronize()


def test_captures_refuse_another_devices_moments(ends):
    waiter, source = ends
    with hold(source) as gate:
        event = source.record()
        with waiter.capture():
            for what, why in ((event, "outside of the capture"), (source, "not in the capture")):
                with pytest.raises(CaptureError, match=why):
                    waiter.wait(what)
        gate.add(1)


def test_a_closed_semaphore_of_another_device_is_refused(ends):
    waiter, source = ends
    semaphore = waiter.device.create_semaphore()
    semaphore.close()
    with pytest.raises(ClosedError):
        source.signal(semaphore)
    with waiter.device.create_semaphore() as good:
        with pytest.raises(InvalidArgument):
            source.signal(good, 1, op="sub")
        with pytest.raises(InvalidArgument, match="another device"):
            source.wait(good, 1)
        with pytest.raises(MaiaError):
            source.signal(good, -1)


def test_validation_takes_the_order_over_another_device():
    with (maia_rt.open("emulated", validate=True) as device, maia_rt.open("emulated") as other,
          device.create_stream() as first, device.create_stream() as second, other.create_stream() as far,
          device.create_semaphore() as semaphore):
        data = device.allocate(64)
        first.fill(data, 1)
        far.wait(first)
        second.wait(far)
        second.fill(data, 2)
        far.wait(second)
        far.signal(semaphore)
        first.wait(semaphore, 1)
        first.fill(data, 3)
        first.synchronize()
