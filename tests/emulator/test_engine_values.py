"""Waits for values in memory, and checksums that compare, encoded by hand, on the engine itself."""

import time

import numpy as np
import pytest
from helpers.bare_engine import DATA, HBM, HOST, HOST_BYTES, BareEngine, until
from helpers.stopwatch import promptly
from maia_emulator.engine import AdminError

from maia_rt.contract import commands as c
from maia_rt.contract.commands import AdminStatus, Condition, Opcode, PostOp, WaitOp
from maia_rt.errors import FaultCode

FREE = 20
WORD = DATA + 0x40
ALL = 0xFFFFFFFF


@pytest.fixture
def bare():
    engine = BareEngine()
    yield engine
    engine.close()


def wait_value(queue, address, value, condition=Condition.GE, mask=ALL, **fields):
    return queue.put(c.WAIT_VALUE, Opcode.WAIT_VALUE, address=address, value=value, mask=mask, condition=condition,
                     **fields)


def waits(queue):
    """Whether the queue's last command has not retired after a while."""
    time.sleep(0.02)
    return queue.progress < queue.index and not queue.stopped


@pytest.mark.parametrize(
    ("condition", "value", "mask", "unmet", "met"),
    [(Condition.GE, 5, ALL, [4, 0, ALL], [5, 6, 5 + 2**31 - 1]), (Condition.GE, 2**32 - 2, ALL, [2**32 - 3], [3]),
     (Condition.EQ, 7, 0xFF, [6, 0x106], [7, 0xABCDEF07]), (Condition.NE, 7, 0xFF, [7, 0x107], [0x700]),
     (Condition.AND, 0x30, 0x1F, [0x20, 0x0F], [0x10, 0xFF])])
def test_a_queue_waits_until_the_word_meets_the_condition(bare, condition, value, mask, unmet, met):
    queue = bare.queue()
    for end in met:
        bare.word(WORD)[0] = unmet[0]
        wait_value(queue, bare.address(WORD), value, condition, mask, post=[(FREE, PostOp.ADD, 1)])
        for other in unmet:
            bare.word(WORD)[0] = other
            assert waits(queue)
        bare.word(WORD)[0] = end
        assert queue.wait(seconds=1.0) == 0
    assert bare.semaphores[FREE] == len(met)


@pytest.mark.parametrize("address", [HBM + 0x1000, (2 << 48) + (1 << 32) + 64, (3 << 48) + (3 << 32) + 128])
def test_the_word_may_lie_in_any_memory_of_the_device(bare, address):
    waiting, writing = bare.queue(), bare.queue()
    wait_value(waiting, address, 3, Condition.EQ)
    assert waits(waiting)
    writing.put(c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, address=address, op=PostOp.ADD, value=3)
    assert waiting.wait(seconds=1.0) == 0


def test_a_wait_for_a_value_blocks_its_own_queue_only(bare):
    waiting, other = bare.queue(), bare.queue()
    wait_value(waiting, bare.address(WORD), 1)
    waiting.put(c.FILL, Opcode.FILL, dst=HBM, size=4, pattern=1, width=4)
    for _ in range(5):
        other.put(c.COMMAND, Opcode.NOP)
        assert other.wait() == 0
    assert waiting.progress == waiting.index - 2
    bare.word(WORD)[0] = 1
    assert waiting.wait() == 0


def test_pre_operations_hold_and_are_acquired_before_the_word_is_looked_at(bare):
    queue = bare.queue()
    bare.word(WORD)[0] = 1
    wait_value(queue, bare.address(WORD), 2, Condition.EQ, pre=[(FREE, WaitOp.ACQUIRE, 3)])
    bare.word(WORD)[0] = 2
    assert waits(queue)
    bare.word(WORD)[0] = 1
    bare.engine.semaphore_op(FREE, PostOp.SET, 3)
    until(lambda: bare.semaphores[FREE] == 0)
    assert waits(queue)
    bare.word(WORD)[0] = 2
    assert queue.wait(seconds=1.0) == 0


def test_a_sleeping_device_looks_every_few_milliseconds_and_a_wake_makes_it_look_at_once(bare):
    queue = bare.queue()
    times = []
    for turn in range(1, 9):
        wait_value(queue, bare.address(WORD), turn)
        until(lambda: queue.page[0x10] != 0)
        start = time.monotonic()
        bare.word(WORD)[0] = turn
        if turn % 2:
            bare.engine.wake()
        while queue.progress < queue.index:
            promptly(start, 1.0)
        times.append(time.monotonic() - start)
    assert min(times[1::2]) < 0.05
    before = time.process_time()
    wait_value(queue, bare.address(WORD), 100)
    time.sleep(0.5)
    assert time.process_time() - before < 0.1, "a device that waits for a value sleeps"
    bare.word(WORD)[0] = 100
    assert queue.wait() == 0


@pytest.mark.parametrize("end", ["reset", "abort", "delete"])
def test_a_wait_for_a_value_can_be_ended(bare, end):
    queue, other = bare.queue(), bare.queue()
    sequence = wait_value(queue, bare.address(WORD), 1, post=[(FREE, PostOp.ADD, 1)])
    assert waits(queue)
    if end == "abort":
        bare.engine.abort(queue.id, sequence)
        assert queue.wait() == FaultCode.ABORTED
        (fault,) = np.frombuffer(bare.engine.faults(), c.FAULT)
        assert c.decode(fault["command"]).startswith(f"WAIT_VALUE until u32[{bare.address(WORD):#x}] >= 1")
    elif end == "reset":
        queue.reset(2**32 - 1)
        queue.put(c.COMMAND, Opcode.NOP)
        assert queue.wait() == 0
    else:
        bare.engine.delete_queue(queue.id)
    bare.word(WORD)[0] = 1
    other.put(c.COMMAND, Opcode.NOP)
    assert other.wait() == 0
    assert bare.semaphores[FREE] == 0


def test_memory_that_goes_while_it_is_waited_for_is_an_address_fault(bare):
    queue = bare.queue()
    bare.engine.dma_map(1 << 40, 4096, bare.fd, DATA, 3)
    wait_value(queue, (1 << 40) + 0x40, 1)
    assert waits(queue)
    bare.engine.dma_unmap(1 << 40, 4096)
    assert queue.wait() == FaultCode.ADDRESS
    (fault,) = np.frombuffer(bare.engine.faults(), c.FAULT)
    assert int(fault["address"]) == (1 << 40) + 0x40


def test_without_bus_mastering_a_wait_in_host_memory_fails(bare):
    # Its rings cannot be reached either, so what shows is the log.
    queue = bare.queue()
    wait_value(queue, bare.address(WORD), 1)
    assert waits(queue)
    bare.engine.set_bus_master(False)
    until(bare.engine.faults)
    (fault,) = np.frombuffer(bare.engine.faults(), c.FAULT)
    assert int(fault["code"]) == FaultCode.ADDRESS
    bare.engine.set_bus_master(True)


def test_a_word_that_only_messages_reach_is_asked_for_now_and_then(bare):
    answers = [0]
    asked = []

    def read(address, size):
        asked.append((time.monotonic(), address, size))
        return answers[-1].to_bytes(size, "little")

    bare.engine.set_message_dma(read, lambda address, data: None)
    bare.engine.dma_map(1 << 40, 4096, -1, 0, 3)
    queue = bare.queue()
    wait_value(queue, (1 << 40) + 8, 9, Condition.EQ)
    time.sleep(0.1)
    assert waits(queue)
    assert 2 <= len(asked) <= 200, "at most once a millisecond, at least every 5 ms or so"
    assert {entry[1:] for entry in asked} == {((1 << 40) + 8, 4)}
    answers.append(9)
    assert queue.wait(seconds=1.0) == 0


def test_a_context_confines_what_is_looked_at(bare):
    context = bare.engine.create_context([(HBM + 4096, 4096)])
    queue = bare.queue(context=context)
    wait_value(queue, HBM + 4096, 0)
    assert queue.wait() == 0
    for address in (HBM, HBM + 8192):
        wait_value(queue, address, 0)
        assert queue.wait() == FaultCode.CONTEXT
        queue.reset()
        queue.put(c.CRC, Opcode.CRC, src=HBM + 4096, size=4, result=address, units=c.CRC_COMPARE)
        assert queue.wait() == FaultCode.CONTEXT
        queue.reset()


BAD = {
    "unaligned word": (FaultCode.BAD_FIELD, {"address": HBM + 2, "condition": 1}),
    "no condition": (FaultCode.BAD_FIELD, {"address": HBM}),
    "unknown condition": (FaultCode.BAD_FIELD, {"address": HBM, "condition": 5}),
    "huge condition": (FaultCode.BAD_FIELD, {"address": HBM, "condition": ALL}),
    "reserved": (FaultCode.BAD_FIELD, {"address": HBM, "condition": 1, "reserved": 1}),
    "units": (FaultCode.BAD_FIELD, {"address": HBM, "condition": 1, "units": 1}),
    "a word nowhere": (FaultCode.ADDRESS, {"address": 0x100, "condition": 1}),
    "a word past host memory": (FaultCode.ADDRESS, {"address": HOST + HOST_BYTES, "condition": 1}),
    "a word past HBM": (FaultCode.ADDRESS, {"address": HBM + (64 << 20), "condition": 1}),
    "the last address": (FaultCode.ADDRESS, {"address": 2**64 - 4, "condition": 1}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_wait_fails(bare, name):
    code, fields = BAD[name]
    queue = bare.queue()
    queue.put(c.WAIT_VALUE, Opcode.WAIT_VALUE, **fields)
    assert queue.wait() == code
    (fault,) = np.frombuffer(bare.engine.faults(), c.FAULT)
    assert int(fault["address"]) == (fields["address"] if code == FaultCode.ADDRESS else 0)


def test_branches_do_not_run_in_rings(bare):
    queue = bare.queue()
    queue.put(c.BRANCH, Opcode.BRANCH, where=HBM, condition=1, source=1)
    assert queue.wait() == FaultCode.BAD_OPCODE


@pytest.mark.parametrize("size", [0, 5, 100_003, (2 << 20) + 1])
def test_a_comparing_crc_writes_nothing_and_fails_on_a_difference(bare, size):
    queue = bare.queue()
    data, result = DATA + 4096, DATA - 64
    bare.host[data : data + size] = np.random.default_rng(3).integers(0, 256, size, dtype=np.uint8)
    queue.put(c.CRC, Opcode.CRC, src=bare.address(data), size=size, result=bare.address(result))
    queue.put(c.CRC, Opcode.CRC, src=bare.address(data), size=size, result=bare.address(result), units=c.CRC_COMPARE)
    assert queue.wait() == 0
    good = int(bare.word(result)[0])
    bare.word(result)[0] ^= 1 << 31
    failed = queue.put(c.CRC, Opcode.CRC, src=bare.address(data), size=size, result=bare.address(result), units=1)
    assert queue.wait() == FaultCode.CHECKSUM
    assert int(bare.word(result)[0]) == good ^ 1 << 31
    (fault,) = np.frombuffer(bare.engine.faults(), c.FAULT)
    assert (int(fault["code"]), int(fault["sequence"])) == (FaultCode.CHECKSUM, failed)
    assert int(fault["address"]) == bare.address(data)
    assert "expected=" in c.decode(fault["command"])


@pytest.mark.parametrize("fields", [{"units": 2}, {"units": 1 << 31}, {"units": 1, "result": HBM + 2}])
def test_a_bad_comparing_crc_fails(bare, fields):
    queue = bare.queue()
    queue.put(c.CRC, Opcode.CRC, **({"src": HBM, "size": 4, "result": HBM} | fields))
    assert queue.wait() == FaultCode.BAD_FIELD


def test_an_aborted_wait_in_the_ring_fails_when_its_turn_comes(bare):
    queue = bare.queue()
    wait_value(queue, bare.address(WORD), 1)
    second = wait_value(queue, bare.address(WORD), 2)
    bare.engine.abort(queue.id, second)
    assert waits(queue)
    bare.word(WORD)[0] = 1
    assert queue.wait() == FaultCode.ABORTED
    assert queue.progress == second - 1
    with pytest.raises(AdminError) as refusal:
        bare.engine.abort(queue.id, second)
    assert refusal.value.status == AdminStatus.NOT_FOUND


def test_a_row_longer_than_a_turn_does_not_hold_up_other_queues(bare):
    long, short = bare.queue(), bare.queue()
    shape = bare.host[DATA : DATA + 64].view(c.COPY_DESCRIPTOR)
    size = (24 << 20) + 12345
    shape[0] = (HBM, HBM + (32 << 20), size, 1, 1, 0, 0, 0, 0)
    bare.engine.dma_write(HBM + size - 8, b"the end.")
    long.put(c.COPY_ND, Opcode.COPY_ND, descriptor=bare.address(DATA), ring=False)
    short.put(c.COMMAND, Opcode.NOP, ring=False)
    long.doorbell(long.index)
    short.doorbell(short.index)
    while short.progress < short.index:
        pass
    assert long.progress < long.index, "the short command retired beside the long row"
    assert long.wait() == 0
    assert bare.engine.dma_read(HBM + (32 << 20) + size - 8, 8) == b"the end."


def test_rows_around_a_turn_s_length_arrive_whole(bare):
    queue = bare.queue()
    rows, row = 3, (1 << 20) + 4097
    data = np.random.default_rng(5).integers(0, 256, rows * row, dtype=np.uint8)
    bare.host[DATA + 4096 : DATA + 4096 + data.size] = data
    shape = bare.host[DATA : DATA + 64].view(c.COPY_DESCRIPTOR)
    shape[0] = (bare.address(DATA + 4096), HBM + 3, row, rows, 1, row, row + 5, 0, 0)
    queue.put(c.COPY_ND, Opcode.COPY_ND, descriptor=bare.address(DATA))
    assert queue.wait() == 0
    for i in range(rows):
        assert bare.engine.dma_read(HBM + 3 + i * (row + 5), row) == data[i * row : (i + 1) * row].tobytes()
