"""Memory without a descriptor: the server's DMA_READ and DMA_WRITE, and clients that answer badly or not at all."""

import contextlib
import errno
import socket
import struct
import time

import pytest
from helpers.admin_queue import (
    BAD_ADDRESS,
    CONTROL,
    FAILED,
    IDENTIFY,
    MEMORY,
    OK,
    READY,
    RESET,
    STATUS,
    Driver,
    MessageClient,
)
from helpers.raw_client import (
    CONFIG,
    DEVICE_RESET,
    DMA_MAP,
    DMA_READ,
    DMA_UNMAP,
    DMA_WRITE,
    ERROR,
    REGION_READ,
    REPLY,
    SET_IRQS,
    Descriptors,
    RawClient,
    access,
    dma_map,
    dma_unmap,
    header,
    irq_set,
)
from helpers.stopwatch import promptly

from maia_rt.contract.commands import CONTRACT_MAJOR, CONTRACT_MINOR

SILENT = 0x4000_0000
"""Where memory lies whose client does not answer."""


@pytest.fixture
def driver(emulator):
    """Rings in shared memory; more memory by messages at SILENT, which only the test answers."""
    with Driver(emulator[1]) as booted:
        booted.boot()
        booted.client.call(DMA_MAP, dma_map(SILENT, MEMORY))
        yield booted


def ask(driver, address=SILENT):
    """Post an IDENTIFY whose page lies there, and receive the DMA_WRITE it causes."""
    client = driver.client
    driver.put(driver.sq + driver.tail % driver.entries * 64, struct.pack("<HHI7Q", IDENTIFY, 0, 1, address, *[0] * 6))
    driver.tail += 1
    number = client.send(10, access(0, 0xB4, 4, struct.pack("<I", driver.tail)))
    messages = [client.recv(), client.recv()]
    (request,) = (m for m in messages if not m.flags & REPLY)
    (reply,) = (m for m in messages if m.flags & REPLY)
    assert reply.id == number
    assert (request.command, request.flags, request.errno) == (DMA_WRITE, 0, 0)
    return request


def test_write_has_address_count_and_data(driver):
    request = ask(driver)
    assert struct.unpack_from("<QQ", request.body) == (SILENT, 512)
    assert len(request.body) == 16 + 512
    assert request.body[16:20] == struct.pack("<HH", CONTRACT_MAJOR, CONTRACT_MINOR)
    answer(driver, request)
    assert driver.wait(driver.tail - 1)[1] == OK


def answer(driver, request, body=None, flags=REPLY, error=0, fds=(), number=None, command=None):
    body = request.body[:16] if body is None else body
    command = request.command if command is None else command
    number = request.id if number is None else number
    driver.client.send_raw(header(command, len(body), number, flags, error) + body, fds)


def test_qemus_short_write_reply_is_taken(driver):
    answer(driver, ask(driver), b"")
    assert driver.wait(driver.tail - 1)[1] == OK


@pytest.mark.parametrize("body", [bytes(8), bytes(12), bytes(17), bytes(600)])
def test_write_reply_of_another_size_is_a_failed_access(driver, body):
    answer(driver, ask(driver), body)
    assert driver.wait(driver.tail - 1)[1] == BAD_ADDRESS
    assert driver.client.alive()


@pytest.mark.parametrize("error", [errno.EFAULT, errno.EPERM, errno.E2BIG, 0, 9999, 0xFFFFFFFF])
def test_error_reply_is_a_failed_access(driver, error):
    answer(driver, ask(driver), b"", REPLY | ERROR, error)
    assert driver.wait(driver.tail - 1)[1] == BAD_ADDRESS
    assert driver.client.alive()


def test_reply_with_another_id_or_command_answers_nothing(driver):
    client = driver.client
    request = ask(driver)
    for change in ({"number": request.id + 1 & 0xFFFF}, {"command": DMA_READ}):
        answer(driver, request, **change)
        refusal = client.recv()
        assert (refusal.flags, refusal.errno) == (REPLY | ERROR, errno.EINVAL)
    answer(driver, request)
    assert driver.wait(driver.tail - 1)[1] == OK
    answer(driver, request)
    assert client.recv().errno == errno.EINVAL


def test_reply_with_descriptors_is_refused(driver):
    request = ask(driver)
    with Descriptors() as descriptors:
        answer(driver, request, fds=[descriptors.memory(4096)])
    assert driver.client.recv().errno == errno.EINVAL
    answer(driver, request)
    assert driver.wait(driver.tail - 1)[1] == OK


def test_commands_are_served_while_the_server_waits(driver):
    """The deadlock rule: a client may want something before it answers."""
    request = ask(driver)
    for _ in range(50):
        assert driver.client.alive()
    with Descriptors() as descriptors:
        driver.client.call(SET_IRQS, irq_set(0x24, 2, 1, 1), [descriptors.eventfd()])
    driver.client.call(DMA_MAP, dma_map(SILENT + MEMORY, 4096))
    answer(driver, request)
    assert driver.wait(driver.tail - 1)[1] == OK


def test_unmap_ends_what_is_under_way_in_its_range(driver):
    request = ask(driver)
    start = time.monotonic()
    driver.client.call(DMA_UNMAP, dma_unmap(SILENT, MEMORY))
    promptly(start, 1)
    assert driver.wait(driver.tail - 1)[1] == BAD_ADDRESS
    # The reply that crossed it is nobody's fault.
    answer(driver, request)
    assert driver.client.alive()


def test_unmap_elsewhere_does_not_disturb(driver):
    driver.client.call(DMA_MAP, dma_map(SILENT + MEMORY, 4096))
    request = ask(driver)
    driver.client.call(DMA_UNMAP, dma_unmap(SILENT + MEMORY, 4096))
    answer(driver, request)
    assert driver.wait(driver.tail - 1)[1] == OK


@pytest.mark.parametrize("how", ["message", "register", "enable"])
def test_reset_does_not_wait_for_the_client(driver, how):
    request = ask(driver)
    start = time.monotonic()
    if how == "message":
        driver.client.call(DEVICE_RESET)
    else:
        driver.client.write32(CONTROL, 2 if how == "register" else 0)
    promptly(start, 1)
    assert driver.client.read32(STATUS) == RESET
    answer(driver, request)
    driver.client.call(DMA_UNMAP, dma_unmap(0, 0, flags=2))
    assert driver.client.read32(STATUS) == RESET


def test_client_that_never_answers_costs_it_only_time(driver):
    ask(driver)
    start = time.monotonic()
    assert driver.wait(driver.tail - 1)[1] == BAD_ADDRESS
    assert promptly(start, 8) > 4
    assert driver.client.read32(STATUS) == READY


@pytest.mark.parametrize("limit", [4096, 100, 1 << 20])
def test_accesses_are_split_to_the_clients_limit(emulator, limit):
    sizes = []

    class Counting(MessageClient):
        def serve(self, message):
            sizes.append(struct.unpack_from("<QQ", message.body)[1])
            super().serve(message)

    with Counting(emulator[1], capabilities={"max_data_xfer_size": limit}) as client:
        client.memory, client.base = bytearray(MEMORY), 0
        client.write(CONFIG, 4, b"\6")
        client.call(DMA_MAP, dma_map(0, MEMORY))
        client.write64(0xA0, 0)
        client.write64(0xA8, 0x8000)
        client.write32(0xB0, 8)
        client.write32(CONTROL, 1)
        while client.read32(STATUS) & 0xF == 1:
            pass
        assert client.read32(STATUS) & 0xF == READY
    assert max(sizes) <= limit
    assert sum(sizes) == 256 * 64 + 256 * 32


def test_client_that_goes_while_asked(emulator):
    for _ in range(3):
        driver = Driver(emulator[1])
        with driver:
            driver.boot()
            driver.client.call(DMA_MAP, dma_map(SILENT, MEMORY))
            ask(driver)
    start = time.monotonic()
    with RawClient(emulator[1]) as client:
        assert client.alive()
    promptly(start, 2)


def test_read_only_memory_is_not_written(driver):
    driver.client.call(DMA_MAP, dma_map(SILENT + MEMORY, 4096, flags=1))
    assert driver.command(IDENTIFY, SILENT + MEMORY)[0] == BAD_ADDRESS


# --- twin socket -----------------------------------------------------------------------------------------------------


@pytest.fixture
def twin_driver(emulator):
    with Driver(emulator[1], capabilities={"twin_socket": {"supported": True}}) as booted:
        client = booted.client
        twin = socket.socket(fileno=client.version.fds.pop())
        with contextlib.closing(twin):
            twin.settimeout(5)
            booted.boot()
            client.call(DMA_MAP, dma_map(SILENT, MEMORY))
            yield booted, RawClient(twin, negotiate=False)


def post_identify(driver):
    return driver.post(struct.pack("<HHI7Q", IDENTIFY, 0, 1, SILENT, *[0] * 6))


def test_server_commands_travel_on_the_twin_socket(twin_driver):
    driver, twin = twin_driver
    index = post_identify(driver)
    request = twin.recv()
    assert request.command == DMA_WRITE
    assert driver.client.alive()
    twin.send_raw(header(DMA_WRITE, 16, request.id, REPLY) + request.body[:16])
    assert driver.wait(index)[1] == OK


def test_twin_socket_that_is_closed_fails_message_dma_only(twin_driver):
    driver, twin = twin_driver
    twin.sock.shutdown(socket.SHUT_RDWR)
    assert driver.wait(post_identify(driver))[1] == BAD_ADDRESS
    assert driver.client.read32(STATUS) == READY


def test_twin_socket_with_an_impossible_size_fails_message_dma_only(twin_driver):
    driver, twin = twin_driver
    twin.send_raw(header(DMA_WRITE, 0, size=3))
    assert twin.recv().errno == errno.EINVAL
    assert twin.closed()
    assert driver.wait(post_identify(driver))[1] == BAD_ADDRESS
    assert driver.client.alive()


def test_reset_while_the_twin_socket_is_silent(twin_driver):
    driver, twin = twin_driver
    post_identify(driver)
    assert twin.recv().command == DMA_WRITE
    start = time.monotonic()
    driver.client.call(DEVICE_RESET)
    promptly(start, 1)


def test_ring_memory_by_messages_that_fails_kills_the_firmware(emulator):
    with RawClient(emulator[1]) as client:
        client.write(CONFIG, 4, b"\6")
        client.call(DMA_MAP, dma_map(0, MEMORY))
        client.write64(0xA8, 0x8000)
        client.write32(0xB0, 4)
        number = client.send(10, access(0, CONTROL, 4, struct.pack("<I", 1)))
        messages = [client.recv(), client.recv()]
        assert {m.id for m in messages if m.flags & REPLY} == {number}
        (request,) = (m for m in messages if not m.flags & REPLY)
        assert request.command == DMA_READ
        assert struct.unpack("<QQ", request.body) == (0, 16 * 64)
        # Data of the wrong length.
        client.send_raw(header(DMA_READ, 16 + 4, request.id, REPLY) + request.body + b"oops")
        deadline = time.monotonic() + 5
        while client.read32(STATUS) & 0xF == 1 and time.monotonic() < deadline:
            pass
        assert client.read32(STATUS) == FAILED | 2 << 8
        assert client.call(REGION_READ, access(0, 0, 4))
