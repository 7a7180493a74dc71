"""How near collectives come to what links and memory allow: python benchmarks/collectives.py [--devices 2,4,8].

As nccl-tests do, each sample is of several calls that are submitted one behind the other, so that what is measured is
how fast data moves, and not how fast the host comes to the next rank; `alone` is a single call, all ranks idle before.

The bounds. *memory*: all devices of one emulator share this machine's memory, so all that a collective must move goes
through it: `bytes_moved`, derived in docs/collectives.md, every byte of every send read once, every byte of every recv
written once. The rate at which memory takes a byte that is read and written is measured in the same run, right before
each sample: all ranks' copy engines copy as many bytes to the next rank's memory at the same time. *link* (with
--link-gbps, the emulator's model of links): what must go through the busiest lane, at the link's rate; there is no
measured part in it. The table has the medians over the samples. All times are the devices'.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import click
import numpy as np

import maia_rt

MIB = 1 << 20
CALLS = 8
"""Of a sample."""


@dataclass
class Row:
    """One collective on so many devices; times, rates and parts of bounds are medians over the samples."""

    collective: str
    algorithm: str
    devices: int
    bytes: int
    bytes_moved: int
    milliseconds: float
    alone_milliseconds: float
    bandwidth_gb_s: float
    rate_gb_s: float
    memory_fraction: float
    link_fraction: float | None


@contextlib.contextmanager
def emulated(count: int, link_gbps: float | None) -> Iterator[list[maia_rt.Device]]:
    """So many devices of one emulator."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="maia-"))
        process = subprocess.Popen([sys.executable, "-m", "maia_emulator", "--socket", f"{folder}/s", "--devices",
                                    str(count), *([] if link_gbps is None else ["--link-gbps", str(link_gbps)])],
                                   stdout=subprocess.PIPE, text=True)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        stdout = stack.enter_context(contextlib.closing(process.stdout or sys.stdin))
        paths = [stdout.readline().removeprefix("listening on ").strip() for _ in range(count)]
        yield [stack.enter_context(maia_rt.open(path)) for path in paths]


def measure(count: int, nbytes: int, samples: int, algorithm: str, link_gbps: float | None) -> list[Row]:
    """All collectives that are measured, on so many devices."""
    with (emulated(count, link_gbps) as devices, contextlib.ExitStack() as stack,
          maia_rt.Communicator(devices, timing=True, algorithm=algorithm) as ranks):
        elements = nbytes // 4 // count * count
        sends = [stack.enter_context(device.upload(np.ones(elements, np.float32))) for device in devices]
        recvs = [stack.enter_context(device.upload(np.zeros(elements, np.float32))) for device in devices]
        part = elements // count
        parts = [recv[rank * part:(rank + 1) * part] for rank, recv in enumerate(recvs)]
        calls: dict[str, Callable[[], maia_rt.Collective]] = {
            "all_reduce": lambda: ranks.all_reduce(sends, recvs),
            "all_reduce in place": lambda: ranks.all_reduce(sends),
            "all_gather": lambda: ranks.all_gather([send[:part] for send in sends], recvs),
            "all_gather in place": lambda: ranks.all_gather(parts, recvs),
            "reduce_scatter": lambda: ranks.reduce_scatter(sends, [recv[:part] for recv in recvs]),
        }
        return [timed(name, call, ranks, elements * 4, samples, link_gbps) for name, call in calls.items()]


def timed(name: str, call: Callable[[], maia_rt.Collective], ranks: maia_rt.Communicator, nbytes: int,
          samples: int, link_gbps: float | None) -> Row:
    """One collective: each sample measures the rate, then the collective."""
    call().synchronize()
    seconds, alone, rates, fractions = [], [], [], []
    for _ in range(samples):
        rates.append(ranks.measure(nbytes))
        one = call()
        one.synchronize()
        alone.append(one.seconds)
        done = [call() for _ in range(CALLS)]
        done[-1].synchronize()
        seconds.append(done[-1].seconds_since(done[0]) / CALLS)
        fractions.append(one.bytes_moved / seconds[-1] / rates[-1])
    middle, moved = statistics.median(seconds), one.bytes_moved
    # Of each port's lanes, in and out, the busiest; all_reduce gathers what it has scattered.
    lane = nbytes * (len(ranks) - 1) / len(ranks) * (2 if name.startswith("all_reduce") else 1)
    return Row(name, one.algorithm, len(ranks), nbytes, moved, middle * 1e3, statistics.median(alone) * 1e3,
               moved / middle / 1e9, statistics.median(rates) / 1e9, statistics.median(fractions),
               lane * 8 / link_gbps / 1e9 / middle if link_gbps else None)


@click.command()
@click.option("--devices", default="2,4,8", help="How many, separated by commas.")
@click.option("--mib", default=16.0, help="MiB of a rank's buffer.")
@click.option("--samples", default=11)
@click.option("--algorithm", type=click.Choice(["auto", "direct", "ring"]), default="auto")
@click.option("--link-gbps", type=float, help="Have the emulator model links of so many gigabits a second, each way.")
@click.option("--json", "as_json", is_flag=True, help="One object on stdout instead of a table.")
def main(devices: str, mib: float, samples: int, algorithm: str, link_gbps: float | None, as_json: bool) -> None:
    """Measure collectives on emulated devices against the rates of links and of memory."""
    rows = [row for count in devices.split(",")
            for row in measure(int(count), int(mib * MIB), samples, algorithm, link_gbps)]
    cores = len(os.sched_getaffinity(0))
    if as_json:
        print(json.dumps({"schema": 2, "emulated": True, "cores": cores, "link_gbps": link_gbps,
                          "rows": [asdict(row) for row in rows]}))
        return
    links = "no model of links" if link_gbps is None else f"links of {link_gbps:g} Gb/s"
    print(f"emulated devices, {mib:g} MiB a rank, {cores} cores, {links}, {samples} samples of {CALLS} calls, medians")
    print("devices  collective            algorithm       ms  alone ms    GB/s   copies GB/s   of memory  of the link")
    for row in rows:
        print(f"{row.devices:7}  {row.collective:20}  {row.algorithm:9} {row.milliseconds:8.2f} "
              f"{row.alone_milliseconds:9.2f} {row.bandwidth_gb_s:7.1f} {row.rate_gb_s:13.1f} "
              f"{row.memory_fraction:11.2f} {'' if row.link_fraction is None else f'{row.link_fraction:.2f}':>12}")


if __name__ == "__main__":
    main()
