"""The socket through which tools ask a process about its devices."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from maia_rt.observe import live
from tests.helpers.emulator import ROOT


@pytest.fixture
def attached():
    attachment = live.attach("fake0", "test", {"hang": lambda: {"verdict": "idle"}, "fail": _fail, "odd": object})
    yield attachment
    attachment.close()


def _fail():
    raise RuntimeError("it is broken")


def connect():
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(5)
    for _ in range(500):
        try:
            connection.connect(live.address(os.getpid()))
        except BlockingIOError:
            time.sleep(0.01)  # its queue is full
        else:
            break
    return connection


def read_all(connection):
    found = b""
    while piece := connection.recv(1 << 16):
        found += piece
    return found


def test_a_process_is_found_and_answers(attached):
    assert os.getpid() in live.processes()
    assert live.ask(os.getpid(), {"call": "devices"}) == [{"name": "fake0", "kind": "test"}]
    assert live.ask(os.getpid(), {"call": "hang", "device": "fake0"}) == [{"verdict": "idle"}]


def test_the_socket_comes_with_the_first_device_and_goes_with_the_last():
    threads = threading.active_count()
    first = live.attach("a", "test", {})
    second = live.attach("b", "test", {})
    assert threading.active_count() == threads + 1
    first.close()
    first.close()
    assert live.ask(os.getpid(), {"call": "devices"}) == [{"name": "b", "kind": "test"}]
    second.close()
    assert threading.active_count() == threads
    assert os.getpid() not in live.processes()
    with pytest.raises(ConnectionError):
        live.ask(os.getpid(), {"call": "devices"})


@pytest.mark.parametrize("request_line, said", [
    (b"\n", "JSONDecodeError"),
    (b"hang\n", "JSONDecodeError"),
    (b'"\xff"\n', "UnicodeDecodeError"),
    (b"[" * 4000 + b"\n", "Error"),
    (b"7\n", "object with a"),
    (b"{}\n", "object with a"),
    (b'{"call": 7}\n', "object with a"),
    (b'{"call": "open"}\n', "unknown call 'open'"),
    (b'{"call": "hang", "device": "other"}\n', "no device 'other'"),
    (b'{"call": "fail"}\n', "RuntimeError: it is broken"),
    (b'{"call": "odd"}\n', "not JSON serializable"),
    (b"x" * 5000, "less than 4096 bytes"),
])
def test_a_bad_request_gets_a_reason_and_the_next_one_its_answer(attached, request_line, said):
    with connect() as connection:
        connection.sendall(request_line)
        assert said in json.loads(read_all(connection))["error"]
    assert live.ask(os.getpid(), {"call": "hang"}) == [{"verdict": "idle"}]


def test_clients_that_say_nothing_or_leave_keep_nobody_from_asking(attached):
    silent = [connect() for _ in range(3 * live.CLIENTS)]
    try:
        for _ in range(100):
            connect().close()
        assert live.ask(os.getpid(), {"call": "hang"}) == [{"verdict": "idle"}]
    finally:
        for connection in silent:
            connection.close()


def test_a_client_that_says_nothing_is_sent_away(attached, monkeypatch):
    monkeypatch.setattr(live, "REQUEST_SECONDS", 0.1)
    with connect() as connection:
        connection.sendall(b'{"call": ')
        assert read_all(connection) == b""


def test_a_client_that_does_not_read_a_long_reply_is_sent_away(monkeypatch):
    monkeypatch.setattr(live, "REQUEST_SECONDS", 0.2)
    attachment = live.attach("long", "test", {"hang": lambda: "x" * (4 << 20)})
    with connect() as connection:
        connection.sendall(b'{"call": "hang"}\n')
        time.sleep(0.5)
        assert 0 < len(read_all(connection)) < 4 << 20
    assert live.ask(os.getpid(), {"call": "hang"}) == ["x" * (4 << 20)]
    attachment.close()


def test_who_asks_gets_the_reason_as_an_error(attached):
    with pytest.raises(ValueError, match="no device 'other'"):
        live.ask(os.getpid(), {"call": "hang", "device": "other"})


def test_the_environment_switches_it_off(monkeypatch):
    monkeypatch.setenv("MAIA_LIVE", "0")
    assert live.attach("a", "test", {}) is None
    assert os.getpid() not in live.processes()


def test_a_forked_child_has_none_of_it_and_can_have_its_own(attached):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            attached.close()
            own = live.attach("child", "test", {})
            code = 0 if live.ask(os.getpid(), {"call": "devices"}) == [{"name": "child", "kind": "test"}] else 2
            own.close()
            code = code or 3 * (os.getpid() in live.processes())
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert live.ask(os.getpid(), {"call": "devices"}) == [{"name": "fake0", "kind": "test"}]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user: run the tests as root")
def test_another_user_is_refused(attached):
    ask = (f"import os, sys; os.setgid(65534); os.setuid(65534); from maia_rt.observe import live\n"
           f"try: live.ask({os.getpid()}, {{'call': 'hang'}})\nexcept PermissionError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", "import maia_rt.observe.live\n" + ask], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=30)
    assert done.stdout.strip() == f"process {os.getpid()} belongs to another user", done.stderr


def test_a_process_that_runs_no_python_is_said_to_be_silent(attached):
    script = ("import os, signal, sys; from maia_rt.observe import live; a = live.attach('x', 'test', {})\n"
              "print('ready', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        assert process.stdout.readline() == b"ready\n"
        assert live.ask(process.pid, {"call": "devices"})
        process.send_signal(19)
        deadline = time.monotonic() + 10
        # It stops a little later.
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.005)
        with pytest.raises(TimeoutError):
            live.ask(process.pid, {"call": "devices"}, timeout=0.2)
        process.send_signal(18)
        assert live.ask(process.pid, {"call": "devices"})
        process.stdin.close()
        assert process.wait(10) == 0
