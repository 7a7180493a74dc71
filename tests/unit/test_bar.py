"""Registers of a BAR: mapped where it can be, one access each, and refused with the BAR's own offsets."""

import os
import signal
import struct

import pytest
from helpers.emulator import running
from helpers.scripted_server import Device, Region, playing, until_closed

from maia_rt.contract.registers import BAR0, Bar0
from maia_rt.errors import (
    ClosedError,
    DeviceLost,
    DeviceTimeout,
    ForkedError,
    InvalidArgument,
    Unsupported,
)
from maia_rt.transport import Bar, open_device
from maia_rt.transport.vfio_user import VfioUserClient

WIDTHS = (8, 16, 32, 64)
PAGE = 4096
READ_WRITE, MAPPED = 3, 7


@pytest.fixture
def device(emulator):
    with open_device(emulator[1]) as opened:
        yield opened


def test_registers_that_cannot_be_mapped_are_reached_through_the_transport(device):
    with Bar(device, 0) as registers:
        assert "0x0 mapped" in repr(registers)
        assert registers.size == device.region(0).size
        assert registers.read32(Bar0.ID) == BAR0["ID"].reset
        registers.write32(Bar0.SCRATCH, 0x89ABCDEF)
        assert registers.read32(Bar0.SCRATCH) == device.read(0, Bar0.SCRATCH, 4) == 0x89ABCDEF


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_reads_what_was_written_mapped_and_trapped(device, bits, mapped):
    value = 0x8877665544332211 & (1 << bits) - 1
    with Bar(device, 4, mapped=mapped) as memory:
        assert ("0x0 mapped" in repr(memory)) is not mapped
        memory.write64(64, 0)
        getattr(memory, f"write{bits}")(64, value)
        assert getattr(memory, f"read{bits}")(64) == value
        assert memory.read64(64) == value
        assert device.read(4, 64, 8) == value


@pytest.mark.parametrize("index", [0, 4])
def test_misaligned_and_outside_accesses_are_refused_alike(device, index):
    with Bar(device, index) as bar:
        for bits in WIDTHS[1:]:
            with pytest.raises(InvalidArgument, match=f"BAR {index}: .* not aligned"):
                getattr(bar, f"read{bits}")(PAGE + 1)
            with pytest.raises(InvalidArgument, match="not aligned"):
                getattr(bar, f"write{bits}")(PAGE - 1, 0)
        for offset in (bar.size, -8, 1 << 70):
            with pytest.raises(InvalidArgument, match="not within"):
                bar.read64(offset)
            with pytest.raises(InvalidArgument, match="not within"):
                bar.write8(offset, 0)
        with pytest.raises(InvalidArgument, match="does not fit"):
            bar.write32(0, 1 << 32)
        with pytest.raises(TypeError):
            bar.read32("0")


def test_a_bar_that_is_not_there_is_refused_with_those_that_are(device):
    with pytest.raises(Unsupported, match=r"no BAR 1\. Likely cause: it has BAR 0, 2, 4"):
        Bar(device, 1)
    with pytest.raises(InvalidArgument, match="no region 77"):
        Bar(device, 77)


def test_a_closed_bar_refuses_and_holds_no_mapping(device):
    for index in (0, 2):
        bar = Bar(device, index)
        bar.close()
        bar.close()
        assert bar.closed
        assert "closed" in repr(bar)
        with pytest.raises(ClosedError, match=f"BAR {index} has been closed"):
            bar.read32(0)
        with pytest.raises(ClosedError):
            bar.write32(0, 0)
        with pytest.raises(ClosedError):
            bar.poll32(0, mask=1, value=0, timeout=0)


def test_a_device_closes_without_a_word_after_its_bars(emulator, caplog):
    with open_device(emulator[1]) as device, Bar(device, 2), Bar(device, 4):
        pass
    assert not caplog.records


def test_a_forked_child_is_refused_mapped_and_trapped(device):
    with Bar(device, 0) as trapped, Bar(device, 4) as mapped:
        child = os.fork()
        if child == 0:
            refused = 0
            for bar in (trapped, mapped):
                try:
                    bar.read32(0)
                except ForkedError:
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


def test_polling_returns_the_whole_register(device):
    with Bar(device, 0) as registers:
        registers.write32(Bar0.SCRATCH, 0xF5)
        assert registers.poll32(Bar0.SCRATCH, mask=0xF, value=5, timeout=0) == 0xF5


def test_polling_ends_with_what_the_register_reads(device):
    with Bar(device, 0) as registers:
        registers.write32(Bar0.SCRATCH, 0xF4)
        with pytest.raises(DeviceTimeout, match=r"BAR 0: SCRATCH, the register at 0xcc, reads 0xf4 after 0\.02 s"):
            registers.poll32(Bar0.SCRATCH, mask=1, value=1, timeout=0.02, what="SCRATCH")
        with pytest.raises(InvalidArgument, match="never"):
            registers.poll32(Bar0.SCRATCH, mask=1, value=2, timeout=1)


def test_all_ones_in_a_living_device_are_a_value(device):
    with Bar(device, 0) as registers:
        registers.write32(Bar0.SCRATCH, 0xFFFFFFFF)
        assert registers.poll32(Bar0.SCRATCH, mask=1, value=1, timeout=0) == 0xFFFFFFFF
        registers.check_alive()


def test_a_server_that_died_is_found_by_polling():
    with running() as (process, paths), open_device(paths[0]) as device, Bar(device, 0) as registers:
        process.send_signal(signal.SIGTERM)
        with pytest.raises(DeviceLost):
            while True:
                registers.poll32(Bar0.ID, mask=0, value=0, timeout=1)


# --- a device with a hole in its mappable area, played ---------------------------------------------------------------

REGION_READ, REGION_WRITE = 9, 10


def test_the_hole_between_two_mapped_areas_is_trapped_and_offsets_are_the_bars():
    fd = os.memfd_create("bar")
    os.ftruncate(fd, 3 * PAGE)
    regions = [Region(3 * PAGE, MAPPED, fd, areas=[(0, PAGE), (2 * PAGE, PAGE)])]
    trapped = []

    def script(peer):
        Device(regions=regions).handshake(peer)
        while True:
            try:
                request = peer.request()
            except EOFError:
                return
            offset, _, count = struct.unpack_from("<QII", request.body)
            trapped.append((request.command, offset, count))
            peer.reply(request, request.body[:16] + (b"\x5a" * count if request.command == REGION_READ else b""))

    try:
        with playing(script) as sock, VfioUserClient.from_socket(sock) as device, Bar(device, 0) as bar:
            bar.write32(0, 1)
            bar.write32(2 * PAGE, 3)
            bar.write16(3 * PAGE - 2, 4)
            assert bar.read16(3 * PAGE - 2) == 4
            assert not trapped
            assert bar.read64(PAGE) == 0x5A5A5A5A5A5A5A5A
            bar.write8(2 * PAGE - 1, 9)
            with pytest.raises(InvalidArgument, match="at 0x2002 are not aligned"):
                bar.read32(2 * PAGE + 2)
        assert os.pread(fd, 4, 0) == b"\1\0\0\0"
        assert os.pread(fd, 4, 2 * PAGE) == b"\3\0\0\0"
        assert os.pread(fd, 2, 3 * PAGE - 2) == b"\4\0"
        assert trapped == [(REGION_READ, PAGE, 8), (REGION_WRITE, 2 * PAGE - 1, 1)]
    finally:
        os.close(fd)


def test_all_ones_everywhere_is_a_lost_device():
    def script(peer):
        Device(flags=3, regions=[Region(PAGE, READ_WRITE)] + [Region()] * 6 + [Region(256, READ_WRITE)]).handshake(peer)
        for _ in range(2):
            request = peer.request(REGION_READ)
            count = struct.unpack_from("<QII", request.body)[2]
            peer.reply(request, request.body[:16] + b"\xff" * count)
        until_closed(peer)

    with playing(script) as sock, VfioUserClient.from_socket(sock) as device, Bar(device, 0) as bar, \
            pytest.raises(DeviceLost, match="all ones, configuration space too"):
        bar.poll32(0x1C, mask=1, value=1, timeout=5)
