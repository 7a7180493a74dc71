"""What software finds in configuration space, through QEMU: identity, header, capabilities, writable bits."""

import struct

import pytest
from helpers.qtest import Ecam, Machine, vfio_user
from helpers.qtest_device import Device, RootPort

PM, MSIX, EXPRESS, SERIAL = 0x40, 0x50, 0x60, 0x100
"""Where the capabilities lie, in the order of the list."""
FUNCTION_LEVEL_RESET = 1 << 15


@pytest.fixture(scope="module", params=["root complex", "root port"])
def place(request, emulator):
    """The machine with the device on bus 0, where QEMU shows it as integrated endpoint, and on a bus of its own."""
    port = request.param == "root port"
    options = [*RootPort.OPTION, *vfio_user(emulator[1], bus="rp0")] if port else vfio_user(emulator[1])
    with Machine(options) as machine:
        if port:
            RootPort(machine)
        yield machine, (0, 1) if port else (0x10, 0)


@pytest.fixture(scope="module")
def device(place):
    machine, where = place
    return Device(machine, *where)


@pytest.fixture(scope="module")
def integrated(place):
    return place[1][1] == 0


def test_identity_and_class(device):
    assert device.read(0x00, 4) == 0x10F0_1AF4
    assert device.read(0x08, 4) == 0x120000_01
    assert device.read(0x0E, 1) == 0, "header type"
    assert device.read(0x2C, 4) == 0x10F0_1AF4, "subsystem"


def test_every_width_reads_the_same_bytes(device):
    for at in range(0, 0x100, 4):
        word = device.read(at, 4)
        assert [device.read(at + n, 1) for n in range(4)] == list(word.to_bytes(4, "little"))
        assert [device.read(at + n, 2) for n in (0, 2)] == [word & 0xFFFF, word >> 16]


def test_after_power_on_nothing_is_enabled(device):
    assert device.read(0x04, 2) == 0
    assert device.read(0x06, 2) == 1 << 4, "a capability list, and nothing to report"
    assert [device.read(0x10 + 4 * n, 4) for n in range(6)] == [0x4, 0, 0x4, 0, 0xC, 0]
    assert device.read(0x30, 4) == 0, "no ROM"
    assert device.read(0x3D, 1) == 1, "INTA"


def test_capabilities_and_their_order(device):
    assert device.capabilities() == [(0x01, PM), (0x11, MSIX), (0x10, EXPRESS)]


def test_power_management_has_d0_and_d3_and_no_soft_reset(device):
    assert device.read(PM + 2, 2) == 3, "version 3, no D1, no D2, no PME"
    assert device.read(PM + 4, 2) == 1 << 3


def test_msix_has_a_vector_for_the_device_and_one_a_queue(device):
    assert device.read(MSIX + 2, 2) == 65 - 1
    assert device.read(MSIX + 4, 4) == 0x8000 | 0
    assert device.read(MSIX + 8, 4) == 0xC000 | 0


def test_express_capability_is_an_endpoint_with_function_level_reset(device, integrated):
    assert device.read(EXPRESS + 2, 2) == 2 | (9 << 4 if integrated else 0)
    capabilities = device.read(EXPRESS + 4, 4)
    assert capabilities & 1 << 28, "FLR"
    assert capabilities & 7 == 1, "payloads of 256 bytes"
    assert device.read(EXPRESS + 8, 2) == 0x2810


def test_link_is_gen5_by_eight(device, integrated):
    assert device.read(EXPRESS + 0x0C, 4) == (0 if integrated else 8 << 4 | 5)
    assert device.read(EXPRESS + 0x12, 2) == (0 if integrated else 8 << 4 | 5)


def test_serial_number_is_the_one_in_the_register(place, device):
    machine, (devfn, bus) = place
    ecam = Ecam(machine)
    assert ecam.extended(devfn, bus) == [(0x0003, SERIAL)]
    in_config, = struct.unpack("<Q", ecam.read(devfn, SERIAL + 4, 8, bus))
    device.enable()
    assert in_config == device.read64(0x10) != 0
    device.write(4, 2, 0)


WRITABLE = {
    0x04: 0x0546,  # memory space, bus master, parity response, SERR#, interrupt disable; there is no I/O BAR
    0x0C: 0xFF, 0x3C: 0xFF,  # cache line size and interrupt line: for software's notes
    0x10: 0xFFFF0000, 0x14: 0xFFFFFFFF, 0x18: 0xFFF80000, 0x1C: 0xFFFFFFFF, 0x20: 0xC0000000, 0x24: 0xFFFFFFFF,
    PM + 4: 3,
    MSIX: 0xC000_0000,
    # Error reporting, relaxed ordering, payload size, no snoop, read request size. Not: extended tags, phantom
    # functions, auxiliary power, which the capabilities do not offer.
    EXPRESS + 8: 0x78FF,
    EXPRESS + 0x28: 0x10,  # completion timeout disable
}
LINK_WRITABLE = {EXPRESS + 0x10: 0xC3, EXPRESS + 0x30: 0xF}


def test_a_write_changes_the_writable_bits_only(device, integrated):
    writable = WRITABLE if integrated else WRITABLE | LINK_WRITABLE
    for at in range(0, 0x100, 4):
        before = device.read(at, 4)
        device.write(at, 4, 0xFFFFFFFF & ~(FUNCTION_LEVEL_RESET if at == EXPRESS + 8 else 0))
        ones = device.read(at, 4)
        device.write(at, 4, 0)
        zeros = device.read(at, 4)
        device.write(at, 4, before)
        assert ones == before | writable.get(at, 0), f"{at:#x}"
        assert zeros == before & ~writable.get(at, 0), f"{at:#x}"
        assert device.read(at, 4) == before, f"{at:#x}"


def test_byte_writes_reach_their_byte_only(device):
    device.write(0x05, 1, 0xFF)
    assert device.read(0x04, 4) == 0x0010_0500
    device.write(0x04, 1, 0xFF)
    assert device.read(0x04, 4) == 0x0010_0546
    device.write(0x04, 2, 0)
    assert device.read(0x04, 4) == 0x0010_0000


def test_extended_configuration_space_ignores_writes(place, device):
    machine, (devfn, bus) = place
    ecam = Ecam(machine)
    before = ecam.read(devfn, 0x100, 0xF00, bus)
    for at in range(0x100, 0x1000, 4):
        machine.store(ecam.at(devfn, at, bus), 4, 0xFFFFFFFF)
    assert ecam.read(devfn, 0x100, 0xF00, bus) == before
