"""Random programs against a plain model that runs every command at once, in the order of submission.

A program has no races: before a stream touches memory that another one has used, it waits for an event of that one. So
whatever the device overlaps, memory must come out as the model has it; also where commands fail, and what stood behind
them on their stream never ran.

``MAIA_MODEL_SEQUENCES`` says how many programs there are in all variants together (1,000; ``make soak`` runs 20,000),
``MAIA_MODEL_SEED`` where they start: the seed of a run is printed with its failure.
"""

import os
import struct
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import HealthCheck, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import maia_rt
from maia_rt import kernels
from maia_rt.contract import program
from maia_rt.contract.commands import Opcode
from maia_rt.errors import DeviceFault, FaultCode, OutOfQueues

ELEMENTS = 64
BUFFERS = 4
PINNED = 2
STREAMS = 5
SEQUENCES = int(os.environ.get("MAIA_MODEL_SEQUENCES", "1000" if "MAIA_TEST_DEVICE" not in os.environ else "40"))
VARIANTS = 4
SEED = int(os.environ.get("MAIA_MODEL_SEED", "0")) or int.from_bytes(os.urandom(4), "little")
SECONDS = 20

memories = st.integers(0, BUFFERS + PINNED - 1)
streams = st.integers(0, STREAMS - 1)
numbers = st.integers(0, 1000).map(float)


def bits(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


class Track:
    """A stream, and what the model knows of it."""

    def __init__(self, number, stream):
        self.number = number
        self.stream = stream
        self.failed = False
        self.clock = defaultdict(int)
        """Up to which command of each stream this one's next command starts after."""

    def step(self):
        self.clock[self.number] += 1
        return self.clock[self.number]


class Programs(RuleBasedStateMachine):
    """Streams, events, semaphores, copies, fills, launches, graphs and faults on a few buffers."""

    device: maia_rt.Device
    add: maia_rt.Kernel
    start: int

    @initialize()
    def begin(self):
        self.tracks = [Track(i, self.device.create_stream(entries=16, timeout=SECONDS)) for i in range(STREAMS)]
        self.memories = [self.device.allocate(ELEMENTS, np.float32) for _ in range(BUFFERS)]
        self.memories += [self.device.allocate_host(ELEMENTS, np.float32) for _ in range(PINNED)]
        self.model = np.zeros((BUFFERS + PINNED, ELEMENTS), np.float32)
        self.written = [{} for _ in self.memories]
        self.read = [{} for _ in self.memories]
        self.events = []
        # One for each stream that signals: another one's signal would let a wait through before its time.
        self.semaphores = [self.device.create_semaphore(self.start) for _ in range(STREAMS)]
        self.graphs = []
        self.signalled = [0] * STREAMS
        for memory in range(len(self.memories)):
            self.fill(0, memory, 0.0)

    # --- what keeps a program free of races --------------------------------------------------------------------------

    def touch(self, track, reads, writes):
        """Wait for whatever else has used the memory, and note this use: none where the stream has failed."""
        for memory, before in [*((m, self.written[m]) for m in reads), *((m, self.written[m]) for m in writes),
                               *((m, self.read[m]) for m in writes)]:
            for other, moment in before.items():
                if other != track.number and track.clock[other] < moment:
                    self.await_other(track, self.tracks[other])
            del memory
        if track.failed:
            return
        moment = track.step()
        for memory in writes:
            self.written[memory], self.read[memory] = {track.number: moment}, {}
        for memory in reads:
            self.read[memory][track.number] = moment

    def await_other(self, track, other):
        if other.failed:  # no event of it says when what stood before its fault is done
            with pytest.raises(DeviceFault):
                other.stream.synchronize(SECONDS)
            self.order(track, other.clock)
            return
        event = self.attempt(other, other.stream.record)
        if event is not None:
            try:
                self.attempt(track, lambda: track.stream.wait(event))
            except OutOfQueues:  # it stands behind a wait for a semaphore, and one queue must stay open to all
                self.attempt(other, lambda: event.synchronize(SECONDS))
        self.order(track, other.clock)

    def order(self, track, clock):
        """A stream goes on after all that; one that has failed does not go on."""
        if not track.failed:
            self.join(track.clock, clock)

    def join(self, clock, other):
        for number, moment in other.items():
            clock[number] = max(clock[number], moment)

    def attempt(self, track, call):
        """Call; a stream that has failed may say so at any time, another never."""
        try:
            return call()
        except DeviceFault as fault:
            assert track.failed, fault
            assert fault.code == FaultCode.TRAP
            return None

    def command(self, track, reads, writes, call, effect):
        self.touch(track, reads, writes)
        self.attempt(track, call)
        if not track.failed:
            effect()

    # --- rules -------------------------------------------------------------------------------------------------------

    @rule(at=streams, dst=memories, value=numbers)
    def fill(self, at, dst, value):
        track, memory = self.tracks[at], self.memories[dst]
        self.command(track, (), (dst,), lambda: track.stream.fill(memory, bits(value), 4),
                     lambda: self.model[dst].fill(value))

    @rule(at=streams, dst=memories, src=memories, start=st.integers(0, ELEMENTS - 1), to=st.integers(0, ELEMENTS - 1),
          count=st.integers(0, ELEMENTS))
    def copy(self, at, dst, src, start, to, count):
        count = min(count, ELEMENTS - start, ELEMENTS - to)
        if dst == src:
            return
        track = self.tracks[at]
        target, source = self.memories[dst][to:to + count], self.memories[src][start:start + count]

        def effect():
            self.model[dst, to:to + count] = self.model[src, start:start + count]

        self.command(track, (src,), (dst,), lambda: track.stream.copy(target, source), effect)

    @rule(at=streams, dst=memories, values=st.lists(numbers, min_size=1, max_size=ELEMENTS))
    def copy_from_program(self, at, dst, values):
        track, array = self.tracks[at], np.array(values, np.float32)

        def effect():
            self.model[dst, :len(array)] = array

        self.command(track, (), (dst,), lambda: track.stream.copy(self.memories[dst][:len(array)], array), effect)

    @rule(at=streams, a=memories, b=memories, c=memories)
    def launch(self, at, a, b, c):
        if c in (a, b):
            return
        track = self.tracks[at]

        def effect():
            self.model[c] = self.model[a] + self.model[b]

        self.command(track, (a, b), (c,), lambda: track.stream.launch(self.add, *(self.memories[m] for m in (a, b, c))),
                     effect)

    @rule(at=streams, to=streams, values=st.lists(numbers, min_size=2, max_size=2), dst=memories,
          src=memories, replays=st.integers(1, 3))
    def replay(self, at, to, values, dst, src, replays):
        """A graph captured from two streams, one of which forks off, and replayed."""
        track, other = self.tracks[at], self.tracks[to]
        if at == to or dst == src or track.failed or other.failed:
            return
        target, source = self.memories[dst], self.memories[src]
        with track.stream.capture() as capture:
            track.stream.fill(source, bits(values[0]), 4)
            other.stream.wait(track.stream.record())
            other.stream.copy(target[:ELEMENTS // 2], source[:ELEMENTS // 2])
            track.stream.fill(target[ELEMENTS // 2:], bits(values[1]), 4)
            track.stream.wait(other.stream.record())
            track.stream.launch(self.add, source, target, target)

        def effect():
            self.model[src] = values[0]
            self.model[dst, :ELEMENTS // 2] = values[0]
            self.model[dst, ELEMENTS // 2:] = values[1]
            self.model[dst] += self.model[src]

        graph = capture.instantiate()
        self.graphs.append(graph)
        for _ in range(replays):
            self.command(track, (src, dst), (src, dst), lambda: graph.launch(track.stream), effect)

    @rule(at=streams, timing=st.booleans())
    def record(self, at, timing):
        track = self.tracks[at]
        # A stream that has failed may refuse, or not have noticed: what is drawn must not depend on that.
        event = self.attempt(track, lambda: track.stream.record(timing=timing))
        self.events.append((track, event, dict(track.clock), track.failed))

    @rule(at=streams, to=streams)
    def signal(self, at, to):
        """One stream signals, then another waits for that."""
        track, other = self.tracks[at], self.tracks[to]
        if track.failed or at == to:
            return
        semaphore = self.semaphores[at]
        track.stream.signal(semaphore)
        self.signalled[at] += 1
        value = self.start + self.signalled[at] & 0xFFFFFFFF
        try:
            self.attempt(other, lambda: other.stream.wait(semaphore, value))
        except OutOfQueues:  # somebody else waits so, and one queue must stay open to all
            return
        self.order(other, track.clock)

    @precondition(lambda self: self.events)
    @rule(at=streams, which=st.integers(0))
    def wait(self, at, which):
        track = self.tracks[at]
        _, event, clock, _ = self.events[which % len(self.events)]
        if event is None:
            return
        try:
            self.attempt(track, lambda: track.stream.wait(event))
        except OutOfQueues:
            return
        self.order(track, clock)

    @precondition(lambda self: self.events)
    @rule(which=st.integers(0))
    def synchronize_event(self, which):
        _, event, _, lost = self.events[which % len(self.events)]
        if event is None:
            return
        try:
            event.synchronize(SECONDS)
            assert not lost
        except DeviceFault:
            assert lost

    @rule(at=streams)
    def fail(self, at):
        track = self.tracks[at]
        if not track.failed:
            track.failed = True
            self.attempt(track, lambda: track.stream._submit(int(Opcode.TRAP), payload=(77, 0, 0)))

    @rule(at=streams)
    def recover(self, at):
        track = self.tracks[at]
        if track.failed:
            with pytest.raises(DeviceFault):
                track.stream.synchronize(SECONDS)
            track.stream.recover()
            track.failed = False
            track.stream.synchronize(SECONDS)

    @rule(at=streams)
    def synchronize(self, at):
        track = self.tracks[at]
        if track.failed:
            with pytest.raises(DeviceFault):
                track.stream.synchronize(SECONDS)
        else:
            track.stream.synchronize(SECONDS)
            assert track.stream.query()

    @rule(at=streams, src=memories)
    def look(self, at, src):
        track = self.tracks[at]
        if track.failed:
            return
        self.touch(track, (src,), ())
        found = np.empty(ELEMENTS, np.float32)
        track.stream.copy(found, self.memories[src])
        track.stream.synchronize(SECONDS)
        assert (found == self.model[src]).all()

    # --- the end -----------------------------------------------------------------------------------------------------

    def teardown(self):
        if not hasattr(self, "tracks"):
            return
        note(f"MAIA_MODEL_SEED={SEED}")
        try:
            for number in range(STREAMS):
                self.recover(number)
            for track in self.tracks:
                track.stream.synchronize(SECONDS)
            for memory, expected in zip(self.memories, self.model, strict=True):
                found = memory.array if isinstance(memory, maia_rt.HostBuffer) else memory.copy_to_host()
                assert (found == expected).all()
            for track in self.tracks:
                figures = track.stream.statistics()
                assert figures.in_flight == 0
                assert figures.submitted == figures.completed + figures.failed + figures.aborted
        finally:
            for track in self.tracks:
                track.stream.close()
            for graph in self.graphs:
                graph.close()
            for memory in self.memories:
                memory.close()
            for semaphore in self.semaphores:
                semaphore.close()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("queues", ["of their own", "shared"])
def test_random_programs_do_what_a_sequential_model_does(request, queues, first_index):
    device = request.getfixturevalue("crowded" if queues == "shared" else "attached")
    image = program.write([kernels.add(device.capabilities.program, ELEMENTS)])
    with device.load(image) as loaded:
        machine = type("Programs", (Programs,), {"device": device, "add": loaded["add"], "start": first_index})
        run_state_machine_as_test(seed(SEED)(machine), settings=settings(
            max_examples=max(SEQUENCES // VARIANTS, 1), stateful_step_count=20, deadline=None, database=None,
            print_blob=True, suppress_health_check=list(HealthCheck)))
