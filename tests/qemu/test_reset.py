"""Resets through QEMU: function level reset, CONTROL.RESET, and the whole machine's."""

import struct
import time

import pytest
from helpers.admin_queue import IDENTIFY, MEMORY
from helpers.emulator import eventually
from helpers.qtest_device import COMMAND, MSIX_TABLE, PLACES, QtestDriver
from helpers.stopwatch import promptly

NOP, COPY = 1, 2
HBM = 1 << 48
STATUS, ERRORS, SCRATCH, SEMAPHORE_OP = 0x84, 0x8C, 0xCC, 0xC0
RESET_SECONDS = 0.1
"""The contract's limit for hardware. QEMU and the test add to what is measured here, and so does a busy machine."""


def function_level_reset(device):
    device.reset()


def register_reset(device):
    device.write32(0x80, 2)


def machine_reset(device):
    device.machine.qmp("system_reset")
    device.machine.qmp.wait("RESET")


ANY_RESET = pytest.mark.parametrize("reset", [function_level_reset, register_reset, machine_reset])


def busy(driver):
    """Leave nothing as it was after power-on, and a command that waits for ever."""
    device = driver.client
    device.write32(SCRATCH, 77)
    device.write64(0, 0x1122334455667788, region=4)
    device.write64(SEMAPHORE_OP, 100 | 1 << 16 | 9 << 32)
    driver.boot().open_queue(vector=5)
    waits = struct.pack("<HBBI", 101, 1, 0, 1) + bytes(8)
    driver.submit(NOP, pre=waits)
    driver.submit(NOP)
    assert driver.progress()[0] == 0


@ANY_RESET
def test_everything_is_as_after_power_on(device, reset):
    with QtestDriver(device) as driver:
        constants = {at: device.read64(at) for at in range(0, 0x68, 8)}
        after_power_on = {at: device.read32(at) for at in range(0x80, 0x90, 4)}
        busy(driver)
        reset(device)
        device.enable()
        assert {at: device.read64(at) for at in range(0, 0x68, 8)} == constants
        assert {at: device.read32(at) for at in range(0x80, 0x90, 4)} == after_power_on
        assert [device.read32(at) for at in (0xA0, 0xA8, 0xB0, 0xB4, 0xB8, SCRATCH)] == [0] * 6
        assert device.read64(0, region=4) == 0
        window = device.read32(0x34)
        assert device.machine.read(PLACES[2], 0x100) == bytes(0x100), "doorbells"
        assert device.machine.read(PLACES[2] + window, 0x400) == bytes(0x400), "semaphores"


@ANY_RESET
def test_what_was_in_flight_is_dropped_and_the_device_boots_again(device, reset):
    with QtestDriver(device) as driver:
        busy(driver)
        reset(device)
        device.enable()
        before = driver.get(driver.base, MEMORY)
        device.write64(SEMAPHORE_OP, 101 | 1 << 16 | 1 << 32)  # what the command waited for
        time.sleep(0.1)
        assert driver.get(driver.base, MEMORY) == before, "the device wrote to memory of a driver that is gone"
        driver.machine("memset", driver.base, MEMORY, 0)
        driver.boot().open_queue()
        driver.machine.write(0x40_0000, b"again")
        driver.done(driver.copy(0x40_0000, HBM, 5))
        assert driver.machine.read(PLACES[4], 5) == b"again"


@ANY_RESET
def test_reset_under_a_long_copy_ends_it_soon(device, reset):
    with QtestDriver(device) as driver:
        driver.boot().open_queue()
        for _ in range(8):
            driver.copy(HBM, HBM + (256 << 20), 256 << 20)
        start = time.monotonic()
        reset(device)
        assert device.read(0, 4) == 0x10F0_1AF4
        promptly(start, RESET_SECONDS + 0.9)
        device.enable()
        assert device.read32(STATUS) == 0
        before = driver.get(driver.base, MEMORY)
        time.sleep(0.1)
        assert driver.get(driver.base, MEMORY) == before


def test_function_level_reset_returns_configuration_space(mapped_device):
    device = mapped_device
    device.write(0x3C, 1, 11)
    device.write(0x0C, 1, 16)
    device.reset()
    assert device.read(COMMAND, 2) == 0
    assert device.read(0x3C, 1) == 0
    assert device.read(0x0C, 1) == 0
    assert device.read(device.express + 8, 2) == 0x2810, "and the bit that starts it reads as 0"
    assert device.read(device.capability(0x01) + 4, 2) == 8


def test_register_reset_leaves_configuration_space(mapped_device):
    device = mapped_device
    device.write(0x3C, 1, 11)
    register_reset(device)
    assert device.read(COMMAND, 2) == 6
    assert device.read(0x3C, 1) == 11
    assert device.alive()


@ANY_RESET
def test_interrupts_work_again_after_a_reset(mapped_device, reset):
    device = mapped_device
    for _ in range(2):
        device.enable()
        device.set_msix()
        device.set_vector(0, 0x1000, 0xABCD)
        with QtestDriver(device) as driver:
            driver.boot()
            assert driver.command(IDENTIFY, 0x40_0000)[0] == 0
            assert eventually(lambda: device.machine.load(0x1000, 4)) == 0xABCD
        reset(device)
        device.machine.store(0x1000, 4, 0)
        time.sleep(0.1)
        assert device.machine.load(0x1000, 4) == 0, "an interrupt of before the reset"


def test_masked_and_disabled_after_the_machines_reset(mapped_device):
    device = mapped_device
    device.set_msix()
    device.set_vector(3, 0x1000, 1)
    machine_reset(device)
    assert device.read(device.msix + 2, 2) == 64
    device.enable()
    assert device.read32(MSIX_TABLE + 3 * 16 + 12) == 1


def test_ten_resets_in_a_row(mapped_device):
    device = mapped_device
    for number in range(10):
        (function_level_reset, machine_reset)[number % 2](device)
        device.enable()
        assert device.alive()
        with QtestDriver(device) as driver:
            driver.boot()
            assert driver.command(IDENTIFY, 0x40_0000)[0] == 0


def test_reset_in_d3_and_flr_bit_written_with_other_bits(mapped_device):
    device = mapped_device
    device.write(device.capability(0x01) + 4, 2, 3)
    device.write(device.express + 8, 2, 0xFFFF)
    assert device.read(device.express + 8, 2) == 0x2810
    power = device.capability(0x01) + 4
    assert device.read(power, 2) & 3 == 0
    device.write(power, 2, 0)  # QEMU has a power state of its own, which only a write brings back
    device.enable()
    assert device.alive()
