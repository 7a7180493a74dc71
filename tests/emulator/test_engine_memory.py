"""The client's memory as the engine sees it: mappings, messages, and clients that cheat."""

import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.bare_engine import DATA, HBM, HOST, BareEngine, until
from helpers.stopwatch import promptly

from maia_rt.contract import commands as c
from maia_rt.contract.commands import Opcode
from maia_rt.errors import FaultCode

FAR = 0x4000_0000


@pytest.fixture
def bare():
    engine = BareEngine()
    yield engine
    engine.close()


@pytest.fixture
def file():
    fd = os.memfd_create("client", os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 20)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("iova", "size", "offset", "code"),
    [(FAR, 0, 0, errno.EINVAL), (2**64 - 4096, 8192, 0, errno.EINVAL), (FAR, 2 << 20, 0, errno.EINVAL),
     (FAR, 4096, 1 << 20, errno.EINVAL), (FAR, 4096, 2**64 - 4096, errno.EINVAL), (HOST, 4096, 0, errno.EEXIST),
     (HOST - 4096, 8192, 0, errno.EEXIST), (HOST + 4096, 4096, 0, errno.EEXIST)],
)
def test_a_bad_mapping_is_refused_with_its_errno(bare, file, iova, size, offset, code):
    with pytest.raises(OSError) as refusal:
        bare.engine.dma_map(iova, size, file, offset, 3)
    assert refusal.value.errno == code


@pytest.mark.parametrize(("iova", "size"), [(HOST, 4096), (HOST + 4096, 4096), (HOST + 4096, 1 << 40), (FAR, 0)])
def test_unmap_does_not_cut_a_mapping(bare, iova, size):
    with pytest.raises(OSError) as refusal:
        bare.engine.dma_unmap(iova, size)
    assert refusal.value.errno == errno.EINVAL


def test_unmap_says_how_many_bytes_were_mapped(bare, file):
    for number in (0, 1, 5):
        bare.engine.dma_map(FAR + number * 4096, 4096, file, 0, 3)
    assert bare.engine.dma_unmap(FAR, 2 << 20) == 3 * 4096
    assert bare.engine.dma_unmap(FAR, 2 << 20) == 0


def test_many_small_mappings_of_one_file_are_one_memory(bare, file):
    pages = 256
    for i in np.random.default_rng(3).permutation(pages):
        bare.engine.dma_map(FAR + int(i) * 4096, 4096, file, int(i) * 4096, 3)
    before = Path("/proc/self/maps").read_text().count("memfd:client")
    assert before == 1
    data = np.random.default_rng(4).integers(0, 256, pages * 4096 - 10, dtype=np.uint8)
    os.pwrite(file, data.tobytes(), 5)
    queue = bare.queue()
    queue.put(c.COPY, Opcode.COPY, src=FAR + 5, dst=bare.address(DATA), size=data.size)
    assert queue.wait() == 0
    assert (bare.host[DATA : DATA + data.size] == data).all()
    for i in range(pages):
        bare.engine.dma_unmap(FAR + i * 4096, 4096)
    assert "memfd:client" not in Path("/proc/self/maps").read_text()


def test_access_flags_are_kept(bare, file):
    bare.engine.dma_map(FAR, 4096, file, 0, 1)
    queue = bare.queue()
    queue.put(c.COPY, Opcode.COPY, src=FAR, dst=HBM, size=8)
    assert queue.wait() == 0
    queue.put(c.COPY, Opcode.COPY, src=HBM, dst=FAR, size=8)
    assert queue.wait() == FaultCode.ADDRESS


def test_unmap_waits_for_inflight_copy(bare, file):
    """After unmap has returned nothing is written any more, whatever was under way."""
    bare.engine.dma_map(FAR, 1 << 20, file, 0, 3)
    queue = bare.queue()
    for round_ in range(30):
        queue.put(c.FILL, Opcode.FILL, dst=HBM, size=16 << 20, pattern=round_ + 1, width=1)
        queue.put(c.COPY, Opcode.COPY, src=HBM, dst=FAR, size=1 << 20)
        time.sleep(0.0005 * (round_ % 7))
        bare.engine.dma_unmap(FAR, 1 << 20)
        os.pwrite(file, bytes(1 << 20), 0)
        fault = queue.wait()
        assert os.pread(file, 1 << 20, 0).count(0) == 1 << 20
        bare.engine.dma_map(FAR, 1 << 20, file, 0, 3)
        if fault:
            assert fault == FaultCode.ADDRESS
            queue.reset()


def test_memory_without_a_descriptor_is_reached_by_messages(bare):
    memory = bytearray(os.urandom(100_000))
    asked = []

    def read(address, size):
        asked.append(("read", size))
        return bytes(memory[address - FAR : address - FAR + size])

    def write(address, data):
        asked.append(("write", len(data)))
        memory[address - FAR : address - FAR + len(data)] = data

    bare.engine.set_message_dma(read, write)
    bare.engine.dma_map(FAR, len(memory), -1, 0, 3)
    queue = bare.queue()
    queue.put(c.COPY, Opcode.COPY, src=FAR, dst=HBM, size=50_000)
    queue.put(c.COPY, Opcode.COPY, src=HBM, dst=FAR + 50_000, size=50_000)
    assert queue.wait() == 0
    assert memory[:50_000] == memory[50_000:]
    assert {kind for kind, _ in asked} == {"read", "write"}
    bare.engine.set_message_dma(None, None)
    queue.put(c.COPY, Opcode.COPY, src=FAR, dst=HBM, size=8)
    assert queue.wait() == FaultCode.ADDRESS


def test_a_client_that_cuts_its_file_short_hurts_only_itself(bare, file):
    bare.engine.dma_map(FAR, 1 << 20, file, 0, 3)
    os.ftruncate(file, 4096)
    queue = bare.queue()
    queue.put(c.COPY, Opcode.COPY, src=FAR, dst=HBM, size=1 << 20)
    queue.put(c.COPY, Opcode.COPY, src=HBM, dst=FAR, size=1 << 20)
    assert queue.wait() == 0
    queue.put(c.COMMAND, Opcode.NOP)
    assert queue.wait() == 0


def test_a_queue_whose_memory_is_gone_does_not_stop_the_others(bare, file):
    bare.engine.dma_map(FAR, 1 << 20, file, 0, 3)
    params = np.zeros((), c.CREATE_QUEUE)
    params["ring"], params["progress"], params["reports"] = FAR, FAR + 0x10000, FAR + 0x20000
    params["entries_log2"] = params["reports_log2"] = 4
    params["vector"], params["queue"] = c.NO_VECTOR, c.ANY_QUEUE
    lost = bare.engine.create_queue(params.tobytes())
    bare.engine.dma_unmap(FAR, 1 << 20)
    bare.bar2[lost * 1024] = 3
    bare.engine.wake()
    until(lambda: bare.engine.errors() & 1)
    queue = bare.queue()
    queue.put(c.COMMAND, Opcode.NOP)
    assert queue.wait() == 0


def test_admin_work_gets_its_turn_beside_a_busy_queue(bare):
    """The command processor's lock is fair enough: creating queues while another one never rests takes no second."""
    queue = bare.queue()
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            queue.put(c.FILL, Opcode.FILL, dst=HBM, size=1 << 20, pattern=1, width=1)
            queue.wait()

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        begin = time.monotonic()
        for _ in range(50):
            other = bare.queue()
            bare.queues.pop()
            bare.engine.delete_queue(other.id)
        promptly(begin, 5)
    finally:
        stop.set()
        thread.join()


def test_reset_zeroes_memory_and_forgets_queues(bare):
    queue = bare.queue()
    queue.put(c.FILL, Opcode.FILL, dst=HBM, size=4096, pattern=7, width=1)
    assert queue.wait() == 0
    bare.engine.reset()
    assert bare.engine.queue_ids() == []
    assert bare.engine.dma_read(HBM, 4096) == bytes(4096)
    queue = bare.queue()
    queue.put(c.COMMAND, Opcode.NOP)
    assert queue.wait() == 0
