"""GET_LOG's QUEUES and SEMAPHORES: what each queue is at and what it waits for, and who wrote each semaphore last."""

import numpy as np
import pytest
from helpers import tiny_program
from helpers.bare_engine import DATA, HBM, HOST, BareEngine, command, until

from maia_rt.contract import commands as c
from maia_rt.contract import program
from maia_rt.contract.commands import (
    CommandFlag,
    Condition,
    ListOption,
    Opcode,
    PostOp,
    QueueStage,
    QueueState,
    SemaphoreWriter,
    WaitOp,
)
from maia_rt.errors import FaultCode

FREE = 20


@pytest.fixture
def bare():
    engine = BareEngine()
    yield engine
    engine.close()


def queue_log(bare, number=0):
    return np.frombuffer(bare.engine.queue_log(), c.QUEUE_LOG)[number]


def semaphore(bare, index):
    log = np.frombuffer(bare.engine.semaphore_log(), c.SEMAPHORE_LOG)
    found = log[log["index"] == index]
    return found[0] if len(found) else None


def test_an_idle_queue_says_so(bare):
    queue = bare.queue(initial=7)
    record = queue_log(bare)
    assert (record["queue"], record["stage"], record["state"]) == (queue.id, QueueStage.IDLE, QueueState.RUNNING)
    assert (record["head"], record["retired"], record["tail"], record["sequence"]) == (7, 7, 7, 0)
    assert not record["command"].any() and record["semaphore"] == c.NO_SEMAPHORE
    assert 0 < record["time_ns"] <= bare.engine.clock_ns()


def test_a_wait_names_semaphore_value_and_what_is_wanted_and_since_when(bare):
    queue = bare.queue()
    began = bare.engine.clock_ns()
    sequence = queue.put(c.COMMAND, Opcode.NOP, pre=[(FREE, WaitOp.GE, 5)])
    until(lambda: queue_log(bare)["stage"] == QueueStage.SEMAPHORE)
    record = queue_log(bare)
    assert record["sequence"] == sequence and record["head"] == sequence - 1
    waits = ("semaphore", "value", "wanted", "condition")
    assert [int(record[name]) for name in waits] == [FREE, 0, 5, WaitOp.GE]
    assert began < record["since_ns"] <= record["time_ns"]
    assert record["command"].tobytes() == queue.ring[(sequence - 1) % queue.entries].tobytes()
    assert queue_log(bare)["since_ns"] == record["since_ns"]
    bare.semaphores[FREE] = 5
    bare.engine.wake()
    queue.wait()
    assert queue_log(bare)["stage"] == QueueStage.IDLE


def test_a_listed_command_that_waits_is_told_with_its_index(bare):
    queue = bare.queue()
    listed = bare.host[DATA : DATA + 128].view(c.COMMAND)
    listed["opcode"] = Opcode.NOP
    listed[1]["pre"][0] = (FREE, WaitOp.EQ, 0, 9)
    queue.put(c.INDIRECT, Opcode.INDIRECT, list=HOST + DATA, count=2)
    until(lambda: queue_log(bare)["stage"] == QueueStage.SEMAPHORE)
    record = queue_log(bare)
    assert (record["list_index"], record["list_count"], record["condition"]) == (1, 2, WaitOp.EQ)
    assert record["command"].tobytes() == listed[1].tobytes()
    bare.semaphores[FREE] = 9
    bare.engine.wake()
    queue.wait()


def test_a_full_report_ring_is_told(bare):
    queue = bare.queue(reports_log2=0)
    queue.put(c.COMMAND, Opcode.NOP, flags=CommandFlag.REPORT)
    queue.wait()
    queue.put(c.COMMAND, Opcode.NOP)
    until(lambda: queue_log(bare)["stage"] == QueueStage.REPORT_ROOM)
    record = queue_log(bare)
    assert (record["report_tail"], record["report_head"]) == (1, 0)
    queue.page[2] = 1
    bare.engine.wake()
    queue.wait()


def test_a_stopped_queue_is_told_with_its_fault(bare):
    queue = bare.queue()
    sequence = queue.put(c.TRAP, Opcode.TRAP, code=3)
    queue.wait()
    record = queue_log(bare)
    assert (record["state"], record["fault"]) == (QueueState.STOPPED, FaultCode.TRAP)
    assert record["fault_sequence"] == sequence and record["stage"] == QueueStage.IDLE


def test_a_post_leaves_queue_sequence_and_time(bare):
    queue = bare.queue()
    assert semaphore(bare, FREE) is None
    began = bare.engine.clock_ns()
    sequence = queue.put(c.COMMAND, Opcode.NOP, post=[(FREE, PostOp.ADD, 3), (FREE + 1, PostOp.SET, 0)])
    queue.wait()
    for index, value in ((FREE, 3), (FREE + 1, 0)):
        record = semaphore(bare, index)
        assert (record["value"], record["writer"], record["queue"]) == (value, SemaphoreWriter.QUEUE, queue.id)
        assert record["sequence"] == sequence
        assert began - 10_000_000 <= record["time_ns"] <= bare.engine.clock_ns()
    sequence = queue.put(c.COMMAND, Opcode.NOP, pre=[(FREE, WaitOp.ACQUIRE, 2)])
    queue.wait()
    assert semaphore(bare, FREE)["value"] == 1 and semaphore(bare, FREE)["sequence"] == sequence


def test_a_store_of_the_host_is_seen_when_the_device_looks(bare):
    queue = bare.queue()
    queue.put(c.COMMAND, Opcode.NOP, post=[(FREE, PostOp.SET, 3)])
    queue.wait()
    bare.semaphores[FREE] = 4
    record = semaphore(bare, FREE)
    assert (record["value"], record["writer"], record["queue"]) == (4, SemaphoreWriter.HOST, c.NO_QUEUE)
    assert record["time_ns"] == record["sequence"] == 0
    bare.engine.semaphore_op(FREE + 1, 1, 0)
    record = semaphore(bare, FREE + 1)
    assert record["writer"] == SemaphoreWriter.HOST and record["time_ns"] > 0


def test_a_semaphore_that_is_only_waited_for_is_told_and_a_mirror_too(bare):
    queue = bare.queue()
    queue.put(c.COMMAND, Opcode.NOP, pre=[(FREE, WaitOp.GE, 1)])
    until(lambda: semaphore(bare, FREE) is not None)
    record = semaphore(bare, FREE)
    assert (record["value"], record["writer"], record["queue"]) == (0, SemaphoreWriter.NONE, c.NO_QUEUE)
    bare.semaphores[FREE] = 1
    bare.engine.wake()
    queue.wait()
    record = semaphore(bare, queue.id)
    assert (record["writer"], record["queue"]) == (SemaphoreWriter.MIRROR, queue.id)
    assert record["sequence"] == queue.index and record["value"] == queue.index & 0xFFFFFFFF


def test_the_logs_start_anew_with_the_device(bare):
    queue = bare.queue()
    queue.put(c.FILL, Opcode.FILL, dst=HBM, size=4, width=4, post=[(FREE, PostOp.SET, 3)])
    queue.wait()
    bare.engine.reset()
    assert bare.engine.queue_log() == bare.engine.semaphore_log() == b""


def test_a_wait_for_a_value_names_the_word_and_what_it_was(bare):
    queue = bare.queue()
    word = bare.host[DATA : DATA + 4].view(np.uint32)
    word[0] = 0x1F3
    sequence = queue.put(c.WAIT_VALUE, Opcode.WAIT_VALUE, address=bare.address(DATA), value=5, mask=0xFF,
                         condition=Condition.EQ)
    until(lambda: queue_log(bare)["stage"] == QueueStage.VALUE)
    record = queue_log(bare)
    assert [int(record[name]) for name in ("sequence", "address", "value", "wanted", "mask", "condition")] == [
        sequence, bare.address(DATA), 0x1F3, 5, 0xFF, Condition.EQ]
    word[0] = 5
    assert queue.wait() == 0


def test_a_list_that_waits_for_its_launches_shows_the_first_of_them(bare):
    kernel = bare.engine.load_program(program.read(program.write([tiny_program.busy(3000)])))
    queue = bare.queue()
    rows = [command(c.COMMAND, Opcode.NOP), *[command(c.LAUNCH, Opcode.LAUNCH, kernel=kernel)] * 2]
    queue.put(c.INDIRECT, Opcode.INDIRECT, **bare.list(*rows), options=ListOption.CONCURRENT)
    until(lambda: queue_log(bare)["in_flight"] == 2)
    record = queue_log(bare)
    assert (record["stage"], record["list_index"], record["list_count"]) == (QueueStage.RUNNING, 1, 3)
    assert record["command"].tobytes() == rows[1].tobytes() and record["sequence"] == queue.index
    put_behind = queue.put(c.COMMAND, Opcode.NOP)
    assert queue.wait(put_behind) == 0
