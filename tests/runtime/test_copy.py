"""Copies between host and device: every path, size and alignment."""

import random

import ml_dtypes
import numpy as np
import pytest

from maia_rt import CopyPath
from maia_rt.errors import ClosedError, InvalidArgument, InvalidType

SIZES = [0, 1, 2, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 65535, 70000]


def noise(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def test_every_size_and_alignment_arrives_and_nothing_else_changes(device, stream):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with device.allocate(80_000) as buffer:
        for size in SIZES + [rng.randrange(70_000) for _ in range(20)]:
            offset = rng.randrange(80_000 - size + 1)
            data = noise(size + 3, size)[3:]
            stream.fill(buffer, 0xA5)
            stream.copy(buffer.view(offset=offset, shape=size), data)
            whole = np.empty(80_000, np.uint8)
            stream.copy(whole, buffer)
            expected = np.full(80_000, 0xA5, np.uint8)
            expected[offset:offset + size] = data
            assert np.array_equal(whole, expected), f"{size} bytes at {offset}"
            back = np.empty(size, np.uint8)
            stream.copy(back, buffer[offset:offset + size])
            assert np.array_equal(back, data), f"{size} bytes from {offset}"


def test_every_small_size(attached):
    with attached.create_stream() as stream, attached.allocate(1024) as buffer:
        for size in range(300):
            data = noise(size, size)
            path = stream.copy(buffer[size:2 * size], data)
            assert path is (CopyPath.DIRECT if size == 0 else CopyPath.INLINE if size <= 16 else CopyPath.STAGED)
            back = np.empty(size, np.uint8)
            stream.copy(back, buffer[size:2 * size])
            assert np.array_equal(back, data), size


def test_64_mib_there_and_back(attached):
    data = noise(64 << 20)
    back = np.empty_like(data)
    with attached.create_stream() as stream, attached.allocate(data.nbytes) as buffer:
        assert stream.copy(buffer, data) is CopyPath.STAGED
        assert stream.copy(back, buffer) is CopyPath.STAGED
    assert np.array_equal(back, data)


@pytest.mark.parametrize("size", [(2 << 20) - 1, 2 << 20, (2 << 20) + 65, (5 << 20) - 63])
def test_long_copies_write_every_byte_and_none_beside(device, stream, size):
    room = size + 4096
    with device.allocate_host(room) as host, device.allocate(room) as first, device.allocate(room) as second:
        for source, target in [(0, 0), (1, 7), (63, 64), (4095, 2049)]:
            host.array[:] = noise(room, size + source)
            wanted = host.array[source:source + size].copy()
            stream.fill(first, 0xA5)
            stream.fill(second, 0x5A)
            stream.copy(first[target:target + size], host[source:source + size])
            stream.copy(second[source:source + size], first[target:target + size])
            stream.synchronize()
            host.array[:] = 0
            for buffer, around, at in ((first, 0xA5, target), (second, 0x5A, source)):
                stream.copy(host, buffer)
                stream.synchronize()
                expected = np.full(room, around, np.uint8)
                expected[at:at + size] = wanted
                assert np.array_equal(host.array, expected), (source, target, around)


def test_pinned_memory_is_copied_directly(device, stream):
    with device.allocate(100_000) as buffer, device.allocate_host(100_000) as host:
        host.array[:] = noise(100_000)
        assert stream.copy(buffer, host) is CopyPath.DIRECT
        stream.synchronize()
        expected = host.array.copy()
        host.array[:] = 0
        assert stream.copy(host, buffer) is CopyPath.DIRECT
        stream.synchronize()
        assert np.array_equal(host.array, expected)


def test_an_array_over_pinned_memory_counts_as_pinned(device, stream):
    with device.allocate(4000) as buffer, device.allocate_host((10, 100), np.float32) as host:
        array = np.asarray(host)
        array[:] = 3
        assert stream.copy(buffer[400:800], array[1]) is CopyPath.DIRECT
        assert stream.copy(array[2:4], buffer[400:1200]) is CopyPath.DIRECT
        stream.synchronize()
        assert (array[2] == 3).all()
        assert stream.copy(buffer[400:800], array[1].copy()) is CopyPath.STAGED


def test_device_to_device(device, stream):
    data = noise(10_000)
    with device.allocate(10_000) as a, device.allocate(10_000) as b:
        stream.copy(a, data)
        assert stream.copy(b[17:5000], a[1:4984]) is CopyPath.DIRECT
        assert np.array_equal(b.copy_to_host()[17:5000], data[1:4984])


def test_the_source_may_be_changed_when_copy_returns(device, stream):
    data = noise(3 << 20)
    expected = data.copy()
    with device.allocate(data.nbytes) as buffer:
        stream.copy(buffer, data)
        data[:] = 0
        assert np.array_equal(buffer.copy_to_host(), expected)


@pytest.mark.parametrize("make", [
    lambda: bytes(range(40)), lambda: bytearray(range(40)), lambda: memoryview(bytes(range(40))),
    lambda: np.arange(10, dtype=np.float32), lambda: np.arange(20, dtype=ml_dtypes.bfloat16),
    lambda: np.arange(80, dtype=np.uint8)[::2], lambda: np.arange(40, dtype=np.uint8).reshape(5, 8).T,
])
def test_sources_of_every_kind(attached, make):
    source = make()
    with attached.create_stream() as stream, attached.allocate(40) as buffer:
        stream.copy(buffer, source)
        raw = np.ascontiguousarray(source).tobytes() if isinstance(source, np.ndarray) else bytes(source)
        assert bytes(buffer.copy_to_host()) == raw


def test_destinations_of_every_kind(attached):
    with attached.create_stream() as stream, attached.allocate(40) as buffer:
        stream.copy(buffer, bytes(range(40)))
        for target in (bytearray(40), np.empty(10, np.float32), np.empty((), "V40"), memoryview(bytearray(40))):
            stream.copy(target, buffer)
            assert bytes(target) == bytes(range(40)) if not isinstance(target, np.ndarray) else target.tobytes()


def test_what_cannot_be_copied_is_refused_and_nothing_is_submitted(attached):
    with attached.create_stream() as stream, attached.allocate(40) as buffer:
        strided = np.zeros(80, np.uint8).reshape(2, 40)[:, ::2]
        for dst, src, error, text in [
            (buffer, bytes(39), InvalidArgument, "dst has 40 bytes, src 39"),
            (bytes(40), buffer, InvalidArgument, "read-only"),
            (strided, buffer.view(np.uint8), InvalidArgument, r"dst has shape \(2, 20\)"),
            (np.broadcast_to(np.uint8(0), 40), buffer, InvalidArgument, "read-only"),
            (buffer, [1, 2], InvalidType, "src is list"),
            (buffer, np.array([None] * 5), InvalidType, "Python objects"),
            (bytearray(4), bytes(4), InvalidType, "neither end"),
        ]:
            with pytest.raises(error, match=text):
                stream.copy(dst, src)
        assert stream.statistics().submitted == 0


def test_fill(device, stream):
    with device.allocate(1001) as buffer:
        stream.fill(buffer, 7)
        stream.fill(buffer[4:12], 0x01020304, 4)
        stream.fill(buffer[14:18], -2, 2)
        got = buffer.copy_to_host()
        assert bytes(got[:18]) == b"\7" * 4 + b"\4\3\2\1" * 2 + b"\7" * 2 + b"\xfe\xff" * 2
        assert (got[18:] == 7).all()
        for arguments in ((buffer, 0, 2), (buffer[1:5], 0, 2), (buffer, 0, 3), (buffer, 256), (buffer, -129)):
            with pytest.raises(InvalidArgument):
                stream.fill(*arguments)


def test_closed_memory_is_refused(attached):
    with attached.create_stream() as stream:
        buffer, host = attached.allocate(64), attached.allocate_host(64)
        part = buffer[8:16]
        array = host.array
        buffer.close()
        host.close()
        host.close()
        for call in (lambda: stream.copy(buffer, bytes(64)), lambda: stream.copy(bytearray(8), part),
                     lambda: stream.copy(host, bytes(64)), lambda: stream.fill(part, 0), lambda: part.address,
                     lambda: host.array):
            with pytest.raises(ClosedError):
                call()
        array[:] = 1


def test_memory_of_another_device_is_refused(attached, other_device):
    with other_device.allocate(64) as buffer, attached.create_stream() as stream, \
            pytest.raises(InvalidArgument, match="another device"):
        stream.copy(buffer, bytes(64))


def test_pinned_memory_is_not_reused_while_an_array_over_it_lives(attached):
    host = attached.allocate_host(1 << 16)
    array = host.array
    array[:] = 9
    host.close()
    others = [attached.allocate_host(1 << 16) for _ in range(8)]
    for other in others:
        other.array[:] = 1
    assert (array == 9).all()
    for other in others:
        other.close()


def test_views_keep_to_their_buffer(attached):
    with attached.allocate((4, 6), np.float32) as buffer:
        assert buffer.nbytes == 96
        assert buffer[1:3].shape == (2, 6)
        assert buffer[1:3].address == buffer.address + 24
        assert buffer[3:9].shape == (1, 6)
        assert buffer.view(np.int32, (2, 3), 4).dtype == np.int32
        assert buffer.view().shape == (96,)
        for arguments in ((np.float32, (25,)), (None, (97,)), (None, None, 97), (None, (1,), -1), (None, (-1,))):
            with pytest.raises(InvalidArgument):
                buffer.view(*arguments)
        assert buffer[::2].shape == (2, 6)
        assert buffer[0].shape == (6,)
