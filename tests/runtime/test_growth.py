"""What work leaves behind in a process that goes on working, and what each thing that is open takes of it."""

import gc
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import tiny_program

pytestmark = pytest.mark.emulator_process
COMMANDS = int(os.environ.get("MAIA_GROWTH_COMMANDS", "100000"))
"""`make soak` has ten million."""
MIB = 1 << 20


@pytest.fixture
def first_index():
    """Once is enough: where numbers roll over changes nothing here."""
    return 0


def memory(pid):
    """Bytes of a process's memory that no file backs, and that a memfd backs."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return [1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")]


def held(device):
    """Memory of the program and of the emulator, objects, descriptors."""
    gc.collect()
    pids = (os.getpid(), device.emulator_pid)
    return ([number for pid in pids for number in memory(pid)], len(gc.get_objects()),
            [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids])


@pytest.mark.timeout(3600)
def test_commands_leave_nothing_behind(embedded):
    x = embedded.upload(np.ones(1000, np.float32))
    pinned, plain = embedded.allocate_host(4096), np.zeros(4096, np.uint8)
    with (embedded.load(tiny_program.image()) as program, embedded.create_stream() as stream,
          embedded.create_stream() as other, embedded.allocate(4096) as buffer, embedded.create_semaphore() as word):
        with stream.capture() as capture:
            for _ in range(4):
                stream.fill(buffer, 1)
        with capture.instantiate() as graph:
            def work(commands):
                for _ in range(commands // 25):
                    for _ in range(5):
                        stream.launch(program["axpy"], x, x, x, 0.0)
                        other.fill(buffer, 3)
                        stream.record(timing=True)
                    graph.launch(stream)
                    other.wait(stream.record())
                    stream.signal(word)
                    stream.copy(buffer, pinned)
                    other.copy(plain, buffer)
                    stream.free(stream.allocate(256))
                stream.synchronize()
                other.synchronize()

            work(COMMANDS // 5)
            before, objects, descriptors = held(embedded)
            work(COMMANDS)
            after, objects_after, descriptors_after = held(embedded)
    assert all(now - then < MIB for now, then in zip(after, before, strict=True)), (before, after)
    assert objects_after - objects < 2000       # what is kept for a while, such as timings
    assert descriptors_after == descriptors
    pinned.close()
    x.close()


def taken(device, make, count):
    """Bytes of this process that one of `count` things takes, of the interpreter's memory and of pinned memory."""
    tracemalloc.start()
    try:
        before, pinned = tracemalloc.get_traced_memory()[0], memory(os.getpid())[1]
        things = [make(device) for _ in range(count)]
        gc.collect()
        found = (tracemalloc.get_traced_memory()[0] - before + memory(os.getpid())[1] - pinned) / count
    finally:
        tracemalloc.stop()
    for thing in things:
        thing.close()
    return found


@pytest.mark.parametrize(("count", "most", "make"), [
    (400, 1536, lambda device: device.allocate(256)),
    (400, 2560, lambda device: device.allocate_host(256)),
    (40, 128 * 1024, lambda device: device.create_stream()),
    (400, 1024, lambda device: device.create_semaphore()),
], ids=["buffer", "host buffer", "stream of 1,024 entries", "semaphore"])
def test_what_is_open_takes_so_many_bytes_and_gives_them_back(embedded, count, most, make):
    assert 0 < taken(embedded, make, count) < most

    def come_and_go(times):
        for _ in range(times):
            for thing in [make(embedded) for _ in range(count)]:
                thing.close()
        return held(embedded)[0]

    before = come_and_go(4)
    after = come_and_go(8)
    assert all(now - then < MIB for now, then in zip(after, before, strict=True)), (before, after)


def test_a_node_of_a_graph_takes_less_than_a_kilobyte(embedded):
    nodes = 2000
    with embedded.create_stream() as stream, embedded.allocate(64) as buffer:
        def graph(device):
            with stream.capture() as capture:
                for number in range(nodes):
                    stream.fill(buffer, number & 255)
            return capture.instantiate()

        graph(embedded).close()
        assert 0 < taken(embedded, graph, 1) < nodes * 1024
