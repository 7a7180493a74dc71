"""Order between devices that one process serves, or two; and how soon a waiter learns that the other device is gone."""

import contextlib
import os
import signal
import time

import numpy as np
import pytest

import maia_rt
from maia_rt.errors import DeviceLost, PeerFault
from tests.helpers.emulator import running
from tests.helpers.stopwatch import promptly

# What a test does not close is closed with its device; the collector may come by before.
pytestmark = [pytest.mark.emulator_process, pytest.mark.filterwarnings("ignore:.* was not closed:ResourceWarning")]
COUNT = 1024


@pytest.fixture(params=["one process", "two processes"])
def pair(request):
    """Two devices on sockets, and a stream on each."""
    together = request.param == "one process"
    with contextlib.ExitStack() as stack:
        served = [stack.enter_context(running(devices=2))] if together else [
            stack.enter_context(running()) for _ in range(2)]
        paths = [path for _, paths in served for path in paths]
        assert len({process.pid for process, _ in served}) == (1 if together else 2)
        devices = [stack.enter_context(maia_rt.open(path)) for path in paths]
        assert all(one.peer(other).kind == "direct" for one, other in [devices, devices[::-1]])
        yield [(device, stack.enter_context(device.create_stream(timeout=20))) for device in devices]


def test_a_number_goes_back_and_forth_and_each_device_adds_to_its_own_work(pair):
    (one, here), (two, there) = pair
    near, far = one.allocate(COUNT, np.uint32), two.allocate(COUNT, np.uint32)
    log = [device.allocate_host((40, COUNT), np.uint32) for device in (one, two)]
    with one.create_stream() as busy, two.create_stream() as as_well, one.allocate(1 << 20) as mine, (
            two.allocate(1 << 20)) as theirs:
        for turn in range(40):
            busy.fill(mine, turn)                   # both have other work all the while
            as_well.fill(theirs, turn)
            here.wait(there)
            here.fill(near, 2 * turn, 4)
            here.copy(log[0][turn], near)
            there.wait(here)
            there.copy(far, near)
            there.copy(log[1][turn], far)
        for stream in (here, there, busy, as_well):
            stream.synchronize()
        assert mine.copy_to_host()[0] == theirs.copy_to_host()[-1] == 39
    for found in log:
        assert (found.array == 2 * np.arange(40, dtype=np.uint32)[:, None]).all()
        found.close()
    near.close()
    far.close()


def test_a_graph_spans_devices_on_sockets_and_both_rest_at_its_end(pair):
    (one, here), (two, there) = pair
    near, far, back = one.allocate(COUNT, np.uint32), two.allocate(COUNT, np.uint32), one.allocate(COUNT, np.uint32)
    with here.capture() as capture:
        here.fill(near, 7, 4)
        there.wait(here)
        there.copy(far, near)
        here.wait(there)
        here.copy(back, far)
    with capture.instantiate() as graph:
        for _ in range(20):
            graph.launch(here)
        assert (back.copy_to_host(here) == 7).all()
    for memory in (near, far, back):
        memory.close()


def test_both_devices_streams_wait_for_each_other_through_events_out_of_order(pair):
    (one, here), (two, there) = pair
    with one.create_stream() as behind, two.create_semaphore() as gate:
        there.wait(gate, 1)
        late = there.record()
        early = here.record()
        behind.wait(late)
        there.wait(early)
        assert not behind.query()
        gate.add(1)
        behind.synchronize()
        there.synchronize()


@pytest.mark.parametrize("way", ["direct", "staged"])
def test_all_waiters_learn_of_the_other_devices_death_within_a_second(embedded, other_device, way, monkeypatch):
    if way == "staged":
        for device in (embedded, other_device):
            monkeypatch.setattr(type(device.transport), "region_file", lambda self, region: (-1, 0))
    assert other_device.peer(embedded).kind == way
    with contextlib.ExitStack() as stack:
        waiters = [stack.enter_context(embedded.create_stream(timeout=20)) for _ in range(3)]
        source = other_device.create_stream(timeout=0.1)
        gate = other_device.create_semaphore()
        source.wait(gate, 1)
        for waiter in waiters:
            waiter.wait(source)
        began = time.monotonic()
        os.kill(other_device.emulator_pid, signal.SIGKILL)
        for waiter in waiters:
            with pytest.raises(PeerFault, match=f"process {other_device.emulator_pid}") as caught:
                waiter.synchronize()
            assert isinstance(caught.value.__cause__, DeviceLost)
        promptly(began, 1.0)
        for waiter in waiters:
            waiter.recover()
            waiter.synchronize()
