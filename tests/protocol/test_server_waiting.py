"""Clients that come while another one is served, and how a connection ends."""

import errno
import time

import pytest
from helpers.emulator import connect, end, eventually, fd_count, listening, spawn
from helpers.raw_client import ERROR, QEMU_CAPABILITIES, REPLY, VERSION, RawClient, header, version_body
from helpers.stopwatch import promptly


def waiting(path):
    """A client that has sent VERSION."""
    client = RawClient(path, negotiate=False)
    client.send(VERSION, version_body(QEMU_CAPABILITIES))
    return client


def read_to_the_end(sock):
    """All that the server sent; a connection that was reset instead of ended raises."""
    received = b""
    while part := sock.recv(1 << 16):
        received += part
    return received


def test_client_that_waits_in_vain_hears_ebusy_before_it_loses_patience(emulator):
    process, path = emulator
    with RawClient(path) as first:
        before = fd_count(process)
        start = time.monotonic()
        with waiting(path) as second:
            reply = second.recv()
            assert (reply.command, reply.flags, reply.errno) == (VERSION, REPLY | ERROR, errno.EBUSY)
            assert promptly(start, 4) > 1  # QEMU and our own driver wait for five seconds
            assert read_to_the_end(second.sock) == b""
        assert first.alive()
        assert eventually(lambda: fd_count(process) == before)


def test_clients_that_wait_in_vain_go_in_their_order_and_the_last_is_served(emulator):
    _, path = emulator
    first = RawClient(path)
    early = [waiting(path) for _ in range(3)]
    time.sleep(1)
    late = waiting(path)
    for client in early:
        assert client.recv().errno == errno.EBUSY
        client.sock.close()
    first.sock.close()
    assert late.recv().flags == REPLY
    assert late.alive()
    late.sock.close()


def test_client_that_waits_without_a_word_is_just_let_go(emulator):
    _, path = emulator
    with RawClient(path) as first, connect(path) as silent:
        assert silent.recv(1) == b""
        assert first.alive()


def test_a_crowd_that_waits_costs_a_bounded_number_of_descriptors(emulator):
    process, path = emulator
    with RawClient(path) as first:
        before = fd_count(process)
        crowd = [connect(path) for _ in range(100)]
        time.sleep(0.2)
        assert fd_count(process) - before <= 64
        assert first.alive()
        for sock in crowd:
            sock.close()
    with RawClient(path) as client:
        assert client.alive()
    assert eventually(lambda: fd_count(process) <= before)


@pytest.mark.parametrize("rest", [0, 1, 100, 100_000])
def test_bad_header_with_more_behind_it_ends_the_stream_and_does_not_reset_it(emulator, rest):
    """A reset would throw the errno away with it, and QEMU aborts when it meets one."""
    with RawClient(emulator[1]) as client:
        client.send_raw(header(VERSION, 0, size=15) + bytes(rest))
        received = read_to_the_end(client.sock)
        assert len(received) == 16
        assert int.from_bytes(received[12:], "little") == errno.EINVAL


@pytest.mark.parametrize("state", ["served", "waiting"])
def test_server_that_is_told_to_end_ends_the_stream_and_does_not_reset_it(tmp_path, state):
    path = f"{tmp_path}/s"
    process = spawn("--socket", path)
    listening(process, 1)
    with RawClient(path) as first:
        if state == "served":
            first.send_raw(header(9, 16)[:10])
            first.send_raw(bytes(3))
            end(process)
            assert read_to_the_end(first.sock) == b""
        else:
            with waiting(path) as second:
                time.sleep(0.2)
                end(process)
                assert second.recv().errno == errno.ESHUTDOWN
                assert read_to_the_end(second.sock) == b""
