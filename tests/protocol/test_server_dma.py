"""The server's DMA_MAP and DMA_UNMAP (vfio-user: DMA_MAP, DMA_UNMAP): every rule with its errno."""

import errno
import os
import struct

import pytest
from helpers.emulator import fd_count
from helpers.raw_client import DMA_MAP, DMA_UNMAP, Descriptors, RawClient, dma_map, dma_unmap

PAGE = 4096
BASE = 0x10_0000


@pytest.fixture
def client(emulator):
    with RawClient(emulator[1]) as connected:
        yield connected


@pytest.fixture
def descriptors():
    with Descriptors() as kept:
        yield kept


def test_map_replies_with_a_header_only(client, descriptors):
    assert client.call(DMA_MAP, dma_map(BASE, PAGE), [descriptors.memory(PAGE)]).size == 16


def unmapped(client, start, size):
    """How many bytes an unmap found, by its reply: that of the request with another size."""
    reply = client.call(DMA_UNMAP, dma_unmap(start, size)).body
    found = int.from_bytes(reply[16:], "little")
    assert reply == dma_unmap(start, found)
    return found


def test_unmap_echoes_its_24_bytes(client, descriptors):
    client.call(DMA_MAP, dma_map(BASE, PAGE), [descriptors.memory(PAGE)])
    assert client.call(DMA_UNMAP, dma_unmap(BASE, PAGE)).body == dma_unmap(BASE, PAGE)


def test_descriptor_is_not_kept_open(emulator, client, descriptors):
    process, _ = emulator
    before = fd_count(process)
    for n in range(20):
        client.call(DMA_MAP, dma_map(BASE + n * PAGE, PAGE), [descriptors.memory(PAGE)])
    assert fd_count(process) == before


def test_map_without_descriptor_is_taken(client):
    client.call(DMA_MAP, dma_map(BASE, PAGE, flags=1))
    client.call(DMA_MAP, dma_map(BASE + PAGE, PAGE, flags=3))
    client.call(DMA_UNMAP, dma_unmap(BASE, PAGE))


def test_read_only_map_with_a_read_only_descriptor(client, descriptors):
    fd = os.open(f"/proc/self/fd/{descriptors.memory(PAGE)}", os.O_RDONLY)
    try:
        client.call(DMA_MAP, dma_map(BASE, PAGE, flags=1), [fd])
        assert client.refused(DMA_MAP, dma_map(BASE + PAGE, PAGE, flags=3), [fd]) == errno.EACCES
    finally:
        os.close(fd)


@pytest.mark.parametrize(("start", "size"), [
    (BASE, 4 * PAGE), (BASE - PAGE, 2 * PAGE), (BASE + PAGE, PAGE), (BASE + 3 * PAGE, 2 * PAGE),
    (BASE - PAGE, 8 * PAGE),
])
def test_overlap_is_eexist(client, descriptors, start, size):
    fd = descriptors.memory(8 * PAGE)
    client.call(DMA_MAP, dma_map(BASE, 4 * PAGE), [fd])
    assert client.refused(DMA_MAP, dma_map(start, size), [fd]) == errno.EEXIST
    assert client.refused(DMA_MAP, dma_map(start, size)) == errno.EEXIST


def test_neighbours_do_not_overlap(client, descriptors):
    fd = descriptors.memory(3 * PAGE)
    for n in (1, 0, 2):
        client.call(DMA_MAP, dma_map(BASE + n * PAGE, PAGE, offset=n * PAGE), [fd])


@pytest.mark.parametrize("body", [
    dma_map(BASE, 0), dma_map(BASE, 100), dma_map(BASE + 1, PAGE), dma_map(BASE, PAGE, flags=0),
    dma_map(BASE, PAGE, flags=4), dma_map(BASE, PAGE, flags=11), dma_map(BASE, PAGE, argsz=31),
    dma_map(BASE, PAGE, argsz=0),
    dma_map((1 << 64) - PAGE, 2 * PAGE), dma_map(BASE, (1 << 64) - PAGE), b"", dma_map(BASE, PAGE)[:31],
    dma_map(BASE, PAGE) + b"\0",
], ids=range(13))
def test_bad_map_is_einval(client, descriptors, body):
    assert client.refused(DMA_MAP, body) == errno.EINVAL
    assert client.refused(DMA_MAP, body, [descriptors.memory(PAGE)]) == errno.EINVAL
    assert client.alive()


@pytest.mark.parametrize(("offset", "size"), [
    (0, 2 * PAGE), (PAGE, PAGE), (1 << 62, PAGE), ((1 << 64) - PAGE, PAGE), (1, PAGE),
])
def test_map_past_the_file_is_einval(client, descriptors, offset, size):
    assert client.refused(DMA_MAP, dma_map(BASE, size, offset=offset), [descriptors.memory(PAGE)]) == errno.EINVAL


def test_two_descriptors_are_einval(client, descriptors):
    assert client.refused(DMA_MAP, dma_map(BASE, PAGE), [descriptors.memory(PAGE)] * 2) == errno.EINVAL


def test_descriptor_that_cannot_be_mapped_brings_mmaps_errno(emulator, client, descriptors):
    process, _ = emulator
    before = fd_count(process)
    assert client.refused(DMA_MAP, dma_map(BASE, PAGE), [descriptors.eventfd()]) in (errno.ENODEV, errno.EINVAL)
    assert fd_count(process) == before
    assert unmapped(client, BASE, PAGE) == 0


@pytest.mark.parametrize(("start", "size"), [
    (BASE, PAGE), (BASE + PAGE, PAGE), (BASE + PAGE, 8 * PAGE), (BASE - PAGE, 2 * PAGE), (BASE, 0), (BASE + 1, PAGE),
    (BASE, PAGE - 1), (2**64 - PAGE, 2 * PAGE),
])
def test_unmap_does_not_cut_a_mapping(client, start, size):
    client.call(DMA_MAP, dma_map(BASE, 4 * PAGE))
    assert client.refused(DMA_UNMAP, dma_unmap(start, size)) == errno.EINVAL
    assert unmapped(client, BASE, 4 * PAGE) == 4 * PAGE


@pytest.mark.parametrize(("start", "size"), [(BASE, 3 * PAGE), (BASE - PAGE, 5 * PAGE), (0, 1 << 63)])
def test_unmap_takes_all_mappings_within_its_range(client, start, size):
    """QEMU takes 2 MiB of a guest's 4 KiB pages back with one message."""
    for n in range(3):
        client.call(DMA_MAP, dma_map(BASE + n * PAGE, PAGE))
    assert unmapped(client, start, size) == 3 * PAGE
    client.call(DMA_MAP, dma_map(BASE, 3 * PAGE))
    client.call(DMA_UNMAP, dma_unmap(BASE, 3 * PAGE))


@pytest.mark.parametrize(("start", "size"), [(BASE, PAGE), (BASE - PAGE, PAGE), (BASE + PAGE, PAGE), (0, BASE)])
def test_unmapping_what_is_not_mapped_says_0_bytes(client, start, size):
    """QEMU does so when a guest turns its IOMMU on."""
    client.call(DMA_MAP, dma_map(BASE, PAGE))
    assert unmapped(client, BASE, PAGE) == PAGE
    assert unmapped(client, start, size) == 0


def test_unmap_all(client, descriptors):
    assert client.call(DMA_UNMAP, dma_unmap(0, 0, flags=2)).body == dma_unmap(0, 0, flags=2)
    for n in range(10):
        client.call(DMA_MAP, dma_map(BASE + n * PAGE, PAGE), [descriptors.memory(PAGE)] if n % 2 else [])
    client.call(DMA_UNMAP, dma_unmap(0, 0, flags=2))
    assert unmapped(client, BASE, 10 * PAGE) == 0
    client.call(DMA_MAP, dma_map(BASE, 10 * PAGE))


@pytest.mark.parametrize("body", [
    dma_unmap(BASE, 0, flags=2), dma_unmap(0, PAGE, flags=2), dma_unmap(0, 0, flags=3), dma_unmap(BASE, PAGE, flags=1),
    dma_unmap(BASE, PAGE, flags=4), dma_unmap(BASE, PAGE, flags=1 << 31), dma_unmap(BASE, PAGE, argsz=23),
    dma_unmap(BASE, PAGE)[:23], dma_unmap(BASE, PAGE) + bytes(16), b"",
], ids=range(10))
def test_bad_unmap_is_einval_and_changes_nothing(client, body):
    client.call(DMA_MAP, dma_map(BASE, PAGE))
    assert client.refused(DMA_UNMAP, body) == errno.EINVAL
    client.call(DMA_UNMAP, dma_unmap(BASE, PAGE))


def test_pipelined_maps_and_unmaps_before_get_info(client, descriptors):
    """QEMU sends them without waiting, before it asks what the device is."""
    fd = descriptors.memory(64 * PAGE)
    for n in range(64):
        client.send(DMA_MAP, dma_map(n * PAGE, PAGE, offset=n * PAGE), [fd])
    for n in range(64):
        client.send(DMA_UNMAP, dma_unmap(n * PAGE, PAGE))
    for _ in range(64):
        reply = client.recv()
        assert (reply.command, reply.errno) == (DMA_MAP, 0)
    for _ in range(64):
        reply = client.recv()
        assert (reply.command, reply.errno) == (DMA_UNMAP, 0)


def test_announced_number_of_maps_fits_and_one_more_is_enospc(client, descriptors):
    """One page at a time with a descriptor of one file, as QEMU does with a guest's IOMMU on."""
    limit = 65535
    fd = descriptors.memory(PAGE)
    done = 0
    while done < limit:
        batch = min(256, limit - done)
        for n in range(done, done + batch):
            client.send(DMA_MAP, dma_map(n * PAGE, PAGE), [fd] if n % 64 == 0 else [])
        for _ in range(batch):
            assert client.recv().errno == 0
        done += batch
    assert client.refused(DMA_MAP, dma_map(limit * PAGE, PAGE), [fd]) == errno.ENOSPC
    client.call(DMA_UNMAP, dma_unmap(0, 0, flags=2))


def test_maps_of_one_client_are_gone_for_the_next(emulator):
    for _ in range(2):
        with RawClient(emulator[1]) as client:
            client.call(DMA_MAP, dma_map(BASE, PAGE))


def test_file_cut_short_after_its_map_does_not_harm_the_server(emulator, client, descriptors):
    """The admin queue lies in memory that is no longer there: the device may fail, the server may not."""
    fd = descriptors.memory(16 * PAGE)
    client.call(DMA_MAP, dma_map(BASE, 16 * PAGE), [fd])
    os.ftruncate(fd, 0)
    client.write(7, 4, b"\6")
    client.write64(0xA0, BASE)
    client.write64(0xA8, BASE + 8 * PAGE)
    client.write32(0xB0, 4)
    client.write32(0x80, 1)
    for _ in range(100):
        if client.read32(0x84) & 0xF != 1:
            break
    assert client.read32(0x84) & 0xF in (1, 2, 3)
    assert struct.pack("<I", client.read32(0)) == b"MAIA"
