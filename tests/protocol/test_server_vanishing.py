"""Clients that vanish at every point of a session: the next one is served, and nothing is left of the first."""

import os
import struct

import pytest
from helpers.admin_queue import SPARE
from helpers.emulator import eventually, fd_count
from helpers.raw_client import (
    DEVICE_RESET,
    DMA_MAP,
    DMA_UNMAP,
    GET_INFO,
    GET_IRQ_INFO,
    GET_REGION_INFO,
    QEMU_CAPABILITIES,
    REGION_READ,
    REGION_WRITE,
    SET_IRQS,
    VERSION,
    Descriptors,
    RawClient,
    access,
    close,
    dma_map,
    dma_unmap,
    header,
    irq_set,
    region_info,
    version_body,
)

BASE = 0x100000


def script(descriptors):
    """(message, descriptors) of a session that uses everything: maps, vectors, rings, a queue that runs."""
    memory = descriptors.memory(1 << 20)

    def message(command, body=b"", fds=()):
        return header(command, len(body)) + body, fds

    def write(offset, layout, value, region=0):
        data = struct.pack(layout, value)
        return message(REGION_WRITE, access(region, offset, len(data), data))

    create = struct.pack("<QQQQBBHHBBIIQ", BASE + SPARE, BASE + SPARE + 0x8000, BASE + SPARE + 0x9000, 0, 4, 4, 1, 0, 0,
                         0, 0xFFFFFFFF, 0, 0)
    admin = struct.pack("<HHI", 0x10, 0, 1) + create
    os.pwrite(memory, admin, 0)
    return [
        message(VERSION, version_body({**QEMU_CAPABILITIES, "twin_socket": {"supported": True}})),
        message(DMA_MAP, dma_map(BASE, 1 << 20), [memory]),
        message(DMA_MAP, dma_map(0x8000000, 1 << 20)),
        message(GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)),
        message(GET_REGION_INFO, region_info(2)),
        message(GET_REGION_INFO, region_info(4)),
        message(GET_IRQ_INFO, struct.pack("<IIII", 16, 0, 2, 0)),
        message(SET_IRQS, irq_set(0x24, 2, 0, 8), [descriptors.eventfd() for _ in range(8)]),
        message(SET_IRQS, irq_set(0x24, 0, 0, 1), [descriptors.eventfd()]),
        message(SET_IRQS, irq_set(0x24, 3, 0, 1), [descriptors.eventfd()]),
        write(4, "<H", 6, region=7),
        write(0xA0, "<Q", BASE), write(0xA8, "<Q", BASE + 0x8000), write(0xB0, "<I", 4), write(0x80, "<I", 1),
        message(REGION_READ, access(0, 0x84, 4)),
        write(0xB4, "<I", 1),
        # Queue 0 exists now, or soon; its ring holds zeros, which are faults.
        write(0, "<I", 3, region=2),
        message(DMA_MAP, dma_map(0x10000000, 1 << 20), [memory]),
        message(DMA_UNMAP, dma_unmap(0x8000000, 1 << 20)),
        # Boot anew with rings behind messages that nobody answers.
        write(0x80, "<I", 0),
        message(DMA_MAP, dma_map(0x8000000, 1 << 20)),
        write(0xA0, "<Q", 0x8000000), write(0x80, "<I", 1),
        message(REGION_READ, access(7, 0, 4096)),
        message(DEVICE_RESET),
    ]


def follow(path, messages, then=b"", fds=(), wait=True):
    """Connect, send the messages, perhaps wait for the last reply, send a rest, and vanish."""
    client = RawClient(path, negotiate=False)
    with client:
        for raw, passed in messages:
            client.send_raw(raw, passed)
        if wait:
            for _ in messages:
                while True:
                    message = client.recv()
                    close(message.fds)
                    if message.flags & 1:
                        break
        if then:
            client.send_raw(then, fds)


@pytest.mark.parametrize("wait", [True, False], ids=["after replies", "at once"])
def test_client_vanishes_after_every_message(emulator, wait):
    process, path = emulator
    with RawClient(path) as client:
        assert client.alive()
        baseline = fd_count(process)
    with Descriptors() as descriptors:
        messages = script(descriptors)
        for count in range(len(messages) + 1):
            follow(path, messages[:count], wait=wait)
            with RawClient(path) as client:
                assert client.alive(), f"after message {count}"
                assert eventually(lambda: fd_count(process) == baseline), f"descriptors after message {count}"


@pytest.mark.parametrize("cut", [1, 8, 16, 20])
def test_client_vanishes_within_every_message(emulator, cut):
    process, path = emulator
    with RawClient(path) as client:
        assert client.alive()
        baseline = fd_count(process)
    with Descriptors() as descriptors:
        messages = script(descriptors)
        for count, (raw, fds) in enumerate(messages):
            follow(path, messages[:count], then=raw[:cut] if cut < len(raw) else raw[:8], fds=fds)
            with RawClient(path) as client:
                assert client.alive(), f"within message {count}"
                assert eventually(lambda: fd_count(process) == baseline), f"descriptors after message {count}"


def test_hundreds_of_connections_that_say_nothing(emulator):
    process, path = emulator
    with RawClient(path) as client:
        assert client.alive()
        baseline = fd_count(process)
    for _ in range(300):
        RawClient(path, negotiate=False).sock.close()
    with RawClient(path) as client:
        assert client.alive()
        assert eventually(lambda: fd_count(process) == baseline)
