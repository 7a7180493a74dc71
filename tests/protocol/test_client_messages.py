"""The vfio-user client says what the specification's text says, byte by byte, and understands it."""

import os
import struct

import pytest
from helpers.dma_memory import Memory
from helpers.scripted_server import Device, Region, playing, until_closed
from vectors import vfio_user as vectors

from maia_rt.errors import InvalidArgument, InvalidType, TransportError, Unsupported
from maia_rt.transport import Access
from maia_rt.transport.vfio_user import VfioUserClient

CONFIG = [Region()] * 7 + [Region(256)]
EVENTFD, MASKABLE = 1, 2


def opened(sock, timeout=5.0):
    return VfioUserClient.from_socket(sock, "scripted", timeout)


def test_opening_asks_version_device_regions_and_interrupts_in_that_order():
    seen = []

    def script(peer):
        Device(regions=[Region(0x1000), Region(0x20, 1)]).handshake(peer)
        seen.extend(peer.seen)

    with playing(script) as sock, opened(sock) as device:
        assert (device.info.num_regions, device.info.num_irqs, device.info.can_reset) == (2, 3, True)
        assert [(r.index, r.size, r.flags) for r in device.regions] == [(0, 0x1000, 3), (1, 0x20, 1)]
        assert [(i.count, i.flags) for i in device.irqs] == [(0, 0), (0, 0), (4, 1)]
    assert [request.command for request in seen] == [1, 4, 5, 5, 7, 7, 7]
    version, info, region, _, _, _, irq = seen
    assert version.body[:4] == b"\0\0\0\0"
    assert version.body[-1] == 0
    assert info.body == struct.pack("<IIII", 16, 0, 0, 0)
    assert region.body == struct.pack("<IIIIQQ", 32, 0, 0, 0, 0, 0)
    assert irq.body == struct.pack("<IIII", 16, 0, 2, 0)
    assert all(not request.fds for request in seen)


def test_the_version_request_fits_into_what_qemu_would_send():
    def script(peer):
        Device().handshake(peer)
        assert len(peer.seen[0].raw) <= 214

    with playing(script) as sock:
        opened(sock).close()


def test_a_server_that_sends_no_version_text_gets_the_defaults():
    with playing(Device(version=b"").handshake) as sock, opened(sock) as device:
        assert device.max_dma_maps == 65535
        assert device.page_sizes == 4096


def exchange(action, request, reply, device=None, number=None):
    """Run `action(client)`; the server expects `request` and answers `reply`, ids apart. Return the action's result."""
    device = device or Device(regions=CONFIG)

    def script(peer):
        device.handshake(peer)
        got = peer.request()
        assert got.raw == vectors.with_id(request, got.id)
        for fd in got.fds:
            assert os.fstat(fd)
        if reply is not None:
            peer.send(vectors.with_id(reply, got.id))
        until_closed(peer)

    with playing(script) as sock, opened(sock) as client:
        return action(client)


def test_region_read():
    assert exchange(lambda c: c.read(7, 0x40, 4), vectors.REGION_READ_REQUEST, vectors.REGION_READ_REPLY) == 0x12345678


def test_region_write():
    exchange(lambda c: c.write(7, 0x40, 4, 0x12345678), vectors.REGION_WRITE_REQUEST, vectors.REGION_WRITE_REPLY)


def test_a_posted_write_asks_for_no_reply_and_waits_for_none():
    exchange(lambda c: c.write(7, 0x40, 4, 0x12345678, posted=True), vectors.REGION_WRITE_POSTED, None)


def test_blocks_travel_as_the_same_messages():
    data = exchange(lambda c: c.read_bytes(7, 0x40, 4), vectors.REGION_READ_REQUEST, vectors.REGION_READ_REPLY)
    assert data == b"\x78\x56\x34\x12"
    exchange(lambda c: c.write_bytes(7, 0x40, b"\x78\x56\x34\x12"),
             vectors.REGION_WRITE_REQUEST, vectors.REGION_WRITE_REPLY)


def test_reset():
    exchange(lambda c: c.reset(), vectors.RESET_REQUEST, vectors.RESET_REPLY)


def test_an_error_reply_becomes_an_error_with_its_errno_and_the_device_stays_usable():
    def action(client):
        what = "refused REGION_READ of 4 bytes at 0x40 of region 7: Invalid argument"
        with pytest.raises(TransportError, match=what) as caught:
            client.read(7, 0x40, 4)
        assert caught.value.errno == 22
        assert client.read(7, 0x40, 4) == 0

    def script(peer):
        Device(regions=CONFIG).handshake(peer)
        peer.send(vectors.with_id(vectors.ERROR_REPLY, peer.request().id))
        request = peer.request(9)
        peer.reply(request, request.body + bytes(4))

    with playing(script) as sock, opened(sock) as client:
        action(client)


def test_an_error_reply_that_carries_a_payload_is_still_only_an_error():
    def script(peer):
        Device().handshake(peer)
        peer.reply(peer.request(9), bytes(8), flags=0x21, errno=5)
        request = peer.request(9)
        peer.reply(request, request.body + b"\x2a")

    with playing(script) as sock, opened(sock) as client:
        with pytest.raises(TransportError) as caught:
            client.read(0, 0, 4)
        assert caught.value.errno == 5
        assert client.read(0, 0, 1) == 42


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_access_size_is_little_endian(size):
    value = int.from_bytes(bytes(range(1, size + 1)), "little")

    def script(peer):
        Device().handshake(peer)
        write = peer.request(10)
        peer.reply(write, write.body[:16])
        read = peer.request(9)
        peer.reply(read, read.body + write.body[16:])

    with playing(script) as sock, opened(sock) as client:
        client.write(0, 3, size, value)
        assert client.read(0, 3, size) == value


def test_accesses_outside_a_region_never_leave_the_process():
    def script(peer):
        Device(regions=[Region(0x10), Region(0x10, 1), Region(0x10, 2), Region()]).handshake(peer)
        handshake = len(peer.seen)
        until_closed(peer)
        assert len(peer.seen) == handshake

    with playing(script) as sock, opened(sock) as client:
        for region, offset, size in [(0, 0x10, 1), (0, 0xD, 4), (0, -1, 1), (3, 0, 1), (4, 0, 1), (-1, 0, 1),
                                     (0, 0, 3), (0, 0, 0), (0, 0, 16)]:
            with pytest.raises(InvalidArgument):
                client.read(region, offset, size)
            with pytest.raises(InvalidArgument):
                client.write(region, offset, size, 0)
        for value in (-1, 256):
            with pytest.raises(InvalidArgument, match="does not fit"):
                client.write(0, 0, 1, value)
        with pytest.raises(InvalidType):
            client.read(0, 1.0, 4)
        with pytest.raises(InvalidArgument, match="no integer"):
            client.write(0, 1.0, 4, 0)
        for offset, size in [(0, 0x11), (0x11, 0), (-1, 1), (0, -1)]:
            with pytest.raises(InvalidArgument):
                client.read_bytes(0, offset, size)
        with pytest.raises(InvalidArgument):
            client.write_bytes(0, 1, bytes(0x10))
        with pytest.raises(Unsupported):
            client.write(1, 0, 1, 0)
        with pytest.raises(Unsupported):
            client.read(2, 0, 1)
        with pytest.raises(InvalidArgument):
            client.region(4)


def test_blocks_are_split_by_the_servers_limit():
    text = os.urandom(250)
    sizes = []

    def script(peer):
        Device(version=b'{"capabilities":{"max_data_xfer_size":100}}\0').handshake(peer)
        for command in (9, 9, 9, 10, 10, 10):
            request = peer.request(command)
            offset, region, count = struct.unpack_from("<QII", request.body)
            sizes.append((command, offset, region, count))
            if command == 9:
                peer.reply(request, request.body + text[offset:offset + count])
            else:
                assert request.body[16:] == text[offset:offset + count]
                peer.reply(request, request.body[:16])

    with playing(script) as sock, opened(sock) as client:
        assert client.read_bytes(0, 0, 250) == text
        client.write_bytes(0, 0, text)
        assert client.read_bytes(0, 0x1000, 0) == b""
        client.write_bytes(0, 0x1000, b"")
    assert sizes == [(c, o, 0, n) for c in (9, 10) for o, n in ((0, 100), (100, 100), (200, 50))]


# --- DMA -------------------------------------------------------------------------------------------------------------


def test_dma_map_and_unmap_are_the_texts_bytes_with_one_descriptor():
    def script(peer):
        Device().handshake(peer)
        request = peer.request(2)
        assert request.raw == vectors.with_id(vectors.DMA_MAP_REQUEST, request.id)
        assert len(request.fds) == 1
        peer.reply(request)
        request = peer.request(3)
        assert request.raw == vectors.with_id(vectors.DMA_UNMAP_REQUEST, request.id)
        peer.reply(request, request.body)
        request = peer.request(2)
        assert struct.unpack_from("<II", request.body) == (32, 1)
        peer.reply(request)
        peer.reply(peer.request(3))  # some servers answer an unmap with a header alone

    class Shifted(Memory):
        def __init__(self):
            super().__init__(0x20_1000)
            self.offset, self.size = 0x1000, 0x20_0000
            self.address += 0x1000

    with playing(script) as sock, Shifted() as memory, opened(sock) as client:
        client.dma_map(0x1000_0000, memory)
        client.dma_unmap(0x1000_0000, 0x20_0000)
        client.dma_map(0x1000_0000, memory, Access.READ)
        client.dma_unmap(0x1000_0000, 0x20_0000)


def test_memory_without_a_descriptor_is_mapped_without_one():
    def script(peer):
        Device().handshake(peer)
        request = peer.request(2)
        assert not request.fds
        assert struct.unpack("<IIQQQ", request.body) == (32, 3, 0, 0x4000, 0x1000)
        peer.reply(request)
        until_closed(peer)

    with playing(script) as sock, Memory(fd=False) as memory, opened(sock) as client:
        client.dma_map(0x4000, memory)


def test_a_refused_map_leaves_nothing_mapped():
    def script(peer):
        Device().handshake(peer)
        peer.reply(peer.request(2), flags=0x21, errno=28)
        handshake = len(peer.seen)
        until_closed(peer)
        assert len(peer.seen) == handshake

    with playing(script) as sock, Memory() as memory, opened(sock) as client:
        with pytest.raises(TransportError) as caught:
            client.dma_map(0x4000, memory)
        assert caught.value.errno == 28
        with pytest.raises(InvalidArgument):
            client.dma_unmap(0x4000, 0x1000)


def test_a_refused_unmap_leaves_the_mapping():
    def script(peer):
        Device().handshake(peer)
        peer.reply(peer.request(2))
        peer.reply(peer.request(3), flags=0x21, errno=16)
        peer.reply(peer.request(3))
        until_closed(peer)

    with playing(script) as sock, Memory() as memory, opened(sock) as client:
        client.dma_map(0x4000, memory)
        with pytest.raises(TransportError):
            client.dma_unmap(0x4000, 0x1000)
        client.dma_unmap(0x4000, 0x1000)


def test_maps_that_cannot_be_are_refused_before_anything_is_sent():
    def script(peer):
        Device(version=b'{"capabilities":{"max_dma_maps":2}}\0').handshake(peer)
        peer.reply(peer.request(2))
        until_closed(peer)
        assert [r.command for r in peer.seen[-2:]] == [2, 3]  # the one good map, and its unmap at close

    with playing(script) as sock, Memory(0x2000) as memory, opened(sock) as client:
        client.dma_map(0x10000, memory)
        for iova in (0x10000, 0x11000, 0xF000, 0x8001, -0x1000, (1 << 64) - 0x1000):
            with pytest.raises(InvalidArgument):
                client.dma_map(iova, memory)
        for iova, size in ((0x10000, 0x1000), (0x11000, 0x1000), (0x12000, 0x2000), (0x10000, 0x3000)):
            with pytest.raises(InvalidArgument):
                client.dma_unmap(iova, size)


# --- interrupts ------------------------------------------------------------------------------------------------------


def test_vectors_are_sent_with_their_eventfds():
    def script(peer):
        Device().handshake(peer)
        request = peer.request(8)
        assert request.raw == vectors.with_id(vectors.SET_IRQS_REQUEST, request.id)
        peer.reply(request)
        for fd in request.fds:
            os.write(fd, struct.pack("<Q", 1))
        for flags, start, count in ((0x21, 1, 2), (0x21, 0, 0)):  # trigger; disable at close
            request = peer.request(8)
            assert struct.unpack("<IIIII", request.body) == (20, flags, 2, start, count)
            peer.reply(request)

    fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(3)]
    with playing(script) as sock, opened(sock) as client:
        client.irq_enable(2, 1, fds)
        assert [os.eventfd_read(fd) for fd in fds] == [1, 1, 1]
        client.irq_trigger(2, 1, 2)
    for fd in fds:
        os.close(fd)


def test_more_eventfds_than_a_message_may_carry_go_in_several():
    def script(peer):
        Device(irqs=[(EVENTFD, 10)], version=b'{"capabilities":{"max_msg_fds":4}}\0').handshake(peer)
        for start, count in ((2, 4), (6, 2)):
            request = peer.request(8)
            assert (struct.unpack("<IIIII", request.body), len(request.fds)) == ((20, 0x24, 0, start, count), count)
            peer.reply(request)
        until_closed(peer)

    fd = os.eventfd(0, os.EFD_CLOEXEC)
    with playing(script) as sock, opened(sock) as client:
        client.irq_enable(0, 2, [fd] * 6)
    os.close(fd)


def test_masking_says_mask_and_unmask():
    def script(peer):
        Device(irqs=[(EVENTFD | MASKABLE, 1)]).handshake(peer)
        for flags in (0x09, 0x11):
            request = peer.request(8)
            assert struct.unpack("<IIIII", request.body) == (20, flags, 0, 0, 1)
            peer.reply(request)

    with playing(script) as sock, opened(sock) as client:
        client.irq_mask(0)
        client.irq_unmask(0)


def test_interrupts_that_cannot_be_are_refused_before_anything_is_sent():
    def script(peer):
        Device(irqs=[(EVENTFD, 4), (0, 1), (0, 0)]).handshake(peer)
        handshake = len(peer.seen)
        until_closed(peer)
        assert len(peer.seen) == handshake

    fd = os.eventfd(0, os.EFD_CLOEXEC)
    with playing(script) as sock, opened(sock) as client:
        for start, count in ((3, 2), (5, 1), (-1, 1)):
            with pytest.raises(InvalidArgument):
                client.irq_enable(0, start, [fd] * count)
        with pytest.raises(InvalidArgument):
            client.irq_enable(0, 0, [])
        for index in (1, 2, 3, -1):
            with pytest.raises(Unsupported):
                client.irq_enable(index, 0, [fd])
        with pytest.raises(Unsupported, match="masked"):
            client.irq_mask(0)
        with pytest.raises(Unsupported):
            client.irq_disable(2)
        with pytest.raises(InvalidArgument):
            client.irq_trigger(0, 0, 0)
    os.close(fd)


def test_an_eventfd_that_is_not_open_is_refused_and_the_device_stays_usable():
    def script(peer):
        Device().handshake(peer)
        request = peer.request(9)
        peer.reply(request, request.body + b"\1")

    with playing(script) as sock, opened(sock) as client:
        with pytest.raises(TransportError) as caught:
            client.irq_enable(2, 0, [1_000_000])
        assert caught.value.errno == 9
        assert client.read(0, 0, 1) == 1


# --- regions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory_file():
    fd = os.memfd_create("region")
    os.ftruncate(fd, 0x10000)
    yield fd
    os.close(fd)


def test_sparse_areas_come_with_the_second_answer_and_map_the_servers_memory(memory_file):
    region = Region(0x8000, 7, memory_file, 0x4000, [(0x1000, 0x2000), (0x6000, 0x1000)])
    os.pwrite(memory_file, b"server", 0x4000 + 0x2000)

    def script(peer):
        Device(regions=[region]).handshake(peer)
        assert [r.command for r in peer.seen] == [1, 4, 5, 5, 7, 7, 7]

    with playing(script) as sock, opened(sock) as client:
        assert client.region(0).areas == ((0x1000, 0x2000), (0x6000, 0x1000))
        view = client.map(0, 0x1000)
        assert len(view) == 0x2000
        assert bytes(view[0x1000:0x1006]) == b"server"
        second = client.map(0, 0x2000, 0x800)
        second[:6] = b"client"
        assert bytes(view[0x1000:0x1006]) == b"client"
        assert os.pread(memory_file, 6, 0x4000 + 0x2000) == b"client"
        for offset, size in ((0, None), (0, 0x1000), (0x1000, 0x3000), (0x3000, None), (0x6000, 0x1001), (0x1000, 0),
                             (0x9000, None)):
            with pytest.raises(Unsupported, match=r"0x1000\+0x2000, 0x6000\+0x1000"):
                client.map(0, offset, size)
        with pytest.raises(InvalidArgument):
            client.map(0, 0x1004)
        view.release()
        second.release()


def test_a_region_that_can_be_mapped_whole_maps_whole(memory_file):
    with playing(Device(regions=[Region(0x4000, 7, memory_file)]).handshake) as sock, opened(sock) as client:
        assert client.region(0).areas == ((0, 0x4000),)
        with client.map(0) as view:
            assert (len(view), view.readonly) == (0x4000, False)


def test_a_read_only_region_maps_read_only(memory_file):
    device = Device(regions=[Region(0x4000, 5, memory_file)])
    with playing(device.handshake) as sock, opened(sock) as client, client.map(0) as view:
        assert view.readonly


def test_a_region_without_descriptor_or_without_the_flag_cannot_be_mapped(memory_file):
    regions = [Region(0x4000, 7), Region(0x4000, 3, memory_file)]
    with playing(Device(regions=regions).handshake) as sock, opened(sock) as client:
        for region in (0, 1):
            assert not client.region(region).mappable
            with pytest.raises(Unsupported, match="none"):
                client.map(region)


def test_views_may_outlive_the_device_and_end_the_mapping(memory_file, caplog):
    with playing(Device(regions=[Region(0x4000, 7, memory_file)]).handshake) as sock:
        client = opened(sock)
        view = client.map(0)
        client.close()
    assert "views of 1 mapped areas" in caplog.text
    view[:2] = b"ok"
    assert os.pread(memory_file, 2, 0) == b"ok"


def test_an_absent_region_or_interrupt_may_be_answered_with_einval():
    def script(peer):
        peer.reply(peer.request(1), bytes(4))
        peer.reply(peer.request(4), struct.pack("<IIII", 16, 0, 1, 1))
        peer.reply(peer.request(5), flags=0x21, errno=22)
        peer.reply(peer.request(7), flags=0x21, errno=22)

    with playing(script) as sock, opened(sock) as client:
        assert client.region(0).size == 0
        assert client.irqs[0].count == 0
        with pytest.raises(Unsupported, match="no reset"):
            client.reset()


# --- closing ---------------------------------------------------------------------------------------------------------


def test_close_turns_bus_mastering_off_then_interrupts_then_unmaps():
    said = []

    def script(peer):
        Device(flags=3, regions=[*CONFIG, Region()]).handshake(peer)
        peer.reply(peer.request(8))
        peer.reply(peer.request(2))
        handshake = len(peer.seen)
        request = peer.request(9)
        peer.reply(request, request.body + b"\x06\x04")
        until_closed(peer)
        said.extend(peer.seen[handshake:])

    fd = os.eventfd(0, os.EFD_CLOEXEC)
    with playing(script) as sock, Memory() as memory:
        client = opened(sock)
        client.irq_enable(2, 0, [fd])
        client.dma_map(0x4000, memory)
        client.close()
        client.close()
        assert client.closed
        assert client.liveness_fd is None
    os.close(fd)
    assert [request.command for request in said] == [9, 10, 8, 3]
    assert said[1].body == struct.pack("<QIIH", 4, 7, 2, 0x0402)


def test_close_goes_on_after_a_refusal(caplog):
    def script(peer):
        Device().handshake(peer)
        peer.reply(peer.request(2))
        peer.reply(peer.request(8))
        peer.reply(peer.request(8), flags=0x21, errno=22)
        peer.reply(peer.request(3), flags=0x21, errno=2)

    fd = os.eventfd(0, os.EFD_CLOEXEC)
    with playing(script) as sock, Memory() as memory, opened(sock) as client:
        client.dma_map(0x4000, memory)
        client.irq_enable(2, 0, [fd])
    os.close(fd)
    assert caplog.text.count("closing goes on") == 2
