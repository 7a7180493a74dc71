"""Each command of the contract, encoded by hand, on the engine itself."""

import itertools
import os
import struct
import time
import zlib

import numpy as np
import pytest
from helpers.bare_engine import DATA, HBM, BareEngine, command, until

from maia_rt.contract import commands as c
from maia_rt.contract.commands import CommandFlag, Opcode, PostOp, WaitOp

FREE = 20  # a semaphore that mirrors no queue


@pytest.fixture
def bare():
    engine = BareEngine()
    yield engine
    engine.close()


@pytest.fixture
def data(bare):
    rng = np.random.default_rng(7)
    bare.host[DATA : DATA + (1 << 20)] = rng.integers(0, 256, 1 << 20, dtype=np.uint8)
    return bare.host[DATA : DATA + (1 << 20)].copy()


def test_progress_counts_on_where_32_bits_wrap(bare):
    queue = bare.queue(entries_log2=2)
    for _ in range(20):
        queue.put(c.COMMAND, Opcode.NOP)
        assert queue.wait() == 0
    assert queue.progress == 2**32 + 17
    assert bare.semaphores[queue.id] == 17


@pytest.mark.parametrize("size", [0, 1, 63, 4096, 65537, (1 << 20) - 5])
def test_copy_moves_exactly_the_bytes_asked_for(bare, data, size):
    queue = bare.queue()
    out = bare.host[DATA + (2 << 20) : DATA + (4 << 20)]
    out[:] = 0xEE
    queue.put(c.COPY, Opcode.COPY, src=bare.address(DATA + 3), dst=HBM + 77, size=size)
    queue.put(c.COPY, Opcode.COPY, src=HBM + 77, dst=bare.address(DATA + (2 << 20) + 5), size=size, flags=1)
    assert queue.wait() == 0
    assert (out[5 : 5 + size] == data[3 : 3 + size]).all()
    assert (out[:5] == 0xEE).all() and (out[5 + size :] == 0xEE).all()


def test_copy_reaches_cluster_and_tile_memory(bare, data):
    queue = bare.queue()
    way = [bare.address(DATA), (2 << 48) + (1 << 32) + 64, (3 << 48) + (3 << 32) + 128, bare.address(DATA + (2 << 20))]
    for src, dst in itertools.pairwise(way):
        queue.put(c.COPY, Opcode.COPY, src=src, dst=dst, size=1000, flags=CommandFlag.BARRIER)
    assert queue.wait() == 0
    assert (bare.host[DATA + (2 << 20) : DATA + (2 << 20) + 1000] == data[:1000]).all()


def test_copy_nd_moves_planes_of_strided_rows(bare, data):
    queue = bare.queue()
    shape = bare.host[DATA - 64 : DATA].view(c.COPY_DESCRIPTOR)
    shape[0] = (bare.address(DATA), bare.address(DATA + (2 << 20)), 12, 5, 3, 100, 12, 1000, 60)
    queue.put(c.COPY_ND, Opcode.COPY_ND, descriptor=bare.address(DATA - 64))
    assert queue.wait() == 0
    want = np.lib.stride_tricks.as_strided(data, (3, 5, 12), (1000, 100, 1))
    assert (bare.host[DATA + (2 << 20) : DATA + (2 << 20) + 180].reshape(3, 5, 12) == want).all()


@pytest.mark.parametrize(("width", "pattern"), [(1, 0xAB), (2, 0x1234), (4, 0xDEADBEEF)])
def test_fill_repeats_its_pattern(bare, width, pattern):
    queue = bare.queue()
    bare.host[DATA : DATA + 20000] = 0
    queue.put(c.FILL, Opcode.FILL, dst=bare.address(DATA + 8), size=12340, pattern=pattern, width=width)
    assert queue.wait() == 0
    raw = pattern.to_bytes(4, "little")[:width]
    assert bare.host[DATA : DATA + 20000].tobytes() == bytes(8) + raw * (12340 // width) + bytes(20000 - 12348)


def test_write_imm_stores_its_bytes_and_no_more(bare):
    queue = bare.queue()
    bare.host[DATA : DATA + 32] = 9
    data = np.zeros(16, np.uint8)
    data[:5] = [1, 2, 3, 4, 5]
    queue.put(c.WRITE_IMM, Opcode.WRITE_IMM, dst=bare.address(DATA + 1), units=5, data=data)
    assert queue.wait() == 0
    assert bare.host[DATA : DATA + 8].tolist() == [9, 1, 2, 3, 4, 5, 9, 9]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 16384, 100_003])
def test_crc_is_that_of_zlib(bare, data, size):
    queue = bare.queue()
    queue.put(c.CRC, Opcode.CRC, src=bare.address(DATA), size=size, result=bare.address(DATA - 64))
    assert queue.wait() == 0
    assert int(bare.host[DATA - 64 : DATA - 60].view(np.uint32)[0]) == zlib.crc32(data[:size].tobytes())


def test_signal_remote_sets_and_adds_a_word(bare):
    queue = bare.queue()
    bare.host[DATA : DATA + 4].view(np.uint32)[0] = 5
    queue.put(c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, address=bare.address(DATA), op=PostOp.ADD, value=7)
    assert queue.wait() == 0
    assert bare.host[DATA : DATA + 4].view(np.uint32)[0] == 12
    queue.put(c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, address=bare.address(DATA), op=PostOp.SET, value=3)
    assert queue.wait() == 0
    assert bare.host[DATA : DATA + 4].view(np.uint32)[0] == 3


def test_a_command_waits_for_its_semaphores_and_posts_after(bare):
    queue, other = bare.queue(), bare.queue()
    held = queue.put(c.COMMAND, Opcode.NOP, pre=[(FREE, WaitOp.GE, 5), (FREE + 1, WaitOp.EQ, 2)],
                     post=[(FREE + 2, PostOp.SET, 9), (FREE + 3, PostOp.ADD, 4)])
    other.put(c.COMMAND, Opcode.NOP, post=[(FREE, PostOp.SET, 6)])
    assert other.wait() == 0, "a blocked queue blocks only itself"
    assert queue.progress < held
    assert bare.semaphores[FREE + 2] == 0
    bare.semaphores[FREE + 1] = 2
    bare.engine.wake()
    assert queue.wait() == 0
    assert bare.semaphores[FREE + 2 : FREE + 4].tolist() == [9, 4]


def test_semaphore_comparison_is_serial(bare):
    queue = bare.queue()
    bare.semaphores[FREE] = 2  # 2^32 - 2 is behind it, although larger as a number
    queue.put(c.COMMAND, Opcode.NOP, pre=[(FREE, WaitOp.GE, 2**32 - 2)])
    assert queue.wait() == 0


def test_acquire_takes_what_it_waited_for(bare):
    queue = bare.queue()
    bare.semaphores[FREE] = 5
    queue.put(c.COMMAND, Opcode.NOP, pre=[(FREE, WaitOp.ACQUIRE, 3)])
    assert queue.wait() == 0
    assert bare.semaphores[FREE] == 2
    queue.put(c.COMMAND, Opcode.NOP, pre=[(FREE, WaitOp.ACQUIRE, 3)])
    time.sleep(0.02)
    assert queue.progress < queue.index
    bare.engine.semaphore_op(FREE, PostOp.ADD, 1)
    assert queue.wait() == 0
    assert bare.semaphores[FREE] == 0


def test_a_queue_waits_for_another_ones_progress_by_its_mirror(bare):
    first, second = bare.queue(initial=0), bare.queue()
    second.put(c.COMMAND, Opcode.NOP, pre=[(first.id, WaitOp.GE, 2)])
    first.put(c.COMMAND, Opcode.NOP)
    first.wait()
    time.sleep(0.01)
    assert second.progress < second.index
    first.put(c.COMMAND, Opcode.NOP)
    assert second.wait() == 0


def test_an_indirect_list_is_one_command(bare, data):
    queue = bare.queue(initial=0)
    rows = [command(c.COPY, Opcode.COPY, src=bare.address(DATA), dst=HBM, size=100),
            command(c.COPY, Opcode.COPY, src=HBM, dst=bare.address(DATA + (2 << 20)), size=100),
            command(c.COMMAND, Opcode.NOP, post=[(FREE, PostOp.ADD, 1)])]
    area = bare.host[DATA + (3 << 20) : DATA + (3 << 20) + 64 * 3]
    area[:] = np.frombuffer(b"".join(r.tobytes() for r in rows), np.uint8)
    queue.put(c.INDIRECT, Opcode.INDIRECT, list=bare.address(DATA + (3 << 20)), count=3,
              post=[(FREE + 1, PostOp.SET, 1)])
    assert queue.wait() == 0
    assert queue.progress == 1
    assert (bare.host[DATA + (2 << 20) : DATA + (2 << 20) + 100] == data[:100]).all()
    assert bare.semaphores[FREE : FREE + 2].tolist() == [1, 1]


def test_reports_carry_sequence_and_times_in_order(bare):
    queue = bare.queue(reports_log2=4)
    sequences = [queue.put(c.COMMAND, Opcode.NOP, flags=CommandFlag.REPORT) for _ in range(5)]
    assert queue.wait() == 0
    rows = queue.reports[:5]
    assert rows["sequence"].tolist() == sequences
    assert (rows["start_ns"] <= rows["end_ns"]).all() and (np.diff(rows["start_ns"].astype(np.int64)) >= 0).all()
    assert int(queue.block["report_tail"][0]) == 5


def test_a_command_does_not_start_without_room_for_its_report(bare):
    queue = bare.queue(reports_log2=1)
    for _ in range(3):
        queue.put(c.COMMAND, Opcode.NOP, flags=CommandFlag.REPORT)
    until(lambda: queue.progress == queue.index - 1)
    time.sleep(0.02)
    assert queue.progress == queue.index - 1
    queue.page[2] = 1  # REPORT_HEAD: one record taken
    bare.engine.wake()
    assert queue.wait() == 0


def test_an_armed_vector_fires_once(bare):
    eventfd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        bare.engine.set_vector(3, eventfd)
        queue = bare.queue(initial=0, vector=3)
        queue.page[4:6].view(np.uint64)[0] = 3
        for _ in range(10):
            queue.put(c.COMMAND, Opcode.NOP)
        assert queue.wait() == 0
        until(lambda: _count(eventfd) == 1)
        queue.page[4:6].view(np.uint64)[0] = 4  # already reached: arming re-checks
        bare.engine.wake()
        until(lambda: _count(eventfd) == 1)
    finally:
        bare.engine.set_vector(3, -1)
        os.close(eventfd)


def test_an_eventfd_at_its_top_does_not_block_the_engine(bare):
    eventfd = os.eventfd(0)
    try:
        os.write(eventfd, struct.pack("<Q", 2**64 - 2))
        bare.engine.set_vector(3, eventfd)
        queue = bare.queue(initial=0, vector=3)
        queue.page[4:6].view(np.uint64)[0] = 1
        queue.put(c.COMMAND, Opcode.NOP)
        queue.put(c.COMMAND, Opcode.NOP)
        assert queue.wait() == 0
    finally:
        bare.engine.set_vector(3, -1)
        os.close(eventfd)


def _count(eventfd):
    try:
        return struct.unpack("<Q", os.read(eventfd, 8))[0]
    except BlockingIOError:
        return 0


def test_a_long_copy_does_not_hold_up_other_queues(bare):
    long, short = bare.queue(), bare.queue()
    long.put(c.COPY, Opcode.COPY, src=HBM, dst=HBM + (32 << 20), size=32 << 20, ring=False)
    long.doorbell(long.index)
    until(lambda: short.put(c.COMMAND, Opcode.NOP) and short.wait() == 0 and True)
    assert long.wait() == 0


def test_an_idle_engine_sleeps(bare):
    queue = bare.queue()
    queue.put(c.COMMAND, Opcode.NOP)
    assert queue.wait() == 0
    until(lambda: queue.page[0x10] != 0)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.01
