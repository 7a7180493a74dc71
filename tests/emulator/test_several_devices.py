"""Several devices in one emulator process: they share its threads, and nothing else."""

import contextlib
import subprocess
import sys
import time

import numpy as np
import pytest
from emulator.test_commands_over_socket import RING, RawQueue
from helpers.admin_queue import Driver
from helpers.bare_engine import HBM, BareEngine, command
from helpers.emulator import cpu_seconds, environment
from helpers.raw_client import BAR2, REGION_WRITE, access
from maia_emulator.processor import Processor

import maia_rt
from maia_rt.contract import commands as c
from maia_rt.contract.commands import CommandFlag, Opcode, PostOp, WaitOp
from maia_rt.errors import FaultCode

FREE = 20
PEER = 0x10_0000_0000


def test_a_client_that_lets_its_device_wait_holds_up_no_other(start_emulator):
    _, (slow, *others) = start_emulator(devices=3)
    with Driver(slow, messages=True) as driver:
        queue = RawQueue(driver.boot())
        row = command(c.COMMAND, Opcode.NOP, sequence=(queue.index + 1) & 0xFFFF)
        driver.put(driver.base + RING + queue.index % 16 * 64, row.tobytes())
        queue.index += 1
        tail = (queue.index & 0xFFFFFFFF).to_bytes(4, "little")
        driver.client.send(REGION_WRITE, access(BAR2, queue.id * 4096, 4, tail))
        # The device asks for the command; nobody reads the socket meanwhile.
        for path in others:
            with maia_rt.open(path) as device:
                stream, buffer = device.create_stream(), device.allocate(4096)
                for value in range(1, 20):
                    stream.fill(buffer, value)
                    stream.synchronize()
        assert driver.client.recv().command == REGION_WRITE
        assert queue.wait() == 0
        assert driver.client.served


COPIES = """
import sys
import maia_rt
device = maia_rt.open(sys.argv[1])
stream = device.create_stream()
a, b = device.allocate(8 << 20), device.allocate_host(8 << 20)
print("copying", flush=True)
while True:
    stream.copy(b, a)
    stream.copy(a, b)
"""


def test_a_client_killed_in_the_middle_of_its_copies_disturbs_no_other(start_emulator):
    _, (theirs, ours) = start_emulator(devices=2)
    rng = np.random.default_rng(7)
    with maia_rt.open(ours) as device:
        stream, buffer = device.create_stream(), device.allocate(1 << 20)
        for _ in range(2):
            other = subprocess.Popen([sys.executable, "-c", COPIES, theirs], stdout=subprocess.PIPE, text=True,
                                     env=environment())
            try:
                assert other.stdout.readline() == "copying\n"
                for turn in range(6):
                    data = rng.integers(0, 256, 1 << 20, dtype=np.uint8)
                    back = np.empty_like(data)
                    stream.copy(buffer, data)
                    if turn == 3:
                        other.kill()
                    stream.copy(back, buffer)
                    stream.synchronize()
                    assert (back == data).all()
            finally:
                other.kill()
                other.communicate()
    with maia_rt.open(theirs) as device:
        stream, host = device.create_stream(), device.allocate_host(64)
        stream.fill(host, 3)
        stream.synchronize()


def test_eight_devices_with_queues_and_nothing_to_do_cost_less_than_a_percent_of_a_core(start_emulator):
    process, paths = start_emulator(devices=8)
    with contextlib.ExitStack() as stack:
        for path in paths:
            device = stack.enter_context(maia_rt.open(path))
            stream = stack.enter_context(device.create_stream())
            buffer = stack.enter_context(device.allocate(64))
            stream.fill(buffer, 1)
            stream.synchronize()
        time.sleep(0.2)
        before = cpu_seconds(process)
        time.sleep(3)
        assert cpu_seconds(process) - before <= 0.03


@pytest.fixture
def pair():
    processor = Processor()
    both = [BareEngine(processor=processor, spin_us=0), BareEngine(processor=processor, spin_us=0)]
    yield both
    for bare in both:
        bare.close()


def test_a_device_is_served_between_the_pieces_of_anothers_copy(pair):
    near, far = pair
    near.engine.dma_map(PEER, far.engine.bar2_bytes, far.engine.bar2_fd, 0, 3)
    long, short = near.queue(), far.queue()
    waited = short.put(c.COMMAND, Opcode.NOP, flags=CommandFlag.REPORT, pre=[(FREE, WaitOp.GE, 1)])
    long.put(c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, address=PEER + far.engine.semaphore_window_offset + 4 * FREE,
             op=PostOp.SET, value=1, ring=False)
    copied = long.put(c.COPY, Opcode.COPY, flags=CommandFlag.REPORT, src=HBM, dst=HBM + (32 << 20), size=32 << 20)
    assert long.wait() == short.wait() == 0
    (first,) = [r for r in short.reports if r["sequence"] == waited]
    (second,) = [r for r in long.reports if r["sequence"] == copied]
    assert first["end_ns"] < second["end_ns"]


def test_a_device_that_goes_leaves_the_others_running(pair):
    near, far = pair
    third = BareEngine(processor=Processor())
    third.close()
    near.engine.stop()
    near.engine.stop()
    queue = far.queue()
    for _ in range(100):
        queue.put(c.FILL, Opcode.FILL, dst=HBM, size=4096, pattern=1, width=4)
        assert queue.wait() == 0


def test_a_fault_and_a_reset_of_one_device_are_its_own(pair):
    near, far = pair
    bad, good = near.queue(), far.queue()
    bad.put(c.TRAP, Opcode.TRAP, code=5)
    assert bad.wait() == FaultCode.TRAP
    good.put(c.FILL, Opcode.FILL, dst=HBM, size=4096, pattern=7, width=4)
    assert good.wait() == 0
    near.engine.reset()
    good.put(c.COPY, Opcode.COPY, src=HBM, dst=far.address(8 << 20), size=4096)
    assert good.wait() == 0
    assert (far.host[8 << 20 : (8 << 20) + 4096].view(np.uint32) == 7).all()
    assert np.frombuffer(far.engine.counters(), c.COUNTERS)[0]["faults"] == 0


def test_a_process_serves_as_many_devices_as_it_has_room_for():
    processor = Processor()
    engines = []
    small = {"hbm_bytes": 1 << 20, "workers": 1, "max_queues": 1, "semaphores": 2, "vectors": 2}
    try:
        for _ in range(64):
            engines.append(BareEngine(processor=processor, **small))
        with pytest.raises(ValueError, match="64 devices"):
            BareEngine(processor=processor, **small)
        queue = engines[-1].queue()
        queue.put(c.COMMAND, Opcode.NOP)
        assert queue.wait() == 0
    finally:
        for bare in engines:
            bare.close()
