"""Queues of larger priority come first, for commands and for tiles, encoded by hand, on the engine itself."""

import numpy as np
import pytest
from helpers import tiny_program
from helpers.bare_engine import DATA, HOST, BareEngine, command, until
from maia_emulator.engine import PRIORITIES, AdminError

from maia_rt.contract import commands as c
from maia_rt.contract import program
from maia_rt.contract.commands import AdminStatus, ListOption, Opcode, PostOp, WaitOp

FREE = 20


@pytest.fixture
def bare():
    engine = BareEngine()
    yield engine
    engine.close()


@pytest.fixture
def kernels(bare):
    """A kernel that keeps one tile for about 5 ms, and one that needs all four tiles."""
    wide = tiny_program.busy(10, "wide")
    image = program.write([tiny_program.busy(500, "busy"), type(wide)(
        "wide", wide.args, wide.streams, tiles=4, sram_bytes=wide.sram_bytes)])
    first = bare.engine.load_program(program.read(image))
    return {"kernel": first}, {"kernel": first + 1}


def test_priorities_past_the_last_are_refused(bare):
    params = np.zeros((), c.CREATE_QUEUE)
    params["ring"], params["progress"], params["reports"] = HOST, HOST + 0x10000, HOST + 0x20000
    params["entries_log2"] = params["reports_log2"] = 4
    params["vector"], params["queue"] = c.NO_VECTOR, c.ANY_QUEUE
    for priority in (PRIORITIES, 255):
        params["priority"] = priority
        with pytest.raises(AdminError) as refusal:
            bare.engine.create_queue(params.tobytes())
        assert refusal.value.status == AdminStatus.INVALID_FIELD
    assert bare.engine.queue_ids() == []


def test_queues_of_larger_priority_are_served_first(bare):
    """What each queue does in its turn shows as a time; one semaphore starts them all at once."""
    priorities = [0, 3, 1, 3, 2]
    queues = [bare.queue(priority=p) for p in priorities]
    for queue in queues:
        queue.put(c.COMMAND, Opcode.NOP, pre=[(FREE, WaitOp.GE, 1)], flags=c.CommandFlag.REPORT)
    bare.engine.semaphore_op(FREE, PostOp.SET, 1)
    for queue in queues:
        assert queue.wait() == 0
    started = [int(queue.reports[0]["start_ns"]) for queue in queues]
    # The first round after the store may have begun in the middle: those it missed follow in order.
    order = np.argsort(started).tolist()
    want = [1, 3, 4, 2, 0]
    assert any(order == want[i:] + want[:i] for i in range(5)), order


def test_free_tiles_go_to_the_larger_priority_and_it_is_not_starved(bare, kernels):
    busy, wide = kernels
    low, high = bare.queue(priority=0), bare.queue(priority=2)
    for _ in range(24):
        low.put(c.LAUNCH, Opcode.LAUNCH, **busy, post=[(FREE, PostOp.ADD, 1)])
    until(lambda: bare.semaphores[FREE] >= 4)
    high.put(c.LAUNCH, Opcode.LAUNCH, **wide, post=[(FREE + 1, PostOp.SET, 1)])
    assert high.wait() == 0
    assert bare.semaphores[FREE] < 20, "four launches that ran had to end first, not those that waited"
    assert low.wait() == 0
    assert bare.semaphores[FREE] == 24


def test_launches_of_lists_have_their_queue_s_priority(bare, kernels):
    busy, wide = kernels
    low, high = bare.queue(priority=1), bare.queue(priority=3)
    fields = bare.list(*[command(c.LAUNCH, Opcode.LAUNCH, **busy, post=[(FREE, PostOp.ADD, 1)])] * 24)
    low.put(c.INDIRECT, Opcode.INDIRECT, **fields, options=ListOption.CONCURRENT)
    until(lambda: bare.semaphores[FREE] >= 4)
    high.put(c.INDIRECT, Opcode.INDIRECT, **bare.list(command(c.LAUNCH, Opcode.LAUNCH, **wide), at=DATA + 65536))
    assert high.wait() == 0
    assert bare.semaphores[FREE] < 20
    assert low.wait() == 0


def test_a_launch_that_waits_claims_only_the_clusters_of_its_mask(bare, kernels):
    busy, _ = kernels
    low, high, other = bare.queue(), bare.queue(priority=1), bare.queue()
    for _ in range(8):
        low.put(c.LAUNCH, Opcode.LAUNCH, **busy, units=1)
        high.put(c.LAUNCH, Opcode.LAUNCH, **busy, units=1)
    for _ in range(2):
        other.put(c.LAUNCH, Opcode.LAUNCH, **busy, units=2, post=[(FREE, PostOp.ADD, 1)])
    assert other.wait() == 0
    assert high.progress < high.index, "the other cluster's launches did not wait for these"
    assert high.wait() == 0
    assert low.wait() == 0


def test_equal_priorities_share(bare, kernels):
    busy, _ = kernels
    queues = [bare.queue(priority=3) for _ in range(2)]
    for _ in range(8):
        for queue in queues:
            queue.put(c.LAUNCH, Opcode.LAUNCH, **busy)
    for queue in queues:
        assert queue.wait() == 0


def test_a_deleted_queue_leaves_the_others_in_order(bare):
    queues = [bare.queue(priority=p) for p in (0, 2, 1, 3)]
    bare.engine.delete_queue(queues[1].id)
    for queue in (queues[0], queues[2], queues[3]):
        queue.put(c.COMMAND, Opcode.NOP)
        assert queue.wait() == 0
