"""The real emulator as a process: started for a test, ended by its pid, its exit code checked.

    def test_something(start_emulator):
        process, paths = start_emulator("--devices", "2")
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READY_SECONDS = 20
END_SECONDS = 10


def environment():
    """The environment in which `python -m maia_emulator` finds everything, installed or not."""
    folders = [str(ROOT), str(ROOT / "emulator"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}


def command(*args):
    return [sys.executable, "-W", "error", "-m", "maia_emulator", *args]


def spawn(*args, **options):
    """Start the emulator with these arguments; its output is piped."""
    return subprocess.Popen(
        command(*args), env=environment(), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )


def listening(process, count):
    """The paths of the first `count` lines of output."""
    paths = []
    for _ in range(count):
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"the emulator said {line + out!r} and {err!r}")
        paths.append(line.removeprefix("listening on ").rstrip("\n"))
    return paths


def end(process, code=0):
    """End a process by SIGTERM unless it has ended; return its output and errors, checked to be quiet."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        out, err = process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise AssertionError(f"the emulator did not end within {END_SECONDS} s of SIGTERM") from None
    assert process.returncode == code, f"exit code {process.returncode}, stderr: {err}"
    return out, err


@contextlib.contextmanager
def running(*args, devices=1):
    """The emulator on a socket in a short temporary folder: yields (process, paths)."""
    folder = tempfile.mkdtemp(prefix="maia-")
    more = ["--devices", str(devices)] if devices != 1 else []
    process = spawn("--socket", f"{folder}/s", *more, *args)
    try:
        yield process, listening(process, devices)
    except BaseException:
        process.kill()
        _, err = process.communicate()
        sys.stderr.write(err)
        raise
    else:
        _, err = end(process)
        assert "Traceback" not in err, err
        assert not os.listdir(folder), "socket files were left behind"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def start_emulator():
    """A function that starts an emulator: ``start_emulator(*args, devices=1) -> (process, paths)``."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, devices=1: stack.enter_context(running(*args, devices=devices))


@pytest.fixture(scope="module")
def emulator():
    """One small device for all tests of a module: (process, path)."""
    with running() as (process, paths):
        yield process, paths[0]


def fd_count(process):
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def cpu_seconds(process):
    """User and system time that the process has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def eventually(condition, seconds=3.0):
    """Wait until a condition holds; returns its last value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return value


def connect(path):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)  # blocking: waits for room in the backlog
        sock.settimeout(10)
    except BaseException:
        sock.close()
        raise
    return sock
