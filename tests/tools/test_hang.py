"""``maia hang`` asks a program that hangs, from outside: one for each way to hang."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from maia_rt.observe import live
from tests.helpers.emulator import eventually
from tests.tools.conftest import ENVIRONMENT

PROLOGUE = """
import sys, threading, time
import maia_rt
from maia_rt.contract.commands import Opcode, PostOp, WaitOp

device = maia_rt.open(sys.argv[1])
streams = [device.create_stream() for _ in range(3)]

def block(stream, semaphore):
    stream._submit(Opcode.NOP, pre=((semaphore, WaitOp.GE, 1),), unbounded=True)

def post(stream, semaphore):
    stream._submit(Opcode.NOP, post=((semaphore, PostOp.SET, 1),))

"""


@pytest.fixture
def start(tmp_path):
    """Start a program that hangs on the device named, the embedded one by default; its process."""
    started = []

    def run(body, selector="emulated"):
        script = tmp_path / "program.py"
        script.write_text(PROLOGUE + textwrap.dedent(body))
        process = subprocess.Popen([sys.executable, script, selector], env=ENVIRONMENT, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_a_program_that_does_nothing_does_not_hang(run_maia, start):
    process = start("print('ready', flush=True); sys.stdin.read()")
    done = run_maia("hang", process.pid)
    assert done.returncode == 0, done.stderr
    assert f"process {process.pid}  {sys.executable}" in done.stdout
    assert "emulated: idle: nothing is outstanding" in done.stdout


def test_a_chain_over_three_streams_is_shown_while_the_main_thread_waits(run_maia, start):
    process = start("""
        block(streams[0], 1000)
        streams[1].wait(streams[0].record())
        streams[2].wait(streams[1].record())
        print('ready', flush=True)
        streams[2].synchronize(60)
    """)
    done = run_maia("hang", process.pid)
    assert done.returncode == 1
    _, verdict, *links = done.stdout.splitlines()
    assert "unsignalled: queue 0 (stream 1) waits for semaphore 1000 >= 1, which is 0, never written; nobody" in verdict
    assert [link.split()[1] for link in links] == ["2", "1", "0"]
    assert "program.py:17" in links[1]
    assert "program.py:18" in links[0]


def test_a_circle_is_a_deadlock(run_maia, start):
    process = start("""
        for number, stream in enumerate(streams):
            block(stream, 1000 + number)
            post(stream, 1000 + (number + 1) % 3)
        print('ready', flush=True)
        device.synchronize(60)
    """)
    done = run_maia("hang", "--json", process.pid)
    assert done.returncode == 1
    data = json.loads(done.stdout)
    assert (data["schema"], data["kind"]) == (1, "hang")
    (found,) = data["processes"]
    (report,) = found["reports"]
    assert (found["pid"], report["schema"], report["verdict"]) == (process.pid, 2, "deadlock")
    assert sorted(place["queue"] for place in report["cycle"]) == [0, 1, 2]


def test_two_devices_that_wait_for_each_other_are_one_picture(run_maia, start):
    process = start("""
        second = maia_rt.open("emulated")
        far = second.create_stream()
        asked, answered = second.create_semaphore(), device.create_semaphore()
        far.wait(asked, 1)
        streams[0].wait(answered, 1)
        streams[0].signal(asked)
        far.signal(answered)
        print('ready', flush=True)
        far.synchronize(60)
    """)
    done = run_maia("hang", process.pid)
    assert done.returncode == 1, done.stderr
    _, verdict, *links = done.stdout.splitlines()
    assert verdict.count("emulated (process ") >= 4 and ": deadlock: queue " in verdict
    assert len(links) == 2
    data = json.loads(run_maia("hang", "--json", process.pid).stdout)
    ((report,),) = [one["reports"] for one in data["processes"]]
    assert report["verdict"] == "deadlock" and len({place["device"] for place in report["cycle"]}) == 2


def test_a_device_is_found_by_its_socket_whoever_drives_it(run_maia, start, start_emulator):
    _, (path,) = start_emulator()
    process = start("""
        block(streams[0], 1000)
        print('ready', flush=True)
        streams[0].synchronize(60)
    """, str(path))
    done = run_maia("hang", os.path.join(os.path.dirname(path), ".", os.path.basename(path)))
    assert done.returncode == 1, done.stderr
    assert f"process {process.pid} " in done.stdout
    assert "semaphore 1000" in done.stdout


def test_every_process_is_asked_where_none_is_named(run_maia, start):
    idle = start("print('ready', flush=True); sys.stdin.read()")
    hung = start("block(streams[0], 1000); print('ready', flush=True); streams[0].synchronize(60)")
    done = run_maia("hang")
    assert done.returncode == 1
    assert f"process {idle.pid} " in done.stdout
    assert f"process {hung.pid} " in done.stdout


def test_a_process_that_cannot_run_python_is_said_not_to_answer_with_code_6(run_maia, start):
    process = start("block(streams[0], 1000); print('ready', flush=True); streams[0].synchronize(60)")
    process.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{process.pid}/stat")
    assert eventually(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
    done = run_maia("hang", "--timeout", "0.2", process.pid)
    assert done.returncode == 6
    assert f"process {process.pid} does not answer within 0.2 s" in done.stderr
    assert "interpreter lock" in done.stderr
    assert run_maia("hang", "--timeout", "0.2").returncode in (1, 6)
    assert run_maia("hang", "--timeout", "0.2", "/somewhere/else").returncode == 6
    process.send_signal(signal.SIGCONT)
    assert run_maia("hang", process.pid).returncode == 1


def test_dead_firmware_is_said_and_the_driver_tells_what_it_knows(run_maia, start):
    process = start("""
        import os, signal
        block(streams[0], 1000)
        os.kill(device.emulator_pid, signal.SIGSTOP)
        print('ready', flush=True)
        sys.stdin.readline()
        os.kill(device.emulator_pid, signal.SIGCONT)
        sys.stdin.read()
    """)
    done = run_maia("hang", process.pid)
    assert done.returncode == 1
    assert "firmware: the device does not answer; queue 0 (stream 1) waits for semaphore 1000 >= 1" in done.stdout
    assert "the device could not be asked, this is what the driver knows: no answer within" in done.stdout
    process.stdin.write("go on\n")
    process.stdin.flush()


def test_nobody_there_is_code_3(run_maia, monkeypatch):
    monkeypatch.setattr(live, "processes", list)
    for target in ([], ["/no/such/socket"], ["0000:3b:00.0"], [str(os.getpid())]):
        done = run_maia("hang", *target)
        assert done.returncode == 3, done.stdout
        assert done.stderr.count("\n") == 3


@pytest.mark.parametrize("arguments", [["--timeout", "0"], ["--timeout", "x"], ["a", "b"], ["--nothing"]])
def test_a_wrong_command_line_is_code_2(run_maia, arguments):
    assert run_maia("hang", *arguments).returncode == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user: run the tests as root")
def test_another_users_process_is_code_4(start):
    process = start("print('ready', flush=True); sys.stdin.read()")
    body = ("import os, sys; from maia_tools import cli; import maia_tools.hang; os.setgid(65534); os.setuid(65534);"
            f"sys.exit(cli.main(['hang', '{process.pid}']))")
    done = subprocess.run([sys.executable, "-c", body], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4, done.stderr
    assert "belongs to another user" in done.stderr
