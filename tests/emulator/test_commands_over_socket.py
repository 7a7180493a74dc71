"""What contract 1.1 added, through the socket: with the client's memory mapped, and by messages."""

import struct
import time

import numpy as np
import pytest
from helpers.admin_queue import OK, Driver
from helpers.bare_engine import command
from helpers.raw_client import BAR2

from maia_rt.contract import commands as c
from maia_rt.contract.commands import AdminOpcode, AdminStatus, BranchSource, Condition, ListOption, Opcode, PostOp
from maia_rt.contract.registers import BAR0, Bar0
from maia_rt.errors import FaultCode

ALL = 0xFFFFFFFF
HBM = 1 << 48
FREE = 100
LIST, TIMES, WORD = 0x20000, 0x30000, 0x40000
"""Offsets in the driver's memory; rings, progress and reports lie from 0x10000 on."""
RING, PROGRESS, REPORTS = 0x10000, 0x18000, 0x19000


@pytest.fixture(params=["memory", "messages"])
def driver(emulator, request):
    with Driver(emulator[1], messages=request.param == "messages") as booted:
        yield booted.boot()


class RawQueue:
    """A queue of the driver's, rung by trapped accesses."""

    def __init__(self, driver, initial=2**32 - 2):
        self.driver, self.index = driver, initial
        status, self.id, _ = driver.create_queue(initial=initial)
        assert status == OK

    def put(self, dtype, opcode, **fields):
        row = command(dtype, opcode, **fields)
        row["sequence"] = (self.index + 1) & 0xFFFF
        self.driver.put(self.driver.base + RING + self.index % 16 * 64, row.tobytes())
        self.index += 1
        self.driver.client.write32(self.id * 4096, self.index & ALL, BAR2)
        self.driver.client.write32(Bar0.WAKE, 1)
        return self.index

    @property
    def block(self):
        return np.frombuffer(self.driver.get(self.driver.base + PROGRESS, 64), c.PROGRESS)[0]

    def wait(self, seconds=5.0):
        """The fault, 0 for none, once the last command is done or the queue has stopped."""
        deadline = time.monotonic() + seconds
        while self.block["progress"] < self.index and self.block["state"] != c.QueueState.STOPPED:
            assert time.monotonic() < deadline, "it did not happen in time"
            assert self.driver.client.alive()
        return int(self.block["fault"])

    def waits(self):
        for _ in range(20):
            assert self.driver.client.alive()
            time.sleep(0.001)
        return self.block["progress"] < self.index and self.block["state"] == c.QueueState.RUNNING

    def list(self, *rows, **fields):
        self.driver.put(self.driver.base + LIST, b"".join(row.tobytes() for row in rows))
        return self.put(c.INDIRECT, Opcode.INDIRECT, list=self.driver.base + LIST, count=len(rows), **fields)


def word(driver, value):
    driver.put(driver.base + WORD, struct.pack("<I", value))


def branch(target, where, value, **fields):
    fields = {"mask": ALL, "condition": Condition.NE, "source": BranchSource.MEMORY} | fields
    return command(c.BRANCH, Opcode.BRANCH, target=target, where=where, value=value, **fields)


def test_the_registers_say_what_there_is(driver):
    caps = BAR0["CAPS"].decode(driver.client.read64(Bar0.CAPS))
    assert all(caps[name] for name in ("WAIT_VALUE", "BRANCH", "LIST_OPTIONS", "CRC_COMPARE"))
    assert BAR0["SCHEDULING_CAPS"].decode(driver.client.read32(Bar0.SCHEDULING_CAPS)) == {"PRIORITIES": 4}
    assert BAR0["VERSION"].decode(driver.client.read32(Bar0.VERSION)) == {"MAJOR": 1, "MINOR": 2}


@pytest.mark.parametrize(("priority", "status"), [(0, OK), (3, OK), (4, AdminStatus.INVALID_FIELD),
                                                  (255, AdminStatus.INVALID_FIELD)])
def test_queues_have_priorities(driver, priority, status):
    base = driver.base
    params = np.zeros((), c.CREATE_QUEUE)
    params["ring"], params["progress"], params["reports"] = base + RING, base + PROGRESS, base + REPORTS
    params["entries_log2"] = params["reports_log2"] = 4
    params["vector"], params["queue"], params["priority"] = c.NO_VECTOR, c.ANY_QUEUE, priority
    assert driver.command(AdminOpcode.CREATE_QUEUE, *np.frombuffer(params.tobytes(), "<u8").tolist())[0] == status


@pytest.mark.parametrize("where", ["host", "device"])
def test_a_wait_for_a_value(driver, where):
    queue = RawQueue(driver)
    word(driver, 4)
    address = driver.base + WORD if where == "host" else HBM + 0x1000
    queue.put(c.WAIT_VALUE, Opcode.WAIT_VALUE, address=address, value=5, mask=ALL, condition=Condition.GE)
    assert queue.waits()
    word(driver, 5)
    if where == "device":
        driver.client.write(4, 0x1000, struct.pack("<I", 5))
    assert queue.wait() == 0


@pytest.mark.parametrize("end", [AdminOpcode.ABORT, AdminOpcode.RESET_QUEUE, AdminOpcode.DELETE_QUEUE])
@pytest.mark.parametrize("what", ["value", "loop"])
def test_what_waits_or_loops_can_be_ended_by_firmware(driver, what, end):
    queue = RawQueue(driver)
    word(driver, 0)
    if what == "value":
        queue.put(c.WAIT_VALUE, Opcode.WAIT_VALUE, address=driver.base + WORD, value=1, mask=ALL,
                  condition=Condition.EQ)
    else:
        queue.list(branch(0, 0, 0, mask=0, condition=Condition.EQ, source=BranchSource.SEMAPHORE))
    assert queue.waits()
    parameters = {AdminOpcode.ABORT: (queue.index,), AdminOpcode.RESET_QUEUE: (2**33,)}.get(end, ())
    assert driver.command(end, queue.id, *parameters)[0] == OK
    if end == AdminOpcode.ABORT:
        assert queue.wait() == FaultCode.ABORTED
        assert driver.command(AdminOpcode.RESET_QUEUE, queue.id, 2**33)[0] == OK
    if end != AdminOpcode.DELETE_QUEUE:
        queue.index = 2**33
        queue.put(c.COMMAND, Opcode.NOP)
        assert queue.wait() == 0


@pytest.mark.parametrize("options", [0, ListOption.CONCURRENT])
def test_a_list_loops_counts_in_memory_and_tells_its_times(driver, options):
    queue = RawQueue(driver)
    base = driver.base
    driver.put(base + TIMES, bytes(64))
    word(driver, 0)
    counter = HBM + 0x2000
    rows = [command(c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, address=counter, op=PostOp.ADD, value=1),
            branch(0, counter, 7),
            command(c.COPY, Opcode.COPY, src=counter, dst=base + WORD, size=4),
            command(c.COMMAND, Opcode.NOP)]
    queue.put(c.FILL, Opcode.FILL, dst=counter, size=4, width=4)
    queue.list(*rows, options=options, times=base + TIMES)
    assert queue.wait() == 0
    assert driver.get(base + WORD, 4) == struct.pack("<I", 7)
    times = np.frombuffer(driver.get(base + TIMES, 64), c.LISTED_TIMES)
    assert (times["start_ns"][1:] >= times["end_ns"][:-1]).all() and (times["end_ns"] >= times["start_ns"]).all()


def test_a_comparing_crc(driver):
    queue = RawQueue(driver)
    driver.put(driver.base + LIST, b"123456789")
    for expected, fault in ((0xCBF43926, 0), (0xCBF43927, FaultCode.CHECKSUM)):
        word(driver, expected)
        queue.put(c.CRC, Opcode.CRC, src=driver.base + LIST, size=9, result=driver.base + WORD, units=1)
        assert queue.wait() == fault
        assert driver.get(driver.base + WORD, 4) == struct.pack("<I", expected)


HOSTILE = {
    "a branch in a ring": (FaultCode.BAD_OPCODE, c.BRANCH, Opcode.BRANCH, {"condition": 1, "source": 1}),
    "a wait at an odd address": (FaultCode.BAD_FIELD, c.WAIT_VALUE, Opcode.WAIT_VALUE, {"address": 1, "condition": 1}),
    "a wait without condition": (FaultCode.BAD_FIELD, c.WAIT_VALUE, Opcode.WAIT_VALUE, {"address": HBM}),
    "a wait nowhere": (FaultCode.ADDRESS, c.WAIT_VALUE, Opcode.WAIT_VALUE, {"address": 2**47, "condition": 1}),
    "a wait past everything": (FaultCode.ADDRESS, c.WAIT_VALUE, Opcode.WAIT_VALUE,
                               {"address": 2**64 - 4, "condition": 1}),
    "an unknown option": (FaultCode.BAD_FIELD, c.INDIRECT, Opcode.INDIRECT, {"list": HBM, "count": 1, "options": 2}),
    "odd times": (FaultCode.BAD_FIELD, c.INDIRECT, Opcode.INDIRECT, {"list": HBM, "count": 1, "times": 12}),
    "a CRC of units 2": (FaultCode.BAD_FIELD, c.CRC, Opcode.CRC, {"src": HBM, "size": 4, "units": 2}),
    "no opcode 13": (FaultCode.BAD_OPCODE, c.COMMAND, 13, {}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_fields_stop_the_queue_and_nothing_else(driver, name):
    fault, dtype, opcode, fields = HOSTILE[name]
    queue = RawQueue(driver)
    queue.put(dtype, opcode, **fields)
    assert queue.wait() == fault
    assert driver.client.alive()
    assert driver.command(AdminOpcode.RESET_QUEUE, queue.id, 0)[0] == OK
    queue.index = 0
    queue.put(c.COMMAND, Opcode.NOP)
    assert queue.wait() == 0
