"""Two devices that reach each other's memory: a store wakes the one that sleeps and waits for it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.bare_engine import DATA, HBM, BareEngine, until

from maia_rt.contract import commands as c
from maia_rt.contract.commands import Condition, Opcode, PostOp, WaitOp
from maia_rt.errors import FaultCode

FREE = 20
"""A semaphore that is no queue's mirror."""
BAR2, BAR4 = 0x10_0000_0000, 0x20_0000_0000
"""Where a peer's BARs are mapped for DMA."""
WORD = 0x1000
ALL = 0xFFFFFFFF
TURNS = 20
"""A device that waits looks every few milliseconds: in one turn it may be awake by itself, hardly in all of them."""


@pytest.fixture
def pair():
    both = [BareEngine(spin_us=0), BareEngine(spin_us=0)]
    yield both
    for bare in both:
        bare.close()


def connect(bare, peer_bar2, bar2_bytes, peer_hbm=None, hbm_bytes=0, access=3):
    """Give a device a peer's BARs as memory for DMA."""
    bare.engine.dma_map(BAR2, bar2_bytes, peer_bar2, 0, access)
    if peer_hbm is not None:
        bare.engine.dma_map(BAR4, hbm_bytes, peer_hbm, 0, 3)


def connect_engines(bare, peer):
    engine = peer.engine
    connect(bare, engine.bar2_fd, engine.bar2_bytes, engine.hbm_fd, engine.hbm_bytes)


def semaphore(bare, index):
    """Its address at a peer."""
    return BAR2 + bare.engine.semaphore_window_offset + 4 * index


def asleep(queue):
    return queue.page[0x10] != 0


def test_a_signal_wakes_a_peer_that_sleeps_and_waits_for_it(pair):
    near, far = pair
    connect_engines(near, far)
    signals, waits = near.queue(), far.queue()
    rung = 0
    for turn in range(1, TURNS + 1):
        waits.put(c.COMMAND, Opcode.NOP, pre=[(FREE, WaitOp.GE, turn)])
        until(lambda: asleep(waits))
        rings = far.engine.rings
        signals.put(c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, address=semaphore(far, FREE), op=PostOp.ADD, value=1)
        assert waits.wait() == 0
        rung += far.engine.rings - rings
    assert rung
    assert far.semaphores[FREE] == TURNS


WRITES = {
    "copy": lambda near, value: (c.COPY, Opcode.COPY, {"src": near.address(DATA), "dst": BAR4 + WORD, "size": 4}),
    "fill": lambda _, value: (c.FILL, Opcode.FILL, {"dst": BAR4 + WORD, "size": 4, "pattern": value, "width": 4}),
    "immediate": lambda _, value: (c.WRITE_IMM, Opcode.WRITE_IMM, {
        "dst": BAR4 + WORD, "data": np.frombuffer(value.to_bytes(16, "little"), np.uint8), "units": 4}),
    "signal": lambda _, value: (c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, {
        "address": BAR4 + WORD, "op": PostOp.SET, "value": value}),
}


@pytest.mark.parametrize("kind", WRITES)
def test_bytes_in_its_hbm_wake_a_peer_that_waits_for_a_value_there(pair, kind):
    near, far = pair
    connect_engines(near, far)
    writes, waits = near.queue(), far.queue()
    rung = 0
    for turn in range(1, TURNS + 1):
        near.word(DATA)[0] = turn
        waits.put(c.WAIT_VALUE, Opcode.WAIT_VALUE, address=HBM + WORD, value=turn, mask=ALL, condition=Condition.EQ)
        until(lambda: asleep(waits))
        rings = far.engine.rings
        dtype, opcode, fields = WRITES[kind](near, turn)
        writes.put(dtype, opcode, **fields)
        assert writes.wait() == 0
        assert waits.wait() == 0
        rung += far.engine.rings - rings
    assert rung


def test_a_peer_that_waits_for_nothing_there_sleeps_on(pair):
    near, far = pair
    connect_engines(near, far)
    copies, idle = near.queue(), far.queue()
    blocked = far.queue()
    blocked.put(c.COMMAND, Opcode.NOP, pre=[(FREE, WaitOp.GE, 1)])
    until(lambda: asleep(idle) and asleep(blocked))
    time.sleep(0.02)
    rings = far.engine.rings
    for _ in range(50):
        copies.put(c.FILL, Opcode.FILL, dst=BAR4 + WORD, size=64, pattern=1, width=4)
        assert copies.wait() == 0
    # Between two sleeps, for a moment, it asks for both.
    assert far.engine.rings - rings < 40
    far.engine.semaphore_op(FREE, PostOp.SET, 1)
    assert blocked.wait() == 0


def test_a_peer_whose_bar2_is_not_mapped_looks_by_itself(pair):
    near, far = pair
    near.engine.dma_map(BAR4, far.engine.hbm_bytes, far.engine.hbm_fd, 0, 3)
    copies, waits = near.queue(), far.queue()
    waits.put(c.WAIT_VALUE, Opcode.WAIT_VALUE, address=HBM + WORD, value=7, mask=ALL, condition=Condition.EQ)
    until(lambda: asleep(waits))
    copies.put(c.FILL, Opcode.FILL, dst=BAR4 + WORD, size=4, pattern=7, width=4)
    assert waits.wait() == 0


def test_a_peers_memory_can_be_unmapped_while_it_waits(pair):
    near, far = pair
    connect_engines(near, far)
    copies, waits = near.queue(), far.queue()
    waits.put(c.COMMAND, Opcode.NOP, pre=[(FREE, WaitOp.GE, 1)])
    until(lambda: asleep(waits))
    near.engine.dma_unmap(BAR2, far.engine.bar2_bytes)
    copies.put(c.FILL, Opcode.FILL, dst=BAR4 + WORD, size=4, pattern=7, width=4)
    assert copies.wait() == 0
    copies.put(c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, address=semaphore(far, FREE), op=PostOp.ADD, value=1)
    assert copies.wait() == FaultCode.ADDRESS
    connect(near, far.engine.bar2_fd, far.engine.bar2_bytes)
    copies.reset()
    copies.put(c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, address=semaphore(far, FREE), op=PostOp.ADD, value=1)
    assert copies.wait() == 0
    assert waits.wait() == 0


def test_a_file_that_looks_like_a_peer_hurts_nobody(pair):
    near, far = pair
    fake = os.memfd_create("fake", os.MFD_CLOEXEC)
    try:
        size = far.engine.bar2_bytes
        os.ftruncate(fake, size + 4096)
        os.pwrite(fake, os.pread(far.engine.bar2_fd, 4096, size), size)
        os.pwrite(fake, b"\xff" * 64, size + 64)
        reader = os.open(f"/proc/self/fd/{fake}", os.O_RDONLY)
        try:
            near.engine.dma_map(BAR2, size, fake, 0, 3)
            near.engine.dma_map(BAR4, size, reader, 0, 1)
        finally:
            os.close(reader)
        queue = near.queue()
        for _ in range(3):
            queue.put(c.FILL, Opcode.FILL, dst=BAR2, size=4096, pattern=3, width=4)
            assert queue.wait() == 0
        os.ftruncate(fake, 0)
        queue.put(c.FILL, Opcode.FILL, dst=BAR2, size=4096, pattern=3, width=4)
        assert queue.wait() == 0
    finally:
        os.close(fake)


OTHER = """
import os, sys
from emulator.test_peers import *
bare = BareEngine(spin_us=0)
queue = bare.queue()
for turn in range(1, TURNS + 1):
    queue.put(c.COMMAND, Opcode.NOP, pre=[(FREE, WaitOp.GE, turn)])
    until(lambda: asleep(queue))
    rings = bare.engine.rings
    print(os.getpid(), bare.engine.bar2_fd, bare.engine.bar2_bytes, bare.engine.semaphore_window_offset, flush=True)
    assert queue.wait(seconds=60) == 0
    print(bare.engine.rings - rings, flush=True)
bare.close()
"""


def test_a_signal_wakes_a_peer_in_another_process():
    near = BareEngine(spin_us=0)
    tests = str(Path(__file__).parent.parent)
    path = os.pathsep.join([tests, *sys.path])
    other = subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"PYTHONPATH": path})
    try:
        signals = near.queue()
        rung = 0
        for turn in range(TURNS):
            pid, number, size, window = map(int, other.stdout.readline().split())
            if turn == 0:
                fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
                connect(near, fd, size)
                os.close(fd)
            signals.put(c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, address=BAR2 + window + 4 * FREE, op=PostOp.ADD, value=1)
            assert signals.wait() == 0
            rung += int(other.stdout.readline())
        assert rung
        assert other.wait(30) == 0
    finally:
        other.kill()
        other.communicate()
        near.close()
