"""What is measured: a device that is kept awake, and the cores that both sides run on."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
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
    cores : Cores
    """

    def __init__(self, device: Device, stream: Stream, stack: ExitStack, cores: Cores) -> None:
        self.device = device
        self.stream = stream
        self.stack = stack
        self.cores = cores

    def settle(self) -> None:
        """Keep the device busy until it is awake and both sides have their caches warm."""
        ring = self.stream.queue.ring
        self.stream.synchronize()
        end = time.perf_counter() + _SETTLE_SECONDS
        while time.perf_counter() < end:
            ring.wait(ring.submit(Opcode.NOP, 0, 0, 0, 0, 0), WAIT_NS)


class Cores:
    """Which cores the program and embedded emulators run on.

    Left alone on few cores, the kernel may keep both ends of a short exchange on one of them, where they take turns
    instead of working side by side.

    Attributes
    ----------
    all, others : list of int
        Those of this process; those of the other side while they are apart, empty where there is but one core.
    """

    def __init__(self) -> None:
        self.all = sorted(os.sched_getaffinity(0))
        self.others = self.all[1:]
        self._devices: list[Device] = []
        self._threads: set[str] = set()

    def add(self, device: Device) -> None:
        """Have a device's emulator, if it is embedded, run where the other side does."""
        self._devices.append(device)

    def add_threads(self, ids: set[str]) -> None:
        """Have threads of this process run where the other side does, while there are such threads."""
        self._threads |= ids

    def part(self) -> None:
        """Run this thread on the first core, and the emulators on the others."""
        if self.others:
            self._set(self.all[:1], self.others)

    def mix(self) -> None:
        """Let everything run everywhere."""
        self._set(self.all, self.all)

    def _set(self, here: list[int], there: list[int]) -> None:
        os.sched_setaffinity(0, here)
        threads = self._threads & set(os.listdir("/proc/self/task"))
        for device in self._devices:
            if not device.closed and device.emulator_pid is not None:
                threads.update(os.listdir(f"/proc/{device.emulator_pid}/task"))
        for thread in threads:
            os.sched_setaffinity(int(thread), there)
