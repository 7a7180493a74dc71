"""Boot, heartbeat and admin queue through the real server: the contract's sections 5 and 6, and hostile rings."""

import struct
import time

import numpy as np
import pytest
from helpers.admin_queue import (
    ABORT,
    ADMIN_CQ,
    ADMIN_HEAD,
    ADMIN_SIZE,
    ADMIN_SQ,
    ADMIN_TAIL,
    BAD_ADDRESS,
    CONTROL,
    CREATE_CONTEXT,
    CREATE_QUEUE,
    DELETE_CONTEXT,
    DELETE_QUEUE,
    ERRORS,
    FAILED,
    GET_FEATURE,
    GET_LOG,
    HEARTBEAT,
    IDENTIFY,
    IN_USE,
    INVALID_FIELD,
    INVALID_OPCODE,
    LOAD_PROGRAM,
    NOT_FOUND,
    OK,
    PROGRAM_REFUSED,
    READY,
    RESET,
    RESET_QUEUE,
    SET_FEATURE,
    STATUS,
    UNLOAD_PROGRAM,
    Driver,
)
from helpers.raw_client import BAR4, CONFIG, DEVICE_RESET, DMA_UNMAP, SET_IRQS, Descriptors, dma_unmap, fired, irq_set

from maia_rt.contract import program
from maia_rt.contract.commands import COUNTERS
from maia_rt.contract.commands import IDENTIFY as IDENTIFY_PAGE

HBM = 1 << 48
UNMAPPED = 0x7000_0000_0000 >> 4


@pytest.fixture(params=["memory", "messages"])
def driver(emulator, request):
    with Driver(emulator[1], messages=request.param == "messages") as booted:
        yield booted.boot()


@pytest.fixture
def unbooted(emulator):
    with Driver(emulator[1]) as connected:
        yield connected


# --- boot ------------------------------------------------------------------------------------------------------------


def test_device_is_in_reset_until_enabled(unbooted):
    assert unbooted.client.read32(STATUS) == RESET
    assert unbooted.client.read32(HEARTBEAT) == 0
    time.sleep(0.1)
    assert unbooted.client.read32(HEARTBEAT) == 0


def test_booting_clears_the_completion_ring(unbooted):
    unbooted.put(unbooted.cq, b"\xff" * 32 * 16)
    unbooted.boot()
    assert unbooted.get(unbooted.cq, 32 * 16) == bytes(32 * 16)


def test_heart_beats_ten_times_a_second(driver):
    first = driver.client.read32(HEARTBEAT)
    time.sleep(0.3)
    assert driver.client.read32(HEARTBEAT) - first >= 3


@pytest.mark.parametrize(("register", "value", "error"), [
    (ADMIN_SQ, 0x100001, 1), (ADMIN_SQ, 0x100020, 1), (ADMIN_CQ, 0x108001, 1), (ADMIN_SQ, UNMAPPED, 2),
    (ADMIN_CQ, UNMAPPED, 2), (ADMIN_SQ, (1 << 64) - 64, 2), (ADMIN_CQ, (1 << 64) - 64, 2),
    (ADMIN_SQ, 0x100000 + (1 << 20) - 64, 2), (ADMIN_CQ, 0x100000 + (1 << 20) - 448, 2),
])
def test_bad_ring_address_fails_the_boot(unbooted, register, value, error):
    client = unbooted.client
    client.write(CONFIG, 4, b"\6")
    client.write64(ADMIN_SQ, unbooted.sq)
    client.write64(ADMIN_CQ, unbooted.cq)
    client.write32(ADMIN_SIZE, 4)
    client.write64(register, value)
    client.write32(CONTROL, 1)
    assert unbooted.state(lambda now: now not in (RESET, 1)) == FAILED
    assert unbooted.error() == error
    assert client.read32(ERRORS) == 2
    # Only a reset leaves this state.
    beat = client.read32(HEARTBEAT)
    client.write32(ADMIN_TAIL, 1)
    time.sleep(0.12)
    assert client.read32(HEARTBEAT) == beat
    assert client.read32(STATUS) & 0xF == FAILED
    client.write32(CONTROL, 0)
    assert client.read32(STATUS) == RESET
    unbooted.boot()


@pytest.mark.parametrize("log2", [0, 13, 200])
def test_bad_ring_length_fails_the_boot(unbooted, log2):
    unbooted.log2 = log2
    unbooted.boot(FAILED)
    assert unbooted.error() == 1


@pytest.mark.parametrize("log2", [1, 12])
def test_shortest_and_longest_ring(emulator, log2):
    with Driver(emulator[1], log2=log2) as driver:
        driver.cq = driver.base + 0x40000
        driver.spare = driver.base + 0x80000
        driver.boot()
        for _ in range(5):
            assert driver.command(IDENTIFY, driver.spare)[0] == OK


@pytest.mark.parametrize("how", ["enable", "register", "message", "flr"])
def test_device_boots_again_after_any_reset(driver, how):
    client = driver.client
    assert driver.create_queue()[0] == OK
    client.write32(0xCC, 0xABCD)
    if how == "enable":
        client.write32(CONTROL, 0)
    elif how == "register":
        client.write32(CONTROL, 2)
    elif how == "message":
        client.call(DEVICE_RESET)
    else:
        control = int.from_bytes(client.read(CONFIG, 0x68, 2), "little")
        client.write(CONFIG, 0x68, (control | 1 << 15).to_bytes(2, "little"))
    assert client.read32(STATUS) == RESET
    assert client.read32(ADMIN_TAIL) == 0
    assert client.read32(ADMIN_HEAD) == 0
    assert client.read32(0xCC) == (0xABCD if how == "enable" else 0)
    driver.boot()
    assert driver.command(DELETE_QUEUE, 0)[0] == NOT_FOUND
    assert driver.create_queue(queue=0)[:2] == (OK, 0)


def test_disabling_keeps_hbm_and_reset_clears_it(driver):
    client = driver.client
    client.write(BAR4, 4096, b"weights")
    client.write32(CONTROL, 0)
    assert client.read(BAR4, 4096, 7) == b"weights"
    driver.boot()
    client.write32(CONTROL, 3)
    assert client.read(BAR4, 4096, 7) == bytes(7)
    assert client.read32(CONTROL) == 0


def test_enabling_twice_changes_nothing(driver):
    assert driver.create_queue(queue=7)[:2] == (OK, 7)
    driver.client.write32(CONTROL, 1)
    assert driver.command(DELETE_QUEUE, 7)[0] == OK


def test_ring_registers_are_taken_at_enable(driver):
    for register in (ADMIN_SQ, ADMIN_CQ):
        driver.client.write64(register, UNMAPPED)
        assert driver.client.read64(register) == UNMAPPED
    driver.client.write32(ADMIN_SIZE, 99)
    assert driver.command(IDENTIFY, driver.spare)[0] == OK


def test_without_bus_master_host_memory_is_out_of_reach(driver):
    client = driver.client
    client.write(CONFIG, 4, b"\2")
    client.write32(ADMIN_TAIL, 1)
    assert driver.state(lambda now: now == FAILED) == FAILED
    assert driver.error() == 2
    client.write32(CONTROL, 0)
    client.write32(CONTROL, 1)
    assert driver.state(lambda now: now != 1) == FAILED
    assert driver.error() == 2
    client.write32(CONTROL, 0)
    driver.boot()
    assert driver.command(GET_FEATURE, 1)[0] == OK


# --- rings -----------------------------------------------------------------------------------------------------------


def test_commands_complete_in_order_and_wrap(driver):
    for n in range(3 * driver.entries + 1):
        assert driver.command(GET_FEATURE, 1, number=n)[0] == OK


def test_many_commands_for_one_doorbell(driver):
    for slot in range(driver.entries):
        driver.put(driver.sq + slot * 64, struct.pack("<HHI7Q", GET_FEATURE, 0, slot, 1, *[0] * 6))
    driver.client.write32(ADMIN_TAIL, driver.entries)
    assert driver.wait(driver.entries - 1)[:2] == (driver.entries - 1, OK)
    for slot in range(driver.entries):
        assert driver.wait(slot) == (slot, OK, 10_000, 0)


def test_completion_fires_vector_0(driver):
    with Descriptors() as descriptors:
        fd = descriptors.eventfd()
        driver.client.call(SET_IRQS, irq_set(0x24, 2, 0, 1), [fd])
        fired(fd)
        driver.command(GET_FEATURE, 1)
        assert fired(fd) == 1


def test_doorbell_past_the_ring_kills_the_firmware(driver):
    driver.client.write32(ADMIN_TAIL, driver.entries + 1)
    assert driver.state(lambda now: now == FAILED) == FAILED
    assert driver.error() == 1
    assert driver.client.read32(ERRORS) == 2
    driver.client.write32(ERRORS, 2)
    assert driver.client.read32(ERRORS) == 0
    driver.client.write32(CONTROL, 0)
    driver.boot()
    assert driver.command(GET_FEATURE, 1)[0] == OK


def test_doorbell_that_goes_back_kills_the_firmware(driver):
    driver.command(GET_FEATURE, 1)
    driver.client.write32(ADMIN_TAIL, 0)
    assert driver.state(lambda now: now == FAILED) == FAILED


def test_ring_that_was_unmapped_kills_the_firmware_and_the_server_lives(driver):
    with Descriptors() as descriptors:
        fd = descriptors.eventfd()
        driver.client.call(SET_IRQS, irq_set(0x24, 2, 0, 1), [fd])
        fired(fd)
        driver.client.call(DMA_UNMAP, dma_unmap(driver.base, 1 << 20))
        driver.client.write32(ADMIN_TAIL, 1)
        assert driver.state(lambda now: now == FAILED) == FAILED
        assert driver.error() == 2
        assert driver.client.read32(ERRORS) == 2
        assert fired(fd) == 1


# --- commands --------------------------------------------------------------------------------------------------------


def test_identify(driver):
    assert driver.command(IDENTIFY, driver.spare) == (OK, 0, 0)
    page = np.frombuffer(driver.get(driver.spare, 512), IDENTIFY_PAGE)[0]
    assert (page["contract_major"], page["contract_minor"], page["profile"]) == (1, 2, 0)
    assert page["model"].decode() == "MAIA small (emulated)"
    assert int(page["serial"], 16) == driver.client.read64(0x10)
    assert not page["reserved"].any()


@pytest.mark.parametrize(("opcode", "count"), [
    (IDENTIFY, 1), (DELETE_QUEUE, 1), (RESET_QUEUE, 2), (LOAD_PROGRAM, 5), (UNLOAD_PROGRAM, 1), (CREATE_CONTEXT, 3),
    (DELETE_CONTEXT, 2), (SET_FEATURE, 2), (GET_FEATURE, 1), (ABORT, 2), (GET_LOG, 3),
])
def test_unused_parameters_and_flags_are_zero(driver, opcode, count):
    for used in range(count, 7):
        p = [0] * 7
        p[used] = 1
        assert driver.command(opcode, *p) == (INVALID_FIELD, 0, 0)
    assert driver.command(opcode, flags=1) == (INVALID_FIELD, 0, 0)
    assert driver.command(opcode, flags=0x8000) == (INVALID_FIELD, 0, 0)


@pytest.mark.parametrize("opcode", [0, 2, 0x13, 0xFF, 0xFFFF])
def test_unknown_opcode(driver, opcode):
    assert driver.command(opcode) == (INVALID_OPCODE, 0, 0)


@pytest.mark.parametrize("address", [UNMAPPED, (1 << 64) - 8, 0xFFFF << 48, HBM + (1 << 30) - 8])
def test_unreachable_addresses(driver, address):
    assert driver.command(IDENTIFY, address)[0] == BAD_ADDRESS
    assert driver.command(GET_LOG, 1, address, 4096)[0] == BAD_ADDRESS
    assert driver.command(LOAD_PROGRAM, address, 4096)[0] == BAD_ADDRESS
    assert driver.command(CREATE_CONTEXT, address, 1)[0] == BAD_ADDRESS


def test_pages_may_lie_in_hbm(driver):
    assert driver.command(IDENTIFY, HBM + 4096)[0] == OK
    assert driver.client.read(BAR4, 4096, 4) == b"\1\0\2\0"


def test_queues(driver):
    status, first, _ = driver.create_queue()
    assert (status, first) == (OK, 0)
    assert driver.create_queue(queue=first)[0] == IN_USE
    assert driver.create_queue(queue=63)[:2] == (OK, 63)
    assert driver.create_queue(queue=64)[0] == INVALID_FIELD
    assert driver.create_queue(context=5)[0] == NOT_FOUND
    assert driver.create_queue(vector=65)[0] == INVALID_FIELD
    assert driver.create_queue(log2=1)[0] == INVALID_FIELD
    assert driver.create_queue(log2=17)[0] == INVALID_FIELD
    assert driver.create_queue(ring=driver.spare + 8)[0] == INVALID_FIELD
    assert driver.create_queue(ring=UNMAPPED)[0] == BAD_ADDRESS
    assert driver.command(RESET_QUEUE, first, 100) == (OK, 0, 0)
    assert driver.command(ABORT, first, 1)[0] == NOT_FOUND
    assert driver.command(DELETE_QUEUE, first) == (OK, 0, 0)
    for opcode in (DELETE_QUEUE, RESET_QUEUE, ABORT):
        assert driver.command(opcode, first)[0] == NOT_FOUND
        assert driver.command(opcode, 1 << 63)[0] == NOT_FOUND
    assert driver.command(CREATE_QUEUE, flags=1)[0] == INVALID_FIELD


def test_a_queue_runs_commands(driver):
    status, queue, _ = driver.create_queue()
    assert status == OK
    source, target = driver.spare + 0x1000, driver.spare + 0x2000
    driver.put(source, b"through the device")
    command = struct.pack("<BBHI", 2, 2, 1, 0) + bytes(32) + struct.pack("<QQQ", source, target, 18)
    driver.put(driver.spare, command)
    driver.client.write32(queue * 4096, 1, region=2)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and driver.get(driver.spare + 0x8000, 8) != struct.pack("<Q", 1):
        driver.client.read32(0)
    assert driver.get(driver.spare + 0x8000, 16) == struct.pack("<QII", 1, 0, 0)
    assert driver.get(target, 18) == b"through the device"


def test_contexts(driver):
    driver.put(driver.spare, struct.pack("<QQQQ", HBM, 4096, HBM + (1 << 20), 8192))
    status, context, _ = driver.command(CREATE_CONTEXT, driver.spare, 2)
    assert (status, context) == (OK, 1)
    status, queue, _ = driver.create_queue(context=context)
    assert status == OK
    assert driver.command(DELETE_CONTEXT, context)[0] == IN_USE
    assert driver.command(DELETE_QUEUE, queue)[0] == OK
    assert driver.command(DELETE_CONTEXT, context)[0] == OK
    assert driver.command(DELETE_CONTEXT, context)[0] == NOT_FOUND
    assert driver.command(DELETE_CONTEXT, 0)[0] == NOT_FOUND
    assert driver.command(CREATE_CONTEXT, driver.spare, 9)[0] == INVALID_FIELD
    assert driver.command(CREATE_CONTEXT, driver.spare, 1 << 60)[0] == INVALID_FIELD
    assert driver.command(CREATE_CONTEXT, driver.spare, 0)[0] == INVALID_FIELD
    driver.put(driver.spare, struct.pack("<QQ", 0x1000, 4096))
    assert driver.command(CREATE_CONTEXT, driver.spare, 1)[0] == BAD_ADDRESS


def test_features(driver):
    assert driver.command(GET_FEATURE, 1) == (OK, 10_000, 0)
    assert driver.command(SET_FEATURE, 1, 250) == (OK, 0, 0)
    assert driver.command(GET_FEATURE, 1) == (OK, 250, 0)
    assert driver.command(SET_FEATURE, 1, 1 << 60)[0] == INVALID_FIELD
    assert driver.command(GET_FEATURE, 99)[0] == NOT_FOUND
    assert driver.command(SET_FEATURE, 1 << 60, 0)[0] == NOT_FOUND
    driver.client.write32(CONTROL, 0)
    driver.boot()
    assert driver.command(GET_FEATURE, 1)[1] == 10_000


def test_counters_log(driver):
    assert driver.command(GET_LOG, 1, driver.spare, 4096) == (OK, COUNTERS.itemsize, COUNTERS.itemsize)
    counters = np.frombuffer(driver.get(driver.spare, COUNTERS.itemsize), COUNTERS)[0]
    assert counters["admin_commands"] == 0
    assert driver.command(GET_LOG, 1, driver.spare, 16) == (OK, 16, COUNTERS.itemsize)
    driver.command(GET_LOG, 1, driver.spare, 4096)
    assert np.frombuffer(driver.get(driver.spare, COUNTERS.itemsize), COUNTERS)[0]["admin_commands"] == 2
    assert driver.command(GET_LOG, 2, driver.spare, 4096) == (OK, 0, 0)
    assert driver.command(GET_LOG, 99, driver.spare, 4096)[0] == NOT_FOUND


def kernel(tiles=1, name="k"):
    return program.KernelImage(name, (), (), tiles, 0)


def test_programs(driver):
    image = program.write([kernel(), kernel(name="second")])
    driver.put(driver.spare, image)
    status, first, count = driver.command(LOAD_PROGRAM, driver.spare, len(image))
    assert (status, count) == (OK, 2)
    assert first > 0
    status, second, _ = driver.command(LOAD_PROGRAM, driver.spare, len(image))
    assert (status, second) == (OK, first + 2)
    assert driver.command(UNLOAD_PROGRAM, first + 1)[0] == NOT_FOUND
    assert driver.command(UNLOAD_PROGRAM, first) == (OK, 0, 0)
    assert driver.command(UNLOAD_PROGRAM, first)[0] == NOT_FOUND
    assert driver.command(LOAD_PROGRAM, driver.spare, len(image))[1] == first


def refusal(driver, image, room=512, size=None):
    at = driver.spare + 0x40000
    driver.put(driver.spare, image)
    driver.put(at, b"\xee" * 600)
    size = len(image) if size is None else size
    assert driver.command(LOAD_PROGRAM, driver.spare, size, at, room)[0] == PROGRAM_REFUSED
    raw = driver.get(at, 600)
    assert raw[room:] == b"\xee" * (600 - room)
    return raw[:room].partition(b"\0")[0].decode()


def test_refused_program_says_why(driver):
    text = refusal(driver, program.write([kernel(tiles=5)]))
    assert "'k'" in text
    assert "tiles" in text
    assert "4" in text
    assert "magic" in refusal(driver, bytes(4096))
    assert "crc32" in refusal(driver, _broken())
    assert "bytes" in refusal(driver, b"", size=(64 << 20) + 1)
    assert "bytes" in refusal(driver, b"", size=0)


def _broken():
    image = bytearray(program.write([kernel()]))
    image[-1] ^= 0x55
    return bytes(image)


@pytest.mark.parametrize("room", [1, 2, 20])
def test_reason_is_cut_to_its_room_and_ended(driver, room):
    whole = refusal(driver, bytes(4096))
    assert refusal(driver, bytes(4096), room=room) == whole[: room - 1]


def test_reason_is_cut_between_characters(driver):
    image = program.write([kernel(tiles=5, name="ä" * 40)])
    whole = refusal(driver, image)
    for room in range(60, 64):
        assert whole.startswith(refusal(driver, image, room=room))


def test_refusal_without_room_for_a_message(driver):
    driver.put(driver.spare, bytes(4096))
    assert driver.command(LOAD_PROGRAM, driver.spare, 4096) == (PROGRAM_REFUSED, 0, 0)
    assert driver.command(LOAD_PROGRAM, driver.spare, 4096, driver.spare + 0x1000, 0) == (PROGRAM_REFUSED, 0, 0)
    assert driver.command(LOAD_PROGRAM, driver.spare, 4096, UNMAPPED, 64)[0] == BAD_ADDRESS


def test_state_after_everything_is_ready(driver):
    for opcode in range(256):
        driver.command(opcode, *[0xFFFF_FFFF_FFFF_FFFF] * 7)
    assert driver.client.read32(STATUS) == READY
    assert driver.client.read32(ERRORS) == 0
