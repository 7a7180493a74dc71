"""Whatever a server does wrong ends in a typed error in bounded time, and nothing stays open."""

import os
import signal
import struct
import threading
import time

import pytest
from helpers.dma_memory import Memory
from helpers.scripted_server import Device, Region, playing, until_closed
from helpers.stopwatch import promptly
from vectors import vfio_user as vectors

from maia_rt.errors import ClosedError, DeviceLost, DeviceTimeout, ProtocolError, TransportError
from maia_rt.transport import Access
from maia_rt.transport.vfio_user import VfioUserClient


def opened(sock, timeout=5.0):
    return VfioUserClient.from_socket(sock, "scripted", timeout)


def after_handshake(play, device=None):
    def script(peer):
        (device or Device()).handshake(peer)
        play(peer)
    return script


WRONG_REPLIES = {
    "another id": {"number": 0x7777},
    "another command": {"command": 10},
    "a command instead": {"flags": 2},
    "too long": {"body": bytes(24)},
    "too short": {"body": bytes(19)},
    "empty": {"body": b""},
    "another count": {"body": struct.pack("<QIII", 0, 0, 2, 0)},
    "size below a header": {"size": 15},
    "size zero": {"size": 0},
    "an enormous size": {"size": 0xFFFF_FFFF},
}


@pytest.mark.parametrize("falsified", WRONG_REPLIES.values(), ids=WRONG_REPLIES.keys())
@pytest.mark.parametrize("block", [False, True], ids=["register", "block"])
def test_a_reply_that_does_not_match_ends_the_connection(falsified, block):
    def play(peer):
        request = peer.request(9)
        peer.reply(request, **({"body": request.body + bytes(4)} | falsified))
        with pytest.raises((EOFError, ConnectionError)):
            peer.recv(1)

    with playing(after_handshake(play)) as sock, opened(sock) as client:
        with pytest.raises(ProtocolError):
            client.read_bytes(0, 0, 4) if block else client.read(0, 0, 4)
        with pytest.raises(DeviceLost, match="the device is gone"):
            client.read(0, 0, 4)
        with pytest.raises(DeviceLost):
            client.service()


@pytest.mark.parametrize("falsified", [{"body": bytes(15)}, {"body": bytes(17)}, {"number": 9}, {"body": b""}])
def test_a_write_reply_that_does_not_match_ends_the_connection(falsified):
    def play(peer):
        request = peer.request(10)
        peer.reply(request, **({"body": request.body[:16]} | falsified))

    with playing(after_handshake(play)) as sock, opened(sock) as client, pytest.raises(ProtocolError):
        client.write(0, 0, 4, 1)


def test_a_reply_that_dribbles_in_is_still_a_reply():
    def play(peer):
        for _ in range(2):
            request = peer.request()
            raw = struct.pack("<HHIII", request.id, 9, 36, 1, 0) + request.body + b"\x78\x56\x34\x12"
            for at in range(len(raw)):
                peer.send(raw[at:at + 1])
                time.sleep(0.001)

    with playing(after_handshake(play)) as sock, opened(sock) as client:
        assert client.read(0, 0, 4) == 0x12345678
        assert client.read_bytes(0, 0, 4) == b"\x78\x56\x34\x12"


def test_descriptors_that_nobody_asked_for_are_closed():
    fd = os.memfd_create("unwanted")

    def play(peer):
        request = peer.request(9)
        peer.reply(request, request.body + bytes(4), fds=[fd])   # on the register path the kernel drops it
        request = peer.request(13)
        peer.reply(request, fds=[fd] * 3)

    with playing(after_handshake(play)) as sock, opened(sock) as client:
        assert client.read(0, 0, 4) == 0
        with pytest.raises(ProtocolError, match="3 descriptors"):
            client.reset()
    os.close(fd)


def test_more_descriptors_than_announced_end_the_connection():
    fd = os.memfd_create("unwanted")

    def play(peer):
        peer.reply(peer.request(13), fds=[fd] * 200)

    with playing(after_handshake(play)) as sock, opened(sock) as client, pytest.raises(ProtocolError):
        client.reset()
    os.close(fd)


# --- opening ---------------------------------------------------------------------------------------------------------


def opening(steps):
    """A script that answers the requests of an opening client with (body, keywords) one after another."""
    def script(peer):
        for body, keywords in steps:
            peer.reply(peer.request(), body, **keywords)
        until_closed(peer)
    return script


VERSION_OK = (b"\0\0\0\0", {})
INFO_OK = (struct.pack("<IIII", 16, 1, 1, 1), {})


def region_reply(**changes):
    fields = {"argsz": 32, "flags": 7, "index": 0, "cap": 0, "size": 0x1000, "offset": 0} | changes
    return struct.pack("<IIIIQQ", *fields.values())


FD = os.memfd_create("hostile region")
HOSTILE_OPENINGS = {
    "version of another major": [(b"\1\0\0\0", {})],
    "version of a higher minor": [(b"\0\0\1\0", {})],
    "broken version text": [(b"\0\0\0\0{\0", {})],
    "version text without end": [(b"\0\0\0\0{}", {})],
    "short version": [(b"\0", {})],
    "version with a descriptor": [(b"\0\0\0\0", {"fds": [FD]})],
    "short device info": [VERSION_OK, (bytes(15), {})],
    "too many regions": [VERSION_OK, (struct.pack("<IIII", 16, 1, 1 << 20, 1), {})],
    "too many interrupts": [VERSION_OK, (struct.pack("<IIII", 16, 1, 1, 1 << 31), {})],
    "short region": [VERSION_OK, INFO_OK, (bytes(31), {})],
    "another region": [VERSION_OK, INFO_OK, (region_reply(index=1), {})],
    "two descriptors": [VERSION_OK, INFO_OK, (region_reply(), {"fds": [FD, FD]})],
    "capabilities outside": [VERSION_OK, INFO_OK, (region_reply(flags=15, cap=32), {"fds": [FD]})],
    "capabilities in the fixed part": [VERSION_OK, INFO_OK, (region_reply(flags=15, cap=8), {"fds": [FD]})],
    "ever more room": [VERSION_OK, INFO_OK, (region_reply(argsz=64), {"fds": [FD]}),
                       (region_reply(argsz=128), {"fds": [FD]})],
    "an area beyond the end": [VERSION_OK, INFO_OK, (
        region_reply(argsz=64, flags=15, cap=32) + struct.pack("<HHIIIQQ", 1, 1, 0, 1, 0, 0x1000, 0x1000),
        {"fds": [FD]})],
    "an area off the page": [VERSION_OK, INFO_OK, (
        region_reply(argsz=64, flags=15, cap=32) + struct.pack("<HHIIIQQ", 1, 1, 0, 1, 0, 0x10, 0x10), {"fds": [FD]})],
    "an area that wraps": [VERSION_OK, INFO_OK, (
        region_reply(argsz=64, flags=15, cap=32) + struct.pack("<HHIIIQQ", 1, 1, 0, 1, 0, 0, 2**64 - 1),
        {"fds": [FD]})],
    "short interrupt": [VERSION_OK, INFO_OK, (region_reply(), {}), (bytes(8), {})],
    "another interrupt": [VERSION_OK, INFO_OK, (region_reply(), {}), (struct.pack("<IIII", 16, 0, 3, 1), {})],
    "a web server": [(b"", {"size": 0x31312F50, "number": 0x5448, "command": 0x5054})],
}


@pytest.mark.parametrize("steps", HOSTILE_OPENINGS.values(), ids=HOSTILE_OPENINGS.keys())
def test_a_server_that_answers_nonsense_while_it_is_opened_is_refused(steps):
    with playing(opening(steps)) as sock, pytest.raises(ProtocolError):
        opened(sock)


def test_a_mapped_file_shorter_than_announced_is_refused_instead_of_killing_the_process():
    fd = os.memfd_create("short")
    os.ftruncate(fd, 0x1000)
    device = Device(regions=[Region(0x2000, 7, fd)])
    with (playing(device.handshake) as sock, opened(sock) as client,
          pytest.raises(ProtocolError, match="4096 bytes, 8192")):
        client.map(0)
    os.close(fd)


# --- time and death --------------------------------------------------------------------------------------------------


def test_no_answer_in_time_is_a_timeout_that_names_the_request_and_ends_the_connection():
    def play(peer):
        peer.request(9)
        with pytest.raises(EOFError):
            peer.recv(1)

    with playing(after_handshake(play)) as sock, opened(sock, 0.5) as client:
        start = time.monotonic()
        with pytest.raises(DeviceTimeout, match=r"REGION_READ of 4 bytes at 0x0 of region 0 within 0\.5 s"):
            client.read(0, 0, 4)
        assert promptly(start, 3) > 0.4
        start = time.monotonic()
        with pytest.raises(DeviceLost, match="no answer"):
            client.read(0, 0, 4)
        client.close()
        promptly(start, 0.5)


def test_a_late_reply_is_never_taken_for_anothers():
    def play(peer):
        late = peer.request(9)
        time.sleep(0.2)
        with pytest.raises(BrokenPipeError):
            peer.reply(late, late.body + b"\1\1\1\1")

    with playing(after_handshake(play)) as sock, opened(sock, 0.05) as client:
        with pytest.raises(DeviceTimeout):
            client.read(0, 0, 4)
        with pytest.raises(DeviceLost):
            client.read(0, 0, 4)
        time.sleep(0.3)


def test_a_server_that_sends_without_end_cannot_hold_a_call():
    def play(peer):
        peer.request(13)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while True:
                peer.send(struct.pack("<HHIIIQQ", 1, 11, 32, 0x10, 0, 0, 1))
                time.sleep(0.001)

    with playing(after_handshake(play)) as sock, opened(sock, 0.2) as client:
        start = time.monotonic()
        with pytest.raises(DeviceTimeout):
            client.reset()
        promptly(start, 2)


def test_a_server_that_stops_reading_ends_posted_writes_with_a_timeout():
    stop = threading.Event()

    with playing(after_handshake(lambda _: stop.wait(10))) as sock, opened(sock, 0.1) as client:
        with pytest.raises(DeviceTimeout):
            for _ in range(100_000):
                client.write(0, 0, 4, 0, posted=True)
        stop.set()


@pytest.mark.parametrize("action", [
    lambda c: c.read(0, 0, 4), lambda c: c.write(0, 0, 4, 0), lambda c: c.reset(), lambda c: c.read_bytes(0, 0, 64),
    lambda c: c.service()], ids=["read", "write", "reset", "block", "service"])
def test_a_server_that_dies_is_a_lost_device_at_once(action):
    def play(peer):
        peer.sock.close()

    with playing(after_handshake(play)) as sock, opened(sock) as client:
        start = time.monotonic()
        with pytest.raises(DeviceLost, match="ended or crashed"):
            action(client)
        with pytest.raises(DeviceLost):
            client.read(0, 0, 4)
        promptly(start, 1)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 35])
def test_a_server_that_dies_in_the_middle_of_a_reply_is_a_lost_device(count):
    def play(peer):
        request = peer.request(9)
        raw = struct.pack("<HHIII", request.id, 9, 36, 1, 0) + request.body + bytes(4)
        peer.send(raw[:count])

    with playing(after_handshake(play)) as sock, opened(sock) as client, pytest.raises(DeviceLost):
        client.read(0, 0, 4)


def test_an_interrupted_request_ends_the_connection_but_not_the_process():
    class Interrupt(Exception):
        pass

    def raise_interrupt(*_):
        raise Interrupt

    def play(peer):
        peer.request(13)
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(EOFError):
            peer.recv(1)

    before = signal.signal(signal.SIGUSR1, raise_interrupt)
    try:
        with playing(after_handshake(play)) as sock, opened(sock) as client:
            with pytest.raises(Interrupt):
                client.reset()
            with pytest.raises(DeviceLost, match="interrupted by Interrupt"):
                client.read(0, 0, 4)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_call_from_inside_another_call_is_refused_instead_of_hanging():
    def play(peer):
        request = peer.request(9)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.05)
        peer.reply(request, request.body + b"\5\0\0\0")
        until_closed(peer)

    def inner(*_):
        with pytest.raises(TransportError, match="inside another call"):
            client.read(0, 0, 4)

    before = signal.signal(signal.SIGUSR1, inner)
    try:
        with playing(after_handshake(play)) as sock, opened(sock) as client:
            assert client.read(0, 0, 4) == 5
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_closed_device_says_so():
    with playing(after_handshake(until_closed)) as sock, Memory() as memory:
        client = opened(sock)
        client.close()
        for action in (lambda: client.read(0, 0, 4), lambda: client.write(0, 0, 4, 0), lambda: client.map(0),
                       lambda: client.read_bytes(0, 0, 4), client.reset, client.service,
                       lambda: client.dma_map(0, memory), lambda: client.dma_unmap(0, 4096)):
            with pytest.raises(ClosedError):
                action()


def test_many_threads_share_one_device():
    def play(peer):
        try:
            while True:
                request = peer.request()
                peer.reply(request, request.body + request.body[:4] if request.command == 9 else b"")
        except EOFError:
            pass

    wrong = []

    def worker(offset):
        wrong.extend(1 for _ in range(200) if client.read(0, offset, 4) != offset)

    with playing(after_handshake(play)) as sock, opened(sock) as client:
        threads = [threading.Thread(target=worker, args=(8 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# --- DMA by message --------------------------------------------------------------------------------------------------


@pytest.fixture
def memory():
    with Memory(0x2000) as some:
        yield some


def mapped(sock, memory, iova=0x1000_0000, access=Access.READ | Access.WRITE):
    client = opened(sock)
    client.dma_map(iova, memory, access)
    return client


def map_and(play):
    def run(peer):
        peer.reply(peer.request(2))
        play(peer)
        until_closed(peer)
    return after_handshake(run)


def test_the_server_reads_and_writes_memory_while_a_reply_is_awaited(memory):
    def play(peer):
        request = peer.request(9)
        peer.send(vectors.DMA_READ_REQUEST)
        assert peer.recv(37)[0] == vectors.DMA_READ_REPLY
        peer.send(vectors.DMA_WRITE_REQUEST)
        assert peer.recv(32)[0] == vectors.DMA_WRITE_REPLY
        peer.reply(request, request.body + b"\7\0\0\0")

    memory.bytes[8:13] = b"hello"
    with playing(map_and(play)) as sock, mapped(sock, memory) as client:
        assert client.read(0, 0, 4) == 7
        assert memory.bytes[8:13] == b"world"


def test_requests_and_the_reply_may_arrive_in_one_piece(memory):
    def play(peer):
        request = peer.request(9)
        reply = struct.pack("<HHIII", request.id, 9, 36, 1, 0) + request.body + b"\7\0\0\0"
        peer.send(vectors.DMA_WRITE_REQUEST + reply + vectors.DMA_READ_REQUEST)
        assert peer.recv(32)[0] == vectors.DMA_WRITE_REPLY
        assert peer.recv(37)[0][32:] == b"world"
        request = peer.request(9)
        reply = struct.pack("<HHIII", request.id, 9, 36, 1, 0) + request.body + b"\x08\0\0\0"
        peer.send(vectors.DMA_READ_REQUEST + vectors.DMA_READ_REQUEST[:4])
        time.sleep(0.05)
        peer.send(vectors.DMA_READ_REQUEST[4:] + reply)
        assert len(peer.recv(74)[0]) == 74

    with playing(map_and(play)) as sock, mapped(sock, memory) as client:
        assert client.read(0, 0, 4) == 7
        assert client.service() in (0, 1)
        assert client.read(0, 0, 4) == 8


def test_service_answers_what_has_arrived_and_does_not_block(memory):
    ready, done = threading.Event(), threading.Event()

    def play(peer):
        peer.send(vectors.DMA_READ_REQUEST * 2)
        ready.set()
        assert peer.recv(74)[0] == vectors.DMA_READ_REPLY * 2
        done.set()

    memory.bytes[8:13] = b"hello"
    with playing(map_and(play)) as sock, mapped(sock, memory) as client:
        assert ready.wait(5)
        assert client.service() == 2
        assert client.service() == 0
        assert done.wait(5)


BASE = 0x1000_0000
REFUSALS = {
    "unmapped": (11, BASE - 8, 4, b"", 14),
    "before the start": (11, BASE - 1, 2, b"", 14),
    "past the end": (11, BASE + 0x1FFF, 2, b"", 14),
    "wrapping": (11, 2**64 - 1, 2, b"", 14),
    "a mebibyte and one": (11, BASE, (1 << 20) + 1, b"", 7),
    "an enormous count": (11, BASE, 2**64 - 1, b"", 7),
    "a read with bytes": (11, BASE, 4, b"1234", 22),
    "a write with too few bytes": (12, BASE, 4, b"123", 22),
    "a write with too many bytes": (12, BASE, 4, b"12345", 22),
    "a command for servers": (9, BASE, 4, b"", 38),
    "an unknown command": (99, BASE, 4, b"", 38),
}


@pytest.mark.parametrize(("command", "address", "count", "body", "code"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_bad_request_of_the_server_gets_its_errno_and_the_device_stays_usable(
    memory, command, address, count, body, code
):
    def play(peer):
        request = peer.request(9)
        raw = struct.pack("<QQ", address, count) + body
        peer.send(struct.pack("<HHIII", 5, command, 16 + len(raw), 0, 0) + raw)
        assert peer.recv(16)[0] == struct.pack("<HHIII", 5, command, 16, 0x21, code)
        peer.reply(request, request.body + b"\1")

    with playing(map_and(play)) as sock, mapped(sock, memory) as client:
        assert client.read(0, 0, 1) == 1


def test_a_short_request_and_one_with_descriptors_get_einval(memory):
    fd = os.memfd_create("attached")

    def play(peer):
        request = peer.request(13)
        peer.send(struct.pack("<HHIIIQ", 5, 11, 24, 0, 0, BASE))
        assert peer.recv(16)[0] == struct.pack("<HHIII", 5, 11, 16, 0x21, 22)
        peer.send(vectors.DMA_READ_REQUEST, [fd, fd])
        assert peer.recv(16)[0] == struct.pack("<HHIII", 0x77, 11, 16, 0x21, 22)
        peer.reply(request)

    with playing(map_and(play)) as sock, mapped(sock, memory) as client:
        client.reset()
    os.close(fd)


def test_a_request_without_reply_gets_none_even_when_it_is_bad(memory):
    def play(peer):
        request = peer.request(9)
        peer.send(struct.pack("<HHIIIQQ", 5, 12, 35, 0x10, 0, BASE, 3) + b"abc")
        peer.send(struct.pack("<HHIIIQQ", 6, 11, 32, 0x10, 0, 0, 3))
        peer.reply(request, request.body + b"\1")
        assert peer.request(9).command == 9  # and nothing before it
        peer.close()

    with playing(map_and(play)) as sock, mapped(sock, memory) as client:
        assert client.read(0, 0, 1) == 1
        with pytest.raises(DeviceLost):
            client.read(0, 0, 1)
        assert memory.bytes[:3] == b"abc"


@pytest.mark.parametrize(("access", "command", "body"), [(Access.READ, 12, b"1234"), (Access.WRITE, 11, b"")])
def test_a_mapping_grants_only_the_access_it_was_made_for(memory, access, command, body):
    def play(peer):
        request = peer.request(13)
        peer.send(struct.pack("<HHIIIQQ", 5, command, 32 + len(body), 0, 0, BASE, 4) + body)
        assert peer.recv(16)[0] == struct.pack("<HHIII", 5, command, 16, 0x21, 1)
        peer.reply(request)

    with playing(map_and(play)) as sock, mapped(sock, memory, access=access) as client:
        client.reset()
    assert memory.bytes[:4] == bytes(4)


def test_one_access_may_span_neighbouring_mappings(memory):
    def play(peer):
        peer.reply(peer.request(2))
        request = peer.request(13)
        peer.send(struct.pack("<HHIIIQQ", 5, 12, 36, 0, 0, BASE + 0x1FFE, 4) + b"abcd")
        assert peer.recv(32)[0][16:] == struct.pack("<QQ", BASE + 0x1FFE, 4)
        peer.send(struct.pack("<HHIIIQQ", 6, 11, 32, 0, 0, BASE + 0x1FFE, 4))
        assert peer.recv(36)[0][32:] == b"abcd"
        peer.reply(request)

    with Memory() as second, playing(map_and(play)) as sock, mapped(sock, memory) as client:
        client.dma_map(BASE + 0x2000, second)
        client.reset()
        assert (memory.bytes[0x1FFE:], second.bytes[:2]) == (b"ab", b"cd")


def test_a_reply_that_nobody_waits_for_ends_the_connection(memory):
    ready = threading.Event()

    def play(peer):
        peer.send(vectors.REGION_READ_REPLY)
        ready.set()

    with playing(map_and(play)) as sock, mapped(sock, memory) as client:
        assert ready.wait(5)
        with pytest.raises(ProtocolError, match="nobody waits"):
            client.service()
