"""Register accesses by kind (contract, section 4), in the register file and through the socket's fast path."""

import struct

import pytest
from helpers.raw_client import BAR0, RawClient
from maia_emulator.register_file import RegisterFile

from maia_rt.contract.register import Field, Register
from maia_rt.contract.registers import BAR0 as TABLE

TOY = {
    r.name: r for r in (
        Register("RO", 0x00, 32, (Field("A", 0, 32, "ro", 0x1234, None, ""),), ""),
        Register("MIXED", 0x04, 32, (
            Field("RW", 0, 8, "rw", 0x11, None, ""), Field("RO", 8, 8, "ro", 0x22, None, ""),
            Field("W1C", 16, 8, "w1c", 0, None, ""), Field("PULSE", 24, 1, "pulse", 0, None, "")), ""),
        Register("WIDE", 0x08, 64, (Field("A", 0, 64, "rw", 0, None, ""),), ""),
        Register("COUNTER", 0x10, 64, (Field("A", 0, 64, "ro", 0, None, ""),), ""),
        Register("ACT", 0x18, 64, (Field("A", 0, 64, "wo", 0, None, ""),), ""),
    )
}


@pytest.fixture
def registers():
    return RegisterFile({}, TOY)


def get(registers, offset, size=4):
    return int.from_bytes(registers.read(offset, size), "little")


def put(registers, offset, value, size=4):
    registers.write(offset, value.to_bytes(size, "little"))


def test_reset_values_and_read_only(registers):
    assert get(registers, 0) == 0x1234
    put(registers, 0, 0xFFFFFFFF)
    assert get(registers, 0) == 0x1234
    assert get(registers, 4) == 0x2211


def test_mixed_kinds_in_one_register(registers):
    seen = []
    registers.on_write("MIXED", lambda written, before: seen.append((written, before)))
    registers.store("MIXED", 0x00FF2211)
    put(registers, 4, 0x010F0033)
    assert get(registers, 4) == 0x00F02233
    assert seen == [(0x010F0033, 0x11)]
    put(registers, 4, 0xFFFFFFFF)
    assert get(registers, 4) == 0x000022FF
    assert seen[-1] == (0x01FF00FF, 0x33)


def test_wide_register_by_halves(registers):
    put(registers, 8, 0x1122334455667788, 8)
    assert get(registers, 8) == 0x55667788
    assert get(registers, 12) == 0x11223344
    put(registers, 12, 0xAABBCCDD)
    assert get(registers, 8, 8) == 0xAABBCCDD55667788
    put(registers, 8, 0)
    assert get(registers, 8, 8) == 0xAABBCCDD00000000


def test_low_half_of_a_counter_latches_the_high_half(registers):
    values = iter([0x1_FFFFFFFF, 0x2_00000000, 0x5_00000001])
    registers.on_read("COUNTER", lambda: next(values))
    assert get(registers, 0x10) == 0xFFFFFFFF
    assert get(registers, 0x14) == 1
    assert get(registers, 0x14) == 1
    assert get(registers, 0x10, 8) == 0x2_00000000
    assert get(registers, 0x10) == 1
    assert get(registers, 0x14) == 5


def test_register_that_acts_is_written_as_a_whole(registers):
    seen = []
    registers.on_write("ACT", lambda written, _: seen.append(written))
    put(registers, 0x18, 1)
    put(registers, 0x1C, 1)
    assert seen == []
    put(registers, 0x18, 0x1_00000002, 8)
    assert seen == [0x1_00000002]
    assert get(registers, 0x18, 8) == 0


@pytest.mark.parametrize(("offset", "size"), [
    (0, 1), (0, 2), (2, 2), (1, 4), (2, 4), (0, 8), (4, 8), (0, 3), (0, 16), (0x20, 4), (0xFFC, 4), (0x14, 8),
])
def test_other_accesses_read_as_zero_and_are_ignored(registers, offset, size):
    before = [registers.load(name) for name in TOY]
    assert registers.read(offset, size) == bytes(size)
    registers.write(offset, b"\xff" * size)
    assert [registers.load(name) for name in TOY] == before


def test_reset_keeps_constants():
    registers = RegisterFile({"RO": 77}, TOY)
    registers.store("WIDE", 5)
    registers.reset()
    assert get(registers, 0) == 77
    assert get(registers, 8, 8) == 0


def test_constants_are_of_registers_that_exist():
    with pytest.raises(ValueError, match="NONE"):
        RegisterFile({"NONE": 1}, TOY)


# --- the contract's registers, through the socket --------------------------------------------------------------------


@pytest.fixture
def client(emulator):
    with RawClient(emulator[1]) as connected:
        yield connected


VOLATILE = {"CLOCK", "HEARTBEAT"}


# What writing ones to these starts is in test_firmware.py.
STARTING = {"CONTROL", "ADMIN_TAIL"}


@pytest.mark.parametrize("register", [r for r in TABLE.values() if r.name not in STARTING], ids=lambda r: r.name)
def test_every_register_obeys_its_access_kinds(client, register):
    """Through the fast path where it applies: writes of ones change the rw bits and nothing else."""
    read = client.read64 if register.width_bytes == 8 else client.read32
    write = client.write64 if register.width_bytes == 8 else client.write32
    before = read(register.offset)
    assert before & register.mask("wo", "pulse") == 0
    assert before >> register.width_bits == 0
    write(register.offset, (1 << register.width_bits) - 1)
    after = read(register.offset)
    if register.name not in VOLATILE:
        assert after == before | register.mask("rw")
    if register.width_bytes == 8 and register.name != "CLOCK":
        assert client.read32(register.offset) == after & 0xFFFFFFFF
        assert client.read32(register.offset + 4) == after >> 32


def test_identity(client):
    assert client.read(BAR0, 0, 4) == b"MAIA"
    assert client.read32(4) == 1 << 16 | 2
    assert client.read32(0x38) == 48
    assert client.read64(0x40) == 1 << 48
    assert client.read32(0x20) == 64 | 16 << 16 | 2 << 24
    assert client.read32(0x24) == 1024 | 2 << 16 | 2 << 20
    assert client.read32(0x34) == 64 * 4096


def test_serial_is_the_capabilitys(client):
    assert client.read64(0x10) == client.read64(0x104, region=7)


def test_clock_is_monotonic_in_both_widths(client):
    last = 0
    for _ in range(50):
        low, high = client.read32(0x90), client.read32(0x94)
        now = high << 32 | low
        assert last < now < client.read64(0x90)
        last = now


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (0, 8), (2, 4), (1, 4), (0xCC, 8), (0xD0, 4), (0x7FF8, 8),
                                             (0, 64), (0xFFC, 8), (0x1000, 4)])
def test_other_accesses_read_as_zero(client, offset, size):
    assert client.read(BAR0, offset, size) == bytes(size)
    client.write(BAR0, offset, b"\xff" * size)
    assert client.read(BAR0, 0, 4) == b"MAIA"
    assert client.read32(0xCC) == 0


def test_semaphores_by_register(client):
    window = client.read32(0x34)

    def operate(index, op, value):
        client.write64(0xC0, index | op << 16 | value << 32)

    operate(100, 1, 5)
    operate(100, 2, 0xFFFFFFFF)
    assert client.read32(window + 400, region=2) == 4
    operate(100, 3, 9)
    operate(100, 0, 9)
    operate(5, 1, 9)
    operate(1024, 1, 9)
    operate(65535, 1, 9)
    client.write32(0xC0, 100 | 1 << 16)
    client.write32(0xC4, 9)
    assert client.read32(window + 400, region=2) == 4
    assert client.read32(window + 20, region=2) == 0


def test_msix_table_is_memory_and_masked_after_reset(client):
    assert client.read(BAR0, 0x8000 + 16 * 64, 16) == bytes(12) + b"\1\0\0\0"
    client.write(BAR0, 0x8000, struct.pack("<QII", 0xFEE00000, 0x4021, 0))
    assert client.read(BAR0, 0x8000, 16) == struct.pack("<QII", 0xFEE00000, 0x4021, 0)
    client.write(BAR0, 0x8000 + 16 * 65, b"\xff" * 16)
    assert client.read(BAR0, 0x8000 + 16 * 65, 16) == bytes(16)
    client.write(BAR0, 0x8000 + 16 * 64 + 8, b"\xff" * 16)
    assert client.read(BAR0, 0x8000 + 16 * 64 + 8, 16) == b"\xff" * 8 + bytes(8)


def test_pending_bits_are_read_only(client):
    client.write(BAR0, 0xC000, b"\xff" * 16)
    assert client.read(BAR0, 0xC000, 16) == bytes(16)
