"""Arrays that are there already, pinned; and device memory seen through BAR 4."""

import threading
import time

import numpy as np
import pytest

from maia_rt import CopyPath, Space
from maia_rt.errors import BufferInUse, ClosedError, InvalidArgument, InvalidType, Unsupported
from tests.helpers import tiny_program
from tests.helpers.blocked import blocked


def test_a_registered_array_is_copied_from_and_to_directly(device, stream):
    data = np.random.default_rng(0).integers(0, 255, (100, 300), np.uint8)
    target = np.zeros_like(data)
    with device.register(data) as source, device.register(target) as landing, \
            device.allocate(data.shape, "u1") as buffer:
        assert source.shape == data.shape
        assert stream.copy(buffer, source) is CopyPath.DIRECT
        assert stream.copy(landing, buffer) is CopyPath.DIRECT
        stream.synchronize()
        assert np.array_equal(target, data)
        assert stream.copy(buffer[10:20], data[:10]) is CopyPath.DIRECT
        assert stream.copy(target[:, ::3], buffer[:, :100]) is CopyPath.DIRECT
        stream.synchronize()
        assert np.array_equal(target[10:20, ::3], data[:10, :100])


def test_after_close_it_is_ordinary_memory_again(device, stream):
    data = np.arange(1000, dtype=np.uint8)
    with device.allocate(1000) as buffer:
        with device.register(data):
            assert stream.copy(buffer, data) is CopyPath.DIRECT
            stream.synchronize()
        assert stream.copy(buffer, data) is CopyPath.STAGED
        data[:] = 3
        with device.register(data) as again:
            assert stream.copy(buffer, again) is CopyPath.DIRECT
            assert (buffer.copy_to_host(stream) == 3).all()


def aligned(count):
    """An array of FP32 zeros at a multiple of 64 bytes, as kernels want them."""
    memory = np.zeros(4 * count + 64, np.uint8)
    return memory[-memory.ctypes.data % 64:][:4 * count].view(np.float32)


def test_a_kernel_takes_it(device, stream):
    x, out = aligned(8), aligned(8)
    x[:] = 1
    with device.load(tiny_program.image(8)) as program, device.register(x) as a, device.register(out) as b:
        stream.launch(program["axpy"], a, a, b, 2.0)
        stream.synchronize()
        assert (out == 3).all()


def test_a_read_only_array_is_only_read(device, stream):
    data = np.arange(64, dtype=np.float32)
    data.flags.writeable = False
    with device.register(data) as source, device.allocate(64, np.float32) as buffer, \
            device.load(tiny_program.image(64)) as program:
        assert source.readonly
        assert source[3:].readonly
        assert not source.array.flags.writeable
        stream.copy(buffer, source)
        assert np.array_equal(buffer.copy_to_host(stream), data)
        for call in (lambda: stream.copy(source, buffer), lambda: stream.copy(source[2:4], bytes(8)),
                     lambda: stream.multicast([source], buffer), lambda: stream.fill(source, 0),
                     lambda: stream.launch(program["axpy"], buffer, buffer, source, 1.0)):
            with pytest.raises(InvalidArgument, match="read-only"):
                call()


def test_neighbours_on_one_page_are_registered_each_for_itself(device, stream):
    page = np.zeros(4096, np.uint8)
    with device.register(page[:1000]) as first, device.register(page[1000:3000]) as second:
        stream.fill(first, 1)
        stream.fill(second, 2)
        stream.synchronize()
    assert (page[:1000] == 1).all()
    assert (page[1000:3000] == 2).all()
    assert not page[3000:].any()


def test_overlapping_and_pinned_memory_is_refused(device):
    data = np.zeros(8192, np.uint8)
    with device.register(data[1000:3000]), device.allocate_host(100) as host:
        for part in (data, data[:1001], data[2999:], data[1500:1600], host.array):
            with pytest.raises(InvalidArgument, match="registered already"):
                device.register(part)
        device.register(data[:1000]).close()
        device.register(data[3000:]).close()


def test_what_cannot_be_registered_is_refused(device):
    for value, error in [(np.zeros((4, 4))[:, ::2], InvalidArgument), (np.zeros(0), InvalidArgument), (3, InvalidType),
                         (np.array([None]), InvalidType), ([1, 2], InvalidType), (np.zeros((4, 4)).T[1:],
                                                                                 InvalidArgument)]:
        with pytest.raises(error):
            device.register(value)
    data = bytearray(100)
    with device.register(data) as buffer:
        assert buffer.nbytes == 100
        with pytest.raises(BufferError):
            data.append(1)


def test_an_array_in_use_is_not_let_go(device, stream):
    data = np.zeros(4096, np.uint8)
    buffer = device.register(data)
    with blocked(stream):
        stream.fill(buffer, 1)
        with pytest.raises(BufferInUse):
            buffer.close()
        stream.free(buffer)
        with pytest.raises(ClosedError):
            memoryview(buffer)
    assert (data == 1).all()


def test_the_array_is_kept_as_long_as_it_is_registered(device, stream):
    buffer = device.register(np.full(5000, 9, np.uint8))
    noise = [np.zeros(5000, np.uint8) for _ in range(10)]
    with device.allocate(5000) as there:
        stream.copy(there, buffer)
        assert (there.copy_to_host(stream) == 9).all()
    assert not any(one.any() for one in noise)
    buffer.close()


def test_the_device_is_answered_while_nobody_waits_for_it(device, stream):
    data = np.zeros(1 << 16, np.uint8)
    with device.register(data) as buffer:
        stream.fill(buffer, 1)
        deadline = time.monotonic() + 10
        while not data[-1] and time.monotonic() < deadline:
            time.sleep(0.001)
        assert data.all()
        stream.synchronize()
    assert not [thread for thread in threading.enumerate() if thread.name == "maia-dma"]


def test_closing_the_device_lets_go(own_selector):
    import maia_rt

    data = np.zeros(100, np.uint8)
    with maia_rt.open(own_selector) as device:
        buffer = device.register(data)
    assert buffer.closed
    data[:] = 1


def test_mapped_device_memory_is_the_devices(device, stream):
    with device.upload(np.arange(5000, dtype=np.int32).reshape(50, 100)) as buffer:
        seen = buffer.map()
        assert np.array_equal(seen, np.arange(5000).reshape(50, 100))
        seen[3, 4] = -1
        assert buffer[3, 4:5].copy_to_host(stream)[0] == -1
        stream.fill(buffer[0], 0)
        stream.synchronize()
        assert not seen[0].any()
        assert np.array_equal(buffer[5:, ::7].map(), seen[5:, ::7])
        del seen


def test_mapped_memory_is_not_handed_out_before_the_last_array_is_gone(device):
    used = device.memory().used
    buffer = device.allocate(1 << 16)
    part = buffer.map()[100:200]
    buffer.close()
    assert device.memory().used == used + (1 << 16)
    part[:] = 1
    del part
    assert device.memory().used == used


def test_what_cannot_be_mapped_is_refused(device):
    with device.allocate(64, space=Space.tile(0)) as tile, pytest.raises(Unsupported, match="SRAM of tile 0"):
        tile.map()
    with device.allocate(0) as empty:
        assert empty.map().size == 0
    with pytest.raises(ClosedError):
        tile.map()
