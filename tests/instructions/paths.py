"""The program that callgrind watches: each hot path N times and 2 N times, so that whatever happens once drops out.

No device is on the other side of the driver's paths, only memory (helpers/ring_consumer.py); the device's own paths are
those of an engine in this process (helpers/bare_engine.py). Nobody spins, but for the path that is about spinning.
"""

import json
import os
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np

from maia_rt._fast.command import Command
from maia_rt._fast.extent import Extent
from maia_rt._fast.lane import Lane, known_words
from maia_rt._fast.ring import Account
from maia_rt._fast.words import SharedWords
from maia_rt.contract import commands as c
from maia_rt.contract.commands import CommandFlag, Opcode, PostOp, WaitOp
from tests.helpers.bare_engine import DATA, BareEngine, command, until
from tests.helpers.ring_consumer import RingConsumer

MARK = "getpgid"
"""The C function whose calls tell callgrind where a run begins and where it ends. Nobody else calls it."""
REPEATS = 3
TIMES = 64
BATCHES = 8
COMMANDS = 128
"""Of the device at a time: two turns of a queue (queues.pyx: TURN)."""
RING = 16384
"""Entries: more than all paths of the driver submit, so that none ever looks for room."""
IDLE = "device: a round in vain"
ROUNDS_SECONDS = 0.02
"""Of processor time, the device's nearly all."""
NEEDS_WAKE, REPORT_HEAD = 0x40 // 4, 0x08 // 4
"""Words of a doorbell page."""
WAIT_SECONDS = 120
ALWAYS_AWAKE_US = 1_000_000_000


def driver_paths(stack):
    """The driver's paths: ``{name: (run, times, operations of one time)}``; ``run(times)`` is what costs."""
    device = stack.enter_context(RingConsumer(RING, wake=lambda: None, sites=True))
    ring = device.ring
    lane = Lane(Account(1, "stream 1"), SimpleNamespace(ring=ring), 10**9)
    encoded, batch = Command.nop(), np.zeros(32, c.COMMAND)
    batch["opcode"] = Opcode.NOP
    over = ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
    device.step()
    words = stack.enter_context(SharedWords(memoryview(bytearray(4096))))
    payload, pre, post = (1, 2, 3), ((7, WaitOp.GE, 9),), ((9, PostOp.ADD, 1),)
    arguments = {count: tuple(range(1 << 48, (1 << 48) + count)) for count in (0, 4, 16)}
    found = {
        "submit": (ring.submit, (Opcode.COPY, CommandFlag.BARRIER, 0, 1, 2, 3)),
        "submit, pre-encoded": (ring.submit_encoded, (encoded,)),
        "submit with a wait and a signal": (ring.submit_with, (Opcode.COPY, 1, 0, 1, 2, 3, pre, post)),
        "poll": (ring.poll, ()),
        "done": (ring.done, (over,)),
        "wait, over already": (ring.wait, (over, 10**9)),
        "encode a copy": (Command.copy, (1, 2, 3)),
        "stream: one command": (lambda: lane._submit(Opcode.COPY, payload=payload), ()),
        "stream: one command with a wait": (lambda: lane._submit(Opcode.COPY, payload=payload, pre=pre), ()),
        "stream: mark": (lane._mark, ()),
        **{f"stream: launch, {count} arguments": (lane._launch, (1, 1, args)) for count, args in arguments.items()},
        "stream: arguments of a launch, 16 known": (known_words, (None, *known(16))),
        "stream: copy of a whole buffer": (lane._copy_whole, tuple(whole(lane, 4096 * number) for number in (1, 2))),
        "read a mapped register": (words.read32, (64,)),
        "write a mapped register": (words.write32, (64, 1)),
    }

    def repeated(call, args):
        def run(times):
            for _ in range(times):
                call(*args)
        return run

    paths = {name: (repeated(call, args), TIMES, 1) for name, (call, args) in found.items()}
    paths[f"submit, batch of {len(batch)}, each"] = repeated(ring.submit_batch, (batch,)), BATCHES, len(batch)
    return paths


def known(count):
    """The checks of a kernel's arguments, and memory that has been found to pass them."""
    checks = [object() for _ in range(count)]
    arguments = tuple(Extent() for _ in range(count))
    for number, (check, argument) in enumerate(zip(checks, arguments, strict=True)):
        argument._address, argument._closed, argument._fits = (1 << 48) + number, False, {check}
    return checks, arguments


def whole(lane, address):
    """A buffer, as far as a copy is concerned."""
    memory = Extent()
    memory._address, memory._closed, memory._run, memory.device = (1 << 48) + address, False, 4096, lane.device
    return memory


def device_paths(stack):
    """The same of the device: a queue's worth of commands with one doorbell."""
    bare = BareEngine(spin_us=1)
    stack.callback(bare.close)
    queue = bare.queue(entries_log2=10, reports_log2=11, initial=0)
    at, there = bare.address(DATA), bare.address(DATA + 4096)
    nop = {"pre": ((40, WaitOp.GE, 0),), "post": ((41, PostOp.SET, 1),)}
    listed = bare.list(*[command(c.COMMAND, Opcode.NOP)] * (2 * COMMANDS), at=DATA + 8192)["list"]
    found = {
        "device: NOP": (c.COMMAND, Opcode.NOP, {}),
        "device: NOP with a wait and a signal": (c.COMMAND, Opcode.NOP, nop),
        "device: NOP that reports": (c.COMMAND, Opcode.NOP, {"flags": CommandFlag.REPORT}),
        "device: COPY of 64 bytes": (c.COPY, Opcode.COPY, {"src": at, "dst": there, "size": 64}),
        "device: FILL of 64 bytes": (c.FILL, Opcode.FILL, {"dst": there, "size": 64, "pattern": 5, "width": 4}),
        "device: WRITE_IMM of 8 bytes": (c.WRITE_IMM, Opcode.WRITE_IMM, {"dst": there, "units": 8}),
    }

    def settle():
        """Wait until all is done and the device sleeps: else part of that would count for the next run."""
        if queue.wait(seconds=WAIT_SECONDS):
            raise RuntimeError("a command failed")
        until(lambda: queue.page[NEEDS_WAKE], WAIT_SECONDS)
        queue.page[REPORT_HEAD] = queue.block["report_tail"][0]

    def several(dtype, opcode, fields):
        rows = np.repeat(command(dtype, opcode, **fields).reshape(1).view(c.COMMAND), 2 * COMMANDS)

        def run(times):
            rows["sequence"] = (queue.index + 1 + np.arange(2 * COMMANDS)) & 0xFFFF
            slots = (queue.index + np.arange(times)) % queue.entries
            queue.ring[slots] = rows[:times]
            queue.index += times
            queue.doorbell(queue.index)
            settle()
        return run

    def indirect(times):
        queue.put(c.INDIRECT, Opcode.INDIRECT, list=listed, count=times)
        settle()

    return {**{name: (several(*what), COMMANDS, 1) for name, what in found.items()},
            "device: NOP of a list": (indirect, COMMANDS, 1)}


def spin(times):
    """Let a device that has nothing to do, and does not sleep, go round for a while."""
    end = time.process_time() + times * ROUNDS_SECONDS
    while time.process_time() < end:
        time.sleep(0.001)


def main(out):
    """Run everything, and write to the file `out` what each part between two marks was."""
    parts = []

    def measure(name, run, times, operations):
        run(times)
        for _ in range(REPEATS):
            for factor in (1, 2):
                os.getpgid(0)
                run(factor * times)
                os.getpgid(0)
                parts.append({"name": name, "operations": factor * times * operations})

    with ExitStack() as stack:
        for name, (run, times, operations) in driver_paths(stack).items():
            measure(name, run, times, operations)
    with ExitStack() as stack:
        for name, (run, times, operations) in device_paths(stack).items():
            measure(name, run, times, operations)
    for queues in (1, 8):
        bare = BareEngine(spin_us=ALWAYS_AWAKE_US)
        for _ in range(queues):
            bare.queue()
        measure(f"{IDLE}, queues: {queues}", spin, 1, 1)
        bare.close()
    with open(out, "w") as file:
        json.dump(parts, file)


if __name__ == "__main__":
    main(sys.argv[1])
