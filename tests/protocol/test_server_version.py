"""The server's side of VERSION (vfio-user: Version), and what QEMU's client adds to it."""

import errno
import json
import socket
import struct

import pytest
from helpers.emulator import fd_count
from helpers.raw_client import (
    DMA_MAP,
    ERROR,
    GET_INFO,
    QEMU_CAPABILITIES,
    REPLY,
    VERSION,
    Descriptors,
    RawClient,
    dma_map,
    header,
    version_body,
)


@pytest.fixture
def client(emulator):
    with RawClient(emulator[1], negotiate=False) as connected:
        yield connected


def answer(client, body):
    reply = client.call(VERSION, body)
    assert reply.body[-1:] == b"\0"
    return struct.unpack_from("<HH", reply.body), json.loads(reply.body[4:-1])["capabilities"], reply


def test_reply_obeys_qemus_hard_limits(client):
    request = version_body(QEMU_CAPABILITIES)
    (major, minor), caps, reply = answer(client, request)
    assert (major, minor) == (0, 0)
    assert reply.size <= 214
    assert len(reply.body) - 5 <= 193
    assert reply.fds == []
    assert 1 <= caps["max_msg_fds"] <= 16
    assert 0 < caps["max_data_xfer_size"] <= 64 << 20
    assert 0 < caps["max_dma_maps"] <= 65535
    assert caps["pgsizes"] and caps["pgsizes"] % 4096 == 0
    assert caps["write_multiple"] is True
    assert set(caps) <= {"max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes", "write_multiple"}


@pytest.mark.parametrize("minor", [0, 1, 2, 65535])
def test_minor_is_never_above_zero(client, minor):
    assert answer(client, version_body(QEMU_CAPABILITIES, minor=minor))[0] == (0, 0)


def test_version_without_json_means_the_defaults(client):
    version, caps, _ = answer(client, version_body())
    assert version == (0, 0)
    assert caps == {}
    assert client.alive()


def test_reply_names_only_what_was_offered(client):
    assert set(answer(client, version_body({"pgsizes": 4096, "max_dma_maps": 100}))[1]) == {"pgsizes", "max_dma_maps"}


def test_unknown_keys_are_ignored_at_every_level(client):
    text = {"capabilities": {"shadow": [1], "pgsizes": 4096}, "vendor": {"a": None}}
    caps = answer(client, struct.pack("<HH", 0, 0) + json.dumps(text).encode() + b"\0")[1]
    assert caps == {"pgsizes": 4096}


@pytest.mark.parametrize("capabilities", [
    {"max_msg_fds": "16"}, {"max_msg_fds": True}, {"max_msg_fds": -1}, {"max_msg_fds": 1025}, {"max_msg_fds": 1.5},
    {"max_data_xfer_size": "big"}, {"max_data_xfer_size": -5}, {"max_dma_maps": []}, {"pgsizes": {}},
    {"write_multiple": 1}, {"write_multiple": "true"}, {"twin_socket": True}, {"twin_socket": {"supported": 1}},
    {"migration": 1}, {"migration": {"pgsize": 1000}}, {"migration": {"pgsize": "4096"}},
])
def test_wrong_json_value_is_einval(client, capabilities):
    assert client.refused(VERSION, version_body(capabilities)) == errno.EINVAL
    assert client.closed()


@pytest.mark.parametrize("body", [
    b"", b"\0", b"\0\0\0", b"\0\0\0\0{}", b"\0\0\0\0{\0", b"\0\0\0\0\0", b"\0\0\0\0[]\0", b"\0\0\0\0null\0",
    b'\0\0\0\0{"capabilities":[]}\0', b"\0\0\0\0\xff\xfe\0", b"\0\0\0\0" + b"[" * 5000 + b"\0",
    version_body({}, major=1),
], ids=lambda b: repr(bytes(b[:24])))
def test_broken_version_is_einval_and_ends_the_client(client, body):
    assert client.refused(VERSION, body) == errno.EINVAL
    assert client.closed()


def test_descriptors_in_version_are_refused(client):
    with Descriptors() as descriptors:
        body = version_body(QEMU_CAPABILITIES)
        assert client.refused(VERSION, body, [descriptors.memory(4096)]) == errno.EINVAL
    assert client.closed()


@pytest.mark.parametrize("command", [2, 4, 9, 13, 99])
def test_anything_before_version_is_refused_and_ends_the_client(client, command):
    assert client.refused(command, bytes(16)) == errno.EINVAL
    assert client.closed()


def test_second_version_is_refused_and_changes_nothing(emulator):
    with RawClient(emulator[1]) as client:
        assert client.refused(VERSION, version_body(QEMU_CAPABILITIES)) == errno.EINVAL
        assert client.alive()


def test_write_multiple_is_declined_where_it_was(client):
    assert answer(client, version_body({"write_multiple": False}))[1] == {"write_multiple": False}


def test_twin_socket_comes_only_to_who_asked(client):
    _, caps, reply = answer(client, version_body({**QEMU_CAPABILITIES, "twin_socket": {"supported": False}}))
    assert reply.fds == []
    assert "twin_socket" not in caps


def test_twin_socket_is_passed_with_its_index(client):
    _, caps, reply = answer(client, version_body({**QEMU_CAPABILITIES, "twin_socket": {"supported": True}}))
    assert caps["twin_socket"] == {"supported": True, "fd_index": 0}
    assert len(reply.fds) == 1
    with socket.socket(fileno=reply.fds[0]) as twin:
        assert (twin.family, twin.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
        # Nothing but replies belongs there.
        twin.settimeout(5)
        twin.sendall(header(GET_INFO, 0, number=7))
        assert struct.unpack("<HHIII", twin.recv(16)) == (7, GET_INFO, 16, REPLY | ERROR, errno.EINVAL)
        assert client.alive()


def test_version_that_wants_no_reply_gets_none(client):
    client.send(VERSION, version_body(QEMU_CAPABILITIES), flags=0x10)
    number = client.send(GET_INFO, struct.pack("<IIII", 16, 0, 0, 0))
    assert client.recv().id == number


def test_read_limit_is_the_clients(emulator):
    with RawClient(emulator[1], capabilities={"max_data_xfer_size": 64}) as client:
        assert client.read(7, 0, 64)
        assert client.refused(9, struct.pack("<QII", 0, 7, 65)) == errno.EINVAL


def test_client_with_the_defaults_only_may_pass_one_descriptor(client):
    client.call(VERSION, version_body())
    with Descriptors() as descriptors:
        client.call(DMA_MAP, dma_map(0, 4096), [descriptors.memory(4096)])


def test_server_keeps_only_its_end_of_the_twin_socket(emulator):
    process, path = emulator
    with RawClient(path) as client:
        assert client.alive()
        plain = fd_count(process)
    with RawClient(path, capabilities={"twin_socket": {"supported": True}}) as client:
        assert client.alive()
        assert fd_count(process) == plain + 1
