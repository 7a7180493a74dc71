"""Injections strike the commands they name, whatever else runs, and the same ones each time."""

import errno
import struct
import time

import numpy as np
import pytest
from helpers.admin_queue import (
    ADMIN_HEAD,
    CONTROL,
    ERRORS,
    FAILED,
    GET_FEATURE,
    HEARTBEAT,
    INVALID_FIELD,
    NO_RESOURCE,
    OK,
    READY,
    STATUS,
    Driver,
)
from helpers.bare_engine import DATA, HOST, BareEngine, command, until
from helpers.emulator import listening, spawn
from helpers.raw_client import BAR0, BAR2, BAR4, CONFIG, DEVICE_RESET
from helpers.stopwatch import promptly
from helpers.tiny_program import image
from maia_emulator.cli import main
from maia_emulator.engine import AdminError

from maia_rt.contract import commands as c
from maia_rt.contract import program
from maia_rt.contract.commands import Opcode, QueueStage
from maia_rt.contract.injection import Injection
from maia_rt.errors import FaultCode

INJECT, CLEAR_INJECTIONS = 0x70, 0x71
FREE = 20


@pytest.fixture
def bare():
    engine = BareEngine()
    yield engine
    engine.close()


def inject(bare, spec):
    return bare.engine.inject(Injection.parse(spec).pack())


def fill(queue, byte=7, size=64, **more):
    return queue.put(c.FILL, Opcode.FILL, dst=HOST + DATA, size=size, pattern=byte, width=1, **more)


def nop(queue, **more):
    return queue.put(c.COMMAND, Opcode.NOP, **more)


def log(bare, queue):
    return np.frombuffer(bare.engine.queue_log(), c.QUEUE_LOG)[queue.id]


# --- what strikes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [code for code in FaultCode if code], ids=lambda code: code.name)
def test_every_code_of_the_catalogue_can_be_had(bare, code):
    queue, other = bare.queue(), bare.queue()
    inject(bare, f"fault:code={code.name},address=0x1234,opcodes=FILL,queue={queue.id}")
    nop(queue)
    failed = fill(queue)
    fill(other)
    assert other.wait() == 0
    assert queue.wait() == code
    assert int(queue.block["fault_sequence"][0]) == failed and queue.progress == failed - 1
    entry = np.frombuffer(bare.engine.faults(), c.FAULT)[-1]
    assert (entry["code"], entry["queue"], entry["sequence"], entry["address"]) == (code, queue.id, failed, 0x1234)
    assert entry["command"].tobytes() == queue.ring[(failed - 1) % queue.entries].tobytes()
    queue.reset()
    fill(queue)
    assert queue.wait() == 0  # once is once


def test_a_fault_leaves_memory_and_semaphores_alone(bare):
    queue = bare.queue()
    inject(bare, "fault:code=ECC")
    bare.host[DATA : DATA + 64] = 1
    fill(queue, post=[(FREE, c.PostOp.SET, 9)])
    assert queue.wait() == FaultCode.ECC
    assert (bare.host[DATA : DATA + 64] == 1).all() and bare.semaphores[FREE] == 0


def test_a_delay_holds_the_queue_and_nobody_else(bare):
    queue, other = bare.queue(), bare.queue()
    inject(bare, f"delay:ms=60,queue={queue.id}")
    began = time.monotonic()
    nop(queue)
    nop(other)
    other.wait()
    done = queue.progress == queue.index
    if done:
        promptly(began, 0.06)
    assert not done
    queue.wait()
    assert promptly(began, 5) >= 0.06


def test_what_hangs_is_ended_by_the_watchdog(bare):
    bare.engine.set_feature(c.Feature.WATCHDOG_MS, 30)
    queue = bare.queue()
    inject(bare, "hang")
    sequence = fill(queue)
    until(lambda: log(bare, queue)["stage"] == QueueStage.RUNNING)
    assert queue.wait() == FaultCode.ENGINE_HANG
    assert int(queue.block["fault_sequence"][0]) == sequence
    assert bare.engine.errors() == 1 | 8


def test_what_hangs_ends_with_an_abort_a_reset_or_when_injections_are_cleared(bare):
    queue = bare.queue()
    inject(bare, "hang:times=0")
    sequence = fill(queue)
    until(lambda: log(bare, queue)["stage"] == QueueStage.RUNNING)
    bare.engine.abort(queue.id, sequence)
    assert queue.wait() == FaultCode.ABORTED
    queue.reset()
    fill(queue)
    until(lambda: log(bare, queue)["stage"] == QueueStage.RUNNING)
    queue.reset(5)
    fill(queue)
    until(lambda: log(bare, queue)["stage"] == QueueStage.RUNNING)
    assert bare.engine.clear_injections() == 3
    assert queue.wait() == 0
    fill(queue)
    assert queue.wait() == 0


def test_a_launch_that_hangs_holds_no_tile(bare):
    first = bare.engine.load_program(program.read(image()))
    bare.engine.set_feature(c.Feature.WATCHDOG_MS, 30)
    queue = bare.queue()
    inject(bare, "hang:opcodes=LAUNCH")
    queue.put(c.LAUNCH, Opcode.LAUNCH, kernel=first, arg_count=4, args=HOST + DATA)
    assert queue.wait() == FaultCode.ENGINE_HANG
    entry = np.frombuffer(bare.engine.faults(), c.FAULT)[-1]
    assert (entry["kernel"], entry["unit"]) == (first, c.NO_UNIT)


WRITES = {
    "COPY": (c.COPY, {"src": HOST + DATA + 4096, "dst": HOST + DATA, "size": 64}),
    "FILL": (c.FILL, {"dst": HOST + DATA, "size": 64, "width": 4}),
    "WRITE_IMM": (c.WRITE_IMM, {"dst": HOST + DATA, "units": 16}),
    "COPY_ND": (c.COPY_ND, {"descriptor": HOST + DATA + 8192}),
}


@pytest.mark.parametrize("name", WRITES)
def test_corrupt_flips_the_bit_that_was_asked_for(bare, name):
    descriptor = bare.host[DATA + 8192 : DATA + 8256].view(c.COPY_DESCRIPTOR)
    descriptor["src"], descriptor["dst"], descriptor["row_bytes"] = HOST + DATA + 4096, HOST + DATA, 8
    descriptor["rows"], descriptor["planes"], descriptor["dst_row_stride"] = 2, 2, 16
    descriptor["dst_plane_stride"] = 64
    queue = bare.queue()
    inject(bare, f"corrupt:bit={8 * 9 + 3}")
    nop(queue)
    dtype, fields = WRITES[name]
    queue.put(dtype, Opcode[name], **fields)
    assert queue.wait() == 0
    found = np.flatnonzero(bare.host[DATA : DATA + 4096])
    # Byte 9 of a strided copy is the second of its second row.
    assert found.tolist() == [17 if name == "COPY_ND" else 9] and bare.host[DATA + found[0]] == 8


def test_corrupt_strikes_before_the_command_is_told_to_be_done_and_never_what_writes_nothing(bare):
    queue = bare.queue()
    inject(bare, "corrupt:seed=5")
    fill(queue, size=0)
    fill(queue, byte=0)
    assert queue.wait() == 0
    assert not bare.host[DATA : DATA + 64].any()  # the empty one took the strike
    inject(bare, "corrupt:seed=5")
    fill(queue, byte=0)
    assert queue.wait() == 0
    (at,) = np.flatnonzero(bare.host[DATA : DATA + 64])
    assert bin(bare.host[DATA + at]).count("1") == 1


# --- which ones ------------------------------------------------------------------------------------------------------


def struck(bare, spec, commands=40, opcode=Opcode.NOP):
    """Which of so many commands of a fresh queue fail."""
    queue = bare.queue(initial=0)
    inject(bare, f"{spec},queue={queue.id}")
    found = []
    for number in range(commands):
        queue.put(c.COMMAND, opcode)
        if queue.wait():
            found.append(number)
            queue.reset(queue.index)
    bare.engine.delete_queue(queue.id)
    bare.engine.clear_injections()
    return found


@pytest.mark.parametrize(("spec", "expected"), [
    ("", [0]), (",times=3", [0, 1, 2]), (",after=5", [5]), (",every=7", [6, 13, 20, 27, 34]),
    (",after=2,every=10,times=2", [11, 21]), (",sequence=9", [8]), (",opcodes=COPY", []),
    (",opcodes=NOP+COPY,after=1", [1]),
])
def test_after_every_times_and_sequence_choose(bare, spec, expected):
    assert struck(bare, f"fault:code=TRAP{spec}") == expected


def test_a_seed_strikes_the_same_commands_each_time_and_another_one_others(bare):
    first = struck(bare, "fault:code=TRAP,probability=0.3,seed=1")
    assert 3 <= len(first) <= 25
    assert struck(bare, "fault:code=TRAP,probability=0.3,seed=1") != [] != first
    again = BareEngine()
    try:
        assert struck(again, "fault:code=TRAP,probability=0.3,seed=1") == first
        other = BareEngine()
        try:
            assert struck(other, "fault:code=TRAP,probability=0.3,seed=2") != first
        finally:
            other.close()
    finally:
        again.close()


def test_queues_are_counted_by_themselves_so_that_their_interleaving_does_not_matter(bare):
    queues = [bare.queue(initial=0) for _ in range(3)]
    inject(bare, "fault:code=TRAP,after=4,times=0")
    for _ in range(6):
        for queue in queues[::-1]:
            nop(queue)
    for queue in queues:
        assert queue.wait() == FaultCode.TRAP and int(queue.block["fault_sequence"][0]) == 5


def test_listed_commands_are_struck_one_by_one(bare):
    queue = bare.queue()
    listed = bare.host[DATA : DATA + 256].view(c.COMMAND)
    for number in range(4):
        listed[number] = command(c.COMMAND, Opcode.NOP)
    inject(bare, "fault:code=ECC,opcodes=NOP,after=2")
    sequence = queue.put(c.INDIRECT, Opcode.INDIRECT, list=HOST + DATA, count=4)
    assert queue.wait() == FaultCode.ECC
    entry = np.frombuffer(bare.engine.faults(), c.FAULT)[-1]
    assert (entry["sequence"], entry["detail"]) == (sequence, 2)


def test_the_first_that_strikes_counts_and_all_count_the_match(bare):
    queue = bare.queue()
    inject(bare, "fault:code=ECC")
    inject(bare, "fault:code=LINK")
    inject(bare, "fault:code=TRAP,after=1")
    for expected in (FaultCode.ECC, FaultCode.LINK):
        nop(queue)
        assert queue.wait() == expected
        queue.reset(queue.index)
    nop(queue)
    assert queue.wait() == FaultCode.TRAP


def test_there_is_room_for_so_many_and_one_that_is_spent_makes_room(bare):
    queue = bare.queue()
    for _ in range(c.MAX_INJECTIONS):
        inject(bare, f"fault:code=TRAP,queue={queue.id}")
    with pytest.raises(AdminError, match="no room"):
        inject(bare, "hang")
    nop(queue)
    queue.wait()
    assert inject(bare, "hang") == c.MAX_INJECTIONS + 1
    with pytest.raises(AdminError, match="there is no queue 8"):
        inject(bare, "hang:queue=8")


def test_a_reset_disarms_all_but_what_the_emulator_was_started_with(bare):
    bare.engine.inject_always([Injection.parse("fault:code=ECC,opcodes=FILL").pack()])
    inject(bare, "fault:code=TRAP,opcodes=NOP")
    for _ in range(2):
        bare.engine.reset()
        queue = bare.queue()
        nop(queue)
        assert queue.wait() == 0
        fill(queue)
        assert queue.wait() == FaultCode.ECC
        queue.reset()
        fill(queue)
        assert queue.wait() == 0
        bare.queues.clear()
    bare.queues.append(queue)


# --- through the server ----------------------------------------------------------------------------------------------


@pytest.fixture
def driver(emulator):
    with Driver(emulator[1]) as booted:
        yield booted.boot()


def words(spec):
    return struct.unpack("<7Q", Injection.parse(spec).pack())


def test_inject_answers_with_a_number_and_refuses_what_it_may_not_do(driver):
    assert driver.command(INJECT, *words("hang:opcodes=FILL")) == (OK, 1, 0)
    assert driver.command(INJECT, *words("delay:us=5,times=0")) == (OK, 2, 0)
    good = words("fault:code=ECC")
    for at, value in ((0, 0), (0, 7), (0, good[0] | 0x80 << 8), (2, 0), (6, 0)):
        bad = list(good)
        bad[at] = value
        assert driver.command(INJECT, *bad)[0] == (INVALID_FIELD if at != 6 else OK)
    assert driver.command(INJECT, *good, flags=1)[0] == INVALID_FIELD
    assert driver.command(INJECT, *words("hang:queue=4000"))[0] == INVALID_FIELD
    assert driver.command(CLEAR_INJECTIONS, 1)[0] == INVALID_FIELD
    assert driver.command(CLEAR_INJECTIONS) == (OK, 0, 0)
    for _ in range(c.MAX_INJECTIONS):
        assert driver.command(INJECT, *words("hang"))[0] == OK
    assert driver.command(INJECT, *words("hang"))[0] == NO_RESOURCE


def test_firmware_that_falls_silent_beats_and_answers_no_more_until_a_reset(driver):
    assert driver.command(INJECT, *words("firmware:now"))[0] == OK
    driver.post(struct.pack("<HHI7Q", GET_FEATURE, 0, 1, 1, *[0] * 6))
    time.sleep(0.02)
    beat = driver.client.read32(HEARTBEAT)
    time.sleep(0.15)
    assert driver.client.read32(HEARTBEAT) == beat
    assert driver.client.read32(STATUS) & 15 == READY and driver.client.read32(ADMIN_HEAD) == 1
    driver.client.write32(CONTROL, 0)
    driver.boot()
    assert driver.command(GET_FEATURE, 1)[0] == OK


def test_firmware_that_dies_says_so(driver):
    assert driver.command(INJECT, *words("firmware:now,ends"))[0] == OK
    assert driver.state(lambda state: state == FAILED) == FAILED
    assert driver.error() == 3 and driver.client.read32(ERRORS) & 2
    driver.client.write32(CONTROL, 0)
    driver.boot()


def test_a_device_that_is_gone_reads_as_all_ones_until_its_client_goes(emulator):
    with Driver(emulator[1]) as driver:
        driver.boot()
        driver.post(struct.pack("<HHI7Q", INJECT, 0, 1, *words("gone:now")))
        until(lambda: driver.client.read32(0) == 0xFFFFFFFF)
        assert driver.get(driver.cq, 8) == struct.pack("<II", 1, OK)  # it was completed before
        for region in (BAR0, CONFIG, BAR2, BAR4):
            assert driver.client.read(region, 0, 4) == b"\xff" * 4
        driver.client.write32(CONTROL, 0)
        driver.client.send(DEVICE_RESET)
        assert driver.client.recv().errno == errno.ENODEV
        assert driver.client.read32(STATUS) == 0xFFFFFFFF
    with Driver(emulator[1]) as driver:
        driver.boot()
        assert driver.command(GET_FEATURE, 1)[0] == OK


def test_a_device_that_ends_hangs_up_and_serves_the_next_client(emulator):
    with Driver(emulator[1]) as driver:
        driver.boot()
        with pytest.raises((EOFError, OSError)):  # perhaps before the doorbell's write is answered
            driver.post(struct.pack("<HHI7Q", INJECT, 0, 1, *words("gone:now,ends")))
            while True:
                driver.client.read32(0)
    with Driver(emulator[1]) as driver:
        driver.boot()


@pytest.mark.parametrize(("options", "says"), [
    (["--inject", "quake"], "there is no kind 'quake'"), (["--inject", "gone:now"], "now is for a device that runs"),
    (["--inject", "hang"] * 33, "33 injections; a device has room for 32"), (["--inject"], "expected one argument"),
])
def test_a_bad_spec_on_the_command_line_is_wrong_usage(options, says, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--socket", "/nowhere/s", *options])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_the_emulators_own_injections_are_printed_with_their_seeds_and_strike(tmp_path):
    process = spawn("--socket", str(tmp_path / "s"), "--seed", "40", "--inject", "delay:us=1,probability=0.5",
                    "--inject", "firmware:opcodes=TRAP", "--inject", "hang:seed=7,queue=3")
    try:
        (path,) = listening(process, 1)
        with Driver(path) as driver:
            driver.boot()
            assert driver.command(INJECT, *words("hang")) == (OK, 4, 0)
    finally:
        process.terminate()
        _, said = process.communicate(timeout=10)
    assert process.returncode == 0
    assert said.splitlines() == [f"maia_emulator: injecting {spec}" for spec in (
        "delay:ns=1000,probability=0.5,seed=40", "firmware:opcodes=TRAP,seed=41", "hang:queue=3,seed=7")]
