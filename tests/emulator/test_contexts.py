"""A hostile queue of a bounded context tries every command against what belongs to somebody else, and gets a fault."""

import numpy as np
import pytest
from helpers import tiny_program
from helpers.bare_engine import DATA, HBM, HOST, BareEngine, command, until
from maia_emulator.engine import AdminError

from maia_rt.contract import commands as c
from maia_rt.contract import program
from maia_rt.contract.commands import AdminStatus, BranchSource, CommandFlag, Condition, Opcode, PostOp, WaitOp
from maia_rt.errors import FaultCode

MIB = 1 << 20
CLUSTER, TILE = 2 << 48, 3 << 48
MINE, THEIRS = DATA, DATA + 2 * MIB
"""Offsets in host memory of what each context may reach, 2 MiB each."""
SECRET = 0xA5


def bounds(**fields):
    row = np.zeros((), c.CONTEXT_BOUNDS)
    for name, value in fields.items():
        row[name] = value
    return row.tobytes()


class Tenants:
    """An engine with two contexts, each with a cluster and 8 semaphores: `mine` has queues 2, 3, `theirs` 4, 5."""

    def __init__(self, bare):
        self.bare = bare
        self.mine = bare.engine.create_context(
            [(HBM + MIB, MIB), (HOST + MINE, 2 * MIB)],
            bounds(first_queue=2, queues=2, first_semaphore=16, semaphores=8, first_cluster=1, clusters=1))
        self.theirs = bare.engine.create_context(
            [(HBM + 4 * MIB, MIB), (HOST + THEIRS, 2 * MIB)],
            bounds(first_queue=4, queues=2, first_semaphore=24, semaphores=8, first_cluster=0, clusters=1))
        self.owner = bare.queue()
        self.other = bare.queue(context=self.theirs)
        self.queue = bare.queue(context=self.mine, doorbell=True)
        # Something to see and to spoil, wherever the other one has memory.
        for at in (HBM + 4 * MIB, HOST + THEIRS, CLUSTER, TILE, TILE + (1 << 32)):
            self.owner.put(c.FILL, Opcode.FILL, dst=at, size=65536, pattern=SECRET, width=1)
        assert self.owner.wait() == 0
        self.bare.semaphores[24:32] = 7

    def unharmed(self):
        """Whether everything of the other context is as it was."""
        seen = []
        for at in (HBM + 4 * MIB, HOST + THEIRS, CLUSTER, TILE, TILE + (1 << 32)):
            self.owner.put(c.COPY, Opcode.COPY, src=at, dst=HOST + DATA + 6 * MIB, size=65536)
            assert self.owner.wait() == 0
            seen.append(bool((self.bare.host[DATA + 6 * MIB : DATA + 6 * MIB + 65536] == SECRET).all()))
        return all(seen) and (self.bare.semaphores[24:32] == 7).all() and not self.other.stopped


@pytest.fixture
def bare():
    engine = BareEngine()
    yield engine
    engine.close()


@pytest.fixture
def tenants(bare):
    return Tenants(bare)


FOREIGN = {
    "HBM below": HBM, "HBM just above": HBM + 2 * MIB, "their HBM": HBM + 4 * MIB, "across the end": HBM + 2 * MIB - 8,
    "their host memory": HOST + THEIRS, "the owner's rings": HOST, "their cluster's SRAM": CLUSTER,
    "their tile's SRAM": TILE, "their other tile's SRAM": TILE + (1 << 32), "nothing": 64,
}
HERE, OWN = HBM + MIB, HOST + MINE


@pytest.mark.parametrize("address", FOREIGN.values(), ids=FOREIGN.keys())
def test_no_command_reaches_what_is_not_its_contexts(tenants, address):
    bare, queue = tenants.bare, tenants.queue
    rows = np.zeros((), c.COPY_DESCRIPTOR)
    rows["row_bytes"], rows["rows"], rows["planes"] = 64, 1, 1
    for at, (src, dst) in ((MINE + 4096, (address, HERE)), (MINE + 4160, (HERE, address))):
        rows["src"], rows["dst"] = src, dst
        bare.host[at : at + 64] = np.frombuffer(rows.tobytes(), np.uint8)
    tries = {
        "copy from": (c.COPY, Opcode.COPY, {"src": address, "dst": OWN, "size": 64}),
        "copy to": (c.COPY, Opcode.COPY, {"src": OWN, "dst": address, "size": 64}),
        "descriptor": (c.COPY_ND, Opcode.COPY_ND, {"descriptor": address & ~63}),
        "rows from": (c.COPY_ND, Opcode.COPY_ND, {"descriptor": HOST + MINE + 4096}),
        "rows to": (c.COPY_ND, Opcode.COPY_ND, {"descriptor": HOST + MINE + 4160}),
        "fill": (c.FILL, Opcode.FILL, {"dst": address, "size": 64, "pattern": 1, "width": 1}),
        "write": (c.WRITE_IMM, Opcode.WRITE_IMM, {"dst": address, "units": 16}),
        "checksum of": (c.CRC, Opcode.CRC, {"src": address, "size": 64, "result": OWN}),
        "checksum to": (c.CRC, Opcode.CRC, {"src": OWN, "size": 64, "result": address}),
        "compare with": (c.CRC, Opcode.CRC, {"src": OWN, "size": 64, "result": address, "units": c.CRC_COMPARE}),
        "signal": (c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, {"address": address, "op": PostOp.SET, "value": 1}),
        "signal by adding": (c.SIGNAL_REMOTE, Opcode.SIGNAL_REMOTE, {"address": address, "op": PostOp.ADD, "value": 1}),
        "list": (c.INDIRECT, Opcode.INDIRECT, {"list": address & ~63, "count": 1}),
        "wait": (c.WAIT_VALUE, Opcode.WAIT_VALUE, {"address": address, "condition": Condition.EQ, "mask": 0}),
    }
    for name, (dtype, opcode, fields) in tries.items():
        if address == FOREIGN["across the end"] and name in ("descriptor", "list", "signal", "signal by adding", "wait",
                                                             "checksum to", "compare with"):
            continue            # these are within the last bytes of the range
        queue.put(dtype, opcode, **fields)
        assert queue.wait() == FaultCode.CONTEXT, name
        queue.reset()
        # The same, out of a list.
        if opcode != Opcode.INDIRECT:
            listed = bare.list(command(dtype, opcode, **fields), at=MINE + 8192)
            queue.put(c.INDIRECT, Opcode.INDIRECT, **listed)
            assert queue.wait() == FaultCode.CONTEXT, f"listed {name}"
            queue.reset()
    times = bare.list(command(c.COMMAND, Opcode.NOP), at=MINE + 8192)
    if address != FOREIGN["across the end"]:
        queue.put(c.INDIRECT, Opcode.INDIRECT, times=address, **times)
        assert queue.wait() == FaultCode.CONTEXT
        queue.reset()
        branch = bare.list(command(c.BRANCH, Opcode.BRANCH, where=address, condition=Condition.EQ,
                                   source=BranchSource.MEMORY), at=MINE + 8192)
        queue.put(c.INDIRECT, Opcode.INDIRECT, **branch)
        assert queue.wait() == FaultCode.CONTEXT
    assert tenants.unharmed()


def test_what_is_its_contexts_it_reaches(tenants):
    bare, queue = tenants.bare, tenants.queue
    bare.host[MINE : MINE + 64] = np.arange(64, dtype=np.uint8)
    for src, dst in ((OWN, HERE), (HERE, CLUSTER + (1 << 32)), (CLUSTER + (1 << 32), TILE + (2 << 32)),
                     (TILE + (2 << 32), TILE + (3 << 32) + 64), (TILE + (3 << 32) + 64, OWN + 4096)):
        queue.put(c.COPY, Opcode.COPY, src=src, dst=dst, size=64)
        assert queue.wait() == 0
    assert (bare.host[MINE + 4096 : MINE + 4160] == np.arange(64)).all()


def test_semaphores_are_its_own_counted_from_its_first_queue(tenants):
    bare, queue = tenants.bare, tenants.queue
    second = bare.queue(context=tenants.mine)
    assert (queue.id, second.id) == (2, 3)
    # 0 and 1 are the mirrors of its two queues, 2 to 9 its free semaphores.
    queue.put(c.COMMAND, Opcode.NOP, post=[(2, PostOp.SET, 5), (9, PostOp.ADD, 6)])
    assert queue.wait() == 0
    assert (int(bare.semaphores[16]), int(bare.semaphores[23])) == (5, 6)
    # initial is 2^32 - 3 and one command has retired.
    second.put(c.COMMAND, Opcode.NOP, pre=[(0, WaitOp.EQ, 2**32 - 2), (2, WaitOp.ACQUIRE, 5)])
    assert second.wait() == 0
    assert int(bare.semaphores[16]) == 0
    log = np.frombuffer(bare.engine.queue_log(), c.QUEUE_LOG)
    assert {int(row["queue"]) for row in log} == {0, 2, 3, 4}


@pytest.mark.parametrize("fields", [
    {"pre": [(10, WaitOp.GE, 0)]}, {"pre": [(24, WaitOp.GE, 0)]}, {"pre": [(63, WaitOp.EQ, 0)]},
    {"pre": [(0, WaitOp.ACQUIRE, 0)]}, {"post": [(10, PostOp.SET, 1)]}, {"post": [(24, PostOp.ADD, 1)]},
    {"post": [(0, PostOp.SET, 1)]}, {"post": [(1, PostOp.ADD, 1)]}, {"post": [(65535, PostOp.SET, 1)]},
], ids=str)
def test_no_other_semaphore_is_read_or_written(tenants, fields):
    bare, queue = tenants.bare, tenants.queue
    before = bare.semaphores.copy()
    sequence = queue.put(c.COMMAND, Opcode.NOP, **fields)
    assert queue.wait() == FaultCode.SEMAPHORE
    # The log has the command as it was fetched.
    assert np.frombuffer(bare.engine.faults(), c.FAULT)[-1]["command"].tobytes() == \
        queue.ring[(sequence - 1) % queue.entries].tobytes()
    queue.reset(initial=int(before[2]))
    assert (bare.semaphores == before).all()
    index, _, _ = (fields.get("pre") or fields.get("post"))[0]
    if index >= 10:
        branch = bare.list(command(c.BRANCH, Opcode.BRANCH, where=index, condition=Condition.EQ,
                                   source=BranchSource.SEMAPHORE), at=MINE + 8192)
        queue.put(c.INDIRECT, Opcode.INDIRECT, **branch)
        assert queue.wait() == FaultCode.SEMAPHORE
    assert tenants.unharmed()


def test_logs_show_its_commands_as_they_were_fetched(tenants):
    bare, queue = tenants.bare, tenants.queue
    sequence = queue.put(c.COMMAND, Opcode.NOP, pre=[(3, WaitOp.GE, 1)], post=[(9, PostOp.ADD, 1)])
    until(lambda: np.frombuffer(bare.engine.queue_log(), c.QUEUE_LOG)[1]["sequence"])
    row = np.frombuffer(bare.engine.queue_log(), c.QUEUE_LOG)[1]
    raw = queue.ring[(sequence - 1) % queue.entries].tobytes()
    assert (int(row["queue"]), row["command"].tobytes(), int(row["semaphore"])) == (2, raw, 17)
    bare.engine.abort(queue.id, sequence)
    assert queue.wait() == FaultCode.ABORTED
    assert np.frombuffer(bare.engine.faults(), c.FAULT)[-1]["command"].tobytes() == raw


@pytest.fixture
def kernels(tenants):
    """First handles of the same program: of the context, of the other one, of context 0."""
    image = program.read(tiny_program.image(1000))
    return [tenants.bare.engine.load_program(image, context) for context in (tenants.mine, tenants.theirs, 0)]


def launch(tenants, kernel, *, x=HERE, y=HERE + 8192, out=HERE + 16384, units=0, at=MINE + 512):
    bare, queue = tenants.bare, tenants.queue
    args = np.array([x, y, out, 0x3F800000], np.uint64)
    bare.host[at : at + 32] = args.view(np.uint8)
    queue.put(c.LAUNCH, Opcode.LAUNCH, kernel=kernel, arg_count=4, args=HOST + at, units=units)
    return queue.wait()


def test_kernels_run_on_its_clusters_only_and_touch_its_memory_only(tenants, kernels):
    mine, theirs, everybodys = kernels
    for kernel in (mine, everybodys):
        for units in (0, 1):
            assert launch(tenants, kernel, units=units) == 0
    bad = {"another's kernel": ({"kernel": theirs}, FaultCode.BAD_KERNEL),
           "another's cluster": ({"kernel": mine, "units": 2}, FaultCode.BAD_FIELD),
           "every cluster there is": ({"kernel": mine, "units": 2**32 - 1}, FaultCode.BAD_FIELD),
           "arguments elsewhere": ({"kernel": mine, "at": THEIRS + 512}, FaultCode.CONTEXT)}
    for name in ("x", "y", "out"):
        for where in ("their HBM", "their host memory", "their tile's SRAM"):
            bad[f"{name} in {where}"] = ({"kernel": mine, name: FOREIGN[where]}, FaultCode.CONTEXT)
        bad[f"{name} past the end"] = ({"kernel": mine, name: HBM + 2 * MIB - 3968}, FaultCode.CONTEXT)
    secret = tenants.bare.host[THEIRS : THEIRS + 65536].copy()
    for name, (fields, code) in bad.items():
        assert launch(tenants, **fields) == code, name
        tenants.queue.reset()
        tenants.bare.host[THEIRS : THEIRS + 65536] = secret
    assert tenants.unharmed()


def test_random_commands_of_a_bounded_context_change_nothing_else(tenants):
    seed = int(np.random.SeedSequence().entropy) & 0xFFFFFFFF
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    bare, queue = tenants.bare, tenants.queue
    addresses = [*FOREIGN.values(), HERE, OWN, HERE + 4096]
    for _ in range(400):
        raw = rng.integers(0, 256, 64, dtype=np.uint8)
        raw[0], raw[1], raw[4:8] = rng.integers(1, 13), rng.integers(0, 4), 0
        for at in (8, 16, 24, 32):
            op = int(rng.integers(0, 3))
            raw[at : at + 8] = 0
            if op:
                raw[at], raw[at + 2], raw[at + 4] = rng.integers(0, 64), op, 0
        for at in (40, 48, 56):
            raw[at : at + 8] = np.array([rng.choice(np.array([*addresses, 64, 1, 0], np.uint64))]).view(np.uint8)
        row = raw.view(c.COMMAND)[0]
        if row["opcode"] == Opcode.WAIT_VALUE or any(op["op"] == WaitOp.EQ for op in row["pre"]):
            continue            # may wait for ever, as it may
        queue.ring[queue.index % queue.entries] = row
        queue.ring[queue.index % queue.entries]["sequence"] = (queue.index + 1) & 0xFFFF
        queue.index += 1
        queue.doorbell(queue.index)
        until(lambda: queue.progress >= queue.index or queue.stopped
              or int(np.frombuffer(bare.engine.queue_log(), c.QUEUE_LOG)[1]["stage"]) == c.QueueStage.SEMAPHORE)
        if queue.progress < queue.index:
            queue.reset()
    assert tenants.unharmed()


def test_queues_come_from_the_bounds_only(tenants):
    bare = tenants.bare
    bare.queue(context=tenants.mine)
    with pytest.raises(AdminError) as refusal:
        bare.queue(context=tenants.mine)
    assert refusal.value.status == AdminStatus.NO_RESOURCE
    params = np.zeros((), c.CREATE_QUEUE)
    params["ring"], params["progress"], params["reports"] = HOST, HOST + 0x10000, HOST + 0x20000
    params["entries_log2"], params["vector"], params["queue"] = 4, c.NO_VECTOR, 1
    params["context"] = tenants.mine
    with pytest.raises(AdminError) as refusal:
        bare.engine.create_queue(params.tobytes())
    assert refusal.value.status == AdminStatus.INVALID_FIELD


GOOD = {"first_queue": 0, "queues": 8, "first_semaphore": 8, "semaphores": 56, "first_cluster": 0, "clusters": 2}


@pytest.mark.parametrize("fields", [
    {"queues": 0}, {"queues": 9}, {"first_queue": 1}, {"first_queue": 2**32 - 1}, {"semaphores": 57},
    {"first_semaphore": 7}, {"first_semaphore": 2**32 - 1}, {"clusters": 0}, {"clusters": 3}, {"first_cluster": 1},
    {"first_cluster": 2**32 - 1}, {"reserved": 1}], ids=str)
def test_bounds_beyond_the_device_are_refused(bare, fields):
    bare.engine.delete_context(bare.engine.create_context([(HBM, MIB)], bounds(**GOOD)))
    with pytest.raises(AdminError) as refusal:
        bare.engine.create_context([(HBM, MIB)], bounds(**(GOOD | fields)))
    assert refusal.value.status == AdminStatus.INVALID_FIELD


def test_a_deleted_context_leaves_nothing_to_read(tenants):
    bare, engine = tenants.bare, tenants.bare.engine
    kernel = engine.load_program(program.read(tiny_program.image(10)), tenants.theirs)
    tenants.other.put(c.COMMAND, Opcode.NOP)
    assert tenants.other.wait() == 0
    with pytest.raises(AdminError) as refusal:
        engine.delete_context(tenants.theirs, True)
    assert refusal.value.status == AdminStatus.IN_USE
    engine.delete_queue(tenants.other.id)
    engine.delete_context(tenants.theirs, True)
    for at in (HBM + 4 * MIB, CLUSTER, TILE, TILE + (1 << 32)):
        tenants.owner.put(c.COPY, Opcode.COPY, src=at, dst=HOST + DATA + 6 * MIB, size=65536)
        assert tenants.owner.wait() == 0
        assert not bare.host[DATA + 6 * MIB : DATA + 6 * MIB + 65536].any(), hex(at)
    assert not bare.semaphores[24:32].any() and bare.semaphores[4] == 0
    with pytest.raises(AdminError) as refusal:
        engine.unload_program(kernel)
    assert refusal.value.status == AdminStatus.NOT_FOUND


def test_a_doorbell_in_host_memory_works_as_one_in_bar_2(bare):
    queue = bare.queue(doorbell=True, reports_log2=1)
    for taken in range(1, 201):
        queue.put(c.COMMAND, Opcode.NOP, flags=CommandFlag.REPORT)
        assert queue.wait() == 0
        queue.page[2] = taken
    until(lambda: queue.page[0x10])     # asleep: put() wakes it through this very word
    queue.put(c.COMMAND, Opcode.NOP)
    assert queue.wait() == 0
    assert not bare.bar2[queue.id * 1024 : queue.id * 1024 + 1024].any()


def test_a_doorbell_page_that_is_taken_away_harms_nobody(bare):
    queue, other = bare.queue(doorbell=True), bare.queue()
    bare.engine.dma_unmap(HOST, 16 * MIB)
    bare.engine.wake()
    bare.engine.dma_map(HOST, 16 * MIB, bare.fd, 0, 3)
    other.put(c.COMMAND, Opcode.NOP)
    assert other.wait() == 0
    bare.engine.delete_queue(queue.id)
