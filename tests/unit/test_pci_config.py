"""Configuration space is decoded as the specifications lay it out, and broken chains end instead of looping."""

import logging
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maia_rt.errors import DeviceLost
from maia_rt.pci import config


class Space:
    """4096 bytes with a reader, filled field by field."""

    def __init__(self, size=4096):
        self.bytes = bytearray(size)
        self.reads = 0
        self.writes = []

    def put(self, offset, size, value):
        self.bytes[offset:offset + size] = value.to_bytes(size, "little")

    def read(self, offset, size):
        self.reads += 1
        assert offset % size == 0
        assert offset + size <= len(self.bytes)
        return int.from_bytes(self.bytes[offset:offset + size], "little")

    def write(self, offset, size, value):
        self.writes.append((offset, size, value))
        self.put(offset, size, value)


@pytest.fixture
def endpoint():
    """PM at 0x40, MSI at 0x50, MSI-X at 0x70, PCI Express at 0x80, vendor at 0xC0; serial at 0x100, vendor at 0x110."""
    space = Space()
    for offset, size, value in [
        (0x00, 2, 0x1AF4), (0x02, 2, 0x10F0), (0x04, 2, 0x0407), (0x06, 2, 0x0010), (0x08, 4, 0x12000003),
        (0x0E, 1, 0x80), (0x10, 4, 0xFEB0000C), (0x14, 4, 0x00000038), (0x18, 4, 0xE001), (0x2C, 2, 0x1234),
        (0x2E, 2, 0x5678), (0x34, 1, 0x40), (0x3D, 1, 1),
        (0x40, 2, 0x5001), (0x42, 2, 0x0003), (0x44, 2, 0x000B),
        (0x50, 2, 0x7005), (0x52, 2, 0x018B),
        (0x70, 2, 0x8011), (0x72, 2, 0x8040), (0x74, 4, 0x00008000), (0x78, 4, 0x0000C002),
        (0x80, 2, 0xC010), (0x82, 2, 0x0002), (0x84, 4, 0x10000002), (0x88, 2, 0x2810), (0x8C, 4, 0x00000085),
        (0x92, 2, 0x0084),
        (0xC0, 2, 0x0009), (0xC2, 1, 8), (0xC3, 1, 0xAA), (0xC4, 4, 0x44332211),
        (0x100, 4, 0x11010003), (0x104, 4, 0x89ABCDEF), (0x108, 4, 0x01234567),
        (0x110, 4, 0x0001000B),
    ]:
        space.put(offset, size, value)
    return space


def test_the_header(endpoint):
    header = config.read_header(endpoint.read)
    assert (header.vendor, header.device, header.command, header.status) == (0x1AF4, 0x10F0, 0x0407, 0x0010)
    assert (header.class_code, header.revision) == (0x120000, 3)
    assert (header.header_type, header.multifunction, header.interrupt_pin) == (0, True, 1)
    assert (header.subsystem_vendor, header.subsystem) == (0x1234, 0x5678)
    assert header.bars == (0xFEB0000C, 0x38, 0xE001, 0, 0, 0)


def test_a_bridge_has_two_bars_and_no_subsystem(endpoint):
    endpoint.put(0x0E, 1, 1)
    header = config.read_header(endpoint.read)
    assert (len(header.bars), header.subsystem, header.multifunction) == (2, 0, False)


def test_all_ones_are_a_lost_device():
    space = Space()
    space.bytes[:] = b"\xff" * 4096
    with pytest.raises(DeviceLost, match="all ones"):
        config.read_header(space.read)


def test_both_chains_are_walked(endpoint):
    assert [(cap.id, cap.offset) for cap in config.capabilities(endpoint.read)] == [
        (1, 0x40), (5, 0x50), (0x11, 0x70), (0x10, 0x80), (9, 0xC0)]
    assert [(cap.id, cap.offset, cap.version) for cap in config.extended_capabilities(endpoint.read)] == [
        (3, 0x100, 1), (0xB, 0x110, 1)]
    assert config.find(endpoint.read, config.CapabilityId.MSIX) == 0x70
    assert config.find_extended(endpoint.read, config.ExtendedId.AER) is None


def test_the_common_capabilities(endpoint):
    read = endpoint.read
    assert config.power_management(read) == config.PowerManagement(0x40, 3, 3, True)
    assert config.msi(read) == config.Msi(0x50, 32, True, True, True)
    assert config.msix(read) == config.MsiX(0x70, 65, True, False, 0, 0x8000, 2, 0xC000)
    assert config.pci_express(read) == config.PciExpress(
        offset=0x80, version=2, port_type=0, can_flr=True, max_payload=128, max_payload_supported=512,
        max_read_request=512, link_speed=4, link_width=8, max_link_speed=5, max_link_width=8)
    assert config.serial_number(read) == 0x0123456789ABCDEF
    assert config.vendor_specific(read) == [bytes.fromhex("090008aa11223344")]


def test_a_function_without_capabilities_has_none(endpoint):
    endpoint.put(0x06, 2, 0)
    endpoint.put(0x100, 4, 0)
    assert config.capabilities(endpoint.read) == config.extended_capabilities(endpoint.read) == ()
    for decode in (config.power_management, config.msi, config.msix, config.pci_express, config.serial_number):
        assert decode(endpoint.read) is None
    assert config.vendor_specific(endpoint.read) == []


def test_256_bytes_have_no_extended_capabilities():
    assert config.extended_capabilities(Space(256).read, 256) == ()


@pytest.mark.parametrize(("at", "link"), [(0x41, 0x40), (0x51, 0x40), (0x51, 0x04), (0xC1, 0x70)])
def test_a_chain_that_leads_back_or_into_the_header_ends_with_a_warning(endpoint, at, link, caplog):
    endpoint.put(at, 1, link)
    found = config.capabilities(endpoint.read)
    assert 1 <= len(found) <= 5
    assert "broken" in caplog.text


def test_an_extended_chain_that_leads_back_or_out_ends_with_a_warning(endpoint, caplog):
    for link in (0x100, 0x110, 0x0FC, 0x004):
        caplog.clear()
        endpoint.put(0x110, 4, link << 20 | 0x1000B)
        assert len(config.extended_capabilities(endpoint.read)) == 2
        assert "broken" in caplog.text


def test_a_null_capability_carries_only_the_link(endpoint):
    endpoint.put(0x100, 4, 0x11000000)
    assert [cap.offset for cap in config.extended_capabilities(endpoint.read)] == [0x110]


@given(st.integers(0, 1 << 32))
def test_no_bytes_make_a_walk_endless_or_leave_the_space(seed):
    logging.disable()
    try:
        space = Space()
        space.bytes[:] = random.Random(seed).randbytes(4096)
        space.put(0x06, 2, 0x10)
        config.capabilities(space.read)
        config.extended_capabilities(space.read)
        assert space.reads < 2000
        config.vendor_specific(space.read)
    finally:
        logging.disable(logging.NOTSET)


def test_bus_mastering_and_memory_space_change_only_their_bit(endpoint):
    config.set_bus_master(endpoint.read, endpoint.write, False)
    config.set_bus_master(endpoint.read, endpoint.write, False)
    config.set_memory_space(endpoint.read, endpoint.write, False)
    config.set_bus_master(endpoint.read, endpoint.write, True)
    assert endpoint.writes == [(4, 2, 0x0403), (4, 2, 0x0401), (4, 2, 0x0405)]
