"""Devices: opening, closing, resetting, dying; and what is left behind, which is nothing."""

import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import maia_rt
from maia_rt.contract.commands import Opcode, PostOp, QueueStage, SemaphoreWriter
from maia_rt.errors import (
    ClosedError,
    DeviceBusy,
    DeviceFault,
    DeviceLost,
    DeviceNotFound,
    DeviceTimeout,
    ForkedError,
    InvalidArgument,
    MaiaError,
    OutOfMemory,
    ProtocolError,
)
from maia_rt.queue import QueuePair
from tests.helpers import tiny_program
from tests.helpers.emulator import emulator, eventually, start_emulator  # noqa: F401
from tests.helpers.stopwatch import promptly
from tests.runtime.test_stream import hold


def test_a_device_says_what_it_is(device):
    assert device.capabilities.emulated
    assert device.capabilities.contract[0] == 1
    assert device.identity.model == "MAIA small (emulated)"
    assert int(device.identity.serial, 16) == device.capabilities.serial
    assert device.capabilities.hbm_bytes == 1 << 30
    assert device.memory().size == 1 << 30
    assert len(device.faults()) == 0


def test_counters_follow_the_work(device, stream):
    before = device.counters()
    with device.allocate(1 << 20) as buffer:
        stream.copy(buffer, bytes(1 << 20))
        buffer.copy_to_host(stream)
    after = device.counters()
    moved = {name: after[name] - before[name] for name in after}
    assert moved["bytes_host_to_device"] == moved["bytes_device_to_host"] == 1 << 20
    assert moved["by_opcode_copy"] == moved["commands"] == stream.statistics().submitted


def test_device_memory_runs_out_and_comes_back(device):
    with device.allocate(device.capabilities.hbm_bytes // 2):
        with pytest.raises(OutOfMemory, match=r"no room for 805306368 bytes.*free"):
            device.allocate(768 << 20)
        with device.allocate(256 << 20):
            pass
    assert device.memory().used == 0
    with device.allocate(device.capabilities.hbm_bytes):
        pass


def test_memory_freed_while_commands_use_it_is_not_handed_out_before_they_are_done(device, stream):
    whole = device.capabilities.hbm_bytes
    buffer = device.allocate(whole)
    stream.fill(buffer[: 1 << 20], 1)
    stream.free(buffer)
    with device.allocate(whole) as again:
        assert stream.query()
        assert again.nbytes == whole


def test_bad_shapes_are_refused(attached):
    for shape in (-1, (2, -1)):
        with pytest.raises(InvalidArgument):
            attached.allocate(shape)
    with attached.allocate(0) as empty, attached.allocate((0, 5), np.float32) as flat:
        assert empty.copy_to_host().size == flat.copy_to_host().size == 0


def test_closing_a_device_closes_what_came_from_it(attached):
    stream, buffer, host = attached.create_stream(), attached.allocate(64), attached.allocate_host(64)
    loaded = attached.load(tiny_program.image(8))
    event = stream.record()
    array = host.array
    attached.close()
    assert stream.closed
    assert buffer.closed
    assert host.closed
    assert loaded.closed
    assert event.query()
    array[:] = 1
    for call in (lambda: attached.allocate(1), attached.create_stream, attached.counters, attached.synchronize,
                 lambda: attached.load(b""), lambda: attached.allocate_host(1), attached.reset, stream.synchronize,
                 lambda: buffer.address):
        with pytest.raises(ClosedError):
            call()
    for child in (stream, buffer, host, loaded, attached):
        child.close()


def test_closing_is_bounded_whatever_the_streams_do(attached):
    streams = [attached.create_stream() for _ in range(4)]
    for stream in streams:
        hold(stream)
    start = time.monotonic()
    attached.close()
    promptly(start, 4)


def test_closing_ends_what_other_threads_wait_for(attached):
    stream = attached.create_stream()
    hold(stream)
    ended = []

    def until_closed(call):
        try:
            while True:
                call()
        except MaiaError as error:
            ended.append(error)

    threads = [threading.Thread(target=until_closed, args=(call,))
               for call in (lambda: stream.synchronize(30), attached.counters, attached.faults)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    attached.close()
    for thread in threads:
        thread.join(3)
    assert [type(error) for error in ended] == [ClosedError] * 3, ended


@pytest.mark.parametrize("how", ["synchronize", "query", "event"])
def test_a_wait_that_looks_again_while_its_queue_is_being_closed_ends_as_those_that_sleep(attached, monkeypatch, how):
    stream = attached.create_stream()
    hold(stream)
    event = stream.record()
    call = {"synchronize": lambda: stream.synchronize(30), "query": stream.query,
            "event": lambda: event.synchronize(30)}[how]
    charge, ended = QueuePair._charge, []

    def charge_slowly(*args, **kinds):
        charge(*args, **kinds)
        time.sleep(0.2)

    def until_closed():
        try:
            while True:
                call()
        except MaiaError as error:
            ended.append(type(error))

    monkeypatch.setattr(maia_rt.queue, "SLICE_SECONDS", 0.01)
    monkeypatch.setattr(maia_rt.runtime.device, "_CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(QueuePair, "_charge", charge_slowly)
    thread = threading.Thread(target=until_closed)
    thread.start()
    attached.close()
    thread.join(3)
    assert ended == [ClosedError]
    with pytest.raises(DeviceFault, match="RESET"):  # it never ran
        event.synchronize()


def test_time_outs_are_bounded(attached):
    with attached.create_stream() as stream:
        for bad in (float("inf"), float("nan"), -1, 1e10):
            with pytest.raises(InvalidArgument, match="a time-out is 0 to"):
                stream.synchronize(bad)
            with pytest.raises(InvalidArgument, match="a time-out is 0 to"):
                attached.create_stream(timeout=bad)


def test_a_reset_device_starts_anew(device):
    stream, buffer, host = device.create_stream(), device.allocate(64), device.allocate_host(64)
    loaded = device.load(tiny_program.image(8))
    hold(stream)
    device.reset()
    assert stream.closed
    assert buffer.closed
    assert loaded.closed
    assert not host.closed
    with device.create_stream() as again, device.allocate(64) as fresh:
        again.copy(fresh, host)
        again.copy(host, fresh)
        again.synchronize()
    with device.load(tiny_program.image(8)) as program, device.allocate(8, np.float32) as x, \
            device.create_stream() as other:
        other.launch(program["axpy"], x, x, x, 1.0)
    assert device.counters()["launches"] == 1
    host.close()


def test_things_nobody_closed_warn_and_are_given_back(attached):
    for make, text in [(lambda: attached.allocate(64), "a buffer of 64 bytes"),
                       (lambda: attached.allocate_host(64), "a host buffer of 64 bytes"),
                       (lambda: attached.load(tiny_program.image(8)), "a program")]:
        with pytest.warns(ResourceWarning, match=f"{text} was not closed"):
            make()
            gc.collect()
    assert attached.memory().used == 0


@pytest.mark.emulator_process
def test_a_device_nobody_closed_warns_and_its_emulator_ends():
    device = maia_rt.open("emulated")
    pid = device.emulator_pid
    with pytest.warns(ResourceWarning):
        del device
        gc.collect()
    assert eventually(lambda: not alive(pid))


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.emulator_process
def test_a_killed_emulator_ends_every_wait_at_once():
    device = maia_rt.open("emulated")
    streams = [device.create_stream() for _ in range(3)]
    for stream in streams:
        hold(stream)
    errors = []

    def wait(stream):
        try:
            stream.synchronize(30)
        except DeviceLost as error:
            errors.append(error)

    def ask():
        try:
            while True:
                device.counters()
        except DeviceLost as error:
            errors.append(error)

    threads = [threading.Thread(target=wait, args=(stream,)) for stream in streams * 2]
    threads.append(threading.Thread(target=ask))
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    start = time.monotonic()
    os.kill(device.emulator_pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert len(errors) == 7
    for call in (streams[0].synchronize, device.create_stream, device.counters):
        with pytest.raises(DeviceLost):
            call()
    buffer = device.allocate(64)
    with pytest.raises(DeviceLost):
        for _ in range(2000):
            streams[0].fill(buffer, 1)
    for stream in streams:
        with pytest.raises(DeviceLost):
            stream.close()
    device.close()
    promptly(start, 2)


@pytest.mark.emulator_process
def test_a_killed_emulator_ends_a_copy(embedded):
    failed = []

    def copy():
        try:
            with embedded.create_stream() as stream, embedded.allocate(1 << 20) as buffer:
                while True:
                    stream.copy(buffer, bytes(1 << 20))
        except DeviceLost as error:
            failed.append(error)

    thread = threading.Thread(target=copy)
    thread.start()
    time.sleep(0.1)
    start = time.monotonic()
    os.kill(embedded.emulator_pid, signal.SIGKILL)
    thread.join()
    embedded.close()
    promptly(start, 2)
    assert failed


@pytest.mark.emulator_process
def test_an_emulator_that_hangs_is_given_up_at_the_deadline(embedded):
    stream = embedded.create_stream(timeout=0.3)
    hold(stream)
    os.kill(embedded.emulator_pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        with pytest.raises(DeviceTimeout, match=r"was not done within 0.3 s"):
            stream.synchronize()
        promptly(start, 1)
    finally:
        os.kill(embedded.emulator_pid, signal.SIGCONT)
    with pytest.raises(DeviceTimeout):
        stream.close()


@pytest.mark.emulator_process
def test_the_embedded_emulator_ends_with_its_owner():
    script = textwrap.dedent("""
        import maia_rt, os, signal
        device = maia_rt.open("emulated")
        print(device.emulator_pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    assert eventually(lambda: not alive(pid), 2), "the emulator outlives its owner"


@pytest.mark.emulator_process
def test_a_program_that_forgets_to_close_ends_cleanly():
    script = textwrap.dedent("""
        import maia_rt
        device = maia_rt.open("emulated")
        stream, buffer = device.create_stream(), device.allocate(1 << 20)
        stream.copy(buffer, bytes(1 << 20))
    """)
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    promptly(start, 10)


def test_an_interrupt_ends_a_wait_and_leaves_the_device_usable(own_selector):
    script = textwrap.dedent(f"""
        import maia_rt, signal, threading, os, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background start with it ignored
        from tests.runtime.test_stream import hold, release
        with maia_rt.open({own_selector!r}) as device, device.create_stream() as stream:
            hold(stream)
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            start = time.monotonic()
            try:
                stream.synchronize()
            except KeyboardInterrupt:
                print("interrupted", time.monotonic() - start < 2)
            release(device)
            stream.synchronize()
    """)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ["PYTHONPATH"]])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted True\n", "")


def test_a_child_made_by_fork_gets_an_error_and_disturbs_nothing(device, stream):
    buffer, host = device.allocate(64), device.allocate_host(64)
    child = os.fork()
    if child == 0:
        code = 0
        for number, call in enumerate((
                lambda: stream.fill(buffer, 1), stream.synchronize, lambda: stream.copy(buffer, bytes(64)),
                device.counters, device.create_stream, lambda: stream.record().query())):
            try:
                call()
                code |= 1 << number
            except ForkedError:
                pass
            except BaseException:
                code |= 1 << number
        stream.close()
        device.close()
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    stream.fill(buffer, 3)
    assert (buffer.copy_to_host(stream) == 3).all()
    buffer.close()
    host.close()


@pytest.mark.emulator_process
def test_one_client_after_another(start_emulator):  # noqa: F811
    process, (path,) = start_emulator()
    for value in range(3):
        with maia_rt.open(path) as device, device.upload(np.full(100, value)) as buffer:
            assert (buffer.copy_to_host() == value).all()
    script = f"import maia_rt, os, signal; d = maia_rt.open({path!r}); os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    with maia_rt.open(path) as device:
        assert device.counters()["commands"] == 0
    assert process.poll() is None


def test_what_is_no_device_is_said_so(tmp_path):
    with pytest.raises(DeviceNotFound):
        maia_rt.open(str(tmp_path / "absent"))
    for selector in ("nonsense", 99, -1, "0000:7f:1f.7"):
        with pytest.raises(DeviceNotFound):
            maia_rt.open(selector)
    path = str(tmp_path / "mute")
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(path)
        mute.listen()

        def hang_up():
            mute.accept()[0].close()

        threading.Thread(target=hang_up).start()
        with pytest.raises((DeviceLost, ProtocolError, DeviceBusy)):
            maia_rt.open(path)


def test_devices_are_listed_and_filtered(monkeypatch):
    monkeypatch.setenv("MAIA_SOCKETS", "/run/a:/run/b")
    assert [d.selector for d in maia_rt.devices()][-3:] == ["/run/a", "/run/b", "emulated"]
    first = len(maia_rt.devices()) - 3
    monkeypatch.setenv("MAIA_VISIBLE_DEVICES", f"emulated, {first + 1},/run/a,/run/other")
    assert [d.selector for d in maia_rt.devices()] == ["emulated", "/run/b", "/run/a", "/run/other"]
    monkeypatch.setenv("MAIA_VISIBLE_DEVICES", "")
    assert maia_rt.devices() == []
    with pytest.raises(DeviceNotFound):
        maia_rt.open()
    monkeypatch.setenv("MAIA_VISIBLE_DEVICES", "7")
    with pytest.raises(DeviceNotFound, match="MAIA_VISIBLE_DEVICES names '7'"):
        maia_rt.devices()


@pytest.mark.emulator_process
def test_without_a_selector_the_first_visible_device_is_opened(monkeypatch):
    monkeypatch.setenv("MAIA_VISIBLE_DEVICES", "emulated")
    with maia_rt.open() as device:
        assert device.name == "emulated"


def test_the_device_tells_what_its_queues_are_at_and_who_wrote_a_semaphore(device, stream):
    stream._submit(Opcode.NOP, post=((1000, PostOp.SET, 7),))
    stream.synchronize()
    queues, semaphores = device._firmware.queue_log(), device._firmware.semaphore_log()
    assert stream.queue.id in queues["queue"] and queues["stage"].max() == QueueStage.IDLE
    (written,) = semaphores[semaphores["index"] == 1000]
    assert (written["value"], written["writer"], written["queue"]) == (7, SemaphoreWriter.QUEUE, stream.queue.id)
