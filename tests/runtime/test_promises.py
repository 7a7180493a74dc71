"""The runtime's error guarantees, a test each, named by its sentence."""

import contextlib
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import maia_rt
from maia_rt.contract.commands import Opcode, PostOp, WaitOp
from maia_rt.contract.registers import BAR0
from maia_rt.errors import (
    FAULTS,
    ClosedError,
    DeviceFault,
    DeviceLost,
    DeviceTimeout,
    FaultCode,
    ForkedError,
    MaiaError,
    OutOfMemory,
    ProgramError,
)
from tests.conftest import held
from tests.helpers import tiny_program
from tests.helpers.served import Served
from tests.helpers.stopwatch import promptly

FREE = 1000
"""A semaphore that the tests write themselves."""


def fail(stream, code=77):
    return stream._submit(int(Opcode.TRAP), payload=(code, 0, 0))


def hold(stream, value=1):
    return stream._submit(int(Opcode.NOP), pre=((FREE, WaitOp.EQ, value),))


def test_a_failed_create_leaves_nothing_behind(attached):
    with attached.create_stream() as stream, attached.allocate(64) as buffer:
        stream.fill(buffer, 1)
        stream.synchronize()
        before, used = held(), attached.memory().used
        for make, error in ((lambda: attached.allocate(1 << 60), OutOfMemory),
                            (lambda: attached.allocate_host(1 << 50), OutOfMemory),
                            (lambda: attached.create_stream(entries=3), ValueError),
                            (lambda: attached.load(b"no program"), ProgramError),
                            (lambda: attached.load(tiny_program.image(8)[:-1]), ProgramError),
                            (lambda: attached.upload(np.array([object()])), TypeError),
                            (lambda: maia_rt.open("/absent/socket"), maia_rt.errors.DeviceNotFound)):
            with pytest.raises(error) as caught:
                make()
            assert isinstance(caught.value, MaiaError)
            del caught
            gc.collect()
        assert attached.memory().used == used
        assert held() == before
        stream.fill(buffer, 2)
        assert (buffer.copy_to_host(stream) == 2).all()


def test_close_is_idempotent_bounded_in_time_children_first(other_device):
    device = other_device
    stream, buffer, host = device.create_stream(), device.allocate(64), device.allocate_host(64)
    loaded = device.load(tiny_program.image(8))
    stuck = device.create_stream(timeout=60)
    hold(stuck)
    kept = host.array
    start = time.monotonic()
    device.close()
    device.close()
    promptly(start, 4)
    for child in (stream, stuck, buffer, host, loaded):
        assert child.closed
        child.close()
    assert kept.sum() >= 0, "an array over closed memory stays readable"
    with pytest.raises(ClosedError):
        stream.synchronize()


def test_finalizers_warn_never_raise(own_selector):
    script = textwrap.dedent(f"""
        import gc, sys, warnings
        import maia_rt
        from tests.helpers import tiny_program
        warnings.simplefilter("always")
        sys.unraisablehook = lambda what: print("raised", what.exc_value)
        warnings.showwarning = lambda text, kind, *_: print(kind.__name__, text)
        device = maia_rt.open({own_selector!r})
        for make in (device.create_stream, lambda: device.allocate(64), lambda: device.allocate_host(64),
                     lambda: device.load(tiny_program.image(8))):
            made = make()
            del made
            gc.collect()
        assert device.memory().used == 0
        stream = device.create_stream()
        stream._submit(10, payload=(1, 0, 0))
        del stream
        gc.collect()
        device.synchronize()
        del device
        gc.collect()
    """)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ["PYTHONPATH"]])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert sum("was not closed" in line for line in said) >= 6
    assert all(line.startswith("ResourceWarning") for line in said), said


def test_a_streams_failure_is_that_streams_alone(attached):
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(attached.create_stream()) for _ in range(4)]
        buffers = [stack.enter_context(attached.allocate(1024)) for _ in streams]
        behind = streams[0].record()
        for stream, buffer in zip(streams, buffers, strict=True):
            stream.fill(buffer, 1)
        fail(streams[0])
        behind = streams[0].record()
        streams[1].wait(behind)
        for _ in range(50):
            for stream, buffer in zip(streams[1:], buffers[1:], strict=True):
                stream.fill(buffer, 2)
        for stream, buffer in zip(streams[1:], buffers[1:], strict=True):
            stream.synchronize(10)
            assert (buffer.copy_to_host(stream) == 2).all()
        with pytest.raises(DeviceFault):
            streams[0].synchronize()
        with pytest.raises(DeviceFault):
            behind.synchronize()
        streams[0].recover()
        streams[0].fill(buffers[0], 3)
        assert (buffers[0].copy_to_host(streams[0]) == 3).all()


@pytest.mark.emulator_process
def test_all_ones_from_a_register_means_a_liveness_check_and_device_lost(tmp_path):
    served = Served(f"{tmp_path}/s")
    try:
        device = maia_rt.open(served.path, timeout=5)
        stream = device.create_stream()
        hold(stream)
        errors = []

        def wait():
            try:
                stream.synchronize()
            except MaiaError as error:
                errors.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        for name, register in BAR0.items():
            if register.readable:
                served.keep(name, 0)  # not from the memory of plain registers, past the region
        served.function.regions[0].read = lambda _offset, size: b"\xff" * size
        start = time.monotonic()
        waiter.join()
        promptly(start, 1)
        assert [type(error) for error in errors] == [DeviceLost]
        assert "0xffffffff" in str(errors[0])
        with contextlib.suppress(DeviceLost):
            stream.close()
        device.close()
    finally:
        served.close()


def test_no_wait_without_a_deadline_and_a_timeout_says_what_it_waits_for_and_who_should_have_signalled(attached):
    with attached.create_stream() as first, attached.create_stream() as second, attached.allocate(64) as buffer:
        hold(first)
        first.fill(buffer, 1)
        second.wait(first.record())
        for call in (second.synchronize, second.record().synchronize):
            with pytest.raises(DeviceTimeout) as caught:
                call(0.05)
            text = str(caught.value)
            assert f"queue {second.queue.id}" in text
            assert f"queue {first.queue.id}" in text
            assert f"semaphore {FREE}" in text
            assert "test_promises.py" in text
        for endless in (float("inf"), 1e12, float("nan"), -1):
            with pytest.raises(ValueError, match="seconds"):
                second.synchronize(endless)
        attached._firmware.post_semaphore(FREE, PostOp.SET, 1)
        second.synchronize()


def test_submitted_is_completed_plus_failed_plus_aborted_always(attached):
    def even(stream):
        figures = stream.statistics()
        assert figures.submitted == figures.completed + figures.failed + figures.aborted + figures.in_flight
        return figures

    with attached.allocate(1 << 16) as buffer:
        stream = attached.create_stream(entries=16)
        for round_ in range(4):
            for value in range(20):
                stream.fill(buffer, value)
                even(stream)
            if round_ % 2:
                fail(stream)
                with contextlib.suppress(DeviceFault):
                    for value in range(5):
                        stream.fill(buffer, value)
                        even(stream)
                with pytest.raises(DeviceFault):
                    stream.synchronize()
                even(stream)
                stream.recover()
            else:
                stream.synchronize()
            assert even(stream).in_flight == 0
        stream.close()
        figures = even(stream)
        assert (figures.failed, figures.in_flight) == (2, 0)
        assert figures.completed >= 80


def test_fork_is_detected_the_child_gets_a_clear_error_and_never_touches_the_device(device):
    with device.create_stream() as stream, device.allocate(64) as buffer:
        stream.fill(buffer, 1)
        stream.synchronize()
        before = device.counters()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            said = []
            for call in (lambda: stream.fill(buffer, 9), stream.synchronize, lambda: device.allocate(64),
                         device.counters, buffer.copy_to_host, device.create_stream):
                try:
                    call()
                    said.append("no error")
                except ForkedError as error:
                    said.append("" if "before fork" in str(error) and "child" in str(error) else str(error))
                except BaseException as error:
                    said.append(repr(error))
            stream.close()
            buffer.close()
            device.close()
            os.write(writer, "\n".join(filter(None, said)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            assert not pipe.read()
        assert os.waitpid(child, 0)[1] == 0
        after = device.counters()
        assert after["commands"] == before["commands"]
        assert after["doorbells"] == before["doorbells"]
        assert after["admin_commands"] == before["admin_commands"] + 1
        assert (buffer.copy_to_host(stream) == 1).all()


def test_the_catalogue_of_faults_has_a_meaning_and_one_recovery_for_each_code():
    for code in FaultCode:
        if code:
            assert FAULTS[code].meaning
            assert FAULTS[code].recovery
