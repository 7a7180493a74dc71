"""Several programs on one device through a broker: each has a device of its own, and none can reach another's."""

import contextlib
import errno
import os
import random
import socket
import threading
import time

import numpy as np
import pytest

import maia_rt
from maia_rt.contract import commands as c
from maia_rt.contract.commands import AdminOpcode, AdminStatus, PostOp
from maia_rt.contract.registers import Bar0
from maia_rt.errors import (
    DeviceBusy,
    DeviceFault,
    DeviceLost,
    FaultCode,
    InvalidArgument,
    OutOfMemory,
    OutOfSemaphores,
    TransportError,
    Unsupported,
)
from maia_rt.memory import DmaRegion
from maia_rt.runtime.discovery import connect
from maia_rt.share import Broker
from maia_rt.transport.uapi import PciRegion
from maia_rt.transport.vfio_user import VfioUserClient
from tests.helpers import tiny_program
from tests.helpers.nursery import outlive

# What a test does not close is closed with its device; the collector may come by before.
pytestmark = pytest.mark.filterwarnings("ignore:a buffer of .* was not closed:ResourceWarning")

ROUNDS = int(os.environ.get("MAIA_KILL_ROUNDS", "20"))
MIB = 1 << 20


@contextlib.contextmanager
def broker_on(path, **options):
    """A broker on an emulator of its own, served by a thread of this process."""
    transport, emulator = connect("emulated")
    try:
        with Broker(transport, path, **options) as broker:
            thread = threading.Thread(target=broker.run)
            thread.start()
            try:
                yield broker
            finally:
                broker.stop()
                thread.join()
    finally:
        transport.close()
        emulator.close()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "share")


@pytest.fixture
def broker(path):
    with broker_on(path) as broker:
        yield broker


@pytest.fixture
def pair(broker):
    """Two programs' devices, as it were."""
    with maia_rt.open(f"share:{broker.path}") as one, maia_rt.open(f"share:{broker.path}") as other:
        yield one, other


def settle(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_each_share_is_a_smaller_device_of_its_own(pair):
    one, other = pair
    for device in pair:
        capabilities = device.capabilities
        assert (capabilities.clusters, capabilities.max_queues, capabilities.semaphores) == (1, 32, 32 + 480)
        assert (capabilities.hbm_bytes, capabilities.max_contexts) == (512 * MIB, 1)
        assert not (capabilities.bounded_contexts or capabilities.host_doorbells or capabilities.injection)
        assert "small" in device.identity.model and device.found == ""
    assert one.capabilities.hbm_base != other.capabilities.hbm_base
    assert one.capabilities.tile_sram_base != other.capabilities.tile_sram_base


def test_the_whole_runtime_works_for_both_at_the_same_time(pair):
    def work(device, seed):
        rng = np.random.default_rng(seed)
        with device.create_stream() as first, device.create_stream() as second:
            program = device.load(tiny_program.image(1000))
            x, y = (rng.standard_normal(1000, dtype=np.float32) for _ in range(2))
            a, b, out = device.upload(x), device.upload(y), device.allocate(1000, np.float32)
            sram = device.allocate(64, space=maia_rt.Space.tile(1))
            with first.capture() as capture:
                first.launch(program["axpy"], a, b, out, 2.0)
                first.fill(sram, 7)
            graph = capture.instantiate()
            for _ in range(5):
                graph.launch(first)
                second.wait(first.record())
                back = np.zeros(1000, np.float32)
                second.copy(back, out)
                second.synchronize()
                assert np.allclose(back, 2 * x + y, rtol=1e-6)
            assert (sram.copy_to_host() == 7).all()
            with device.create_semaphore(3) as semaphore:
                assert semaphore.value == 3
            graph.close()
            program.close()

    errors = []

    def run(device, seed):
        try:
            work(device, seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(device, seed)) for seed, device in enumerate(pair)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_fault_of_one_is_told_to_it_alone(pair):
    one, other = pair
    with one.create_stream() as stream, other.create_stream() as undisturbed:
        stream._submit(c.Opcode.COPY, payload=(other.capabilities.hbm_base, one.capabilities.hbm_base, 64))
        with pytest.raises(DeviceFault) as fault:
            stream.synchronize()
        assert fault.value.code == FaultCode.CONTEXT
        assert fault.value.address == other.capabilities.hbm_base
        assert fault.value.queue == stream.queue.id
        stream.recover()
        stream.fill(one.allocate(64), 1)
        stream.synchronize()
        undisturbed.fill(other.allocate(64), 1)
        undisturbed.synchronize()
        assert len(one.faults()) == 1 and len(other.faults()) == 0
    assert "CONTEXT" in str(fault.value)


def test_a_hang_report_shows_the_own_queues_only(pair):
    one, other = pair
    with other.create_semaphore() as semaphore, one.create_stream(), other.create_stream(timeout=60) as waiting:
        waiting.wait(semaphore, 1)
        settle(lambda: "semaphore" in str(other.hang_report()))
        assert "semaphore" not in str(one.hang_report())
        semaphore.set(1)
        waiting.synchronize()


def test_what_one_had_the_next_does_not_see(broker):
    secret = np.full(8 * MIB, 0xA5, np.uint8)
    with maia_rt.open(f"share:{broker.path}") as device:
        at = device.capabilities.hbm_base
        device.upload(secret)
        sram = device.allocate(4096, space=maia_rt.Space.tile(0))
        device.default_stream.fill(sram, 0xA5)
        semaphore = device.create_semaphore(77)
        device.default_stream.synchronize()
        semaphore.close()
    settle(lambda: not broker.clients())
    with maia_rt.open(f"share:{broker.path}") as one, maia_rt.open(f"share:{broker.path}") as other:
        again = one if one.capabilities.hbm_base == at else other
        assert not again.allocate(32 * MIB).copy_to_host().any()
        assert not again.allocate(4096, space=maia_rt.Space.tile(0)).copy_to_host().any()
        assert not any(again._firmware.semaphore(i) for i in range(32, 512))


def test_a_third_program_is_refused_and_served_when_one_goes(broker, pair):
    with pytest.raises(DeviceBusy):
        maia_rt.open(f"share:{broker.path}")
    opened = []
    waiting = threading.Thread(target=lambda: opened.append(maia_rt.open(f"share:{broker.path}")))
    waiting.start()
    settle(broker.waiting)
    pair[0].close()
    waiting.join()
    with opened[0] as device:
        assert (device.upload([1, 2, 3]).copy_to_host() == [1, 2, 3]).all()


def test_a_lease_that_ran_out_ends_when_another_waits(path):
    with broker_on(path, clients=1, lease=0.2), maia_rt.open(f"share:{path}") as first:
        time.sleep(0.3)
        assert (first.upload([5]).copy_to_host() == [5]).all()      # nobody waits
        with maia_rt.open(f"share:{path}") as second:
            assert (second.upload([6]).copy_to_host() == [6]).all()
            with pytest.raises(DeviceLost):
                first.counters()


def test_a_reset_of_one_is_nothing_to_the_other(pair):
    one, other = pair
    with other.create_stream() as stream:
        kept = other.upload(np.arange(1000))
        one.upload(np.arange(1000))
        one.reset()
        with one.allocate(1 * MIB) as fresh:
            assert not fresh.copy_to_host().any()
        back = np.zeros(1000, np.int64)
        stream.copy(back, kept)
        stream.synchronize()
        assert (back == np.arange(1000)).all()
        with one.upload([4]) as again:
            assert (again.copy_to_host() == [4]).all()


# --- hostile clients --------------------------------------------------------------------------------------------------


@pytest.fixture
def raw(broker):
    """A client that speaks for itself, beside one that must not notice."""
    with maia_rt.open(f"share:{broker.path}") as other:
        kept = other.upload(np.arange(5000))
        with VfioUserClient.connect(broker.path) as client:
            yield client
        assert (kept.copy_to_host() == np.arange(5000)).all()
        assert not other.faults().size


@pytest.mark.parametrize("iova", [0, 1 << 20, (1 << 36) - 4096, 3 << 36, (1 << 48) - 4096, 1 << 63])
def test_memory_is_mapped_in_the_own_window_only(raw, iova):
    with DmaRegion(8192) as region, pytest.raises(TransportError) as refusal:
        raw.dma_map(iova, region)
    assert refusal.value.errno == errno.EINVAL


class Plain:
    """Memory whose file can shrink."""

    def __init__(self, fd, size=4096):
        self.fd, self.offset, self.size, self.address = fd, 0, size, 4096

    def view(self):
        return memoryview(bytearray(self.size))


def test_memory_that_could_vanish_is_refused(raw, tmp_path):
    first = raw.read(PciRegion.BAR0, Bar0.HOST_FIRST, 8)
    memfd = os.memfd_create("soft", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, 4096)
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(plain, 4096)
    try:
        for fd in (memfd, plain, -1):
            with pytest.raises(TransportError):
                raw.dma_map(first, Plain(fd))
        with DmaRegion(4096) as region, pytest.raises(TransportError):
            raw.dma_map(first, Plain(region.fd, 1 << 30))       # longer than its file
    finally:
        os.close(memfd)
        os.close(plain)


@pytest.fixture
def booted(broker, raw):
    """The raw client's share, booted by hand: a function that runs an admin command."""
    window = raw.read(PciRegion.BAR0, Bar0.HOST_FIRST, 8)
    with DmaRegion(1 * MIB) as region:
        raw.dma_map(window, region)
        held = [np.frombuffer(region.view(), np.uint8)]
        raw.write(PciRegion.BAR0, Bar0.ADMIN_SQ, 8, window)
        raw.write(PciRegion.BAR0, Bar0.ADMIN_CQ, 8, window + 4096)
        raw.write(PciRegion.BAR0, Bar0.ADMIN_SIZE, 4, 4)
        raw.write(PciRegion.BAR0, Bar0.CONTROL, 4, 1)
        assert raw.read(PciRegion.BAR0, Bar0.STATUS, 4) == 2
        tail = 0

        def admin(opcode, *p, params=None):
            nonlocal tail
            row = np.zeros((), c.ADMIN_COMMAND)
            row["opcode"] = opcode
            if params is None:
                row["p"][:len(p)] = p
            else:
                row["p"] = np.frombuffer(params.tobytes(), "<u8")
            memory, slot = held[0], tail % 16
            memory[64 * slot:64 * slot + 64] = np.frombuffer(row.tobytes(), np.uint8)
            tail += 1
            raw.write(PciRegion.BAR0, Bar0.ADMIN_TAIL, 4, tail)
            done = memory[4096 + 32 * slot:4096 + 32 * slot + 32].view(c.ADMIN_COMPLETION)[0]
            assert done["sequence"] == tail
            return AdminStatus(int(done["status"])), int(done["result"][0])

        admin.window = window
        yield admin
        held.clear()
        raw.dma_unmap(window, 1 * MIB)


def queue_params(window, **fields):
    params = np.zeros((), c.CREATE_QUEUE)
    params["ring"], params["progress"], params["reports"] = window + 0x4000, window + 0x8000, window + 0xC000
    params["entries_log2"] = params["reports_log2"] = 4
    params["vector"], params["queue"] = c.NO_VECTOR, c.ANY_QUEUE
    for name, value in fields.items():
        params[name] = value
    return params


def test_admin_commands_reach_nothing_of_others(broker, booted):
    window = booted.window
    elsewhere = next(part.host_first for part in broker.shares if part.host_first != window)
    status, queue = booted(AdminOpcode.CREATE_QUEUE, params=queue_params(window))
    assert (status, queue) == (AdminStatus.OK, 0)
    refused = {"context": 2, "doorbell": window, "queue": 32, "vector": 33}
    for name, value in refused.items():
        assert booted(AdminOpcode.CREATE_QUEUE, params=queue_params(window, **{name: value}))[0] in (
            AdminStatus.INVALID_FIELD, AdminStatus.NOT_FOUND), name
    for name in ("ring", "progress", "reports"):
        for address in (elsewhere, 4096, 1 << 20, 1 << 48, (1 << 64) - 64, window + 1 * MIB - 64):
            if name == "progress" and address == window + 1 * MIB - 64:
                continue
            assert booted(AdminOpcode.CREATE_QUEUE, params=queue_params(window, **{name: address}))[0] == \
                AdminStatus.BAD_ADDRESS, (name, hex(address))
    assert booted(AdminOpcode.CREATE_QUEUE, params=queue_params(window, entries_log2=200))[0] == \
        AdminStatus.INVALID_FIELD
    for opcode in (AdminOpcode.DELETE_QUEUE, AdminOpcode.RESET_QUEUE, AdminOpcode.ABORT):
        for other in (1, 32, 33, 63, 1 << 40):
            assert booted(opcode, other)[0] == AdminStatus.NOT_FOUND
    for first in range(1, 8):
        assert booted(AdminOpcode.UNLOAD_PROGRAM, first)[0] == AdminStatus.NOT_FOUND
    for opcode in (AdminOpcode.CREATE_CONTEXT, AdminOpcode.DELETE_CONTEXT, AdminOpcode.SET_FEATURE, AdminOpcode.INJECT,
                   AdminOpcode.CLEAR_INJECTIONS, 0, 0xFF):
        assert booted(opcode, 1)[0] == AdminStatus.INVALID_OPCODE
    for address in (elsewhere, 4096, 1 << 48, (1 << 64) - 64):
        assert booted(AdminOpcode.IDENTIFY, address)[0] == AdminStatus.BAD_ADDRESS
        assert booted(AdminOpcode.GET_LOG, c.Log.COUNTERS, address, 320)[0] == AdminStatus.BAD_ADDRESS
        assert booted(AdminOpcode.LOAD_PROGRAM, address, 64)[0] == AdminStatus.BAD_ADDRESS
        assert booted(AdminOpcode.LOAD_PROGRAM, window, 64, address, 64)[0] == AdminStatus.BAD_ADDRESS
    assert booted(AdminOpcode.LOAD_PROGRAM, window, 64, 0, 0, 1)[0] == AdminStatus.INVALID_FIELD
    assert booted(AdminOpcode.LOAD_PROGRAM, window, 1 << 63)[0] == AdminStatus.BAD_ADDRESS


def test_registers_of_a_share_do_nothing_to_others(broker, raw, booted):
    other = broker._served[0].tenant.partition
    for index in range(0, 1024, 7):
        raw.write(PciRegion.BAR0, Bar0.SEMAPHORE_OP, 8, index | PostOp.SET << 16 | 0x5A << 32)
    reached = [i for i in range(1024) if broker._firmware.semaphore(i) == 0x5A]
    mine = broker._served[1].tenant.partition
    assert reached and all(mine.first_semaphore <= i < mine.first_semaphore + mine.semaphores for i in reached)
    assert not any(other.first_semaphore <= i < other.first_semaphore + other.semaphores for i in reached)
    rng = random.Random(5)
    for _ in range(300):
        region = rng.choice([PciRegion.BAR0, PciRegion.BAR2, PciRegion.CONFIG])
        size = rng.choice([1, 2, 4, 8])
        offset = rng.randrange(0, raw.region(region).size // size) * size
        if region == PciRegion.BAR0 and offset in (Bar0.CONTROL, Bar0.ADMIN_TAIL):
            continue
        raw.write(region, offset, size, rng.getrandbits(8 * size))
        raw.read(region, offset, size)


@pytest.mark.parametrize("raw_bytes", [b"", b"\0" * 15, b"\xff" * 16, b"\0" * 64, os.urandom(200)],
                         ids=["nothing", "half", "ones", "zeros", "noise"])
def test_nonsense_ends_its_client_alone(broker, raw_bytes):
    with maia_rt.open(f"share:{broker.path}") as other:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(broker.path)
            sock.sendall(raw_bytes)
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(4096):
                    pass
        assert (other.upload([1]).copy_to_host() == [1]).all()
    settle(lambda: not broker.clients())


def test_a_broker_says_what_it_cannot_do(path, tmp_path):
    for options, error in (({"clients": 3}, "shared by 1 to 2 programs"), ({"clients": 0}, "1 to 2 programs"),
                           ({"lease": -1.0}, "lease")):
        with pytest.raises(InvalidArgument, match=error), broker_on(path, **options):
            pass
    with pytest.raises(InvalidArgument, match="cannot listen"), broker_on(str(tmp_path / "absent" / "s")):
        pass
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidArgument, match="is no socket"), broker_on(str(tmp_path / "file")):
        pass
    with broker_on(path), pytest.raises(DeviceBusy, match="another server"), broker_on(path):
        pass
    # A share has no bounded contexts of its own to give away.
    with broker_on(path), maia_rt.open(f"share:{path}") as device, pytest.raises(Unsupported):
        device._firmware.create_context([(device.capabilities.hbm_base, MIB)], np.zeros((), c.CONTEXT_BOUNDS))


def test_a_share_past_its_limits_says_so_and_goes_on(pair):
    one, other = pair
    limits = one.capabilities
    with contextlib.ExitStack() as stack:
        with pytest.raises(OutOfMemory, match="536"):
            one.allocate(limits.hbm_bytes + 4096)
        with pytest.raises(OutOfMemory):
            one.allocate(limits.cluster_sram_bytes + 64, space=maia_rt.Space.cluster(0))
        with pytest.raises(InvalidArgument, match="cluster"):
            one.create_stream(clusters=0b10)
        with pytest.raises(InvalidArgument):
            one.allocate(64, space=maia_rt.Space.tile(limits.clusters * limits.tiles_per_cluster))
        with pytest.raises(OutOfSemaphores):
            for _ in range(limits.semaphores + 1):
                stack.enter_context(one.create_semaphore())
        for _ in range(limits.max_queues + 4):      # streams share queues when they run out
            stack.enter_context(one.create_stream(entries=64)).synchronize()
        with other.upload(np.arange(100)) as memory, one.upload(np.arange(100)) as mine:
            assert (memory.copy_to_host() == np.arange(100)).all()
            assert (mine.copy_to_host() == np.arange(100)).all()
        with other.create_semaphore(1) as semaphore:
            assert semaphore.value == 1


# --- a client that is killed ------------------------------------------------------------------------------------------


def test_programs_that_are_killed_in_the_middle_of_a_copy_cost_the_survivor_nothing(path):
    with broker_on(path) as broker, maia_rt.open(f"share:{path}") as device, device.create_stream() as stream:
        outlive(path, stream, size=8 * MIB, rounds=ROUNDS)
        settle(lambda: len(broker.clients()) == 1)
        assert len(broker._firmware.queue_log()) == len({stream.queue.id, device.default_stream.queue.id})
