"""Submitting commands, and waiting for them."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from maia_rt._fast.command import Command
from maia_rt.contract.commands import COMMAND, Opcode
from maia_rt.contract.program import ArgKind, Dtype
from maia_rt.contract.program import write as write_program
from maia_rt.kernels.builder import KernelBuilder
from maia_tools.bench.here import device_here
from maia_tools.bench.measurement import Bar, Measurement, each, parts
from maia_tools.bench.subject import BURST, WAIT_NS, Subject

if TYPE_CHECKING:
    from maia_rt.runtime.stream import Stream

BATCHES = (1, 8, 32, 128, 1024)
ARGUMENTS = (0, 1, 2, 4, 16)
LAUNCHES = 512
"""In one sample: few enough that the ring has room for all, whose launches take longer than their submission."""
ROUND_TRIPS = 300
MESSAGES = 100
"""Of what takes longer."""
PART, FEW = 128, 16
"""Timed together, where one takes nanoseconds or a microsecond: in a pause the device catches up, and then looks at the
doorbell so often that each store to it takes longer."""
LATE_BYTES = 256 << 10
"""Copied, they keep a device busy for longer than it takes to go to sleep in a wait."""
IDLE_SECONDS = 0.002
NODES = {1: 512, 10: 512, 100: 256, 1000: 64, 10_000: 8}
"""And launches in one sample: enough to have the caches warm."""
PACKING = "struct.pack_into of 64 bytes"
COPYING = "numpy copy of 64 bytes, one of {}"


def packing() -> Measurement:
    """What it costs Python to write as many bytes as a command has anywhere."""
    room = bytearray(64)
    pack = struct.Struct("<16I").pack_into
    numbers = tuple(range(16))

    def run() -> None:
        for _ in range(PART):
            pack(room, 0, *numbers)

    return Measurement(PACKING, BURST, lambda: parts(BURST, PART, run))


def submissions(subject: Subject) -> list[Measurement]:
    """NOPs, one way and another; beside batches, a numpy copy of as many bytes."""
    ring = subject.stream.queue.ring
    encoded = Command.nop()

    def single() -> None:
        submit = ring.submit
        for _ in range(PART):
            submit(1, 0, 0, 0, 0, 0)

    def preencoded() -> None:
        submit = ring.submit_encoded
        for _ in range(PART):
            submit(encoded)

    found = [
        Measurement("submit, encoded on the way", BURST, lambda: parts(BURST, PART, single), subject.settle,
                    reference=PACKING, bar=Bar(plus_ns=300)),
        Measurement("submit, pre-encoded", BURST, lambda: parts(BURST, PART, preencoded), subject.settle,
                    reference=PACKING, bar=Bar(plus_ns=200)),
    ]
    for size in BATCHES:
        found += _batches(subject, size)
    return found


def _batches(subject: Subject, size: int) -> list[Measurement]:
    ring = subject.stream.queue.ring
    batch = np.zeros(size, COMMAND)
    batch["opcode"] = Opcode.NOP
    plain, room = np.zeros(64 * size, np.uint8), np.zeros(64 * size, np.uint8)
    times = max(1, PART // size)

    def batches() -> None:
        submit = ring.submit_batch
        for _ in range(times):
            submit(batch)

    def copying() -> None:
        for _ in range(times):
            np.copyto(room, plain)

    def commands(some: Callable[[], None]) -> Callable[[], object]:
        return lambda: parts(BURST, times * size, some)

    reference = COPYING.format(size)
    return [
        Measurement(reference, BURST, commands(copying)),
        Measurement(f"submit, numpy batch of {size}", BURST, commands(batches), subject.settle, reference=reference,
                    bar=Bar(plus_ns=50) if size == 32 else None, series=("numpy batch", size)),
    ]


def waits(subject: Subject) -> list[Measurement]:
    """Submit and wait: by looking, by interrupt, with a device that has gone to sleep, and with one in this process."""
    ring = subject.stream.queue.ring

    def asleep() -> None:
        subject.stream.synchronize()
        time.sleep(IDLE_SECONDS)

    found = _waits(subject, "")
    found.append(Measurement("submit and wait, NOP, after 2 ms of rest", 1,
                             lambda: each(1, lambda: ring.wait(ring.submit(1, 0, 0, 0, 0, 0), WAIT_NS)), asleep,
                             reference="socket, round trip"))
    if subject.device.emulator_pid is None:
        return found
    device = subject.stack.enter_context(device_here(subject.cores))
    stream = subject.stack.enter_context(device.create_stream())
    return found + _waits(Subject(device, stream, subject.stack, subject.cores), ", device in this process")


def _waits(subject: Subject, where: str) -> list[Measurement]:
    device, ring = subject.device, subject.stream.queue.ring
    source, target = (subject.stack.enter_context(device.allocate(LATE_BYTES)) for _ in range(2))
    looking, sleeping = (subject.stack.enter_context(device.create_stream()) for _ in range(2))
    # One looks until it is done, the other arms the queue's vector and sleeps at once.
    looking.queue.ring.waiters.spin_ns, sleeping.queue.ring.waiters.spin_ns = WAIT_NS, 0
    late = f"submit and wait, a copy of 256 KiB{where}"

    def once() -> None:
        ring.wait(ring.submit(1, 0, 0, 0, 0, 0), WAIT_NS)

    def copying(name: str, stream: Stream, reference: str = "") -> Measurement:
        def copy() -> None:
            stream.copy(target, source)
            stream.synchronize()

        return Measurement(f"{late}, {name}", MESSAGES, lambda: each(MESSAGES, copy), subject.settle,
                           reference=reference)

    return [
        Measurement(f"submit and wait, NOP{where}", ROUND_TRIPS, lambda: each(ROUND_TRIPS, once), subject.settle,
                    reference="shared word, round trip", bar=None if where else Bar(2, 500)),
        copying("polled", looking),
        copying("adaptive", subject.stream, f"{late}, polled"),
        copying("by interrupt", sleeping, f"{late}, polled"),
    ]


def launches(subject: Subject) -> list[Measurement]:
    """Submitting launches of a kernel that does next to nothing, by number of arguments."""
    return [measurement for count in ARGUMENTS for measurement in _launch(subject, count)]


def _launch(subject: Subject, count: int) -> list[Measurement]:
    device, stream = subject.device, subject.stream
    builder = KernelBuilder(f"of_{count}", device.capabilities.program)
    for number in range(count):
        builder.argument(f"x{number}", ArgKind.IN, Dtype.FP32, (16,))
    tile = builder.tile(0)
    tile.fill(tile.allocate((16,), Dtype.FP32), 0)
    program = subject.stack.enter_context(device.load(write_program([builder.build()])))
    kernel = program[f"of_{count}"]
    buffers = [subject.stack.enter_context(device.allocate(16, np.float32)) for _ in range(count)]

    def run() -> None:
        launch = stream.launch
        for _ in range(FEW):
            launch(kernel, *buffers)

    def done() -> None:
        stream.launch(kernel, *buffers)
        stream.synchronize()

    found = [Measurement(f"launch, {count} arguments", LAUNCHES, lambda: parts(LAUNCHES, FEW, run), subject.settle,
                         stream.synchronize, reference=PACKING, series=("launch by arguments", count))]
    if not count:
        found.append(Measurement("launch, 0 arguments, and wait", MESSAGES, lambda: each(MESSAGES, done),
                                 subject.settle, reference="shared word, round trip"))
    return found


def graphs(subject: Subject) -> list[Measurement]:
    """Launching a graph of so many nodes, on the host's side, and until it is done."""
    found: list[Measurement] = []
    for count, replays in NODES.items():
        found += _graph(subject, count, replays)
    return found


def _graph(subject: Subject, count: int, replays: int) -> list[Measurement]:
    device, stream = subject.device, subject.stream
    word = subject.stack.enter_context(device.allocate(4))
    with stream.capture() as capture:
        for number in range(count):
            stream.write_value(word, number)
    graph = subject.stack.enter_context(capture.instantiate())

    def once() -> None:
        graph.launch(stream)

    def some() -> None:
        for _ in range(FEW):
            graph.launch(stream)

    def done() -> None:
        graph.launch(stream)
        stream.synchronize()

    return [
        Measurement(f"graph of {count:,} nodes, launch", replays,
                    lambda: parts(replays, FEW, some) if replays >= FEW else each(replays, once),
                    subject.settle, stream.synchronize,
                    bar=Bar(plus_ns=1300 + 20 * count), series=("graph launch by nodes", count)),
        Measurement(f"graph of {count:,} nodes, launch and wait", 1, done, subject.settle,
                    series=("graph launch and wait by nodes", count)),
    ]


def events(subject: Subject) -> list[Measurement]:
    """Events, semaphores, and the allocators."""
    device, stream = subject.device, subject.stream
    other = subject.stack.enter_context(device.create_stream())
    event = stream.record()
    semaphore = subject.stack.enter_context(device.create_semaphore())

    def many(once: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(FEW):
                once()
        return lambda: parts(LAUNCHES, FEW, run)

    def finish() -> None:
        stream.synchronize()
        other.synchronize()

    def allocate() -> None:
        device.allocate(4096).close()

    def allocate_in_order() -> None:
        stream.free(stream.allocate(4096))

    return [Measurement(name, LAUNCHES, many(once), subject.settle, finish, reference=PACKING) for name, once in (
        ("record an event", lambda: stream.record(event)),
        ("record an event that takes the time", lambda: stream.record(timing=True)),
        ("have another stream wait for an event", lambda: other.wait(event)),
        ("ask whether an event is done", event.query),
        ("signal a semaphore", lambda: stream.signal(semaphore)),
        ("allocate 4 KiB and close it", allocate),
        ("allocate 4 KiB in stream order and free it", allocate_in_order),
    )]
