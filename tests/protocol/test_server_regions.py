"""What the server says about device and regions, and reads and writes of them (vfio-user: sections 6, 7, 8, 10, 12)."""

import errno
import mmap
import os
import struct

import pytest
from helpers.emulator import fd_count
from helpers.raw_client import (
    BAR0,
    BAR2,
    BAR4,
    CONFIG,
    DEVICE_RESET,
    GET_INFO,
    GET_REGION_INFO,
    GET_REGION_IO_FDS,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    ROM,
    VGA,
    WRITE_MULTI,
    RawClient,
    access,
    close,
    region_info,
)

SCRATCH = 0xCC
HBM = 1 << 30


@pytest.fixture
def client(emulator):
    with RawClient(emulator[1]) as connected:
        yield connected


def info(argsz=16):
    return struct.pack("<IIII", argsz, 0, 0, 0)


# --- GET_INFO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [info(), info(32), info(32) + bytes(16)])
def test_device_is_pci_with_reset_9_regions_5_interrupts(client, body):
    assert client.call(GET_INFO, body).body == struct.pack("<IIII", 16, 3, 9, 5)


@pytest.mark.parametrize("body", [info(15), info(0), info()[:15], b""])
def test_short_get_info_is_einval(client, body):
    assert client.refused(GET_INFO, body) == errno.EINVAL
    assert client.alive()


# --- GET_REGION_INFO -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "flags", "size"), [
    (BAR0, 3, 0x10000), (1, 0, 0), (BAR2, 7, None), (3, 0, 0), (BAR4, 7, HBM), (5, 0, 0), (ROM, 0, 0),
    (CONFIG, 3, 4096), (VGA, 0, 0),
])
def test_regions_and_their_descriptors(client, index, flags, size):
    reply = client.call(GET_REGION_INFO, region_info(index))
    try:
        argsz, got_flags, got_index, cap_offset, got_size, offset = struct.unpack("<IIIIQQ", reply.body)
        assert (argsz, got_flags, got_index, cap_offset, offset) == (32, flags, index, 0, 0)
        if size is not None:
            assert got_size == size
        assert got_size & (got_size - 1) == 0
        assert len(reply.fds) == (1 if flags & 4 else 0)
    finally:
        close(reply.fds)


@pytest.mark.parametrize("body", [
    region_info(9), region_info(0xFFFFFFFF), region_info(0, argsz=31), region_info(0, argsz=0), region_info(0)[:31],
    b"",
])
def test_bad_get_region_info_is_einval(client, body):
    assert client.refused(GET_REGION_INFO, body) == errno.EINVAL
    assert client.alive()


def test_larger_argsz_with_the_short_body_is_taken(client):
    """QEMU's second try announces more room and sends 32 bytes."""
    reply = client.call(GET_REGION_INFO, region_info(BAR0, argsz=4096))
    assert reply.body[:4] == struct.pack("<I", 32)


def test_descriptors_are_the_memory_itself(emulator, client):
    process, _ = emulator
    before = fd_count(process)
    for index in (BAR2, BAR4):
        reply = client.call(GET_REGION_INFO, region_info(index))
        (size,) = struct.unpack_from("<Q", reply.body, 16)
        with mmap.mmap(reply.fds[0], size) as memory:
            offset = size - 4096
            client.write(index, offset, b"by message")
            assert memory[offset : offset + 10] == b"by message"
            memory[offset : offset + 10] = b"by mapping"
            assert client.read(index, offset, 10) == b"by mapping"
            memory[offset : offset + 10] = bytes(10)
        close(reply.fds)
    assert fd_count(process) == before


def test_client_cannot_cut_off_the_memory_it_is_given(client):
    for index in (BAR2, BAR4):
        reply = client.call(GET_REGION_INFO, region_info(index))
        (size,) = struct.unpack_from("<Q", reply.body, 16)
        held = os.fstat(reply.fds[0]).st_size  # behind the region, what only devices use may follow
        for length in (0, size - 4096, held - 4096, held + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(reply.fds[0], length)
        close(reply.fds)


def test_bar_beyond_hbm_is_sparse_and_reads_as_zero(start_emulator):
    """maia200: 216 GiB of HBM in a BAR of 256 GiB."""
    _, (path,) = start_emulator("--profile", "maia200")
    size, backed = 256 << 30, 216 << 30
    with RawClient(path) as client:
        reply = client.call(GET_REGION_INFO, region_info(BAR4))
        close(reply.fds)
        assert reply.body == struct.pack("<IIIIQQ", 64, 7, BAR4, 0, size, 0)
        assert len(reply.fds) == 1
        reply = client.call(GET_REGION_INFO, region_info(BAR4, argsz=64))
        close(reply.fds)
        assert len(reply.fds) == 1
        assert reply.body == (
            struct.pack("<IIIIQQ", 64, 15, BAR4, 32, size, 0) + struct.pack("<HHI", 1, 1, 0) + struct.pack("<II", 1, 0)
            + struct.pack("<QQ", 0, backed)
        )
        client.write(BAR4, backed - 4, b"12345678")
        assert client.read(BAR4, backed - 4, 8) == b"1234\0\0\0\0"
        client.write(BAR4, size - 8, bytes(range(8)))
        assert client.read(BAR4, size - 8, 8) == bytes(8)
        assert client.refused(REGION_READ, access(BAR4, size - 4, 8)) == errno.EINVAL


# --- GET_REGION_IO_FDS -----------------------------------------------------------------------------------------------


def io_fds(index, argsz=16, flags=0, count=0):
    return struct.pack("<IIII", argsz, flags, index, count)


@pytest.mark.parametrize("index", [BAR0, BAR2, BAR4, CONFIG])
def test_no_region_has_ioeventfds(client, index):
    reply = client.call(GET_REGION_IO_FDS, io_fds(index, argsz=4096))
    assert (reply.body, reply.fds) == (io_fds(index), [])


@pytest.mark.parametrize("body", [
    io_fds(0, argsz=15), io_fds(0, flags=1), io_fds(0, count=1), io_fds(9), io_fds(1), io_fds(ROM),
    io_fds(0, argsz=1 << 31), io_fds(0)[:15], b"",
])
def test_bad_get_region_io_fds_is_einval(client, body):
    assert client.refused(GET_REGION_IO_FDS, body) == errno.EINVAL
    assert client.alive()


# --- REGION_READ, REGION_WRITE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4, 8, 256, 4096])
def test_config_space_in_any_size(client, count):
    assert client.read(CONFIG, 0, count)[:4] == b"\xf4\x1a\xf0\x10"[:count]


@pytest.mark.parametrize(("region", "offset", "count"), [
    (BAR0, 0x10000, 4), (BAR0, 0xFFFE, 4), (BAR0, 1 << 63, 4), (BAR0, (1 << 64) - 4, 4), (BAR0, (1 << 64) - 1, 4),
    (CONFIG, 4093, 4), (CONFIG, 0, 4097), (BAR4, HBM, 1), (BAR4, HBM - 1, 2), (1, 0, 1), (3, 0, 4), (ROM, 0, 4),
    (VGA, 0, 1), (9, 0, 4), (0xFFFFFFFF, 0, 4), (BAR4, 0, (1 << 20) + 1), (BAR4, 0, 0xFFFFFFFF), (BAR0, 0x10001, 0),
])
def test_access_out_of_bounds_is_einval(client, region, offset, count):
    assert client.refused(REGION_READ, access(region, offset, count)) == errno.EINVAL
    data = bytes(min(count, 64))
    assert client.refused(REGION_WRITE, access(region, offset, len(data), data) if count <= 64
                          else access(region, offset, count, data)) == errno.EINVAL
    assert client.alive()


@pytest.mark.parametrize("region", [BAR0, BAR2, BAR4, CONFIG])
def test_access_of_no_bytes_is_no_error(client, region):
    assert client.call(REGION_READ, access(region, 0, 0)).body == access(region, 0, 0)
    assert client.call(REGION_WRITE, access(region, 0, 0)).body == access(region, 0, 0)


@pytest.mark.parametrize("body", [b"", bytes(15), access(BAR0, SCRATCH, 4) + b"abcd"])
def test_read_body_is_exactly_16_bytes(client, body):
    assert client.refused(REGION_READ, body) == errno.EINVAL
    assert client.alive()


@pytest.mark.parametrize("body", [
    b"", bytes(15), access(BAR0, SCRATCH, 4), access(BAR0, SCRATCH, 4, b"abc"), access(BAR0, SCRATCH, 4, b"abcde"),
    access(BAR0, SCRATCH, 4, b"abcdefgh"), access(BAR0, SCRATCH, 8, b"abcd"),
])
def test_write_body_is_exactly_its_count(client, body):
    client.write32(SCRATCH, 1)
    assert client.refused(REGION_WRITE, body) == errno.EINVAL
    assert client.read32(SCRATCH) == 1


def test_posted_writes_take_effect_in_order(client):
    for value in range(100):
        client.send(REGION_WRITE, access(BAR0, SCRATCH, 4, struct.pack("<I", value)), flags=NO_REPLY)
    assert client.read32(SCRATCH) == 99


@pytest.mark.parametrize("count", [1, 2, 4, 8, 3, 100])
def test_doorbell_bar_by_messages(client, count):
    data = bytes(range(1, count + 1))
    client.write(BAR2, 64 * 4096 + 8 * 64, data)
    assert client.read(BAR2, 64 * 4096 + 8 * 64, count) == data


# --- REGION_WRITE_MULTI ----------------------------------------------------------------------------------------------


def entry(region, offset, data, count=None):
    return struct.pack("<QII8s", offset, region, len(data) if count is None else count, data)


def multi(*entries, count=None):
    return struct.pack("<Q", len(entries) if count is None else count) + b"".join(entries)


def test_write_multi_does_its_writes_and_counts_them(client):
    body = multi(entry(BAR0, SCRATCH, b"\1\2\3\4"), entry(BAR4, 4096, b"abcdefgh"), entry(BAR4, 4100, b"X"))
    assert client.call(WRITE_MULTI, body).body == struct.pack("<Q", 3)
    assert client.read32(SCRATCH) == 0x04030201
    assert client.read(BAR4, 4096, 8) == b"abcdXfgh"


def test_write_multi_of_200_without_reply(client):
    client.send(WRITE_MULTI, multi(*(entry(BAR0, SCRATCH, struct.pack("<I", n)) for n in range(200))), flags=NO_REPLY)
    assert client.read32(SCRATCH) == 199


@pytest.mark.parametrize("body", [
    b"", bytes(7), multi(count=1), multi(entry(BAR0, SCRATCH, b"abcd"), count=2),
    multi(entry(BAR0, SCRATCH, b"abcd"), count=0),
    multi(count=1 << 61), multi(entry(BAR0, SCRATCH, b"abcd", count=9)),
    multi(entry(BAR0, SCRATCH, b"abcd"), entry(BAR0, 1 << 40, b"abcd")),
    multi(entry(BAR0, SCRATCH, b"abcd"), entry(9, 0, b"abcd")), multi(entry(BAR0, SCRATCH, b"abcd")) + b"\0",
], ids=range(10))
def test_bad_write_multi_is_einval_and_writes_nothing(client, body):
    client.write32(SCRATCH, 7)
    assert client.refused(WRITE_MULTI, body) == errno.EINVAL
    assert client.read32(SCRATCH) == 7


def test_write_multi_is_refused_where_it_was_not_negotiated(emulator):
    with RawClient(emulator[1], capabilities={}) as client:
        assert client.refused(WRITE_MULTI, multi(entry(BAR0, SCRATCH, b"abcd"))) == errno.EINVAL


# --- DEVICE_RESET ----------------------------------------------------------------------------------------------------


def test_reset_has_no_payload_and_resets(client):
    client.write32(SCRATCH, 5)
    client.write(BAR4, 0, b"secret")
    client.write(CONFIG, 4, b"\6")
    assert client.call(DEVICE_RESET).size == 16
    assert client.read32(SCRATCH) == 0
    assert client.read(BAR4, 0, 6) == bytes(6)
    assert client.read(CONFIG, 4, 1) == b"\0"


def test_reset_with_payload_is_einval(client):
    assert client.refused(DEVICE_RESET, b"\0") == errno.EINVAL


def test_next_client_finds_a_fresh_device(emulator):
    with RawClient(emulator[1]) as client:
        client.write32(SCRATCH, 0x1234)
        client.write(BAR4, 1 << 20, b"secret")
        client.write(BAR2, 64 * 4096 + 400, b"secret")
        client.write(CONFIG, 0x3C, b"\x0b")
    with RawClient(emulator[1]) as client:
        assert client.read32(SCRATCH) == 0
        assert client.read(BAR4, 1 << 20, 6) == bytes(6)
        assert client.read(BAR2, 64 * 4096 + 400, 6) == bytes(6)
        assert client.read(CONFIG, 0x3C, 1) == b"\0"
