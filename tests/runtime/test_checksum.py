"""Copies that are checked: the CRC of what arrived against that of the source."""

import zlib

import numpy as np
import pytest

import maia_rt
from maia_rt import CopyPath
from maia_rt.contract.commands import Opcode
from maia_rt.errors import DeviceFault, FaultCode, InvalidArgument

SIZES = [1, 16, 17, 5000, 700_000]


@pytest.mark.parametrize("size", SIZES)
def test_every_way_of_a_copy_can_be_checked(device, stream, size):
    data = np.random.default_rng(size).integers(0, 255, size, np.uint8)
    back = np.zeros_like(data)
    with device.allocate(size) as a, device.allocate(size) as b, device.allocate_host(size) as host:
        path = stream.copy(a, data, checksum=True)
        assert path is (CopyPath.INLINE if size <= 16 else CopyPath.STAGED)
        assert stream.copy(b, a, checksum=True) is CopyPath.DIRECT
        assert stream.copy(host, b, checksum=True) is CopyPath.DIRECT
        assert stream.copy(back, host, checksum=True) is CopyPath.STAGED
        assert np.array_equal(back, data)
        stream.copy(back, b, checksum=True)
        stream.synchronize()
        assert np.array_equal(host.array, data)


def test_a_copy_of_nothing_is_checked_at_once(device, stream):
    with device.allocate(0) as empty:
        stream.copy(empty, b"", checksum=True)
    assert stream.statistics().submitted == 0


def test_a_difference_is_a_fault_of_the_stream_alone(device, stream):
    """The comparison of another checksum than the copy had: as if bits had turned on their way."""
    with device.upload(np.arange(100, dtype=np.uint8)) as buffer, device.create_stream() as other:
        stream.copy(buffer, bytes(100), checksum=True)
        stream.copy(buffer[:4], zlib.crc32(bytes(99)).to_bytes(4, "little"))
        stream._submit(Opcode.CRC, units=1, payload=(buffer.address, 100, buffer.address))
        with pytest.raises(DeviceFault) as caught:
            stream.synchronize()
        assert caught.value.code == FaultCode.CHECKSUM
        assert caught.value.address == buffer.address
        assert "test_checksum.py" in caught.value.where
        other.copy(buffer, bytes(100), checksum=True)
        other.synchronize()
        assert stream.recover()
        stream.copy(buffer, bytes(range(100)), checksum=True)
        assert bytes(buffer.copy_to_host(stream)) == bytes(range(100))


def test_threads_check_copies_on_one_stream(device, stream):
    import threading

    failed = []

    def work(value):
        try:
            data = np.full(300_000, value, np.uint8)
            with device.allocate(data.nbytes) as own:
                for _ in range(3):
                    stream.copy(own, data, checksum=True)
                    back = np.empty_like(data)
                    stream.copy(back, own, checksum=True)
                    assert np.array_equal(back, data)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_strided_memory_has_no_checksum(device, stream):
    with device.allocate((4, 4)) as buffer, pytest.raises(InvalidArgument, match="contiguous"):
        stream.copy(buffer[:, 0], bytes(4), checksum=True)


def corrupt(device, *opcodes):
    if not device.capabilities.injection:
        pytest.skip("the device makes no faults on purpose; run this on the emulator")
    device.inject(maia_rt.Injection("corrupt", opcodes=opcodes, seed=1))


@pytest.mark.parametrize("size", [16, 5000, 700_000])
def test_a_bit_that_turns_on_the_way_to_the_device_is_a_fault(device, stream, size):
    with device.allocate(size) as buffer:
        corrupt(device, "COPY" if size > 16 else "WRITE_IMM")
        # The checksum of so few bytes travels as they do; whichever of the two is struck, they differ.
        stream.copy(buffer, bytes(size), checksum=True)
        with pytest.raises(DeviceFault, match="CHECKSUM") as caught:
            stream.synchronize()
        assert caught.value.code == FaultCode.CHECKSUM
        assert stream.recover()
        stream.copy(buffer, bytes(size), checksum=True)
        assert not buffer.copy_to_host(stream).any()


def test_a_bit_that_turns_between_buffers_is_a_fault(device, stream):
    with device.upload(np.arange(5000, dtype=np.int16)) as one, device.allocate(5000, np.int16) as other:
        corrupt(device, "COPY")
        stream.copy(other, one)
        stream.synchronize()
        corrupt(device, "COPY")
        stream.copy(other, one, checksum=True)
        with pytest.raises(DeviceFault, match="CHECKSUM"):
            stream.synchronize()
        stream.recover()


def test_a_bit_that_turns_on_the_way_to_the_host_is_raised_by_the_copy(device, stream):
    with device.upload(np.arange(5000, dtype=np.int16)) as buffer:
        found = np.empty(5000, np.int16)
        corrupt(device, "COPY")
        with pytest.raises(DeviceFault, match="arrived on the host") as caught:
            stream.copy(found, buffer, checksum=True)
        assert caught.value.code == FaultCode.CHECKSUM
        stream.copy(found, buffer, checksum=True)
        assert np.array_equal(found, np.arange(5000))
