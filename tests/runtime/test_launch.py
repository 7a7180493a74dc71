"""Programs: loading, launching, and what a wrong launch gets."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from maia_rt.contract import program
from maia_rt.errors import ClosedError, InvalidArgument, InvalidType, ProgramError
from tests.helpers import tiny_program

COUNT = 1008


@pytest.fixture
def axpy(device):
    with device.load(tiny_program.image(COUNT)) as loaded:
        yield loaded["axpy"]


def test_a_kernel_computes(device, stream, axpy):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, COUNT)).astype(np.float32)
    with device.upload(x) as a, device.upload(y) as b, device.allocate(COUNT, np.float32) as out:
        for factor in (2.5, np.float32(-1.25), 3, np.int32(-2)):
            stream.launch(axpy, a, b, out, factor)
            assert np.array_equal(out.copy_to_host(stream), np.float32(factor) * x + y)
    assert device.counters()["launches"] == 4
    assert device.counters()["vector_elements"] == 4 * 2 * COUNT


def test_launches_reuse_argument_slots_safely(device, axpy):
    with device.create_stream(entries=4) as stream:
        x = np.ones(COUNT, np.float32)
        with device.upload(x) as a, device.upload(0 * x) as b, device.allocate((64, COUNT), np.float32) as out:
            for i in range(64):
                stream.launch(axpy, a, b, out[i:i + 1].view(np.float32, (COUNT,)), float(i))
            assert np.array_equal(out.copy_to_host(stream), np.arange(64, dtype=np.float32)[:, None] * np.ones(COUNT))


def test_memory_without_a_dtype_and_pinned_memory_are_taken(device, stream, axpy):
    with device.allocate(3 * 4 * COUNT) as raw, device.allocate_host(COUNT, np.float32) as host:
        host.array[:] = 4
        stream.fill(raw, 0)
        stream.launch(axpy, host, raw, raw[8 * COUNT:], 0.5)
        assert (raw.copy_to_host(stream)[8 * COUNT:].view(np.float32) == 2).all()


def test_programs_are_mappings_of_kernels(device):
    image = program.write([tiny_program.axpy(8, "first"), tiny_program.axpy(16, "second")])
    with device.load(image) as loaded, device.load(program.read(image)) as again:
        assert list(loaded) == ["first", "second"]
        assert loaded["second"].handle == loaded["first"].handle + 1
        assert again["first"].handle not in (loaded["first"].handle, loaded["second"].handle)
        assert [arg.name for arg in loaded["first"].args] == ["x", "y", "out", "factor"]
        assert loaded["first"].args[0].shape == (8,)
        with pytest.raises(KeyError, match="no kernel 'third'; there are first, second"):
            loaded["third"]


def test_a_wrong_launch_is_refused_and_nothing_is_submitted(device, stream, axpy, other_device):
    with device.allocate(COUNT, np.float32) as good, device.allocate(4 * COUNT + 64) as raw, \
            other_device.allocate(COUNT, np.float32) as foreign:
        closed = device.allocate(COUNT, np.float32)
        closed.close()
        cases = [
            ((good, good, good), InvalidArgument, "takes 4 arguments, not 3.*pass x, y, out, factor"),
            ((good,) * 3 + (1.0, 2.0), InvalidArgument, "takes 4 arguments, not 5"),
            ((good, good, good, good), InvalidType, "argument 'factor' is Buffer, not a number"),
            ((good, good, good, "1"), InvalidType, "argument 'factor' is str"),
            ((good, np.ones(COUNT, np.float32), good, 1.0), InvalidType, "argument 'y' is ndarray, not a Buffer"),
            ((closed, good, good, 1.0), ClosedError, "argument 'x' has been closed"),
            ((good, good, foreign, 1.0), InvalidArgument, "argument 'out' belongs to another device"),
            ((raw[:4031], good, good, 1.0), InvalidArgument, "argument 'x' has 4031 bytes, 4032 are needed"),
            ((good, raw.view(np.int32, COUNT), good, 1.0), InvalidArgument, r"'y' is int32 \(1008,\), not float32"),
            ((good, raw.view(np.float32, (18, 56)), good, 1.0), InvalidArgument, r"is float32 \(18, 56\)"),
            ((good, raw.view(ml_dtypes.bfloat16, COUNT), good, 1.0), InvalidArgument, "is bfloat16"),
            ((good, good, raw[32:], 1.0), InvalidArgument, "'out' is at 0x[0-9a-f]*, not a multiple of 64"),
        ]
        for arguments, error, text in cases:
            with pytest.raises(error, match=text):
                stream.launch(axpy, *arguments)
        assert stream.statistics().submitted == 0
        stream.launch(axpy, good, good, good, 1.0)
        stream.synchronize()


def test_a_kernel_of_a_closed_program_is_refused(device, stream):
    loaded = device.load(tiny_program.image(8))
    kernel = loaded["axpy"]
    with device.allocate(8, np.float32) as x:
        stream.launch(kernel, x, x, x, 1.0)
        loaded.close()
        loaded.close()
        with pytest.raises(ClosedError, match="kernel 'axpy': its program has been closed"):
            stream.launch(kernel, x, x, x, 1.0)
        stream.synchronize()


def test_a_program_closed_while_its_kernel_waits_still_runs_it(device, stream):
    from tests.runtime.test_stream import hold, release

    x = np.ones(8, np.float32)
    with device.upload(x) as a, device.allocate(8, np.float32) as out:
        with device.load(tiny_program.image(8)) as loaded:
            hold(stream)
            stream.launch(loaded["axpy"], a, a, out, 2.0)
        release(device)
        assert (out.copy_to_host(stream) == 3).all()


def test_a_kernel_of_another_device_is_refused(device, stream, other_device):
    with other_device.load(tiny_program.image(8)) as loaded, \
            other_device.allocate(8, np.float32) as x, pytest.raises(InvalidArgument, match="another device"):
        stream.launch(loaded["axpy"], x, x, x, 1.0)


def test_images_that_do_not_verify_are_refused_with_the_reason(device):
    image = bytearray(tiny_program.image(8))
    kernel = tiny_program.axpy(8)
    broken = [
        (b"", "image"),
        (bytes(image[:100]), "header.bytes|image"),
        (bytes(image[:-1]), "header.bytes"),
        (bytes(image[:300]) + bytes([image[300] ^ 1]) + bytes(image[301:]), "header.crc32"),
        (program.write([dataclasses.replace(kernel, tiles=10_000)]), "tiles: needs 10000, the device has"),
        (program.write([dataclasses.replace(kernel, sram_bytes=64)]), "leaves the 64 bytes of SRAM"),
        (program.write([dataclasses.replace(kernel, streams=kernel.streams[:1])]), "for ever"),
    ]
    for data, text in broken:
        with pytest.raises(ProgramError, match=text):
            device.load(data)
    with device.load(bytes(image)) as loaded:
        assert list(loaded) == ["axpy"]


def test_the_device_says_why_it_refuses_an_image(device):
    """Past the driver, which parses images too: the text is the firmware's."""
    with pytest.raises(ProgramError, match=r"program refused: header.crc32"):
        device._firmware.load_program(tiny_program.image(8)[:-1] + b"\1")


def test_what_was_found_to_fit_is_checked_again_where_it_may_have_changed(device, stream, axpy):
    with device.load(program.write([tiny_program.axpy(16, "small")])) as loaded, \
            device.allocate(COUNT, np.float32) as kept:
        stream.fill(kept, 0)
        gone = device.allocate(COUNT, np.float32)
        for _ in range(3):
            stream.launch(axpy, kept, gone, gone, 1.0)
        with pytest.raises(InvalidArgument, match=r"kernel 'small': argument 'x' is float32 \(1008,\)"):
            stream.launch(loaded["small"], kept, kept, kept, 1.0)
        with pytest.raises(InvalidArgument, match=r"argument 'x' is float32 \(16,\), not float32 \(1008,\)"):
            stream.launch(axpy, kept[:16], kept, kept, 1.0)
        stream.synchronize()
        gone.close()
        with pytest.raises(ClosedError, match="argument 'y' has been closed"):
            stream.launch(axpy, kept, gone, gone, 1.0)
        stream.launch(axpy, kept, kept, kept, 1.0)
        assert not kept.copy_to_host(stream).any()


def test_a_buffer_fits_the_arguments_of_any_number_of_kernels(device, stream):
    image = program.write([tiny_program.axpy(8, f"axpy{number}") for number in range(30)])
    with device.load(image) as loaded, device.allocate(8, np.float32) as memory:
        for _ in range(2):
            for kernel in loaded.values():
                stream.launch(kernel, memory, memory, memory, 0.0)
        stream.synchronize()
        assert len(memory._fits) <= 64
