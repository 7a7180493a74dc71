"""How the server reads its stream: split and merged messages, impossible sizes, descriptors in odd places."""

import contextlib
import errno
import os
import struct
import time

import pytest
from helpers.emulator import eventually, fd_count
from helpers.raw_client import (
    BAR0,
    CONFIG,
    DEVICE_RESET,
    DMA_MAP,
    DMA_UNMAP,
    ERROR,
    GET_INFO,
    GET_IRQ_INFO,
    GET_REGION_INFO,
    NO_REPLY,
    QEMU_CAPABILITIES,
    REGION_READ,
    REGION_WRITE,
    REPLY,
    SET_IRQS,
    VERSION,
    Descriptors,
    RawClient,
    access,
    dma_map,
    dma_unmap,
    header,
    irq_set,
    region_info,
    version_body,
)

SCRATCH = 0xCC


@pytest.fixture
def client(emulator):
    with RawClient(emulator[1]) as connected:
        yield connected


def test_message_may_arrive_byte_by_byte(client):
    body = access(BAR0, SCRATCH, 4, b"\x11\x22\x33\x44")
    for byte in header(REGION_WRITE, len(body), number=5) + body:
        client.send_raw(bytes([byte]))
    assert client.recv().id == 5
    assert client.read32(SCRATCH) == 0x44332211


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 31])
def test_message_may_be_split_anywhere(client, cut):
    raw = header(REGION_READ, 16, number=9) + access(CONFIG, 0, 4)
    client.send_raw(raw[:cut])
    time.sleep(0.02)
    client.send_raw(raw[cut:])
    reply = client.recv()
    assert (reply.id, reply.flags, reply.body[16:]) == (9, REPLY, b"\xf4\x1a\xf0\x10")


def test_many_messages_in_one_write_are_answered_in_order(client):
    raw = b"".join(header(REGION_READ, 16, number=n) + access(BAR0 if n % 2 else CONFIG, 0, 4) for n in range(200))
    client.send_raw(raw)
    assert [client.recv().id for _ in range(200)] == list(range(200))


def test_version_may_share_a_write_with_what_follows(emulator):
    with RawClient(emulator[1], negotiate=False) as client:
        body = version_body(QEMU_CAPABILITIES)
        client.send_raw(header(VERSION, len(body), number=1) + body + header(GET_INFO, 16, number=2)
                        + struct.pack("<IIII", 16, 0, 0, 0))
        assert [client.recv().id for _ in range(2)] == [1, 2]


def test_descriptor_belongs_to_its_own_message(client):
    """The kernel joins a message without descriptors to a following one that has some."""
    with Descriptors() as descriptors:
        one, two = descriptors.memory(4096), descriptors.memory(8192)
        client.send(GET_INFO, struct.pack("<IIII", 16, 0, 0, 0))
        client.send(DMA_MAP, dma_map(0x10000, 4096), [one])
        client.send(GET_INFO, struct.pack("<IIII", 16, 0, 0, 0))
        client.send(DMA_MAP, dma_map(0x20000, 8192), [two])
        client.send(REGION_READ, access(BAR0, 0, 4))
        assert [client.recv().flags for _ in range(5)] == [REPLY] * 5


def test_descriptor_may_come_with_the_body(client):
    with Descriptors() as descriptors:
        body = dma_map(0x10000, 4096)
        client.send_raw(header(DMA_MAP, len(body), number=3))
        time.sleep(0.02)
        client.send_raw(body, [descriptors.memory(4096)])
        assert client.recv().flags == REPLY


@pytest.mark.parametrize("size", [0, 1, 15, 16 + 16 + (1 << 20) + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_impossible_size_is_einval_and_ends_that_client(emulator, size):
    with RawClient(emulator[1]) as client:
        assert client.refused(GET_INFO, size=size) == errno.EINVAL
        assert client.closed()
    with RawClient(emulator[1]) as client:
        assert client.alive()


def test_largest_message_is_taken(client):
    data = os.urandom(1 << 20)
    client.write(4, 0, data)
    assert client.read(4, 0, 1 << 20) == data


@pytest.mark.parametrize("kind", [2, 3, 7, 15])
def test_type_that_does_not_exist_is_einval(client, kind):
    client.send_raw(header(GET_INFO, 16, number=4, flags=kind) + struct.pack("<IIII", 16, 0, 0, 0))
    reply = client.recv()
    assert (reply.id, reply.flags, reply.errno) == (4, REPLY | ERROR, errno.EINVAL)
    assert client.alive()


@pytest.mark.parametrize("command", [DMA_MAP, 11, 12, REGION_READ])
def test_reply_that_nobody_waits_for_is_einval(client, command):
    client.send_raw(header(command, 16, number=4, flags=REPLY) + bytes(16))
    reply = client.recv()
    assert (reply.id, reply.flags, reply.errno) == (4, REPLY | ERROR, errno.EINVAL)
    assert client.alive()


def test_other_flag_bits_are_ignored(client):
    client.send_raw(header(REGION_READ, 16, number=4, flags=0xFFFFFF00, errno=77) + access(BAR0, 0, 4))
    assert client.recv().body[16:] == b"MAIA"


@pytest.mark.parametrize("command", [14, 16, 17, 18, 0, 19, 999, 0xFFFF])
def test_unknown_command_is_refused_and_the_client_lives_on(client, command):
    assert client.refused(command, bytes(32)) == errno.ENOTSUP
    assert client.alive()


@pytest.mark.parametrize("command", [11, 12])
def test_server_commands_from_the_client_are_einval(client, command):
    assert client.refused(command, struct.pack("<QQ", 0, 16)) == errno.EINVAL
    assert client.alive()


def test_id_is_echoed_and_may_repeat(client):
    for number in (0, 0xFFFF, 0xFFFF, 42):
        client.send_raw(header(REGION_READ, 16, number=number) + access(BAR0, 0, 4))
        assert client.recv().id == number


@pytest.mark.parametrize(("command", "body"), [
    (REGION_WRITE, access(BAR0, SCRATCH, 4, b"abcd")), (REGION_WRITE, access(BAR0, 1 << 40, 4, b"abcd")),
    (REGION_READ, access(CONFIG, 0, 4)), (REGION_READ, b""), (DEVICE_RESET, b""), (DEVICE_RESET, b"x"), (99, b""),
    (DMA_UNMAP, dma_unmap(0, 4096)), (GET_INFO, b""),
])
def test_no_reply_command_is_never_answered(client, command, body):
    client.send(command, body, flags=NO_REPLY)
    fence = client.send(REGION_READ, access(BAR0, 0, 4))
    assert client.recv().id == fence


ONE_FD = [
    (GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)), (GET_REGION_INFO, region_info(0)), (DEVICE_RESET, b""),
    (GET_IRQ_INFO, struct.pack("<IIII", 16, 0, 2, 0)), (REGION_READ, access(BAR0, 0, 4)),
    (REGION_WRITE, access(BAR0, SCRATCH, 4, b"abcd")), (DMA_UNMAP, dma_unmap(0, 4096)), (99, b""),
]


@pytest.mark.parametrize(("command", "body"), ONE_FD)
def test_descriptor_on_a_message_that_takes_none_is_refused_and_closed(emulator, client, command, body):
    process, _ = emulator
    before = fd_count(process)
    with Descriptors() as descriptors:
        expected = errno.ENOTSUP if command == 99 else errno.EINVAL
        assert client.refused(command, body, [descriptors.memory(4096)]) == expected
        assert fd_count(process) == before
    assert client.alive()


@pytest.mark.parametrize("count", [17, 64, 253])
def test_more_descriptors_than_announced_are_closed(emulator, client, count):
    process, _ = emulator
    before = fd_count(process)
    with Descriptors() as descriptors:
        fds = [descriptors.eventfd()] * count
        assert client.refused(SET_IRQS, irq_set(0x24, 2, 0, min(count, 65)), fds) == errno.EINVAL
        assert client.refused(DMA_MAP, dma_map(0, 4096), fds) == errno.EINVAL
        assert fd_count(process) == before
    assert client.alive()


def test_descriptors_in_header_and_body_are_counted_together(emulator, client):
    process, _ = emulator
    before = fd_count(process)
    with Descriptors() as descriptors:
        fds = [descriptors.memory(4096)] * 10
        body = dma_map(0, 4096)
        client.send_raw(header(DMA_MAP, len(body), number=8), fds)
        time.sleep(0.02)
        client.send_raw(body, fds)
        reply = client.recv()
        assert (reply.id, reply.flags, reply.errno) == (8, REPLY | ERROR, errno.EINVAL)
        assert fd_count(process) == before


def test_descriptors_of_a_message_that_never_ends_are_closed(emulator):
    process, path = emulator
    with RawClient(path) as client:
        before = fd_count(process)
        with Descriptors() as descriptors:
            client.send_raw(header(DMA_MAP, 32, number=8) + bytes(10), [descriptors.memory(4096)] * 5)
    with RawClient(path) as client:
        assert client.alive()
        assert eventually(lambda: fd_count(process) == before)


def test_client_that_does_not_read_is_given_up(start_emulator):
    """Its replies fill the socket; the server must not wait for ever, and the next client must be served."""
    _, (path,) = start_emulator()
    with RawClient(path) as stuck:
        stuck.sock.settimeout(0.2)
        raw = header(REGION_READ, 16) + access(CONFIG, 0, 4096)
        try:
            for _ in range(2000):
                stuck.send_raw(raw)
        except TimeoutError:
            pass
        else:
            pytest.fail("the server read it all")
        assert eventually(lambda: served(path), 15), "nobody else was served"


def served(path):
    """Whether a client is served before it is told that another one is."""
    with contextlib.suppress(AssertionError), RawClient(path) as client:
        return client.alive()
