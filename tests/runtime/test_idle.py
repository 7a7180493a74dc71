"""What devices and programs cost while nothing happens, and that one processor core is enough for both sides."""

import asyncio
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import maia_rt
from maia_rt._fast.ring import WAIT_DONE
from maia_rt.contract.registers import Bar0
from tests.helpers.emulator import environment, running

pytestmark = pytest.mark.emulator_process
SETTLE_SECONDS, WATCHED_SECONDS = 0.5, 1.5
SHARE = 0.01
"""Of one core."""


@pytest.fixture
def first_index():
    """Once is enough: where numbers roll over changes nothing here."""
    return 0


def cpu_seconds(pid):
    """How long the threads of a process have run, in user space and in the kernel's."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def shares(*pids):
    """What part of a core each process uses while the test does nothing."""
    time.sleep(SETTLE_SECONDS)
    before, began = [cpu_seconds(pid) for pid in pids], time.monotonic()
    time.sleep(WATCHED_SECONDS)
    took = time.monotonic() - began
    return [(cpu_seconds(pid) - start) / took for pid, start in zip(pids, before, strict=True)]


def test_the_first_command_after_rest_wakes_the_device(embedded):
    ring = embedded.default_stream.queue.ring
    before = embedded.counters()["wakes"]
    for _ in range(20):
        time.sleep(0.02)
        assert ring.wait(ring.submit(1, 0, 0, 0, 0, 0), 10_000_000_000) == WAIT_DONE
    assert 20 <= embedded.counters()["wakes"] - before < 40
    embedded.transport.write(0, Bar0.WAKE, 4, 1)
    assert embedded.counters()["wakes"] - before >= 21


def test_an_idle_program_and_its_devices_use_less_than_a_hundredth_of_a_core(embedded, other_device):
    called = []
    with (embedded.create_stream() as here, other_device.create_stream() as there, embedded.allocate(4096) as near,
          other_device.allocate(4096) as far, embedded.create_semaphore() as gate):
        here.fill(near, 7)
        here.call(lambda: called.append(1))
        there.wait(here.record())                # has the thread that looks after peers
        there.copy(far, near)
        asyncio.run(there.record().synchronize_async())
        here.synchronize()
        assert all(share < SHARE for share in shares(os.getpid(), embedded.emulator_pid, other_device.emulator_pid))
        # Nor do those that wait for something that does not come: a stream, another device's stream, the program.
        here.wait(gate, 1)
        there.wait(here.record())
        here.call(lambda: called.append(2))
        assert all(share < SHARE for share in shares(os.getpid(), embedded.emulator_pid, other_device.emulator_pid))
        gate.set(1)
        there.synchronize()
        here.synchronize()
        assert (far.copy_to_host() == 7).all()
    assert called == [1, 2]


def test_an_emulator_that_nobody_uses_and_one_that_is_only_open_are_idle():
    with running(devices=4) as (process, paths):
        assert shares(process.pid)[0] < SHARE
        with maia_rt.open(paths[1]), maia_rt.open(paths[2]) as other:
            other.upload(np.ones(4096, np.float32)).close()
            assert all(share < SHARE for share in shares(process.pid, os.getpid()))


ON_ONE_CORE = """
    import asyncio, os, sys
    import numpy as np
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import maia_rt
    from tests.helpers import tiny_program

    done = []
    with maia_rt.open("emulated") as one, maia_rt.open("emulated") as two:
        assert all(len(os.sched_getaffinity(pid)) == 1 for pid in (0, one.emulator_pid, two.emulator_pid))
        here, there = one.create_stream(), one.create_stream()
        x = one.upload(np.ones(1000, np.float32))
        big, back = np.arange(1 << 18, dtype=np.uint32), np.zeros(1 << 18, np.uint32)
        buffer, given = one.allocate(big.nbytes), one.allocate_host(big.shape, big.dtype)
        given.array[:] = big
        program = one.load(tiny_program.image())
        with here.capture() as capture:
            here.fill(buffer, 0)
            here.copy(buffer, given)
        graph = capture.instantiate()
        for turn in range(20):
            for _ in range(20):
                here.synchronize()
                here.launch(program["axpy"], x, x, x, 0.0)
            graph.launch(here)
            there.wait(here.record())
            there.copy(back, buffer)
            here.wait(there.record())
            there.call(lambda turn=turn: done.append(turn))
            asyncio.run(here.record().synchronize_async())
            assert (back == big).all()
            back[:] = 0
        with maia_rt.Communicator([one, two]) as ranks:
            parts = [device.upload(np.full(5000, 2, np.float32)) for device in (one, two)]
            for _ in range(5):
                ranks.all_reduce(parts).synchronize()
            assert (parts[1].copy_to_host() == 64).all()
            for part in parts:
                part.close()
        for thing in (graph, program, buffer, given, x, here, there):
            thing.close()
    assert done == list(range(20))
    print("done")
"""


def test_on_one_core_both_sides_make_progress(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(ON_ONE_CORE))
    done = subprocess.run([sys.executable, "-W", "error", script], env=environment(), capture_output=True, text=True,
                          timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
