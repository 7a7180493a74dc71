"""What is measured: a device that is kept awake, apart from the program on a core of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from maia_rt.contract.commands import Opcode

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.stream import Stream

BURST = 2048
"""Commands in one sample of a submission; a quarter of the ring, so that no sample waits for the device."""
WAIT_NS = 10_000_000_000
_SETTLE_SECONDS = 0.01


class Subject:
    """A device, a stream of it, and what is given back at the end.

    Attributes
    ----------
    device : Device
    stream : Stream
    stack : ExitStack
    """

    def __init__(self, device: Device, stream: Stream, stack: ExitStack) -> None:
        self.device = device
        self.stream = stream
        self.stack = stack

    def settle(self) -> None:
        """Keep the device busy until it is awake and both sides have their caches warm."""
        ring = self.stream.queue.ring
        self.stream.synchronize()
        end = time.perf_counter() + _SETTLE_SECONDS
        while time.perf_counter() < end:
            ring.wait(ring.submit(Opcode.NOP, 0, 0, 0, 0, 0), WAIT_NS)


@contextmanager
def apart(device: Device) -> Iterator[list[int]]:
    """Run this thread on one core and an embedded emulator on the others, while the context lasts.

    Left alone on few cores, the kernel may keep both ends of a short exchange on one of them, where they take turns
    instead of working side by side. Yields the cores of the other side; empty where there is but one.
    """
    mine = os.sched_getaffinity(0)
    first, *others = sorted(mine)
    if not others:
        yield []
        return
    os.sched_setaffinity(0, {first})
    try:
        if device.emulator_pid is not None:
            for thread in os.listdir(f"/proc/{device.emulator_pid}/task"):
                os.sched_setaffinity(int(thread), set(others))
        yield others
    finally:
        os.sched_setaffinity(0, mine)
