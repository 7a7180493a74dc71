"""Every way a hand-encoded command can be wrong stops its queue with the right code, and only its queue."""

import time

import numpy as np
import pytest
from helpers.bare_engine import DATA, HBM, HOST, HOST_BYTES, BareEngine, command, until
from maia_emulator.engine import AdminError

from maia_rt.contract import commands as c
from maia_rt.contract.commands import AdminStatus, CommandFlag, Opcode, PostOp, WaitOp
from maia_rt.errors import FaultCode

FREE = 20


@pytest.fixture
def bare():
    engine = BareEngine()
    yield engine
    engine.close()


BAD = {
    "no opcode": (FaultCode.BAD_OPCODE, c.COMMAND, 0, {}),
    "unknown opcode": (FaultCode.BAD_OPCODE, c.COMMAND, 200, {}),
    "unknown flag": (FaultCode.BAD_FIELD, c.COMMAND, Opcode.NOP, {"flags": 0x80}),
    "stale slot": (FaultCode.BAD_SEQUENCE, c.COMMAND, Opcode.NOP, {"sequence": 77}),
    "units of a NOP": (FaultCode.BAD_FIELD, c.COMMAND, Opcode.NOP, {"units": 1}),
    "payload of a NOP": (FaultCode.BAD_FIELD, c.COMMAND, Opcode.NOP, {"payload": [0, 1, 0]}),
    "unknown wait": (FaultCode.BAD_FIELD, c.COMMAND, Opcode.NOP, {"pre": [(FREE, 9, 0)]}),
    "index without wait": (FaultCode.BAD_FIELD, c.COMMAND, Opcode.NOP, {"pre": [(FREE, 0, 0)]}),
    "no such semaphore": (FaultCode.SEMAPHORE, c.COMMAND, Opcode.NOP, {"pre": [(64, WaitOp.GE, 0)]}),
    "acquire a mirror": (FaultCode.SEMAPHORE, c.COMMAND, Opcode.NOP, {"pre": [(0, WaitOp.ACQUIRE, 0)]}),
    "post a mirror": (FaultCode.SEMAPHORE, c.COMMAND, Opcode.NOP, {"post": [(7, PostOp.SET, 0)]}),
    "unknown post": (FaultCode.BAD_FIELD, c.COMMAND, Opcode.NOP, {"post": [(FREE, 3, 0)]}),
    "add of 2^31": (FaultCode.SEMAPHORE_OVERFLOW, c.COMMAND, Opcode.NOP, {"post": [(FREE, PostOp.ADD, 1 << 31)]}),
    "copy from nowhere": (FaultCode.ADDRESS, c.COPY, Opcode.COPY, {"src": 0x100, "dst": HBM, "size": 8}),
    "copy past host memory": (FaultCode.ADDRESS, c.COPY, Opcode.COPY,
                              {"src": HOST + HOST_BYTES - 4, "dst": HBM, "size": 8}),
    "copy past HBM": (FaultCode.ADDRESS, c.COPY, Opcode.COPY, {"src": HBM, "dst": HBM + (64 << 20) - 4, "size": 8}),
    "copy to a fifth tile": (FaultCode.ADDRESS, c.COPY, Opcode.COPY,
                             {"src": HBM, "dst": (3 << 48) + (4 << 32), "size": 8}),
    "copy past tile memory": (FaultCode.ADDRESS, c.COPY, Opcode.COPY,
                              {"src": HBM, "dst": (3 << 48) + (1 << 20) - 4, "size": 8}),
    "copy of 2^63": (FaultCode.BAD_FIELD, c.COPY, Opcode.COPY, {"src": HBM, "dst": HBM, "size": 1 << 63}),
    "wrapping copy": (FaultCode.ADDRESS, c.COPY, Opcode.COPY, {"src": 2**64 - 4, "dst": HBM, "size": 8}),
    "fill width 3": (FaultCode.BAD_FIELD, c.FILL, Opcode.FILL, {"dst": HBM, "size": 9, "width": 3}),
    "unaligned fill": (FaultCode.BAD_FIELD, c.FILL, Opcode.FILL, {"dst": HBM + 1, "size": 4, "width": 4}),
    "write of 17 bytes": (FaultCode.BAD_FIELD, c.WRITE_IMM, Opcode.WRITE_IMM, {"dst": HBM, "units": 17}),
    "write of nothing": (FaultCode.BAD_FIELD, c.WRITE_IMM, Opcode.WRITE_IMM, {"dst": HBM}),
    "crc to an odd address": (FaultCode.BAD_FIELD, c.CRC, Opcode.CRC, {"src": HBM, "size": 4, "result": HBM + 2}),
    "unaligned descriptor": (FaultCode.BAD_FIELD, c.COPY_ND, Opcode.COPY_ND, {"descriptor": HOST + 8}),
    "descriptor nowhere": (FaultCode.ADDRESS, c.COPY_ND, Opcode.COPY_ND, {"descriptor": 0}),
    "launch of nothing": (FaultCode.BAD_KERNEL, c.LAUNCH, Opcode.LAUNCH, {"kernel": 1, "args": HOST}),
    "launch past the table": (FaultCode.BAD_KERNEL, c.LAUNCH, Opcode.LAUNCH, {"kernel": 2**32 - 1, "args": HOST}),
    "unaligned signal": (FaultCode.BAD_FIELD, c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, {"address": HOST + 2, "op": 1}),
    "signal without op": (FaultCode.BAD_FIELD, c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, {"address": HOST}),
    "signal nowhere": (FaultCode.ADDRESS, c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, {"address": 4, "op": 1}),
    "remote add of 2^31": (FaultCode.SEMAPHORE_OVERFLOW, c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE,
                           {"address": HOST, "op": 2, "value": 1 << 31}),
    "empty list": (FaultCode.BAD_FIELD, c.INDIRECT, Opcode.INDIRECT, {"list": HOST + DATA}),
    "endless list": (FaultCode.BAD_FIELD, c.INDIRECT, Opcode.INDIRECT, {"list": HOST + DATA, "count": 2**32 - 1}),
    "list nowhere": (FaultCode.ADDRESS, c.INDIRECT, Opcode.INDIRECT, {"list": 64, "count": 1}),
    "trap": (FaultCode.TRAP, c.TRAP, Opcode.TRAP, {"code": 42}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_command_stops_its_queue_alone(bare, name):
    code, dtype, opcode, fields = BAD[name]
    queue, other = bare.queue(), bare.queue()
    good = queue.put(c.COMMAND, Opcode.NOP)
    failed = queue.put(dtype, opcode, **fields)
    after = queue.put(c.COMMAND, Opcode.NOP)
    assert queue.wait() == code
    assert queue.stopped
    assert queue.progress == good < failed < after
    assert int(queue.block["fault_sequence"][0]) == failed
    report = queue.reports[0]
    assert (int(report["sequence"]), int(report["status"])) == (failed, code)
    until(lambda: bare.engine.errors() & 1)
    log = np.frombuffer(bare.engine.faults(), c.FAULT)
    assert (int(log[-1]["code"]), int(log[-1]["queue"]), int(log[-1]["sequence"])) == (code, queue.id, failed)
    assert log[-1]["command"].tobytes() == queue.ring[(failed - 1) % queue.entries].tobytes()
    other.put(c.COMMAND, Opcode.NOP)
    assert other.wait() == 0
    queue.reset(5)
    queue.put(c.COMMAND, Opcode.NOP)
    assert queue.wait() == 0
    assert queue.progress == 6


def test_a_doorbell_past_the_ring_is_a_fault(bare):
    queue = bare.queue(entries_log2=2)
    queue.doorbell(queue.index + 5)
    assert queue.wait(queue.index + 5) == FaultCode.DOORBELL


def test_a_doorbell_that_goes_back_is_a_fault(bare):
    queue = bare.queue()
    queue.put(c.COMMAND, Opcode.NOP, pre=[(FREE, WaitOp.GE, 1)])
    queue.put(c.COMMAND, Opcode.NOP)
    until(lambda: np.frombuffer(bare.engine.counters(), c.COUNTERS)[0]["doorbells"])
    time.sleep(0.01)
    queue.doorbell(queue.index - 1)
    assert queue.wait() == FaultCode.DOORBELL


def test_a_listed_failure_names_its_place(bare):
    queue = bare.queue()
    rows = [command(c.COMMAND, Opcode.NOP), command(c.COMMAND, Opcode.NOP), command(c.TRAP, Opcode.TRAP, code=1)]
    bare.host[DATA : DATA + 192] = np.frombuffer(b"".join(r.tobytes() for r in rows), np.uint8)
    queue.put(c.INDIRECT, Opcode.INDIRECT, list=bare.address(DATA), count=3)
    assert queue.wait() == FaultCode.TRAP
    assert int(queue.reports[0]["detail"]) == 2


def test_lists_do_not_nest(bare):
    queue = bare.queue()
    row = command(c.INDIRECT, Opcode.INDIRECT, list=bare.address(DATA), count=1)
    bare.host[DATA : DATA + 64] = np.frombuffer(row.tobytes(), np.uint8)
    queue.put(c.INDIRECT, Opcode.INDIRECT, list=bare.address(DATA), count=1)
    assert queue.wait() == FaultCode.BAD_OPCODE


def test_a_context_confines_its_queues(bare):
    context = bare.engine.create_context([(HBM + 4096, 4096), (HBM + 16384, 4096)])
    queue = bare.queue(context=context)
    for address in (HBM + 4096, HBM + 16384 + 4088):
        queue.put(c.FILL, Opcode.FILL, dst=address, size=8, pattern=1, width=1)
        assert queue.wait() == 0
    for address in (HBM, HBM + 8188, HBM + 16384 + 4092):
        queue.put(c.FILL, Opcode.FILL, dst=address, size=8, pattern=1, width=1)
        assert queue.wait() == FaultCode.CONTEXT
        queue.reset()
    with pytest.raises(AdminError) as refusal:
        bare.engine.delete_context(context)
    assert refusal.value.status == AdminStatus.IN_USE
    bare.engine.delete_queue(queue.id)
    bare.engine.delete_context(context)


def test_abort_fails_a_command_that_waits(bare):
    queue = bare.queue()
    waiting = queue.put(c.COMMAND, Opcode.NOP, pre=[(FREE, WaitOp.GE, 1)])
    bare.engine.abort(queue.id, waiting)
    assert queue.wait() == FaultCode.ABORTED
    with pytest.raises(AdminError) as refusal:
        bare.engine.abort(queue.id, 10**12)
    assert refusal.value.status == AdminStatus.NOT_FOUND


def test_the_oldest_faults_make_room_and_the_register_says_so(bare):
    queue = bare.queue()
    for _ in range(c.FAULT_LOG_ENTRIES + 3):
        queue.put(c.TRAP, Opcode.TRAP)
        assert queue.wait() == FaultCode.TRAP
        queue.reset()
    assert len(bare.engine.faults()) == c.FAULT_LOG_ENTRIES * c.FAULT.itemsize
    assert bare.engine.errors() & 16
    bare.engine.clear_errors(0x1F)
    assert bare.engine.errors() == 0


def test_random_commands_never_hurt_the_engine(bare):
    """Seeded noise in every slot: each ends in a fault or in progress, and the engine runs on."""
    rng = np.random.default_rng(2026)
    queue = bare.queue()
    for _ in range(400):
        raw = rng.integers(0, 256, 64, dtype=np.uint8)
        raw[0] = rng.integers(0, 12)
        raw[1] &= 3
        raw[8:40] *= rng.integers(0, 2, dtype=np.uint8)
        row = raw.view(c.COMMAND)[0]
        row["sequence"] = (queue.index + 1) & 0xFFFF
        queue.ring[queue.index % queue.entries] = row
        queue.index += 1
        queue.doorbell(queue.index)
        try:
            fault = queue.wait(seconds=0.05)
        except AssertionError:  # it waits for a semaphore of the noise's choice
            fault = 1
        if fault or queue.stopped:
            queue.reset(queue.index)
    queue.put(c.COMMAND, Opcode.NOP, flags=CommandFlag.BARRIER)
    assert queue.wait() == 0


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [("ring", HOST + 8, AdminStatus.INVALID_FIELD), ("ring", 0, AdminStatus.BAD_ADDRESS),
     ("progress", HBM, AdminStatus.BAD_ADDRESS), ("reports", HOST + HOST_BYTES, AdminStatus.BAD_ADDRESS),
     ("entries_log2", 1, AdminStatus.INVALID_FIELD), ("entries_log2", 17, AdminStatus.INVALID_FIELD),
     ("vector", 9, AdminStatus.INVALID_FIELD), ("context", 5, AdminStatus.NOT_FOUND),
     ("queue", 8, AdminStatus.INVALID_FIELD), ("reserved1", 1, AdminStatus.INVALID_FIELD),
     ("doorbell", 8, AdminStatus.INVALID_FIELD), ("doorbell", HBM, AdminStatus.BAD_ADDRESS),
     ("doorbell", 4096, AdminStatus.BAD_ADDRESS)],
)
def test_create_queue_refuses_what_it_cannot_serve(bare, field, value, status):
    params = np.zeros((), c.CREATE_QUEUE)
    params["ring"], params["progress"], params["reports"] = HOST, HOST + 0x10000, HOST + 0x20000
    params["entries_log2"] = params["reports_log2"] = 4
    params["vector"], params["queue"] = c.NO_VECTOR, c.ANY_QUEUE
    params[field] = value
    with pytest.raises(AdminError) as refusal:
        bare.engine.create_queue(params.tobytes())
    assert refusal.value.status == status
    assert bare.engine.queue_ids() == []


def test_queues_run_out_with_an_answer(bare):
    for _ in range(8):
        bare.queue()
    with pytest.raises(AdminError) as refusal:
        bare.queue()
    assert refusal.value.status == AdminStatus.NO_RESOURCE
