"""The emulator as a process: its lines, its socket files, its end, its idleness."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from helpers.admin_queue import Driver
from helpers.emulator import (
    END_SECONDS,
    READY_SECONDS,
    command,
    connect,
    cpu_seconds,
    end,
    environment,
    eventually,
    listening,
    spawn,
)
from helpers.raw_client import GET_INFO, QEMU_CAPABILITIES, REGION_READ, VERSION, RawClient, access, version_body
from helpers.stopwatch import promptly


def fails(*args, code=1):
    """Run an emulator that must refuse to start; returns what it says."""
    done = subprocess.run(command(*args), env=environment(), text=True, capture_output=True, timeout=READY_SECONDS)
    assert done.returncode == code
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


# --- socket files ----------------------------------------------------------------------------------------------------


def test_one_device_listens_on_the_path_itself(tmp_path):
    path = f"{tmp_path}/s"
    process = spawn("--socket", path)
    assert listening(process, 1) == [path]
    with RawClient(path) as client:
        assert client.alive()
    out, err = end(process)
    assert (out, err) == ("", "")
    assert os.listdir(tmp_path) == []


def test_several_devices_have_numbered_paths_and_serials_of_their_own(start_emulator):
    _, paths = start_emulator(devices=3)
    assert [p[-2:] for p in paths] == [".0", ".1", ".2"]
    clients = [RawClient(path) for path in paths]
    assert len({client.read64(0x10) for client in clients}) == 3
    for client in clients:
        client.__exit__()


def test_serial_number_follows_the_seed(start_emulator):
    serials = []
    for seed in ("1", "1", "2"):
        _, (path,) = start_emulator("--seed", seed)
        with RawClient(path) as client:
            serials.append(client.read64(0x10))
    assert serials[0] == serials[1] != serials[2]


def test_ids_are_configurable(start_emulator):
    _, (path,) = start_emulator("--vendor-id", "1414", "--device-id", "0xbeef")
    with RawClient(path) as client:
        assert client.read(7, 0, 4) == b"\x14\x14\xef\xbe"
        assert client.read(7, 0x2C, 4) == b"\x14\x14\xef\xbe"


@pytest.mark.parametrize(("profile", "number", "topology", "hbm"), [
    ("small", 0, 0x0202, 1 << 30), ("maia100", 1, 0x0410, 64 << 30), ("maia200", 2, 0x0A04, 216 << 30),
])
def test_profiles(start_emulator, profile, number, topology, hbm):
    _, (path,) = start_emulator("--profile", profile)
    with RawClient(path) as client:
        assert client.read32(0x08) == number | 1 << 8 | 1 << 16
        assert client.read32(0x30) == topology
        assert client.read64(0x48) == hbm
        assert client.read(4, hbm - 8, 8) == bytes(8)


def test_socket_is_private_whatever_the_umask(tmp_path):
    for mask in (0o000, 0o022, 0o077):
        process = spawn("--socket", f"{tmp_path}/s", preexec_fn=lambda mask=mask: os.umask(mask))
        listening(process, 1)
        assert stat.S_IMODE(os.lstat(f"{tmp_path}/s").st_mode) == 0o600
        end(process)


def test_socket_is_private_from_its_first_moment(tmp_path):
    path = Path(tmp_path, "s")
    process = spawn("--socket", str(path), preexec_fn=lambda: os.umask(0))
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            mode = stat.S_IMODE(path.lstat().st_mode)
            break
        except FileNotFoundError:
            continue
    assert mode == 0o600
    listening(process, 1)
    end(process)


def test_stale_socket_is_replaced(tmp_path):
    path = f"{tmp_path}/s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    process = spawn("--socket", path)
    assert listening(process, 1) == [path]
    end(process)
    assert not os.path.lexists(path)


def test_socket_of_a_killed_server_is_replaced(tmp_path):
    path = f"{tmp_path}/s"
    process = spawn("--socket", path)
    listening(process, 1)
    process.kill()
    process.communicate()
    assert os.path.lexists(path)
    process = spawn("--socket", path)
    listening(process, 1)
    with RawClient(path) as client:
        assert client.alive()
    end(process)


def test_socket_in_use_is_refused_and_undisturbed(emulator):
    _, path = emulator
    with RawClient(path) as client:
        assert "is in use" in fails("--socket", path)
        assert client.alive()
    with RawClient(path) as client:
        assert client.alive()


def test_what_is_no_socket_is_never_deleted(tmp_path):
    for name, make in {
        "file": lambda p: p.write_text("precious"), "folder": lambda p: p.mkdir(), "pipe": os.mkfifo,
        "link": lambda p: p.symlink_to(tmp_path / "file"),
    }.items():
        path = tmp_path / name
        make(path)
        assert "no socket" in fails("--socket", str(path))
        assert os.path.lexists(path)
    assert (tmp_path / "file").read_text() == "precious"


def test_path_that_is_too_long(tmp_path):
    said = fails("--socket", f"{tmp_path}/{'x' * 108}")
    assert "107" in said
    assert "shorter" in said


def test_path_of_107_bytes_is_not_too_long():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own may be too long already
        path = f"{folder}/".ljust(107, "x")
        process = spawn("--socket", path)
        assert listening(process, 1) == [path]
        end(process)


def test_missing_folder(tmp_path):
    said = fails("--socket", f"{tmp_path}/none/s")
    assert f"{tmp_path}/none" in said


def test_one_bad_path_of_several_leaves_nothing(tmp_path):
    (tmp_path / "s.1").write_text("in the way")
    assert "no socket" in fails("--socket", f"{tmp_path}/s", "--devices", "3")
    assert os.listdir(tmp_path) == ["s.1"]


@pytest.mark.parametrize("args", [
    [], ["--socket", "a", "--fd", "3"], ["--socket", "a", "--profile", "h100"], ["--socket", "a", "--devices", "0"],
    ["--socket", "a", "--vendor-id", "12345"], ["--bogus"], ["--socket", "a", "--link-gbps", "0"],
    ["--socket", "a", "--link-gbps", "nan"], ["--socket", "a", "--link-gbps", "fast"],
    ["--socket", "a", "--link-us", "-1"], ["--socket", "a", "--link-us", "inf"],
])
def test_wrong_usage_exits_with_2(args):
    assert "usage" in fails(*args, code=2)


def test_file_that_somebody_else_put_there_is_not_removed(tmp_path):
    path = f"{tmp_path}/s"
    process = spawn("--socket", path)
    listening(process, 1)
    os.unlink(path)
    Path(path).write_text("mine")
    end(process)
    assert Path(path).read_text() == "mine"


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow_poll(tmp_path_factory):
    """A library to preload (helpers/slow_poll.c)."""
    library = tmp_path_factory.mktemp("preload") / "slow_poll.so"
    source = Path(__file__).parents[1] / "helpers/slow_poll.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True, timeout=60)
    return str(library)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("client", ["none", "silent", "idle", "booted", "half a message"])
def test_signal_ends_it_soon_and_cleanly(tmp_path, number, client):
    path = f"{tmp_path}/s"
    process = spawn("--socket", path, "--devices", "2")
    listening(process, 2)
    attached = None
    if client == "silent":
        attached = RawClient(path + ".0", negotiate=False)
    elif client == "booted":
        attached = Driver(path + ".0")
        attached.boot()
    elif client != "none":
        attached = RawClient(path + ".0")
    if client == "half a message":
        attached.send_raw(b"\1\0\2\0")
    start = time.monotonic()
    process.send_signal(number)
    process.wait(5)
    ended = time.monotonic()
    assert end(process) == ("", "")
    promptly(start, 1, ended)
    assert os.listdir(tmp_path) == []
    if attached is not None:
        attached.__exit__(None, None, None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("program", ["emulator", "share"])
def test_signal_just_before_the_wait_is_not_lost(tmp_path, slow_poll, program, number):
    path = f"{tmp_path}/s"
    arguments = command("--socket", path) if program == "emulator" else [
        sys.executable, "-m", "maia_tools.cli", "share", "emulated", "--socket", path]
    preload = f"{os.environ.get('LD_PRELOAD', '')} {slow_poll}"  # a sanitizer's library comes first
    process = subprocess.Popen(arguments, env={**environment(), "LD_PRELOAD": preload}, text=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert path in process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(number)
    try:
        assert process.communicate(timeout=END_SECONDS)[1] == ""
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert not os.path.lexists(path)


def test_signal_while_a_queue_waits_for_ever(tmp_path):
    """A command waits on a semaphore that nobody posts, and another copies without end in sight."""
    path = f"{tmp_path}/s"
    process = spawn("--socket", path)
    listening(process, 1)
    with Driver(path) as driver:
        driver.boot()
        assert driver.create_queue(queue=0)[0] == 0
        wait = bytes([1, 0, 1, 0]) + bytes(4) + (100).to_bytes(2, "little") + bytes([1, 0]) + (7).to_bytes(4, "little")
        driver.put(driver.spare, wait.ljust(64, b"\0"))
        driver.client.write32(0, 1, region=2)
        driver.client.read32(0)
        start = time.monotonic()
        process.terminate()
        process.wait(5)
        promptly(start, 1)
    end(process)


def test_two_signals_are_one(tmp_path):
    process = spawn("--socket", f"{tmp_path}/s")
    listening(process, 1)
    process.terminate()
    process.send_signal(signal.SIGINT)
    end(process)


# --- one client at a time --------------------------------------------------------------------------------------------


def test_second_client_waits_and_is_served_next(emulator):
    _, path = emulator
    first = RawClient(path)
    second = RawClient(path, negotiate=False)
    second.send(VERSION, version_body(QEMU_CAPABILITIES))
    second.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        second.sock.recv(1)
    first.write32(0xCC, 77)
    assert first.read32(0xCC) == 77
    second.sock.settimeout(5)
    first.sock.close()
    assert second.recv().flags == 1
    assert second.read32(0xCC) == 0
    second.sock.close()


def test_waiting_clients_may_leave(emulator):
    _, path = emulator
    with RawClient(path) as first:
        for _ in range(20):
            connect(path).close()
        assert first.alive()
    with RawClient(path) as client:
        assert client.alive()


def test_devices_of_one_process_do_not_wait_for_each_other(start_emulator):
    _, paths = start_emulator(devices=2)
    with RawClient(paths[0]) as one, RawClient(paths[1]) as two:
        one.write32(0xCC, 1)
        two.write32(0xCC, 2)
        assert (one.read32(0xCC), two.read32(0xCC)) == (1, 2)


# --- an inherited descriptor -----------------------------------------------------------------------------------------


def inherited(*args):
    ours, theirs = socket.socketpair()
    with theirs:
        process = spawn("--fd", str(theirs.fileno()), *args, pass_fds=[theirs.fileno()])
    ours.settimeout(READY_SECONDS)
    return process, ours


def test_inherited_socket_is_served_until_its_client_goes():
    process, ours = inherited()
    with RawClient(ours) as client:
        assert client.alive()
    process.wait(5)
    assert end(process) == ("", "")


def test_inherited_socket_ends_with_sigterm():
    process, ours = inherited("--profile", "maia100")
    with RawClient(ours) as client:
        start = time.monotonic()
        assert end(process) == ("", "")
        promptly(start, 1)
        with pytest.raises((EOFError, OSError)):
            client.read32(0)


def test_client_that_is_gone_before_the_start():
    process, ours = inherited()
    ours.close()
    process.wait(10)
    assert end(process) == ("", "")


def test_descriptor_that_is_no_socket():
    read, write = os.pipe()
    try:
        said = subprocess.run(command("--fd", str(read)), env=environment(), capture_output=True, text=True,
                              pass_fds=[read], timeout=READY_SECONDS)
        assert said.returncode == 1
        assert "no socket" in said.stderr
    finally:
        os.close(read)
        os.close(write)
    assert "socket" in fails("--fd", "999")


# --- idleness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["no client", "idle client", "booted with queues"])
def test_idle_costs_less_than_a_percent_of_a_core(start_emulator, state):
    process, (path,) = start_emulator()
    clients = []
    if state == "idle client":
        clients.append(RawClient(path))
    elif state == "booted with queues":
        clients.append(Driver(path))
        clients[0].boot()
        for queue in range(4):
            assert clients[0].create_queue(queue=queue)[0] == 0
    time.sleep(0.3)
    before = cpu_seconds(process)
    time.sleep(2)
    used = cpu_seconds(process) - before
    for client in clients:
        client.__exit__(None, None, None)
    assert used <= 0.02, f"{used / 2:.1%} of a core"


def test_threads_stay_bounded_over_many_clients(emulator):
    process, path = emulator

    def threads():
        return len(os.listdir(f"/proc/{process.pid}/task"))

    with RawClient(path) as client:
        client.alive()
        before = threads()
    for _ in range(20):
        with RawClient(path, capabilities={"twin_socket": {"supported": True}}) as client:
            client.alive()
    with RawClient(path) as client:
        client.alive()
        assert eventually(lambda: threads() == before)


def test_register_reads_come_from_several_threads_of_a_client(emulator):
    """Requests of many threads are one stream; the answers come in its order."""
    with RawClient(emulator[1]) as client:
        sent = []
        lock = threading.Lock()

        def ask():
            for _ in range(50):
                with lock:
                    sent.append(client.send(REGION_READ, access(0, 0, 4)))

        workers = [threading.Thread(target=ask) for _ in range(4)]
        for worker in workers:
            worker.start()
        got = [client.recv().id for _ in range(200)]
        for worker in workers:
            worker.join()
        assert got == sent


def test_connection_refused_after_the_end(tmp_path):
    path = f"{tmp_path}/s"
    process = spawn("--socket", path)
    listening(process, 1)
    with RawClient(path) as client:
        end(process)
        with pytest.raises((EOFError, OSError)):
            client.call(GET_INFO, bytes(16))
    with pytest.raises(OSError) as caught:
        connect(path)
    assert caught.value.errno in (errno.ENOENT, errno.ECONNREFUSED)
