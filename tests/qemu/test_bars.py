"""BARs through QEMU: their sizes, what they decode, and that mapped ones are the device's own memory."""

import struct

import pytest
from helpers.qtest import MMIO
from helpers.qtest_device import BUS_MASTER, MEMORY_SPACE, PLACES

SCRATCH, SEMAPHORE_OP = 0xCC, 0xC0


@pytest.mark.parametrize(("profile", "hbm_bar"), [("small", 1 << 30), ("maia100", 64 << 30), ("maia200", 256 << 30)])
def test_sizes_of_each_profile(attach, profile, hbm_bar):
    device = attach("--profile", profile)
    all_ones = (1 << 64) - 1
    assert device.sized(0) == all_ones & -0x10000 | 0x4, "64-bit"
    assert device.sized(2) == all_ones & -0x80000 | 0x4
    assert device.sized(4) == all_ones & -hbm_bar | 0xC, "64-bit, prefetchable"


def test_nothing_answers_before_memory_space_is_enabled(attach):
    device = attach().enable(command=0)
    assert device.read32(0) == 0, "QEMU's answer where no device is"
    device.write(4, 2, MEMORY_SPACE)
    assert device.alive()
    device.write32(SCRATCH, 0x1234)
    device.write(4, 2, BUS_MASTER)
    device.write32(SCRATCH, 0x5678)
    assert device.read32(0) == 0
    device.write(4, 2, MEMORY_SPACE)
    assert device.read32(SCRATCH) == 0x1234


def test_registers_follow_their_bar(mapped_device):
    device = mapped_device
    elsewhere = MMIO + 0x200_0000
    device.write32(SCRATCH, 77)
    device.place(0, elsewhere)
    assert device.machine.load(elsewhere, 4) == 0x4149414D
    assert device.machine.load(elsewhere + SCRATCH, 4) == 77
    assert device.read32(0) == 0
    above_4g = 0x40_0000_0000
    device.place(0, above_4g)
    assert device.machine.load(above_4g + SCRATCH, 4) == 77


@pytest.mark.parametrize(("size", "expected"), [(1, 0), (2, 0), (4, 0x4149414D), (8, 0)])
def test_accesses_of_every_width(mapped_device, size, expected):
    """ID is a register of four bytes; QEMU passes an access on as it comes."""
    assert mapped_device.machine.load(MMIO, size) == expected
    serial = mapped_device.machine.load(MMIO + 0x10, 8)
    assert serial == mapped_device.read32(0x10) | mapped_device.read32(0x14) << 32


def test_semaphores_written_by_register_are_seen_in_the_mapped_window(mapped_device):
    device = mapped_device
    window = device.read32(0x34)
    last = (device.read32(0x24) & 0xFFFF) - 1
    for index, value in ((last, 0xCAFE), (100, 7)):
        device.write64(SEMAPHORE_OP, index | 1 << 16 | value << 32)
        assert device.read32(window + 4 * index, region=2) == value
    device.write64(SEMAPHORE_OP, 100 | 2 << 16 | 5 << 32)
    assert device.read32(window + 400, region=2) == 12


def test_device_memory_keeps_what_was_stored_until_reset(mapped_device):
    device = mapped_device
    size = device.read64(0x48)
    for at in (0, 4096, size - 16):
        device.machine.write(PLACES[4] + at, struct.pack("<QQ", at, ~at & (1 << 64) - 1))
    for at in (0, 4096, size - 16):
        assert device.read64(at, region=4) == at
        assert device.read64(at + 8, region=4) == ~at & (1 << 64) - 1
    device.write32(0x80, 2)  # CONTROL.RESET
    for at in (0, 4096, size - 16):
        assert device.machine.read(PLACES[4] + at, 16) == bytes(16)


def test_bar_that_is_larger_than_its_memory_reads_zero_beyond_it(attach):
    device = attach("--profile", "maia200").enable()
    size = device.read64(0x48)
    assert size == 216 << 30
    device.write64(size - 8, 0x1122334455667788, region=4)
    device.write64(size, 0x1122334455667788, region=4)
    assert device.read64(size - 8, region=4) == 0x1122334455667788
    assert device.read64(size, region=4) == 0
    assert device.read64((256 << 30) - 8, region=4) == 0


def test_d3_and_back_loses_nothing(mapped_device):
    device = mapped_device
    control = device.capability(0x01) + 4
    device.write32(SCRATCH, 99)
    device.write64(0, 42, region=4)
    device.write(control, 2, 3)
    assert device.read(control, 2) & 3 == 3
    assert device.read32(0) == 0, "a function in D3hot answers configuration cycles only"
    device.write(control, 2, 0)
    assert device.read(control, 2) & 3 == 0
    assert device.read32(SCRATCH) == 99
    assert device.read64(0, region=4) == 42
