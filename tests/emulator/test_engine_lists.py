"""INDIRECT lists: branches, concurrency, times, failures and their end, encoded by hand, on the engine itself."""

import time

import numpy as np
import pytest
from helpers import tiny_program
from helpers.bare_engine import DATA, HBM, BareEngine, command, until

from maia_rt.contract import commands as c
from maia_rt.contract import program
from maia_rt.contract.commands import BranchSource, CommandFlag, Condition, Feature, ListOption, Opcode, PostOp, WaitOp
from maia_rt.errors import FaultCode

FREE = 20
ALL = 0xFFFFFFFF
WORD = DATA - 0x40
"""Lists lie at DATA, words below, times above."""
TIMES = DATA + (1 << 20)
CONCURRENT = ListOption.CONCURRENT
INITIAL = 2**32 - 3


@pytest.fixture
def bare():
    engine = BareEngine()
    yield engine
    engine.close()


@pytest.fixture
def busy(bare):
    """LAUNCH fields of kernels that keep one tile for about 2, 30 and 300 ms."""
    image = program.write([tiny_program.busy(200, "short"), tiny_program.busy(3000, "long"),
                           tiny_program.busy(30_000, "longest")])
    first = bare.engine.load_program(program.read(image))
    return {"kernel": first}, {"kernel": first + 1}, {"kernel": first + 2}


def nop(**fields):
    return command(c.COMMAND, Opcode.NOP, **fields)


def count(index=FREE):
    return nop(post=[(index, PostOp.ADD, 1)])


def launch(fields, **more):
    return command(c.LAUNCH, Opcode.LAUNCH, **fields, **more)


def trap(code=1, **fields):
    return command(c.TRAP, Opcode.TRAP, code=code, **fields)


def branch(target, where, value, condition=Condition.NE, mask=ALL, source=BranchSource.SEMAPHORE, **fields):
    return command(c.BRANCH, Opcode.BRANCH, target=target, where=where, value=value, mask=mask, condition=condition,
                   source=source, **fields)


def always(target):
    return branch(target, 0, 0, Condition.EQ, mask=0)


def wait_value(address, value=1):
    return command(c.WAIT_VALUE, Opcode.WAIT_VALUE, address=address, value=value, mask=ALL, condition=Condition.EQ)


def put(bare, queue, *rows, times=0, **fields):
    """Run a list, ``times=True`` for times at TIMES; returns the INDIRECT's sequence number."""
    bare.host[TIMES : TIMES + 16 * len(rows)] = 0
    times = bare.address(TIMES) if times is True else times
    return queue.put(c.INDIRECT, Opcode.INDIRECT, **bare.list(*rows), times=times, **fields)


def times(bare, rows):
    return bare.host[TIMES : TIMES + 16 * rows].view(c.LISTED_TIMES)


def last_fault(bare):
    return np.frombuffer(bare.engine.faults(), c.FAULT)[-1]


# --- branches --------------------------------------------------------------------------------------------------------


def test_a_branch_back_repeats_until_its_semaphore_says_so(bare):
    queue = bare.queue()
    put(bare, queue, count(), count(FREE + 1), branch(0, FREE, 1000), count(FREE + 2))
    assert queue.wait() == 0
    assert bare.semaphores[FREE : FREE + 3].tolist() == [1000, 1000, 1]
    assert queue.progress == INITIAL + 1, "the list is one command of its queue, however often it went round"


def test_a_loop_counts_in_memory_and_a_branch_ahead_passes_commands_over(bare):
    queue = bare.queue()
    bare.word(WORD)[0] = 0
    rows = [command(c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, address=bare.address(WORD), op=PostOp.ADD, value=1),
            branch(3, bare.address(WORD), 4, Condition.EQ, mask=4, source=BranchSource.MEMORY),
            count(),
            branch(0, bare.address(WORD), 8, Condition.NE, source=BranchSource.MEMORY)]
    put(bare, queue, *rows)
    assert queue.wait() == 0
    assert bare.word(WORD)[0] == 8
    assert bare.semaphores[FREE] == 4, "rounds 4 to 7 have the bit"


def test_a_branch_to_the_count_ends_the_list(bare):
    queue = bare.queue()
    put(bare, queue, count(), always(3), trap(), post=[(FREE + 1, PostOp.SET, 7)])
    assert queue.wait() == 0
    assert bare.semaphores[FREE : FREE + 2].tolist() == [1, 7]


def test_a_branch_waits_for_its_pre_operations_and_posts_whether_taken_or_not(bare):
    queue = bare.queue()
    row = {"pre": [(FREE, WaitOp.ACQUIRE, 1)], "post": [(FREE + 1, PostOp.ADD, 1)]}
    put(bare, queue, branch(2, 0, 1, Condition.EQ, mask=0, **row), branch(2, 0, 0, Condition.EQ, mask=0, **row))
    time.sleep(0.01)
    assert queue.progress == INITIAL
    bare.engine.semaphore_op(FREE, PostOp.ADD, 2)
    assert queue.wait() == 0
    assert bare.semaphores[FREE : FREE + 2].tolist() == [0, 2]


def test_a_branch_may_look_at_a_mirror(bare):
    queue, other = bare.queue(), bare.queue(initial=2**32 - 2)
    put(bare, queue, branch(0, other.id, 1, Condition.NE), count())
    time.sleep(0.01)
    assert bare.semaphores[FREE] == 0
    for _ in range(3):
        other.put(c.COMMAND, Opcode.NOP)
    assert queue.wait() == 0
    assert bare.semaphores[FREE] == 1


BAD_BRANCHES = {
    "target past the end": (FaultCode.BAD_FIELD, {"target": 4}),
    "target far away": (FaultCode.BAD_FIELD, {"target": ALL}),
    "no condition": (FaultCode.BAD_FIELD, {"condition": 0}),
    "unknown condition": (FaultCode.BAD_FIELD, {"condition": 5}),
    "no source": (FaultCode.BAD_FIELD, {"source": 0}),
    "unknown source": (FaultCode.BAD_FIELD, {"source": 3}),
    "units": (FaultCode.BAD_FIELD, {"units": 1}),
    "unaligned word": (FaultCode.BAD_FIELD, {"source": 1, "where": HBM + 2}),
    "no such semaphore": (FaultCode.SEMAPHORE, {"where": 64}),
    "a semaphore beyond 2^32": (FaultCode.SEMAPHORE, {"where": (1 << 32) + FREE}),
    "a word nowhere": (FaultCode.ADDRESS, {"source": 1, "where": 0x100}),
    "the last address": (FaultCode.ADDRESS, {"source": 1, "where": 2**64 - 4}),
}


@pytest.mark.parametrize("name", BAD_BRANCHES)
def test_a_bad_branch_fails_its_list_taken_or_not(bare, name):
    code, fields = BAD_BRANCHES[name]
    queue = bare.queue()
    # EQ of a masked-out word and 1: never taken.
    row = {"target": 0, "where": FREE, "value": 1, "mask": 0, "condition": 2, "source": 2, "post": [(FREE, 2, 1)]}
    put(bare, queue, count(), command(c.BRANCH, Opcode.BRANCH, **(row | fields)), count())
    assert queue.wait() == code
    assert bare.semaphores[FREE] == 1
    assert int(queue.reports[0]["detail"]) == 1
    assert last_fault(bare)["command"].tobytes()[:1] == bytes([Opcode.BRANCH])


# --- a loop and its neighbours ---------------------------------------------------------------------------------------


def test_a_list_that_loops_yields_to_other_queues(bare):
    looping, other = bare.queue(), bare.queue()
    put(bare, looping, always(0))
    for _ in range(100):
        other.put(c.COMMAND, Opcode.NOP)
        assert other.wait(seconds=1.0) == 0
    assert looping.progress == INITIAL


@pytest.mark.parametrize("end", ["reset", "abort", "delete", "stop"])
@pytest.mark.parametrize("what", ["loop", "value", "semaphore", "launches"])
def test_a_list_that_would_never_end_can_be_ended(bare, busy, what, end):
    queue, other = bare.queue(), bare.queue()
    bare.word(WORD)[0] = 0
    rows = {"loop": [count(), always(0)], "value": [wait_value(bare.address(WORD))],
            "semaphore": [nop(pre=[(FREE + 1, WaitOp.GE, 1)])],
            "launches": [launch(busy[0]), launch(busy[0]), always(0)]}[what]
    sequence = put(bare, queue, *rows, options=CONCURRENT, times=True)
    time.sleep(0.01)
    if end == "reset":
        queue.reset(2**40)
        queue.put(c.COMMAND, Opcode.NOP)
        assert queue.wait() == 0
        assert queue.progress == 2**40 + 1
    elif end == "abort":
        bare.engine.abort(queue.id, sequence)
        assert queue.wait() == FaultCode.ABORTED
        assert int(queue.block["fault_sequence"][0]) == sequence
        assert int(queue.reports[0]["detail"]) < len(rows)
    elif end == "delete":
        bare.engine.delete_queue(queue.id)
    else:
        bare.engine.clear()
        return
    written = times(bare, len(rows)).copy()
    counted = int(bare.semaphores[FREE])
    other.put(c.LAUNCH, Opcode.LAUNCH, **busy[0])
    assert other.wait() == 0, "every tile is free again"
    assert (times(bare, len(rows)) == written).all() and counted == bare.semaphores[FREE]


# --- concurrency -----------------------------------------------------------------------------------------------------


def test_without_the_option_launches_of_a_list_run_one_after_the_other(bare, busy):
    queue = bare.queue()
    put(bare, queue, *[launch(busy[0])] * 4, count(), times=True)
    assert queue.wait() == 0
    rows = times(bare, 5)
    assert (rows["start_ns"][1:] >= rows["end_ns"][:-1]).all()
    assert (rows["end_ns"] >= rows["start_ns"]).all() and rows["start_ns"].all()


def test_launches_of_a_concurrent_list_overlap(bare, busy):
    queue = bare.queue()
    put(bare, queue, *[launch(busy[1])] * 4, options=CONCURRENT, times=True)
    assert queue.wait() == 0
    rows = times(bare, 4)
    assert rows["start_ns"].max() < rows["end_ns"].min()


@pytest.mark.parametrize("row", [nop(flags=CommandFlag.BARRIER), always(3)])
def test_barriers_and_branches_wait_for_everything_ahead_in_a_concurrent_list(bare, busy, row):
    queue = bare.queue()
    put(bare, queue, launch(busy[0]), launch(busy[0]), row, launch(busy[1]), launch(busy[1]), options=CONCURRENT,
        times=True)
    assert queue.wait() == 0
    rows = times(bare, 5)
    assert rows["start_ns"][2] >= rows["end_ns"][:2].max()
    assert rows["start_ns"][3:].min() >= rows["end_ns"][2]
    assert rows["start_ns"][3:].max() < rows["end_ns"][3:].min()


def test_more_launches_than_tiles_and_places_all_run(bare, busy):
    queue = bare.queue()
    put(bare, queue, *[launch(busy[0], post=[(FREE, PostOp.ADD, 1)])] * 40, options=CONCURRENT)
    assert queue.wait() == 0
    assert bare.semaphores[FREE] == 40


def test_a_waiting_command_holds_up_those_behind_it_and_not_those_that_run(bare, busy):
    queue = bare.queue()
    put(bare, queue, launch(busy[0], post=[(FREE, PostOp.ADD, 1)]), nop(pre=[(FREE, WaitOp.GE, 2)]), count(FREE + 1),
        options=CONCURRENT)
    until(lambda: bare.semaphores[FREE] == 1)
    time.sleep(0.01)
    assert bare.semaphores[FREE + 1] == 0
    bare.engine.semaphore_op(FREE, PostOp.ADD, 1)
    assert queue.wait() == 0


def test_the_list_retires_after_all_that_is_in_flight(bare, busy):
    queue = bare.queue()
    put(bare, queue, launch(busy[1], post=[(FREE, PostOp.ADD, 1)]), count(FREE + 1), options=CONCURRENT,
        post=[(FREE + 2, PostOp.SET, 1)])
    until(lambda: bare.semaphores[FREE + 1] == 1)
    assert queue.progress == INITIAL and bare.semaphores[FREE + 2] == 0
    assert queue.wait() == 0
    assert bare.semaphores[FREE : FREE + 3].tolist() == [1, 1, 1]


# --- times -----------------------------------------------------------------------------------------------------------


def test_times_are_those_of_the_last_round_and_of_nothing_that_was_passed_over(bare):
    queue = bare.queue()
    put(bare, queue, count(), branch(3, 0, 0, Condition.EQ, mask=0), nop(), branch(0, FREE, 5), nop(), times=True)
    assert queue.wait() == 0
    rows = times(bare, 5)
    assert rows[2].tolist() == (0, 0)
    kept = rows[[0, 1, 3, 4]]
    assert (kept["start_ns"][1:] >= kept["end_ns"][:-1]).all() and kept["start_ns"][0] > 0


def test_times_are_there_before_the_posts_of_their_command(bare):
    queue = bare.queue()
    bare.word(WORD)[0] = 0
    put(bare, queue, count(), wait_value(bare.address(WORD)), times=True)
    until(lambda: bare.semaphores[FREE] == 1)
    assert times(bare, 1)["end_ns"][0] > 0
    assert times(bare, 2)["end_ns"][1] == 0
    bare.word(WORD)[0] = 1
    assert queue.wait() == 0
    assert times(bare, 2)["end_ns"][1] > 0


@pytest.mark.parametrize(("at", "code"), [(0x100, FaultCode.ADDRESS), (2**64 - 8, FaultCode.ADDRESS),
                                          (HBM, FaultCode.CONTEXT)])
@pytest.mark.parametrize("options", [0, CONCURRENT])
def test_times_that_cannot_be_written_fail_their_command(bare, busy, at, code, options):
    queue = bare.queue(context=bare.engine.create_context([(HBM + 4096, 4096)]))
    put(bare, queue, launch(busy[0], post=[(FREE, PostOp.ADD, 1)]), count(), times=at, options=options)
    assert queue.wait() == code
    assert int(queue.reports[0]["detail"]) == 0 or options
    assert bare.semaphores[FREE] == 0


@pytest.mark.parametrize("fields", [{"times": 4}, {"times": 1}, {"options": 2}, {"options": 1 << 31}, {"options": 3}])
def test_a_bad_option_or_times_fails_the_list_before_anything_ran(bare, fields):
    queue = bare.queue()
    put(bare, queue, count(), **fields)
    assert queue.wait() == FaultCode.BAD_FIELD
    assert bare.semaphores[FREE] == 0


# --- failures --------------------------------------------------------------------------------------------------------


def test_of_several_failures_in_a_concurrent_list_the_first_in_its_order_is_told(bare, busy):
    image = program.write([tiny_program.axpy(100)])
    axpy = bare.engine.load_program(program.read(image))
    queue = bare.queue()
    sequence = put(bare, queue, launch(busy[1], post=[(FREE, PostOp.ADD, 1)]), count(),
                   launch(busy[0], post=[(FREE + 1, PostOp.ADD, 1)]), trap(42), count(FREE + 2),
                   launch({"kernel": axpy}), options=CONCURRENT, times=True, post=[(FREE + 3, PostOp.SET, 1)])
    until(lambda: bare.semaphores[FREE + 1] == 1)
    assert not queue.stopped, "what is in flight ends first"
    assert queue.wait() == FaultCode.TRAP
    assert bare.semaphores[FREE : FREE + 4].tolist() == [2, 1, 0, 0]
    assert int(queue.block["fault_sequence"][0]) == sequence and queue.progress == INITIAL
    assert int(queue.block["report_tail"][0]) == 1
    assert queue.reports[0].tolist()[3:] == (FaultCode.TRAP, 3)
    fault = last_fault(bare)
    assert (int(fault["address"]), int(fault["detail"])) == (42, 3)
    assert c.decode(fault["command"]) == "TRAP code=42"
    assert len(bare.engine.faults()) == c.FAULT.itemsize
    ended = times(bare, 6)["end_ns"]
    assert ended[[0, 1, 2]].all() and not ended[3:].any()


def test_a_launch_that_fails_ahead_of_a_wait_ends_the_list_and_the_wait(bare, busy):
    bare.engine.set_feature(Feature.WATCHDOG_MS, 4)
    queue = bare.queue()
    bare.word(WORD)[0] = 0
    put(bare, queue, count(), launch(busy[1]), wait_value(bare.address(WORD)), count(), options=CONCURRENT)
    assert queue.wait() == FaultCode.ENGINE_HANG
    assert bare.semaphores[FREE] == 1
    assert int(queue.reports[0]["detail"]) == 1
    assert bare.engine.errors() & 8, "the watchdog's bit"


@pytest.mark.parametrize("options", [0, CONCURRENT])
def test_the_watchdog_looks_at_launches_inside_lists(bare, busy, options):
    bare.engine.set_feature(Feature.WATCHDOG_MS, 100)
    queue = bare.queue()
    put(bare, queue, launch(busy[0]), launch(busy[2]), count(), options=options)
    assert queue.wait() == FaultCode.ENGINE_HANG
    fault = last_fault(bare)
    assert (int(fault["code"]), int(fault["detail"]), int(fault["kernel"])) == (FaultCode.ENGINE_HANG, 1,
                                                                               busy[2]["kernel"])
    assert bare.engine.errors() & 8
    queue.reset()
    bare.engine.set_feature(Feature.WATCHDOG_MS, 10_000)
    put(bare, queue, launch(busy[1]))
    assert queue.wait() == 0


def test_an_abort_of_a_concurrent_list_names_the_first_launch_in_flight(bare, busy):
    queue = bare.queue()
    sequence = put(bare, queue, count(), launch(busy[1], post=[(FREE, PostOp.ADD, 1)]), launch(busy[1]),
                   nop(pre=[(FREE + 1, WaitOp.GE, 1)]), options=CONCURRENT)
    time.sleep(0.01)
    bare.engine.abort(queue.id, sequence)
    assert queue.wait() == FaultCode.ABORTED
    assert int(queue.reports[0]["detail"]) == 1
    assert bare.semaphores[FREE] == 1


def test_a_doorbell_that_goes_back_ends_a_list_with_what_it_has_in_flight(bare, busy):
    queue = bare.queue()
    put(bare, queue, launch(busy[1]), launch(busy[1]), options=CONCURRENT)
    time.sleep(0.005)
    queue.doorbell(queue.index - 1)
    bare.engine.wake()
    assert queue.wait() == FaultCode.DOORBELL


def test_an_earlier_launch_that_fails_leaves_the_list_behind_it_where_it_is(bare, busy):
    queue = bare.queue()
    failing = queue.put(c.LAUNCH, Opcode.LAUNCH, **busy[2])
    put(bare, queue, launch(busy[0], post=[(FREE, PostOp.ADD, 1)]), count(FREE + 1), always(0))
    until(lambda: bare.semaphores[FREE + 1] >= 1)
    bare.engine.abort(queue.id, failing)
    assert queue.wait() == FaultCode.ABORTED
    assert int(queue.block["fault_sequence"][0]) == failing
    counted = bare.semaphores[FREE : FREE + 2].tolist()
    time.sleep(0.01)
    assert bare.semaphores[FREE : FREE + 2].tolist() == counted
    queue.reset()
    put(bare, queue, launch(busy[0]))
    assert queue.wait() == 0


def test_a_list_that_fails_before_an_earlier_launch_does_has_its_report_too(bare, busy):
    queue = bare.queue()
    earlier = queue.put(c.LAUNCH, Opcode.LAUNCH, **busy[2])
    later = put(bare, queue, launch(busy[1]), trap(), options=CONCURRENT)
    time.sleep(0.003)
    bare.engine.abort(queue.id, earlier)
    assert queue.wait() == FaultCode.ABORTED
    assert int(queue.block["fault_sequence"][0]) == earlier
    told = {int(row["sequence"]): int(row["status"]) for row in queue.reports[:2]}
    assert told == {earlier: FaultCode.ABORTED, later: FaultCode.TRAP}, "in the order in which they ended"


def test_a_list_that_cannot_be_read_fails_where_it_ends(bare):
    queue = bare.queue()
    queue.put(c.INDIRECT, Opcode.INDIRECT, list=HBM + (64 << 20) - 64, count=2)
    assert queue.wait() == FaultCode.BAD_OPCODE
    queue.reset()
    bare.engine.dma_write(HBM + (64 << 20) - 64, nop().tobytes())
    queue.put(c.INDIRECT, Opcode.INDIRECT, list=HBM + (64 << 20) - 64, count=2)
    assert queue.wait() == FaultCode.ADDRESS
    fault = last_fault(bare)
    assert (int(fault["detail"]), int(fault["address"])) == (1, HBM + (64 << 20))
    assert c.decode(fault["command"]).startswith("INDIRECT"), "what could not be read is not shown as if it had been"


def test_random_lists_never_hurt_the_engine(bare, busy):
    """Seeded noise in every field of lists of every kind: each ends, or can be ended, and the engine runs on."""
    rng = np.random.default_rng(2027)
    queue = bare.queue()
    for _ in range(300):
        rows = rng.integers(0, 256, (6, 64), dtype=np.uint8)
        rows[:, 0] = rng.choice([1, 6, 6, 8, 11, 12, 12, 12, 4], 6)
        rows[:, 1] &= 3
        rows[:, 4:40] *= rng.integers(0, 2, (6, 1), dtype=np.uint8) * rng.integers(0, 2, (6, 36), dtype=np.uint8)
        plain = rng.integers(0, 4, 6) > 0
        for row, good in zip(rows, plain, strict=True):
            if good:
                row[4:40] = 0
            if row[0] == Opcode.BRANCH and good:
                row.view(c.BRANCH)[0] = branch(int(rng.integers(0, 8)), FREE, int(rng.integers(0, 3)))
            elif row[0] == Opcode.LAUNCH and good:
                row.view(c.LAUNCH)[0] = launch(busy[0])
            elif good:
                row.view(c.COMMAND)[0] = count()
        raw = [row.view(c.COMMAND)[0] for row in rows]
        put(bare, queue, *raw, options=int(rng.integers(0, 2)), times=bool(rng.integers(0, 2)))
        try:
            fault = queue.wait(seconds=0.02)
        except AssertionError:  # it loops, or waits for what nobody writes
            fault = 1
        if fault or queue.stopped:
            queue.reset(queue.index)
    put(bare, queue, launch(busy[0]), nop())
    assert queue.wait() == 0
