"""What a command costs as work grows: many queues, many commands in flight."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from maia_tools.bench.measurement import Bar, Measurement
from maia_tools.bench.subject import WAIT_NS, Subject

if TYPE_CHECKING:
    from maia_rt._fast.ring import Ring
    from maia_rt.runtime.stream import Stream

QUEUES = (1, 4, 16, 32, 64)
OTHERS = 10
"""Queues that the rest of a run has."""
TURNS = 1024
"""Commands in one sample over many queues."""
IN_FLIGHT = (1, 64, 1024, 16_384, 65_023)
"""Outstanding before a sample begins; its own make the last one 65,535."""
BURST = 512
ENTRIES = 1 << 15
"""The longest stream."""
FLAT = Bar(1.5)
"""Of what the fewest take."""


def queues(subject: Subject) -> list[Measurement]:
    """Submitting to many queues by turns, and waiting for all of them: a command's share."""
    most = min(QUEUES[-1], subject.device.capabilities.max_queues - OTHERS)
    found = [_by_turns(subject, count) for count in sorted({min(count, most) for count in QUEUES})]
    for measurement in found[1:]:
        measurement.reference, measurement.bar = found[0].name, FLAT
    return found


def _by_turns(subject: Subject, count: int) -> Measurement:
    streams = ExitStack()
    rings: list[Ring] = []
    rounds = TURNS // count

    def prepare() -> None:
        # For this sample only: what is measured after it has queues to itself.
        for _ in range(count):
            rings.append(streams.enter_context(subject.device.create_stream(entries=2 * TURNS)).queue.ring)
        subject.settle()

    def run() -> None:
        for _ in range(rounds):
            last = [(ring, ring.submit(1, 0, 0, 0, 0, 0)) for ring in rings]
        for ring, sequence in last:
            ring.wait(sequence, WAIT_NS)

    def finish() -> None:
        rings.clear()
        streams.close()

    return Measurement(f"submit by turns to {count} queues and wait, a command", rounds * count, run, prepare, finish,
                       series=("by queues", count))


def in_flight(subject: Subject) -> list[Measurement]:
    """Submitting while so many commands are outstanding, then having all of them done: a command's share."""
    streams = [subject.stack.enter_context(subject.device.create_stream(entries=ENTRIES)) for _ in range(2)]
    pairs = [_outstanding(subject, streams, count) for count in IN_FLIGHT]
    for pair in pairs[1:]:
        for measurement, least in zip(pair, pairs[0], strict=True):
            measurement.reference, measurement.bar = least.name, FLAT
    return [measurement for pair in pairs for measurement in pair]


def _outstanding(subject: Subject, streams: list[Stream], count: int) -> tuple[Measurement, Measurement]:
    gate = subject.stack.enter_context(subject.device.create_semaphore())
    rings = [stream.queue.ring for stream in streams]
    room = ENTRIES - BURST
    # One stream holds half of them at most, the other has the rest, and stands at the same gate.
    shares = [(streams[0], min(count, room)), (streams[1], count - room)] if count > room else [(streams[0], count)]

    def submit(ring: Ring, number: int) -> None:
        for _ in range(number):
            ring.submit(1, 0, 0, 0, 0, 0)

    def hold() -> None:
        gate.set(0)
        subject.settle()
        for stream, number in shares:
            stream.wait(gate, 1)
            submit(stream.queue.ring, number - 1)

    def hold_all() -> None:
        hold()
        submit(rings[0], BURST)

    def let_go() -> None:
        gate.set(1)
        for ring in rings:
            ring.wait(ring.head, WAIT_NS)

    return (
        Measurement(f"submit with {count:,} in flight", BURST, lambda: submit(rings[0], BURST), hold, let_go,
                    series=("submit by commands in flight", count)),
        Measurement(f"complete {count + BURST:,} in flight, a command", count + BURST, let_go, hold_all,
                    series=("complete by commands in flight", count)),
    )
