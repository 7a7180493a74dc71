"""The model of links: what goes to a host or a peer takes its time at least, and shares the way fairly."""

import os

import numpy as np
import pytest
from helpers import tiny_program
from helpers.bare_engine import DATA, HBM, BareEngine, until
from maia_emulator import cli
from maia_emulator.processor import Processor

import maia_rt
from maia_rt.contract import commands as c
from maia_rt.contract.commands import CommandFlag, Opcode, PostOp, WaitOp
from maia_rt.errors import FaultCode

BAR2, BAR4 = 0x10_0000_0000, 0x20_0000_0000
FREE = 20
SIZE = 4 << 20
GBPS = 4.0
TAKES = SIZE * 8 / GBPS
"""Nanoseconds of SIZE bytes."""
LATENCY_US = 2000.0


@pytest.fixture
def pair():
    processor = Processor()
    both = [BareEngine(processor=processor), BareEngine(processor=processor)]
    near, far = both
    near.engine.dma_map(BAR2, far.engine.bar2_bytes, far.engine.bar2_fd, 0, 3)
    near.engine.dma_map(BAR4, far.engine.hbm_bytes, far.engine.hbm_fd, 0, 3)
    yield both
    for bare in both:
        bare.close()


def report(queue, sequence):
    (row,) = [r for r in queue.reports if r["sequence"] == sequence]
    assert row["status"] == 0
    return int(row["start_ns"]), int(row["end_ns"])


def took(queue, sequence):
    start, end = report(queue, sequence)
    return end - start


def copy(queue, dst, src, size=SIZE, **fields):
    return queue.put(c.COPY, Opcode.COPY, flags=CommandFlag.REPORT, dst=dst, src=src, size=size, **fields)


def test_bytes_to_the_host_and_from_it_take_their_time(pair):
    near, _ = pair
    near.engine.set_link(GBPS, LATENCY_US)
    queue = near.queue()
    sent, fetched = copy(queue, near.address(DATA), HBM), copy(queue, HBM, near.address(DATA))
    within = copy(queue, HBM + SIZE, HBM)
    assert queue.wait() == 0
    for sequence in (sent, fetched):
        assert took(queue, sequence) >= TAKES + LATENCY_US * 1000
    assert took(queue, within) < took(queue, sent)


def test_a_latency_alone_can_be_modelled(pair):
    near, _ = pair
    near.engine.set_link(0, LATENCY_US)
    queue = near.queue()
    small = copy(queue, near.address(DATA), HBM, 4)
    assert queue.wait() == 0
    assert took(queue, small) >= LATENCY_US * 1000


def test_two_queues_share_a_port_fairly(pair):
    near, _ = pair
    near.engine.set_link(GBPS, 0)
    near.engine.semaphore_op(FREE, PostOp.SET, 0)
    queues = [near.queue(), near.queue()]
    sequences = [copy(q, near.address(DATA), HBM, pre=[(FREE, WaitOp.GE, 1)]) for q in queues]
    near.engine.semaphore_op(FREE, PostOp.SET, 1)
    assert [q.wait() for q in queues] == [0, 0]
    spans = [report(q, s) for q, s in zip(queues, sequences, strict=True)]
    assert max(end for _, end in spans) - min(start for start, _ in spans) >= 2 * TAKES
    # Piece by piece: neither is done before most of the other's have gone.
    assert min(end for _, end in spans) - min(start for start, _ in spans) >= 1.5 * TAKES


def test_the_two_lanes_of_a_port_are_apart(pair):
    near, _ = pair
    near.engine.set_link(GBPS, 0)
    near.engine.semaphore_op(FREE, PostOp.SET, 0)
    queues = [near.queue(), near.queue()]
    gate = {"pre": [(FREE, WaitOp.GE, 1)]}
    sequences = [copy(queues[0], near.address(DATA), HBM, **gate),
                 copy(queues[1], HBM + SIZE, near.address(DATA + SIZE), **gate)]
    near.engine.semaphore_op(FREE, PostOp.SET, 1)
    assert [q.wait() for q in queues] == [0, 0]
    for queue, sequence in zip(queues, sequences, strict=True):
        assert took(queue, sequence) >= TAKES


def test_bytes_between_peers_take_the_ports_of_both(pair):
    near, far = pair
    for bare in pair:
        bare.engine.set_link(GBPS, 0)
        bare.engine.semaphore_op(FREE, PostOp.SET, 0)
    queues = [near.queue(), far.queue()]
    gate = {"pre": [(FREE, WaitOp.GE, 1)]}
    # The peer's own copy from its host comes in through the same lane as ours to it.
    sequences = [copy(queues[0], BAR4, HBM, **gate), copy(queues[1], HBM + SIZE, far.address(DATA), **gate)]
    for bare in pair:
        bare.engine.semaphore_op(FREE, PostOp.SET, 1)
    assert [q.wait() for q in queues] == [0, 0]
    spans = [report(q, s) for q, s in zip(queues, sequences, strict=True)]
    assert max(end for _, end in spans) - min(start for start, _ in spans) >= 2 * TAKES


def test_a_signal_arrives_a_latency_after_what_it_follows(pair):
    near, far = pair
    near.engine.set_link(0, 20 * LATENCY_US)
    signals, waits = near.queue(), far.queue()
    waited = waits.put(c.COMMAND, Opcode.NOP, flags=CommandFlag.REPORT, pre=[(FREE, WaitOp.GE, 1)])
    address = BAR2 + far.engine.semaphore_window_offset + 4 * FREE
    sent = signals.put(c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, flags=CommandFlag.REPORT, address=address,
                       op=PostOp.ADD, value=1)
    assert waits.wait() == 0
    assert signals.wait() == 0
    assert far.semaphores[FREE] == 1
    assert report(waits, waited)[0] - report(signals, sent)[0] >= 20 * LATENCY_US * 1000


def test_a_list_takes_its_time_and_what_is_held_can_be_reset(pair):
    near, _ = pair
    near.engine.set_link(GBPS, 0)
    queue = near.queue()
    row = np.zeros((), c.COPY)
    row["opcode"], row["src"], row["dst"], row["size"] = Opcode.COPY, HBM, near.address(DATA + 4096), SIZE
    listed = queue.put(c.INDIRECT, Opcode.INDIRECT, flags=CommandFlag.REPORT, **near.list(row, row))
    assert queue.wait() == 0
    assert took(queue, listed) >= 2 * TAKES
    near.engine.set_link(0.001, 0)
    copy(queue, near.address(DATA), HBM)
    until(lambda: queue.page[0x10] != 0)
    queue.reset()
    near.engine.set_link(0, 0)
    copy(queue, near.address(DATA), HBM)
    assert queue.wait() == 0


def test_a_port_that_a_client_has_written_to_holds_nobody_for_ever(pair):
    near, far = pair
    near.engine.set_link(GBPS, 0)
    page = far.engine.bar2_bytes
    lanes = near.engine.bar2_bytes + 128, page + 128
    for fd, at in zip((near.engine.bar2_fd, far.engine.bar2_fd), lanes, strict=True):
        os.pwrite(fd, b"\xff" * 16, at)
    queue = near.queue()
    copy(queue, BAR4, HBM)
    assert queue.wait() == 0


def test_bytes_of_peers_are_counted(pair):
    near, far = pair
    queue = near.queue()
    copy(queue, BAR4, HBM, 1000)
    copy(queue, HBM, BAR4, 300)
    copy(queue, near.address(DATA), BAR4, 20)
    assert queue.wait() == 0
    counters = np.frombuffer(near.engine.counters(), c.COUNTERS)[0]
    assert (counters["bytes_to_peers"], counters["bytes_from_peers"]) == (1000, 320)
    assert counters["bytes_device_to_host"] == counters["bytes_host_to_device"] == counters["bytes_host_to_host"] == 0
    theirs = np.frombuffer(far.engine.counters(), c.COUNTERS)[0]
    assert theirs["bytes_to_peers"] == theirs["bytes_from_peers"] == 0
    near.engine.dma_unmap(BAR4, far.engine.hbm_bytes)
    copy(queue, BAR4, HBM, 1000)
    assert queue.wait() == FaultCode.ADDRESS


@pytest.mark.parametrize(("args", "gbps", "us"), [
    ([], 0, 0), (["--link-gbps", "8"], 8, 0), (["--link-us", "3"], 0, 3), (["--link-gbps", "profile"], 252, 1),
    (["--link-gbps", "profile", "--link-us", "0"], 252, 0),
    (["--profile", "maia200", "--link-gbps", "profile"], 472, 1),
])
def test_the_command_line_asks_for_a_model(args, gbps, us):
    options = cli.parser().parse_args(["--socket", "s", *args])
    assert cli.link(options) == (pytest.approx(gbps, rel=0.01), us)


def test_an_emulator_started_with_a_model_holds_a_copy(start_emulator):
    _, (path,) = start_emulator("--link-gbps", "profile", "--link-us", "50000")
    with maia_rt.open(path) as device:
        stream = device.create_stream()
        host, buffer = device.allocate_host(4096), device.allocate(4096)
        begin = stream.record(timing=True)
        stream.copy(buffer, host)
        end = stream.record(timing=True)
        stream.synchronize()
        assert end - begin >= 50
        stream.fill(buffer, 1)
        stream.synchronize()
        assert device.counters()["bytes_from_peers"] == 0


def test_a_tile_that_waits_for_a_link_leaves_its_thread_to_others(start_emulator):
    _, (path,) = start_emulator("--link-us", "500000", "--workers", "1")
    count = 256
    with (maia_rt.open(path) as device, device.load(tiny_program.image(count)) as loaded,
          device.allocate_host(count, np.float32) as host, device.allocate((3, count), np.float32) as near,
          device.create_stream(clusters=0b01) as far_stream, device.create_stream(clusters=0b10) as near_stream):
        host.array[:] = 1
        for row in near:
            near_stream.fill(row, 0)
        far_stream.launch(loaded["axpy"], host, near[0], near[1], 2.0)
        near_stream.launch(loaded["axpy"], near[2], near[2], near[2], 1.0)
        near_stream.synchronize()
        assert not far_stream.query()
        far_stream.synchronize()
        assert (near[1].copy_to_host() == 2).all()


def test_a_collective_takes_what_its_links_take(start_emulator):
    gbps, count = 4, 1 << 20
    _, paths = start_emulator("--link-gbps", str(gbps), devices=2)
    with (maia_rt.open(paths[0]) as near, maia_rt.open(paths[1]) as far,
          maia_rt.Communicator([near, far], timing=True) as ranks):
        buffers = [near.upload(np.full(count, 1, np.float32)), far.upload(np.full(count, 2, np.float32))]
        done = ranks.all_reduce(buffers)
        done.synchronize()
        # A port takes half of the buffer to be combined, and the other half combined.
        assert done.seconds >= 4 * count * 8 / gbps / 1e9
        for buffer in buffers:
            assert (buffer.copy_to_host() == 3).all()
            buffer.close()
