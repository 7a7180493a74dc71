"""Hang reports over several devices: who waits for whom on which of them, circles among them, and who is gone."""

import contextlib
import json
import os
import re
import signal

import numpy as np
import pytest

import maia_rt
from maia_rt import HangVerdict
from maia_rt.errors import DeviceTimeout, MaiaError
from maia_rt.observe import live
from tests.helpers.emulator import eventually

pytestmark = pytest.mark.emulator_process


@pytest.fixture
def devices(embedded, other_device):
    """Three devices with a stream each; all reach each other."""
    with maia_rt.open("emulated") as third, contextlib.ExitStack() as stack:
        opened = [embedded, other_device, third]
        yield [(device, stack.enter_context(device.create_stream(timeout=20))) for device in opened]


def label(device):
    return f"{device.name} (process {device.emulator_pid})"


def places(report):
    return [(link.device, link.queue) for link in report.links]


def place(stream):
    return label(stream.device), stream.queue.id


def test_a_chain_is_followed_over_three_devices_from_either_end(devices):
    (first, last), (second, middle), (third, root) = devices
    with third.create_semaphore() as gate:
        root.wait(gate, 1)
        middle.wait(root)
        last.wait(middle)
        for device in (first, second, third):
            report = device.hang_report()
            assert report.device == label(device)
            assert report.verdict is HangVerdict.UNSIGNALLED
            assert places(report) == [place(last), place(middle), place(root)]
            assert report.sentence.startswith(f"queue {root.queue.id} of {label(third)} ({root.name}) waits for "
                                              f"semaphore {gate.index} >= 1, which is 0")
            assert "the program can, for it holds the semaphore" in report.sentence
            header, *lines = str(report).splitlines()
            assert header.startswith(f"{label(device)}: unsignalled: ") and len(lines) == 3
            for line, (waits, stream) in zip(lines, [(second, last), (third, middle)], strict=False):
                assert re.search(rf"queue {stream.queue.id} of {re.escape(label(stream.device))} .*waits for command "
                                 rf"\d+ of queue \d+ of {re.escape(label(waits))}, submitted at {__file__}:\d+, by "
                                 r"semaphore \d+ >= \d+, which is \d+", line)
            assert [wait.places[0].device for link in report.links for wait in link.waits if wait.places] == [
                label(second), label(third)]
        gate.add(1)
        last.synchronize()
        assert not first.hang_report().hangs


def test_who_should_signal_from_another_device_and_who_did_last_are_named(devices):
    (here, waiter), (_, source), _ = devices
    with here.create_semaphore() as semaphore, source.device.create_semaphore() as gate:
        source.signal(semaphore)
        source.synchronize()
        source.wait(gate, 1)
        source.signal(semaphore)
        waiter.wait(semaphore, 2)
        assert eventually(lambda: waiter.queue.ring.poll() < waiter.queue.ring.head)
        report = here.hang_report()
        assert places(report) == [place(waiter), place(source)]
        (wait,) = report.links[0].waits
        assert (wait.semaphore, wait.value, wait.wanted) == (semaphore.index, 1, 2)
        assert [(one.device, one.queue) for one in wait.signallers] == [place(source)]
        there = re.escape(label(source.device))
        assert re.search(rf"which is 1, last signalled by command \d+ of queue \d+ of {there}, submitted at "
                         rf"{__file__}:\d+; command \d+ of queue \d+ of {there} \({source.name}\) will signal it, "
                         rf"submitted at {__file__}", wait.text)
        gate.add(1)
        waiter.synchronize()


def test_a_word_that_a_peer_is_to_write_names_the_copy(devices):
    (here, waiter), (there, source), _ = devices
    with here.upload(np.zeros(1, np.uint32)) as word, there.upload(np.ones(1, np.uint32)) as one, (
            there.create_semaphore()) as gate:
        source.wait(gate, 1)
        source.copy(word, one)
        waiter.wait_value(word, 1)
        assert eventually(lambda: place(source) in places(here.hang_report()))
        (wait,) = here.hang_report().links[0].waits
        assert f"of {label(there)} ({source.name}) will write it" in wait.text
        gate.add(1)
        waiter.synchronize()


@pytest.mark.parametrize("members", [2, 3])
def test_a_circle_over_devices_is_a_deadlock_with_all_its_members(devices, members):
    ring = devices[:members]
    with contextlib.ExitStack() as stack:
        gates = [stack.enter_context(device.create_semaphore()) for device, _ in ring]
        for (_, stream), gate in zip(ring, gates, strict=True):
            stream.wait(gate, 1)
        for number, (_, stream) in enumerate(ring):
            stream.signal(gates[(number + 1) % members])
        for device, _ in ring:
            report = device.hang_report()
            assert report.verdict is HangVerdict.DEADLOCK
            assert {(one.device, one.queue) for one in report.cycle} == {place(stream) for _, stream in ring}
            for _, stream in ring:
                assert f"queue {stream.queue.id} of {label(stream.device)} ({stream.name})" in report.sentence
            json.dumps(report.to_json())
        with pytest.raises(DeviceTimeout, match=r"waits for queue .* of emulated \(process") as caught:
            ring[0][1].synchronize(0.01)
        assert caught.value.report.verdict is HangVerdict.DEADLOCK
        gates[0].add(1)
        for _, stream in ring:
            stream.synchronize()


def test_a_stream_that_waits_for_a_stream_whose_signal_is_behind_that_very_wait_is_a_deadlock(devices):
    (_, waiter), (there, source), _ = devices
    with there.create_semaphore() as semaphore:
        source.wait(semaphore, 1)
        waiter.wait(source)
        waiter.signal(semaphore)
        report = there.hang_report()
        assert report.verdict is HangVerdict.DEADLOCK
        assert {(one.device, one.queue) for one in report.cycle} == {place(waiter), place(source)}
        semaphore.add(1)
        waiter.synchronize()


def test_the_circle_is_found_where_signals_go_through_the_host(devices, monkeypatch):
    for device, _ in devices:
        monkeypatch.setattr(type(device.transport), "region_file", lambda self, region: (-1, 0))
    (_, waiter), (there, source), _ = devices
    with there.create_semaphore() as semaphore:
        source.wait(semaphore, 1)
        waiter.wait(source)
        waiter.signal(semaphore)
        assert there.hang_report().verdict is HangVerdict.DEADLOCK
        semaphore.add(1)
        waiter.synchronize()


def test_a_chain_that_is_slow_and_goes_on_is_never_called_stuck(devices):
    streams = [stream for _, stream in devices]
    with devices[0][0].allocate(1 << 20) as memory:
        devices[0][0].inject("delay:us=2000,opcodes=FILL")
        for _ in range(60):
            streams[0].fill(memory, 1)
            streams[1].wait(streams[0])
            streams[2].wait(streams[1])
            streams[0].wait(streams[2])
        seen = set()
        while not all(stream.query() for stream in streams):
            seen |= {device.hang_report().verdict for device, _ in devices}
        assert seen <= {HangVerdict.WAITING, HangVerdict.RUNNING, HangVerdict.IDLE}
        devices[0][0].clear_injections()


def test_what_another_device_lost_is_a_fault(devices):
    (here, waiter), (there, source), _ = devices
    with here.create_semaphore() as semaphore, there.allocate(64) as memory, there.create_semaphore() as gate:
        source.wait(gate, 1)
        there.inject("fault:code=ECC,opcodes=FILL")
        source.fill(memory, 0)
        source.signal(semaphore)
        gate.add(1)
        with pytest.raises(MaiaError):
            source.synchronize()
        waiter.wait(semaphore, 1)
        assert eventually(lambda: here.hang_report().verdict is HangVerdict.FAULT)
        assert re.search(rf"of {re.escape(label(there))} \({source.name}\) would have done so, .*was lost, for "
                         rf"{source.name} has failed in FILL", here.hang_report().sentence)
        semaphore.add(1)
        waiter.synchronize()
        source.recover()


def test_a_device_that_is_gone_is_named_by_those_that_wait_for_it(embedded, other_device):
    source = other_device.create_stream(timeout=0.1)
    with embedded.create_stream() as waiter, embedded.create_semaphore() as semaphore:
        gate = other_device.create_semaphore()
        source.wait(gate, 1)
        source.signal(semaphore)
        waiter.wait(semaphore, 1)
        os.kill(other_device.emulator_pid, signal.SIGKILL)
        assert eventually(lambda: embedded.hang_report().verdict is HangVerdict.FIRMWARE)
        report = embedded.hang_report()
        assert report.sentence.startswith(f"{label(other_device)} does not answer; ")
        assert place(waiter) in places(report)
        semaphore.add(1)
        waiter.synchronize()
    gate.close()
    with contextlib.suppress(MaiaError):
        source.close()


def test_devices_that_have_nothing_to_do_with_each_other_are_no_concern_of_each_others_reports(embedded, other_device):
    with other_device.create_stream() as stream, other_device.create_semaphore() as gate:
        stream.wait(gate, 1)
        report = embedded.hang_report()
        assert (report.verdict, report.device) == (HangVerdict.IDLE, embedded.name)
        assert other_device.hang_report().device == other_device.name
        gate.add(1)


def test_a_process_tells_of_its_devices_in_one_picture(devices):
    (_, waiter), (_, source), (third, _) = devices
    with source.device.create_semaphore() as gate:
        source.wait(gate, 1)
        waiter.wait(source)
        told = live.ask(os.getpid(), {"call": "hang"})
        ours = [one for one in told if f"process {source.device.emulator_pid}" in one["device"]]
        assert len(ours) == 1
        assert f"process {waiter.device.emulator_pid}" in ours[0]["device"]
        assert ours[0]["verdict"] == "unsignalled" and len(ours[0]["links"]) == 2
        # Devices of other tests of this process are there, too, and have the same name.
        assert {one["verdict"] for one in told if one["device"] == third.name} == {"idle"}
        gate.add(1)
        waiter.synchronize()
