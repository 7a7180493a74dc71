"""DMA through QEMU, into memory that the device maps and into memory that it reaches by messages only."""

import os
import struct
import zlib

import pytest
from helpers.admin_queue import BAD_ADDRESS, FAILED, IDENTIFY, MEMORY, OK
from helpers.qtest import MEGABYTES, MMIO
from helpers.qtest_device import BUS_MASTER, COMMAND, MEMORY_SPACE, PLACES, QtestDriver

HBM = 1 << 48
NOP, COPY, FILL, CRC = 1, 2, 4, 7
ADDRESS = 4
GET_LOG, RESET_QUEUE = 0x60, 0x12
BUFFER = 0x40_0000
"""A buffer in guest memory, away from what the driver uses."""
OUTSIDE = MEGABYTES << 20


@pytest.fixture
def driver(device):
    with QtestDriver(device) as driver:
        yield driver.boot().open_queue()


def recovered(driver):
    """Whether the queue works again after a reset, and a copy with it."""
    assert driver.command(RESET_QUEUE, 0, 0)[0] == OK
    driver.commands = 0
    driver.machine.write(BUFFER, b"still alive")
    driver.done(driver.copy(BUFFER, BUFFER + 4096, 11))
    return driver.machine.read(BUFFER + 4096, 11) == b"still alive" and driver.client.alive()


def test_identify_is_written_to_guest_memory(driver):
    assert driver.command(IDENTIFY, BUFFER) == (0, 0, 0)
    page = driver.get(BUFFER, 512)
    assert struct.unpack_from("<HHI", page) == (1, 2, 0)
    assert page[104:136].rstrip(b"\0")
    assert page[136:] == bytes(376)


@pytest.mark.parametrize("size", [1, 63, 4096, 100_003, 3 << 20])
def test_copy_into_device_memory_and_back(driver, size):
    """The longest one takes several messages: one carries a mebibyte."""
    data, back = os.urandom(size), BUFFER + (8 << 20) + 1
    driver.machine.write(BUFFER + 5, data)
    driver.copy(BUFFER + 5, HBM + 77, size)
    driver.done(driver.copy(HBM + 77, back, size))
    assert driver.machine.read(back, size) == data
    assert driver.machine.read(PLACES[4] + 77, min(size, 4096)) == data[:4096], "through BAR 4"
    assert driver.machine.read(back - 1, 1) + driver.machine.read(back + size, 16) == bytes(17), "and no byte more"


def test_checksum_of_guest_memory(driver):
    data = os.urandom(300_000)
    driver.machine.write(BUFFER, data)
    driver.done(driver.submit(CRC, struct.pack("<QQQ", BUFFER, len(data), BUFFER + (1 << 20))))
    assert driver.machine.load(BUFFER + (1 << 20), 4) == zlib.crc32(data)


def test_memory_with_a_file_is_mapped_and_other_memory_is_asked_for(driver, request):
    driver.done(driver.copy(BUFFER, HBM, 4096))
    assert driver.command(GET_LOG, 1, BUFFER, 320)[0] == OK
    messages, = struct.unpack_from("<Q", driver.get(BUFFER, 320), 168)
    assert bool(messages) == ("messages" in request.node.name)


@pytest.mark.parametrize(("src", "dst"), [
    (OUTSIDE, HBM), (HBM, OUTSIDE), (OUTSIDE - 4096, HBM), (HBM, OUTSIDE - 4096), (MMIO, HBM), (HBM, 1 << 47),
], ids=["read outside", "write outside", "read over the end", "write over the end", "own registers", "far outside"])
def test_address_without_memory_is_a_fault_and_the_device_lives_on(driver, src, dst):
    assert driver.failed(driver.copy(src, dst, 8192)) == ADDRESS
    assert recovered(driver)


def test_admin_command_with_such_an_address_fails_alone(driver):
    assert driver.command(IDENTIFY, OUTSIDE)[0] == BAD_ADDRESS
    assert driver.command(IDENTIFY, OUTSIDE - 256)[0] == BAD_ADDRESS
    assert driver.command(IDENTIFY, BUFFER)[0] == OK
    assert recovered(driver)


def test_own_device_memory_is_reached_through_the_bus_too(driver):
    """QEMU maps a BAR that is memory into its bus, without a file: peers reach it so, and the device itself."""
    driver.machine.write(PLACES[4] + 4096, b"around the corner")
    driver.done(driver.copy(PLACES[4] + 4096, BUFFER, 17))
    assert driver.machine.read(BUFFER, 17) == b"around the corner"
    driver.done(driver.copy(BUFFER, PLACES[4] + (1 << 20), 17))
    assert driver.machine.read(PLACES[4] + (1 << 20), 17) == b"around the corner"


def test_boot_without_bus_mastering_fails_and_touches_nothing(device):
    device.write(COMMAND, 2, MEMORY_SPACE)
    with QtestDriver(device) as driver:
        driver.machine("memset", driver.base, MEMORY, 0x5A)
        device.write64(0xA0, driver.sq)
        device.write64(0xA8, driver.cq)
        device.write32(0xB0, driver.log2)
        device.write32(0x80, 1)
        assert driver.state(lambda now: now == FAILED) == FAILED
        assert driver.error() == 2
        assert driver.get(driver.base, MEMORY) == b"\x5a" * MEMORY
        device.write32(0x80, 0)
        driver.boot()
        assert driver.command(IDENTIFY, BUFFER)[0] == OK


def test_bus_mastering_that_is_taken_away_stops_dma_and_firmware(driver):
    """The command cannot even be fetched; after the next boot the device works as before."""
    device, before = driver.client, driver.get(driver.base, MEMORY)
    device.write(COMMAND, 2, MEMORY_SPACE)
    driver.post(struct.pack("<HHI7Q", IDENTIFY, 0, 1, BUFFER, *[0] * 6))
    assert driver.state(lambda now: now == FAILED) == FAILED
    after = bytearray(driver.get(driver.base, MEMORY))
    slot = driver.sq - driver.base + 64 * ((driver.tail - 1) % driver.entries)
    after[slot : slot + 64] = before[slot : slot + 64]
    assert bytes(after) == before, "nothing was written"
    device.write(COMMAND, 2, MEMORY_SPACE | BUS_MASTER)
    device.write32(0x80, 0)
    driver.boot().open_queue()
    assert recovered(driver)


def test_bus_mastering_that_is_taken_away_under_a_long_copy(driver):
    """Whatever happens to the copy, nothing hangs, and the device works again afterwards."""
    device = driver.client
    for _ in range(4):
        driver.copy(HBM, BUFFER, 32 << 20)
    device.write(COMMAND, 2, MEMORY_SPACE)
    device.write(COMMAND, 2, MEMORY_SPACE | BUS_MASTER)
    device.write32(0x80, 0)
    assert driver.state(lambda now: now == 0) == 0
    driver.boot().open_queue()
    assert recovered(driver)
