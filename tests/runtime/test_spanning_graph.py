"""Graphs that span devices: one doorbell a device and replay, in order also in flight, and nobody waits in vain."""

import contextlib
import os
import signal
import time

import numpy as np
import pytest

import maia_rt
from maia_rt.errors import (
    CaptureError,
    ClosedError,
    DeviceFault,
    DeviceLost,
    InvalidArgument,
    InvalidType,
    MaiaError,
    PeerFault,
    Unsupported,
)
from tests.helpers.emulator import eventually
from tests.helpers.stopwatch import promptly

# What a test does not close is closed with its device; the collector may come by before.
pytestmark = [pytest.mark.emulator_process, pytest.mark.filterwarnings("ignore:.* was not closed:ResourceWarning")]
COUNT = 256


@pytest.fixture
def ends(embedded, other_device):
    with embedded.create_stream(timeout=20) as here, other_device.create_stream(timeout=20) as there:
        yield here, there


def words(device, value=0):
    return device.upload(np.full(COUNT, value, np.uint32))


@pytest.fixture
def relay(ends):
    """A number goes from a word of the host to the other device and back: the graph, where it comes in and goes out."""
    here, there = ends
    given, taken = (here.device.allocate_host(COUNT, np.uint32) for _ in range(2))
    near, far, back = words(here.device), words(there.device), words(here.device)
    with here.capture() as capture:
        here.copy(near, given)
        there.wait(here.record())
        there.copy(far, near)                       # pulled from the first device
        here.wait(there.record())
        here.copy(back, far)                        # and pulled back
        here.copy(taken, back)
    with capture.instantiate() as graph:
        yield graph, given, taken
    for memory in (given, taken, near, far, back):
        memory.close()


def test_a_capture_over_two_devices_is_one_graph_with_a_part_and_a_doorbell_each(ends, relay):
    here, there = ends
    graph, given, taken = relay
    assert isinstance(graph, maia_rt.SpanningGraph)
    assert [part.device for part in graph.parts] == [here.device, there.device]
    assert len(graph) == graph.count == 8 and len(list(graph)) == 8
    for turn in range(5):
        given.array[:] = turn
        before = [here.statistics().submitted, graph._streams[0].statistics().submitted]
        graph.launch(here)
        assert [here.statistics().submitted, graph._streams[0].statistics().submitted] == [one + 1 for one in before]
        here.synchronize()
        assert (taken.array == turn).all()
    assert there.statistics().submitted == 0


def test_replays_in_flight_one_behind_the_other_each_see_their_own_values(ends):
    here, there = ends
    counter, seen = words(here.device), words(there.device)
    log = here.device.allocate_host((40, COUNT), np.uint32)
    graphs = []
    for turn in range(2):
        with here.capture() as capture:
            here.fill(counter, turn + 1, 4)
            there.wait(here)
            there.copy(seen, counter)
            here.wait(there)
            here.fill(counter, 0xDEAD, 4)           # overtaking would be seen
            here.copy(counter, seen)
        graphs.append(capture.instantiate())
    for turn in range(40):
        graphs[turn % 2].launch(here)
        here.copy(log[turn], counter)
    here.synchronize()
    assert log.array[:, 0].tolist() == [1, 2] * 20 and (log.array == log.array[:, :1]).all()
    for one in (*graphs, counter, seen, log):
        one.close()


def test_a_graph_is_launched_on_several_streams_and_its_replays_follow_each_other(ends, relay):
    here, _ = ends
    graph, given, taken = relay
    given.array[:] = 3
    with here.device.create_stream() as second:
        for _ in range(10):
            graph.launch(here)
            graph.launch(second)
        second.synchronize()
        here.synchronize()
    assert (taken.array == 3).all()


def test_three_devices_with_lanes_that_cross_both_ways_do_not_wait_for_each_other_in_a_circle(ends):
    # In the order of each lane by itself, each device's list would begin with the wait for the other.
    here, there = ends
    with maia_rt.open("emulated") as third, contextlib.ExitStack() as stack:
        here2, there2, last = (stack.enter_context(device.create_stream()) for device in (here.device, there.device,
                                                                                         third))
        a, b, c = words(here.device), words(there.device), words(third)
        with here.capture() as capture:
            here2.wait(here.record())
            there.wait(here.record())
            there2.wait(here.record())
            last.wait(there)
            here2.fill(a, 5, 4)
            there.fill(b, 6, 4)
            there2.wait(here2)
            here2.wait(there)
            there2.wait(there)
            last.wait(there2)
            last.copy(c[:128], a[:128])
            last.copy(c[128:], b[128:])
            here.wait(here2)
            here.wait(there2)
            here.wait(last)
        with capture.instantiate() as graph:
            for _ in range(5):
                graph.launch(here)
            here.synchronize()
            assert c.copy_to_host()[[0, 127, 128, 255]].tolist() == [5, 5, 6, 6]
            c.close()


def test_a_stream_signals_a_peers_semaphore_in_a_graph_of_one_device(ends):
    here, there = ends
    with there.device.create_semaphore() as semaphore:
        with here.capture() as capture:
            here.signal(semaphore, 2)
        with capture.instantiate() as graph:
            assert type(graph) is maia_rt.Graph
            graph.launch(here)
            there.wait(semaphore, 2)
            there.synchronize()
            with pytest.raises(Unsupported, match="not saved"):
                graph.save("/nowhere")
    with pytest.raises(ClosedError):
        graph.launch(here)


def test_updates_hold_for_later_launches_and_edges_have_none(ends, relay):
    here, _ = ends
    graph, given, taken = relay
    given.array[:] = 1
    with here.device.allocate_host(COUNT, np.uint32) as other:
        other.array[:] = 9
        graph.launch(here)
        graph.update(graph.nodes[0], src=other)
        graph.launch(here)
        here.synchronize()
        assert (taken.array == 9).all()
        signal_node = next(node for node in graph.nodes if node.name.startswith("signal to"))
        with pytest.raises(InvalidArgument, match="cannot be changed"):
            graph.update(signal_node, value=3)
        with pytest.raises(InvalidArgument, match="no node"):
            graph.update(here.device.create_graph().join(after=[]))
    with pytest.raises(ClosedError, match="made at"):
        graph.launch(here)


def test_a_buffer_of_a_peer_that_was_closed_refuses_the_launch_and_an_update_mends_it(ends):
    here, there = ends
    near, far, other = words(here.device), words(there.device, 4), words(there.device, 5)
    with here.capture() as capture:
        here.copy(near, far)
    with capture.instantiate() as graph:
        graph.launch(here)
        here.synchronize()
        far.close()
        with pytest.raises(ClosedError, match=r"copy of 1024 bytes between devices, a node made at .*test_spanning"):
            graph.launch(here)
        graph.update(graph.nodes[0], src=other)
        graph.launch(here)
        assert (near.copy_to_host(here) == 5).all()
    near.close()
    other.close()


def test_times_are_by_device_and_nothing_is_saved(ends, relay, tmp_path):
    here, there = ends
    graph, *_ = relay
    with pytest.raises(InvalidArgument):
        graph.times()
    graph.launch(here)
    here.synchronize()
    assert eventually(lambda: graph._replays.look() or graph._replays.over)
    times = graph.times()
    assert list(times) == [here.device, there.device]
    assert [len(one) for one in times.values()] == [5, 3]
    assert all(one.end_ns >= one.start_ns > 0 for part in times.values() for one in part)
    with pytest.raises(Unsupported, match="spans devices is not saved"):
        graph.save(tmp_path / "graph")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_part_that_fails_is_told_to_the_others_within_a_second_and_the_graph_runs_again(ends, relay, failing):
    here, _ = ends
    graph, given, taken = relay
    given.array[:] = 7
    device = graph.parts[failing].device
    graph.launch(here)
    here.synchronize()
    device.inject("fault:code=ECC,opcodes=COPY")
    with here.device.create_semaphore() as gate:
        here.wait(gate, 1)
        for _ in range(3):
            graph.launch(here)
        begun = time.monotonic()
        gate.add(1)
        with pytest.raises(DeviceFault, match="ECC") as caught:
            here.synchronize()
    assert eventually(lambda: all(part.quiet for part in graph._replays._last))
    promptly(begun, 1.0)
    assert isinstance(caught.value, PeerFault) is bool(failing)
    if failing:
        assert f"process {device.emulator_pid}" in str(caught.value)
        assert caught.value.__cause__.node
    else:
        with pytest.raises(PeerFault):
            graph._streams[0].synchronize()
    with pytest.raises(DeviceFault):
        graph.launch(here)
    assert here.recover()
    taken.array[:] = 0
    for _ in range(3):
        graph.launch(here)
    here.synchronize()
    assert (taken.array == 7).all()


def test_a_fault_before_the_launch_on_its_stream_leaves_no_part_waiting(ends, relay):
    here, _ = ends
    graph, given, taken = relay
    with here.device.create_semaphore() as gate:
        here.wait(gate, 1)
        graph.launch(here)
        assert here.abort()
        with pytest.raises(DeviceFault):
            here.synchronize()
        here.recover()
        given.array[:] = 2
        graph.launch(here)
        here.synchronize()
        assert (taken.array == 2).all()


def test_a_device_that_dies_is_told_to_the_first_part_within_a_second(embedded, other_device):
    with embedded.create_stream() as here, other_device.create_semaphore() as gate:
        there = other_device.create_stream(timeout=0.1)
        with here.capture() as capture:
            there.wait(here.record())
            there.wait(gate, 1)
            here.wait(there.record())
        graph = capture.instantiate()
        graph.launch(here)
        assert eventually(lambda: graph._streams[0].queue.ring.head)
        begun = time.monotonic()
        os.kill(other_device.emulator_pid, signal.SIGKILL)
        with pytest.raises(PeerFault, match=f"process {other_device.emulator_pid}") as caught:
            here.synchronize()
        promptly(begun, 1.0)
        assert isinstance(caught.value.__cause__, DeviceLost)
        here.recover()
        with pytest.raises(MaiaError):
            graph.launch(here)
        graph.close()
        here.synchronize()
        with contextlib.suppress(MaiaError):
            there.close()


def test_closing_in_flight_waits_for_nobody_and_takes_nothing_away(ends, relay):
    here, _ = ends
    graph, given, taken = relay
    given.array[:] = 8
    with here.device.create_semaphore() as gate:
        here.wait(gate, 1)
        graph.launch(here)
        graph.close()
        graph.close()
        with pytest.raises(ClosedError):
            graph.launch(here)
        gate.add(1)
        here.synchronize()
        assert (taken.array == 8).all()


def test_a_reset_device_closes_its_part(ends, relay):
    here, there = ends
    graph, *_ = relay
    there.close()
    there.device.reset()
    assert graph.closed
    with pytest.raises(ClosedError):
        graph.launch(here)


def test_what_cannot_be_is_refused(ends, relay):
    here, there = ends
    graph, *_ = relay
    with pytest.raises(InvalidType):
        graph.launch(None)
    with pytest.raises(InvalidArgument, match="first part"):
        graph.launch(there)
    with pytest.raises(InvalidType):
        graph.update("node")
    with here.capture() as capture:
        with pytest.raises(CaptureError, match="spans devices"):
            graph.launch(here)
        there.wait(here.record())
        here.wait(there.record())
    with pytest.raises(InvalidArgument, match=r"capture\.instantiate"):
        capture.builder.instantiate()
    with pytest.raises(InvalidArgument, match="no child"):
        here.device.create_graph().child(capture.builder)
    with pytest.raises(CaptureError, match="had not come back"), here.capture():
        there.wait(here.record())


def test_without_a_direct_path_captures_say_so(ends, monkeypatch):
    here, there = ends
    for stream in ends:
        monkeypatch.setattr(type(stream.device.transport), "region_file", lambda self, region: (-1, 0))
    near, far = words(here.device), words(there.device)
    with there.device.create_semaphore() as semaphore, here.capture():
        event = here.record()
        with pytest.raises(CaptureError, match="no direct path"):
            there.wait(event)
        with pytest.raises(CaptureError, match="copy that goes through the host"):
            here.copy(near, far)
        with pytest.raises(CaptureError, match="signal that goes through the host"):
            here.signal(semaphore)
    near.close()
    far.close()


def test_a_collective_of_all_ranks_is_captured_into_one_graph(ends):
    here, there = ends
    with maia_rt.Communicator([here.device, there.device]) as group:
        buffers = [device.upload(np.full(COUNT, 1 + rank, np.float32)) for rank, device in
                   enumerate([here.device, there.device])]
        with here.capture() as capture:
            there.wait(here)
            group.all_reduce(buffers, streams=[here, there])
            here.wait(there)
        with capture.instantiate() as graph:
            for _ in range(3):
                graph.launch(here)
            assert all((buffer.copy_to_host(here if buffer is buffers[0] else there) == 3 * 2**2).all()
                       for buffer in buffers)
        for buffer in buffers:
            buffer.close()


def test_a_hang_inside_of_a_graph_is_followed_to_the_other_device(ends):
    here, there = ends
    with there.device.create_semaphore() as gate:
        with here.capture() as capture:
            there.wait(here)
            there.wait(gate, 1)
            here.wait(there)
        with capture.instantiate() as graph:
            graph.launch(here)
            assert eventually(lambda: len(here.device.hang_report().links) == 2)
            report = here.device.hang_report()
            assert report.verdict is maia_rt.HangVerdict.UNSIGNALLED
            assert [link.device.split("process ")[1] for link in report.links] == [
                f"{one.device.emulator_pid})" for one in ends]
            gate.add(1)
            here.synchronize()
