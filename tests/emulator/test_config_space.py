"""PCI configuration space as software finds it: identity, BAR sizing, the capability chains, FLR, write masks."""

import struct

import pytest
from maia_emulator.config_space import BAR_PREFETCHABLE, ConfigSpace

BARS = {0: (0x10000, 0), 2: (0x80000, 0), 4: (1 << 38, BAR_PREFETCHABLE)}


@pytest.fixture
def resets():
    return []


@pytest.fixture
def masters():
    return []


@pytest.fixture
def config(resets, masters):
    return ConfigSpace(
        vendor_id=0x1AF4, device_id=0x10F0, serial=0x1122334455667788, link_speed=6, bars=BARS, vectors=65, msix_bar=0,
        msix_table=0x8000, msix_pba=0xC000, bus_master=masters.append, flr=lambda: resets.append(1),
    )


def get(config, offset, size):
    return int.from_bytes(config.read(offset, size), "little")


def put(config, offset, size, value):
    config.write(offset, value.to_bytes(size, "little"))


def capability(config, wanted):
    at = get(config, 0x34, 1)
    seen = set()
    while at:
        assert at % 4 == 0
        assert at not in seen
        seen.add(at)
        if get(config, at, 1) == wanted:
            return at
        at = get(config, at + 1, 1)
    raise AssertionError(f"no capability {wanted:#x}")


def test_identity(config):
    assert get(config, 0, 4) == 0x10F01AF4
    assert get(config, 0x2C, 4) == 0x10F01AF4
    assert get(config, 0x09, 3) == 0x120000
    assert get(config, 0x0E, 1) == 0
    assert get(config, 0x06, 2) & 0x10
    assert get(config, 0x3D, 1) == 1
    assert get(config, 0x30, 4) == 0


def test_capability_chain(config):
    chain = []
    at = get(config, 0x34, 1)
    while at:
        chain.append(get(config, at, 1))
        at = get(config, at + 1, 1)
    assert chain == [0x01, 0x11, 0x10]


@pytest.mark.parametrize("index", [0, 2, 4])
def test_bar_sizing(config, index):
    size, flags = BARS[index]
    at = 0x10 + 4 * index
    assert get(config, at, 8) == 4 | flags
    put(config, at, 4, 0xFFFFFFFF)
    put(config, at + 4, 4, 0xFFFFFFFF)
    assert get(config, at, 8) == (1 << 64) - size | 4 | flags
    assert (get(config, at, 8) & ~0xF) + size == 1 << 64
    put(config, at, 4, 0xC000_0000)
    put(config, at + 4, 4, 0x40)
    assert get(config, at, 8) == 0x40_C000_0000 & ~(size - 1) | 4 | flags


def test_header_masks(config):
    before = config.read(0, 64)
    config.write(0, b"\xff" * 0x10)
    config.write(0x28, b"\xff" * 0x18)
    after = config.read(0, 64)
    changed = {i for i in range(64) if before[i] != after[i]}
    assert changed == {0x04, 0x05, 0x0C, 0x3C}
    assert get(config, 4, 2) == 0x0546


def test_bus_master_is_told_once_a_change(config, masters):
    for value in (2, 6, 6, 2, 4):
        put(config, 4, 2, value)
    put(config, 5, 1, 4)
    assert masters == [True, False, True]
    config.reset()
    assert masters == [True, False, True, False]


def test_write_of_each_byte_alone(config):
    """A byte mask, not a dword: neighbours keep their value."""
    put(config, 0x3C, 1, 0x0A)
    put(config, 0x3D, 1, 0xFF)
    assert get(config, 0x3C, 4) == 0x010A
    put(config, 5, 1, 4)
    assert get(config, 4, 2) == 0x0400
    put(config, 4, 1, 6)
    assert get(config, 4, 2) == 0x0406
    assert config.bus_master
    assert config.intx_disabled


def test_power_management(config):
    at = capability(config, 0x01)
    assert get(config, at + 2, 2) & 7 == 3
    assert get(config, at + 4, 2) == 8
    put(config, at + 4, 2, 3)
    assert get(config, at + 4, 2) == 11
    for unsupported in (1, 2):
        put(config, at + 4, 2, unsupported)
        assert get(config, at + 4, 2) == 11
    put(config, at + 4, 2, 0xFFFC)
    assert get(config, at + 4, 2) == 8


def test_msix(config):
    at = capability(config, 0x11)
    assert get(config, at + 2, 2) == 64
    assert get(config, at + 4, 4) == 0x8000
    assert get(config, at + 8, 4) == 0xC000
    config.write(at, b"\xff" * 12)
    assert get(config, at + 2, 2) == 0xC000 | 64
    assert get(config, at + 4, 4) == 0x8000


def test_pcie_endpoint(config):
    at = capability(config, 0x10)
    assert get(config, at + 2, 2) == 2
    assert get(config, at + 4, 4) & 1 << 28
    assert get(config, at + 0x0C, 4) & 0x3FF == 8 << 4 | 6
    assert get(config, at + 0x12, 2) == 8 << 4 | 6
    assert get(config, at + 0x2C, 4) == 0x7E


def test_flr_is_called_once_and_reads_as_zero(config, resets):
    at = capability(config, 0x10) + 8
    put(config, at, 2, get(config, at, 2) | 0x8000)
    assert resets == [1]
    assert not get(config, at, 2) & 0x8000
    put(config, at + 1, 1, 0x80)
    assert resets == [1, 1]
    put(config, at, 1, 0xFF)
    put(config, at, 2, 0x7FFF)
    put(config, at + 2, 2, 0x8000)
    assert resets == [1, 1]


def test_serial_number(config):
    assert get(config, 0x100, 4) == 0x00010003
    assert get(config, 0x104, 8) == 0x1122334455667788
    config.write(0x104, bytes(8))
    assert get(config, 0x104, 8) == 0x1122334455667788


def test_reset_restores_every_byte(config):
    before = config.read(0, 4096)
    for offset in range(0, 4096, 4):
        if offset != 0x68:
            config.write(offset, struct.pack("<I", 0xFFFFFFFF))
    assert config.read(0, 4096) != before
    config.reset()
    assert config.read(0, 4096) == before


def test_bytes_without_meaning_stay_zero(config):
    for offset in [*range(0xC0, 0x100), *range(0x10C, 0x1000)]:
        config.write(offset, b"\xff")
    assert config.read(0xC0, 0x40) == bytes(0x40)
    assert config.read(0x10C, 0x1000 - 0x10C) == bytes(0x1000 - 0x10C)
