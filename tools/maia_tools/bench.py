"""``maia bench``: what the host path costs, beside what the machine itself costs in the same run.

Every round takes one sample of every measurement, so that a noisy moment spoils all alike; medians are shown. Bars are
ratios to the references wherever the machine matters.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from maia_rt._fast.command import Command
from maia_rt.contract.commands import COMMAND, Opcode
from maia_rt.contract.registers import Bar0
from maia_tools import selection
from maia_tools.options import device_option, json_option
from maia_tools.output import bytes_text, print_json, print_table
from maia_tools.reference import Memcpy, echo, ping_pong

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.stream import Stream

BURST = 256
"""Commands in one sample of a submission: they fit the ring, so that no sample waits for the device."""
BATCH = 32
ROUND_TRIPS = 300
MESSAGES = 100
COPY_SIZES = (64, 1 << 10, 16 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
SETTLE_SECONDS = 0.01
IDLE_SECONDS = 0.002
WAIT_NS = 10_000_000_000


@dataclass
class Measurement:
    """One thing that is timed: ``run`` does it ``count`` times, after ``prepare`` and before ``finish``."""

    name: str
    count: int
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    finish: Callable[[], object] = lambda: None
    nbytes: int = 0
    samples: list[float] = field(default_factory=list)

    def sample(self) -> None:
        """Take one sample, in nanoseconds for one of ``count``."""
        self.prepare()
        begin = time.perf_counter_ns()
        self.run()
        self.samples.append((time.perf_counter_ns() - begin) / self.count)
        self.finish()

    @property
    def median(self) -> float:
        """Nanoseconds."""
        return float(np.median(self.samples))

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        low, high = np.percentile(self.samples, (10, 90))
        found = {"name": self.name, "median_ns": round(self.median, 1), "p10_ns": round(float(low), 1),
                 "p90_ns": round(float(high), 1)}
        if self.nbytes:
            found |= {"bytes": self.nbytes, "bytes_per_second": round(self.nbytes / self.median * 1e9)}
        return found


@dataclass(frozen=True)
class Bar:
    """A target: at most ``limit``, or at least where ``least``."""

    name: str
    value: float
    limit: float
    unit: str
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether this run met it."""
        return self.value >= self.limit if self.least else self.value <= self.limit

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"name": self.name, "value": round(self.value, 3), "limit": round(self.limit, 3), "unit": self.unit,
                "at": "least" if self.least else "most", "met": self.met}


def settled(stream: Stream) -> None:
    """Keep the device busy until it is awake and both sides have their caches warm."""
    ring = stream.queue.ring
    stream.synchronize()
    end = time.perf_counter() + SETTLE_SECONDS
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


def submissions(stream: Stream) -> list[Measurement]:
    """Submitting NOPs one way and another, and waiting for them."""
    ring = stream.queue.ring
    encoded = Command.nop()
    batch = np.zeros(BATCH, COMMAND)
    batch["opcode"] = Opcode.NOP

    def awake() -> None:
        settled(stream)

    def single() -> None:
        submit = ring.submit
        for _ in range(BURST):
            submit(1, 0, 0, 0, 0, 0)

    def preencoded() -> None:
        submit = ring.submit_encoded
        for _ in range(BURST):
            submit(encoded)

    def batches() -> None:
        submit = ring.submit_batch
        for _ in range(BURST // BATCH):
            submit(batch)

    def waited() -> None:
        submit, wait = ring.submit, ring.wait
        for _ in range(ROUND_TRIPS):
            wait(submit(1, 0, 0, 0, 0, 0), WAIT_NS)

    return [
        Measurement("submit, encoded on the way", BURST, single, awake),
        Measurement("submit, pre-encoded", BURST, preencoded, awake),
        Measurement(f"submit, numpy batch of {BATCH}", BURST, batches, awake),
        Measurement("submit and wait, NOP", ROUND_TRIPS, waited, awake),
    ]


def copies(device: Device, stream: Stream, size: int) -> list[Measurement]:
    """Both ways, from plain memory and from memory that the device reaches, and memcpy."""
    buffer = device.allocate(size)
    pinned = device.allocate_host(size)
    plain = np.ones(size, np.uint8)
    pinned.array[:] = 1
    count = max(1, min(64, (1 << 20) // size))
    text = bytes_text(size)
    found = []
    for what, host in (("plain", plain), ("pinned", pinned)):
        for name, dst, src in ((f"host to device, {what}", buffer, host), (f"device to host, {what}", host, buffer)):
            way = stream.copy(dst, src)
            stream.synchronize()

            def run(dst: Any = dst, src: Any = src) -> None:
                for _ in range(count):
                    stream.copy(dst, src)
                    stream.synchronize()

            found.append(Measurement(f"copy {text} {name} ({way.value})", count, run, lambda: settled(stream),
                                     nbytes=size))
    memcpy = Memcpy(size)

    def run_memcpy() -> None:
        for _ in range(count):
            memcpy.copy()

    found.append(Measurement(f"memcpy {text}", count, run_memcpy, nbytes=size))
    return found


def bars(found: list[Measurement]) -> list[Bar]:
    """The targets that these measurements speak to."""
    by_name = {m.name: m.median for m in found}
    shared = by_name["shared word, round trip"]
    result = [
        Bar("submit, encoded on the way", by_name["submit, encoded on the way"], 300, "ns"),
        Bar("submit, pre-encoded", by_name["submit, pre-encoded"], 200, "ns"),
        Bar(f"submit, numpy batch of {BATCH}, a command", by_name[f"submit, numpy batch of {BATCH}"], 50, "ns"),
        Bar("submit and wait, over the shared word", by_name["submit and wait, NOP"], 2 * shared + 500, "ns"),
        Bar("register read, over a bare socket", by_name["register read"] / by_name["socket, round trip"], 1.5, "x"),
    ]
    for m in found:
        if m.nbytes >= 1 << 20 and m.name.endswith("(direct)"):
            ratio = by_name[f"memcpy {bytes_text(m.nbytes)}"] / m.median
            result.append(Bar(f"{m.name}, of memcpy", ratio, 0.95, "x", least=True))
    return result


def measure(selector: str | None, rounds: int) -> dict[str, Any]:
    """Take ``rounds`` samples of everything; the result as ``--json`` prints it."""
    import maia_rt

    with ExitStack() as stack:
        device = stack.enter_context(maia_rt.open(selection.selector(selector)))
        stream = stack.enter_context(device.create_stream())
        others = stack.enter_context(apart(device))
        game, peer = stack.enter_context(ping_pong(others)), stack.enter_context(echo(others))
        transport = device.transport

        def begin_game() -> None:
            # The emulated device, which has just been busy, still watches its doorbells for a moment.
            time.sleep(IDLE_SECONDS)
            game.begin()

        def read_registers() -> None:
            for _ in range(MESSAGES):
                transport.read(0, Bar0.ID, 4)

        found = submissions(stream)
        found += [
            Measurement("shared word, round trip", ROUND_TRIPS, lambda: game.round_trips(ROUND_TRIPS), begin_game,
                        game.end),
            Measurement("register read", MESSAGES, read_registers, stream.synchronize),
            Measurement("socket, round trip", MESSAGES, lambda: peer.round_trips(MESSAGES)),
        ]
        for size in COPY_SIZES:
            found += copies(device, stream, size)
        # One unseen round warms caches, pages and pools.
        with click.progressbar(range(rounds + 1), label="measuring", file=click.get_text_stream("stderr"),
                               hidden=not os.isatty(2)) as numbers:
            for number in numbers:
                for m in found:
                    m.sample()
                    if number == 0:
                        m.samples.clear()
        identity = device.identity
        return {
            "device": {"name": device.name, "model": identity.model, "firmware": identity.firmware,
                       "emulated": device.capabilities.emulated},
            "host": {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(),
                     "kernel": platform.release()},
            "rounds": rounds,
            "pinned": bool(others),
            "results": [m.data() for m in found],
            "bars": [b.data() for b in bars(found)],
        }


def _amount(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if unit == "ns" else f"{value:.2f} {unit}"


@click.command()
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(1, 1000), help="Samples of each.")
@device_option
@json_option
def bench(rounds: int, device: str | None, as_json: bool) -> None:
    """Time submissions, waits, copies and register reads, beside memcpy and a shared word in the same run."""
    data = measure(device, rounds)
    if as_json:
        print_json("bench", data)
        return
    shown = data["device"]
    click.echo(f"{shown['model']} ({shown['name']}), {'emulated' if shown['emulated'] else 'hardware'}; "
               f"{data['host']['cores']} cores, Python {data['host']['python']}; medians of {rounds} rounds\n")
    rows = [[r["name"], f"{r['median_ns']:,.0f}", f"{r['p10_ns']:,.0f}", f"{r['p90_ns']:,.0f}",
             f"{r['bytes_per_second'] / 1e9:.2f}" if "bytes" in r else ""] for r in data["results"]]
    print_table(["measured", "median ns", "p10", "p90", "GB/s"], rows, right=(1, 2, 3, 4))
    click.echo()
    rows = [[b["name"], _amount(b["value"], b["unit"]), f"{b['at']} {_amount(b['limit'], b['unit'])}",
             "yes" if b["met"] else "no"] for b in data["bars"]]
    print_table(["bar", "this run", "wanted", "met"], rows, right=(1, 2))
