"""The wire formats are the specification's: they pack to and unpack from bytes written by hand."""

import array
import errno
import json
import os
import socket
import struct
import threading
import time

import pytest
from helpers.scripted_server import open_fds
from vectors import vfio_user as vectors

from maia_rt.errors import ProtocolError
from maia_rt.transport import wire

FIXED = [
    ("DMA_MAP", wire.DMA_MAP, vectors.DMA_MAP_REQUEST, vectors.DMA_MAP_FIELDS),
    ("DMA_UNMAP", wire.DMA_UNMAP, vectors.DMA_UNMAP_REQUEST, vectors.DMA_UNMAP_FIELDS),
    ("DEVICE_GET_INFO", wire.DEVICE_INFO, vectors.DEVICE_INFO_REPLY, vectors.DEVICE_INFO_FIELDS),
    ("GET_REGION_INFO", wire.REGION_INFO, vectors.REGION_INFO_REPLY, vectors.REGION_INFO_FIELDS),
    ("GET_IRQ_INFO", wire.IRQ_INFO, vectors.IRQ_INFO_REPLY, vectors.IRQ_INFO_FIELDS),
    ("SET_IRQS", wire.IRQ_SET, vectors.SET_IRQS_REQUEST, vectors.SET_IRQS_FIELDS),
    ("REGION_READ", wire.REGION_ACCESS, vectors.REGION_READ_REQUEST, vectors.REGION_ACCESS_FIELDS),
    ("REGION_READ reply", wire.REGION_ACCESS, vectors.REGION_READ_REPLY, vectors.REGION_ACCESS_FIELDS),
    ("REGION_WRITE", wire.REGION_ACCESS, vectors.REGION_WRITE_REQUEST, vectors.REGION_ACCESS_FIELDS),
    ("DMA_READ", wire.DMA_ACCESS, vectors.DMA_READ_REQUEST, (0x1000_0008, 5)),
    ("DMA_WRITE", wire.DMA_ACCESS, vectors.DMA_WRITE_REQUEST, (0x1000_0008, 5)),
]


@pytest.mark.parametrize(("structure", "raw", "fields"), [row[1:] for row in FIXED], ids=[row[0] for row in FIXED])
def test_fixed_structures_match_the_bytes_of_the_text(structure, raw, fields):
    body = raw[16:]
    assert structure.unpack_from(body) == fields
    assert structure.pack(*fields) == body[:structure.size]


MESSAGES = [name for name in dir(vectors) if name.endswith(("_REQUEST", "_REPLY", "_POSTED"))]


@pytest.mark.parametrize("name", MESSAGES)
def test_every_header_says_its_messages_length_and_packs_back(name):
    raw = getattr(vectors, name)
    header = wire.unpack_header(raw)
    assert header.size == len(raw)
    assert header.body_size == len(raw) - 16
    assert wire.pack_header(header.id, header.command, header.body_size, header.flags, header.errno) == raw[:16]
    assert wire.Command(header.command).name.removeprefix("DEVICE_").removeprefix("GET_")


def test_an_error_reply_is_a_header_with_id_command_and_errno():
    request = wire.unpack_header(vectors.REGION_READ_REQUEST)
    assert wire.pack_error(request, errno.EINVAL) == vectors.ERROR_REPLY


def test_reset_has_no_payload():
    assert wire.pack_header(0x1234, wire.Command.DEVICE_RESET, 0) == vectors.RESET_REQUEST
    assert wire.pack_header(0x1234, wire.Command.DEVICE_RESET, 0, wire.TYPE_REPLY) == vectors.RESET_REPLY


def test_write_multi_entries_are_24_bytes_apart():
    body = vectors.WRITE_MULTI_REQUEST[16:]
    (count,) = wire.WRITE_MULTI_COUNT.unpack_from(body)
    entries = list(wire.WRITE_MULTI_ENTRY.iter_unpack(body[8:]))
    assert (count, entries) == (2, vectors.WRITE_MULTI_FIELDS)
    assert wire.WRITE_MULTI_COUNT.pack(2) + b"".join(wire.WRITE_MULTI_ENTRY.pack(*e) for e in entries) == body


def test_an_ioeventfd_entry_has_40_bytes():
    assert wire.IOEVENTFD.size == 40


# --- VERSION ---------------------------------------------------------------------------------------------------------


def payload(capabilities, major=0, minor=0):
    return struct.pack("<HH", major, minor) + json.dumps({"capabilities": capabilities}).encode() + b"\0"


def test_version_of_the_text_is_understood():
    version = wire.unpack_version(vectors.VERSION_REQUEST[16:])
    assert (version.major, version.minor) == (0, 1)
    assert version.offered == {"max_msg_fds", "max_data_xfer_size"}
    assert version.capabilities == wire.Capabilities(max_msg_fds=8, max_data_xfer_size=65536)


def test_version_without_text_means_the_defaults():
    version = wire.unpack_version(b"\0\0\0\0")
    assert version.capabilities == wire.Capabilities(1, 1048576, 65535, 4096, False, False, None)
    assert not version.offered


def test_version_packs_what_it_unpacks():
    caps = wire.Capabilities(16, 1 << 16, 100, 0x201000, True, True, 0)
    version = wire.unpack_version(wire.pack_version(caps, minor=1))
    assert (version.capabilities, version.minor) == (caps, 1)


def test_a_version_reply_names_only_the_keys_it_is_given():
    raw = wire.pack_version(wire.Capabilities(max_msg_fds=8), keys={"max_msg_fds", "twin_socket"})
    assert raw == b'\0\0\0\0{"capabilities":{"max_msg_fds":8}}\0'


def test_a_full_version_reply_fits_into_qemus_buffer():
    caps = wire.Capabilities(16, 64 << 20, 65535, 0xFFFFFFFFFFFFF000, True)
    assert wire.HEADER_SIZE + len(wire.pack_version(caps)) <= 214


def test_unknown_version_keys_are_ignored():
    raw = b'\0\0\0\0{"new":1,"capabilities":{"newer":[1],"twin_socket":{"newest":2},"migration":{"pgsize":8192}}}\0'
    assert wire.unpack_version(raw).capabilities == wire.Capabilities()


BAD_VERSIONS = {
    "empty": b"",
    "three bytes": b"\0\0\0",
    "no NUL": b'\0\0\0\0{"capabilities":{}}',
    "only NUL": b"\0\0\0\0\0",
    "two texts": b"\0\0\0\0{}\0{}\0",
    "broken text": b'\0\0\0\0{"capabilities":{\0',
    "not UTF-8": b'\0\0\0\0{"\xff\xfe":1}\0',
    "an array": b"\0\0\0\0[]\0",
    "deep nesting": b"\0\0\0\0" + b"[" * 100_000 + b"\0",
    "endless number": b'\0\0\0\0{"capabilities":{"pgsizes":' + b"9" * 10_000 + b"}}\0",
    "capabilities a list": b'\0\0\0\0{"capabilities":[]}\0',
    "capabilities null": b'\0\0\0\0{"capabilities":null}\0',
}
BAD_VALUES = [
    ("max_msg_fds", "8"), ("max_msg_fds", True), ("max_msg_fds", 8.0), ("max_msg_fds", None), ("max_msg_fds", -1),
    ("max_msg_fds", 1025), ("max_data_xfer_size", 0), ("max_data_xfer_size", -5), ("max_data_xfer_size", 1 << 64),
    ("max_data_xfer_size", []), ("max_dma_maps", -1), ("max_dma_maps", {}), ("pgsizes", 0), ("pgsizes", "4096"),
    ("write_multiple", 1), ("write_multiple", "true"), ("twin_socket", True), ("twin_socket", {"supported": 1}),
    ("twin_socket", {"supported": True, "fd_index": "0"}), ("twin_socket", {"fd_index": -1}), ("migration", 5),
    ("migration", {"pgsize": 100}), ("migration", {"pgsize": 0}), ("migration", {"max_bitmap_size": -1}),
]


@pytest.mark.parametrize("raw", BAD_VERSIONS.values(), ids=BAD_VERSIONS.keys())
def test_a_malformed_version_is_refused_with_einval(raw):
    with pytest.raises(ProtocolError) as caught:
        wire.unpack_version(raw)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_a_capability_of_the_wrong_kind_or_size_is_refused_with_einval(key, value):
    with pytest.raises(ProtocolError, match=key) as caught:
        wire.unpack_version(payload({key: value}))
    assert caught.value.errno == errno.EINVAL


# --- regions ---------------------------------------------------------------------------------------------------------


def test_region_info_with_sparse_areas_packs_to_the_bytes_of_the_text():
    raw = wire.pack_region_info(80, 2, 7, size=0x1_0000, offset=0x4000_0000, areas=vectors.REGION_SPARSE_AREAS)
    assert raw == vectors.REGION_SPARSE_REPLY[16:]
    assert wire.unpack_region_caps(raw, 32) == (vectors.REGION_SPARSE_AREAS, None)


def test_region_info_without_room_says_how_much_it_needs():
    raw = wire.pack_region_info(32, 2, 7, size=0x1_0000, offset=0x4000_0000, areas=vectors.REGION_SPARSE_AREAS)
    assert raw == vectors.REGION_TOO_SMALL_REPLY[16:]


def test_a_region_without_areas_has_no_capabilities():
    raw = wire.pack_region_info(4096, 1, 3, size=256, offset=0)
    assert wire.REGION_INFO.unpack(raw) == (32, 3, 1, 0, 256, 0)


def test_a_chain_of_two_capabilities_is_walked():
    assert wire.unpack_region_caps(vectors.REGION_INFO_REPLY[16:], 32) == ([], (5, 7))


@pytest.mark.parametrize(("at", "chain"), [
    (16, b""),                                                     # into the fixed part
    (32, b"\x01\0\x01\0"),                                         # cut short in its header
    (32, struct.pack("<HHI", 1, 1, 0)),                            # no count
    (32, struct.pack("<HHIII", 1, 1, 0, 1000, 0)),                 # more areas than bytes
    (32, struct.pack("<HHI", 9, 1, 32) + bytes(16)),               # leads to itself
    (32, struct.pack("<HHI", 9, 1, 4096) + bytes(16)),             # leads outside
    (32, struct.pack("<HHI", 9, 1, 40) + struct.pack("<HHI", 9, 1, 32)),  # leads back
    (0xFFFF_FFFF, b""),
])
def test_a_hostile_capability_chain_is_refused(at, chain):
    info = bytes(32) + chain
    with pytest.raises(ProtocolError):
        wire.unpack_region_caps(info, at)


# --- the socket ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    before = open_fds()
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    a.settimeout(5)
    b.settimeout(5)
    yield a, b
    a.close()
    b.close()
    assert open_fds() == before


def fds_of(sock, data, fds):
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def test_reading_exactly_keeps_descriptors_with_their_message(pair):
    a, b = pair
    one, two = os.memfd_create("one"), os.memfd_create("two")
    os.write(two, b"second")
    b.send(b"header1.body1")
    fds_of(b, b"header2.", [one])
    b.send(b"body2")
    fds_of(b, b"header3.body3", [two])
    got = []
    for _ in range(3):
        header, body = bytearray(8), bytearray(5)
        fds = wire.recv_exact(a, header, 4)
        fds += wire.recv_exact(a, body, 4)
        got.append((bytes(header + body), len(fds), fds))
    assert [(text, count) for text, count, _ in got] == [
        (b"header1.body1", 0), (b"header2.body2", 1), (b"header3.body3", 1)]
    assert os.pread(got[2][2][0], 10, 0) == b"second"
    assert not os.get_inheritable(got[2][2][0])
    for fd in (one, two, *got[1][2], *got[2][2]):
        os.close(fd)


def test_a_message_that_dribbles_in_is_put_together(pair):
    a, b = pair
    text = bytes(range(40))

    def dribble():
        for byte in text:
            b.send(bytes([byte]))
            time.sleep(0.0005)

    thread = threading.Thread(target=dribble)
    thread.start()
    buffer = bytearray(40)
    assert wire.recv_exact(a, buffer, 1) == []
    thread.join()
    assert buffer == text


def test_more_descriptors_than_there_is_room_for_are_closed_and_refused(pair):
    a, b = pair
    fd = os.memfd_create("many")
    before = open_fds()
    fds_of(b, b"12345678", [fd] * 9)
    with pytest.raises(ProtocolError):
        wire.recv_exact(a, bytearray(8), 4)
    assert open_fds() == before
    fds_of(b, b"12345678", [fd] * 2)
    with pytest.raises(ProtocolError):  # CMSG_SPACE(4) has room for two
        wire.recv_exact(a, bytearray(8), 1)
    assert open_fds() == before
    fds_of(b, b"12345678", [fd] * 3)
    assert wire.recv_exact(a, bytearray(8), 0) == []
    assert open_fds() == before
    os.close(fd)


def test_descriptors_are_closed_when_the_message_breaks_off(pair):
    a, b = pair
    fd = os.memfd_create("half")
    before = open_fds()
    fds_of(b, b"1234", [fd])
    b.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError, match="4 of 8"):
        wire.recv_exact(a, bytearray(8), 4)
    assert open_fds() == before
    os.close(fd)


def test_a_deadline_ends_a_peer_that_sends_drop_by_drop(pair):
    a, b = pair
    b.send(b"1234")
    with pytest.raises(TimeoutError):
        wire.recv_exact(a, bytearray(8), 0, time.monotonic() - 1)


def test_a_message_larger_than_the_socket_takes_at_once_is_sent_whole(pair):
    a, b = pair
    fd = os.memfd_create("big")
    body = os.urandom(3 << 20)
    got = bytearray(len(body) + 16)
    fds = []
    thread = threading.Thread(target=lambda: fds.extend(wire.recv_exact(a, got, 4)))
    thread.start()
    wire.send(b, [b"0123456789abcdef", body], [fd])
    thread.join()
    assert got[:16] == b"0123456789abcdef"
    assert got[16:] == body
    assert len(fds) == 1
    wire.close_fds([fd, *fds])
