"""Tensors to and from other libraries: DLPack, and the buffer protocol."""

import array
import gc

import ml_dtypes
import numpy as np
import pytest

import maia_rt
from maia_rt._fast.dlpack import ImportedTensor, export_tensor
from maia_rt.errors import ClosedError, InvalidArgument, InvalidType

CPU, EXT_DEV = 1, 12


class Tensor:
    """What other libraries hand over: nothing but the protocol."""

    def __init__(self, source, device=None, old=False):
        self.source, self.device, self.old = source, device or source.__dlpack_device__(), old

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        if self.old and options:
            raise TypeError("got an unexpected keyword argument 'max_version'")
        return self.source.__dlpack__(**options)


def test_numpy_takes_host_buffers_without_a_copy(attached):
    with attached.allocate_host((3, 4), np.float32) as host:
        host.array[:] = np.arange(12).reshape(3, 4)
        taken = np.from_dlpack(host)
        assert np.array_equal(taken, host.array)
        taken[0, 0] = 77
        assert host.array[0, 0] == 77
        part = np.from_dlpack(host[::2, 1:3])
        assert np.shares_memory(part, host.array)
        assert np.array_equal(part, host.array[::2, 1:3])


@pytest.mark.parametrize("dtype", ["i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "c16", "?"])
def test_every_dtype_of_numpy_goes_both_ways(attached, dtype):
    data = np.arange(6).astype(dtype).reshape(2, 3)
    with attached.allocate_host((2, 3), dtype) as host:
        host.array[:] = data
        taken = np.from_dlpack(host)
        assert taken.dtype == data.dtype
        assert np.array_equal(taken, data)
    with maia_rt.from_dlpack(data, attached) as buffer:
        assert buffer.dtype == data.dtype
        assert np.array_equal(buffer.copy_to_host(), data)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_dtypes_that_numpy_has_not_go_from_buffer_to_buffer(attached, dtype):
    data = np.arange(6).astype(dtype)
    with attached.allocate_host(6, dtype) as host:
        host.array[:] = data
        with maia_rt.from_dlpack(Tensor(host), attached) as buffer:
            assert buffer.dtype == dtype
            assert np.array_equal(buffer.copy_to_host(), data)


def test_the_memory_lives_as_long_as_a_consumer(attached):
    host = attached.allocate_host(1 << 16)
    host.array[:] = 5
    taken = np.from_dlpack(host)
    host.close()
    others = [attached.allocate_host(1 << 16) for _ in range(4)]
    for other in others:
        other.array[:] = 1
        other.close()
    assert (taken == 5).all()


def test_a_capsule_that_nobody_takes_lets_go(attached):
    before = attached._pool.statistics().allocations
    host = attached.allocate_host(64)
    capsules = [host.__dlpack__(max_version=(1, 0)), host.__dlpack__()]
    host.close()
    assert attached._pool.statistics().allocations == before + 1
    del capsules
    gc.collect()
    assert attached._pool.statistics().allocations == before


def test_consumers_before_version_1_are_served(attached):
    with attached.allocate_host(4, np.int32) as host:
        host.array[:] = 3
        tensor = ImportedTensor(host.__dlpack__())
        assert (tensor.shape, tensor.strides, tensor.dtype, tensor.device) == ((4,), (1,), (0, 32, 1), (CPU, 0))
        assert bytes(tensor) == host.array.tobytes()
        del tensor
        with maia_rt.from_dlpack(Tensor(host, old=True), attached) as buffer:
            assert (buffer.copy_to_host() == 3).all()


def test_device_memory_is_exported_as_an_extension_device(device):
    with device.upload(np.arange(12, dtype=np.int16).reshape(3, 4)) as buffer:
        kind, number = buffer.__dlpack_device__()
        assert kind == EXT_DEV
        tensor = ImportedTensor(buffer[::2].__dlpack__(max_version=(1, 0)))
        assert tensor.address == buffer.address
        assert (tensor.shape, tensor.strides, tensor.device) == ((2, 4), (8, 1), (EXT_DEV, number))
        back = maia_rt.from_dlpack(Tensor(buffer[1:, ::2]), device)
        assert back.address == buffer[1:].address
        assert np.array_equal(back.copy_to_host(), [[4, 6], [8, 10]])
        assert maia_rt.from_dlpack(buffer, device).address == buffer.address
        with maia_rt.from_dlpack(Tensor(buffer), device, copy=True) as copied:
            assert copied.address != buffer.address
            assert np.array_equal(copied.copy_to_host(), buffer.copy_to_host())


def test_the_consumers_stream_comes_after_what_was_submitted(device, stream):
    with device.allocate(1 << 20) as buffer, device.create_stream() as consumer:
        stream.fill(buffer, 7)
        buffer.__dlpack__(stream=consumer, max_version=(1, 0))
        found = np.empty(1 << 20, np.uint8)
        consumer.copy(found, buffer)
        assert (found == 7).all()
        stream.fill(buffer, 8)
        buffer.__dlpack__(max_version=(1, 0))
        assert stream.query()
        buffer.__dlpack__(stream=-1)


def test_a_copy_on_the_cpu_is_made_where_it_is_asked_for(device):
    data = np.arange(12, dtype=np.float32).reshape(3, 4)
    with device.upload(data) as buffer:
        tensor = ImportedTensor(buffer.__dlpack__(max_version=(1, 0), dl_device=(CPU, 0), copy=True))
        assert tensor.device == (CPU, 0)
        assert bytes(tensor) == data.tobytes()
        if np.lib.NumpyVersion(np.__version__) >= "2.1.0":
            assert np.array_equal(np.from_dlpack(buffer, device="cpu"), data)


def test_wrong_demands_are_buffer_errors(attached, other_device):
    readonly = np.arange(4.0)
    readonly.flags.writeable = False
    with attached.allocate(4, np.float32) as buffer, attached.allocate_host(4, np.float32) as host, \
            attached.allocate_host(4, "V3") as odd, attached.register(readonly) as pinned:
        for call in [
            lambda: buffer.__dlpack__(dl_device=(CPU, 0), copy=False), lambda: buffer.__dlpack__(dl_device=(2, 0)),
            lambda: buffer.__dlpack__(copy=True), lambda: host.__dlpack__(dl_device=(2, 0)), odd.__dlpack__,
            pinned.__dlpack__,
            lambda: maia_rt.from_dlpack(Tensor(host), attached, copy=False),
            lambda: maia_rt.from_dlpack(buffer, other_device), lambda: ImportedTensor(3),
        ]:
            with pytest.raises(BufferError):
                call()
        assert not np.from_dlpack(pinned).flags.writeable
        for call, error in [
            (lambda: host.__dlpack__(stream=1), InvalidArgument), (lambda: buffer.__dlpack__(stream=1), InvalidType),
            (lambda: maia_rt.from_dlpack([1], attached), InvalidType),
            (lambda: maia_rt.from_dlpack(np.zeros(3), "device"), InvalidType),
        ]:
            with pytest.raises(error):
                call()
        capsule = host.__dlpack__()
        ImportedTensor(capsule)
        with pytest.raises(BufferError, match="used before"):
            ImportedTensor(capsule)
    for closed in (buffer, host):
        with pytest.raises(ClosedError):
            closed.__dlpack__(max_version=(1, 0))


def test_a_tensor_without_a_numpy_dtype_is_refused(attached):
    class Odd:
        def __dlpack_device__(self):
            return CPU, 0

        def __dlpack__(self, **options):
            return export_tensor(self, 4096, (17, 4), (2,), (1,), (CPU, 0))

    for call in (lambda: maia_rt.from_dlpack(Odd(), attached),
                 lambda: attached.default_stream.copy(attached.default_pool, Odd())):
        with pytest.raises(InvalidType):
            call()


def test_a_stream_copies_any_tensor_of_the_cpu(attached):
    data = np.arange(20, dtype=np.int32).reshape(4, 5)
    with attached.create_stream() as stream, attached.allocate((4, 5), np.int32) as buffer:
        stream.copy(buffer, Tensor(data))
        target = np.zeros((4, 10), np.int32)
        stream.copy(Tensor(target[:, ::2]), buffer)
        assert np.array_equal(target[:, ::2], data)
        assert not target[:, 1::2].any()


def test_the_buffer_protocol_serves_host_buffers(attached):
    with attached.allocate_host((2, 3), np.int16) as host:
        host.array[:] = np.arange(6).reshape(2, 3)
        view = memoryview(host)
        assert (view.format, view.shape, view.readonly) == ("h", (2, 3), False)
        assert array.array("h", bytes(view)).tolist() == [0, 1, 2, 3, 4, 5]
        assert bytes(host) == host.array.tobytes()
        assert memoryview(host[:, 1]).tolist() == [1, 4]
        view.release()
    with pytest.raises(ClosedError):
        memoryview(host)
    with attached.allocate_host(2, ml_dtypes.bfloat16) as odd, pytest.raises(BufferError):
        memoryview(odd)
    with attached.allocate(2) as buffer, pytest.raises(TypeError):
        memoryview(buffer)
