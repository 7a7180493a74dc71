"""How near collectives come to what memory allows: python benchmarks/collectives.py [--devices 2,4,8] [--mib 16].

The bound. All devices of one emulator share this machine's memory, so all that a collective must move goes through it.
What must move, `bytes_moved`, is derived in docs/collectives.md: every byte of every send is read once, every byte of
every recv written once. The rate at which memory takes a byte that is read and written is measured in the same run,
right before each collective: all ranks' copy engines copy as many bytes to the next rank's memory at the same time. A
collective's part of the bound is (bytes_moved / rate) / time, of times taken by the devices. The table has the median
of the rounds' parts, and the part that the best round of all reached of the best rate of all: on a machine that others
use as well, that is what neither of them was disturbed at.
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


@dataclass
class Row:
    """One collective on so many devices; times and rates are medians over the rounds."""

    collective: str
    algorithm: str
    devices: int
    bytes: int
    bytes_moved: int
    milliseconds: float
    bandwidth_gb_s: float
    rate_gb_s: float
    bound_fraction: float
    undisturbed_fraction: float


@contextlib.contextmanager
def emulated(count: int) -> Iterator[list[maia_rt.Device]]:
    """So many devices of one emulator."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="maia-"))
        process = subprocess.Popen([sys.executable, "-m", "maia_emulator", "--socket", f"{folder}/s", "--devices",
                                    str(count)], stdout=subprocess.PIPE, text=True)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        stdout = stack.enter_context(contextlib.closing(process.stdout or sys.stdin))
        paths = [stdout.readline().removeprefix("listening on ").strip() for _ in range(count)]
        yield [stack.enter_context(maia_rt.open(path)) for path in paths]


def measure(count: int, nbytes: int, rounds: int, algorithm: str) -> list[Row]:
    """All collectives that are measured, on so many devices."""
    with (emulated(count) as devices, contextlib.ExitStack() as stack,
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
        return [timed(name, call, ranks, nbytes, rounds) for name, call in calls.items()]


def timed(name: str, call: Callable[[], maia_rt.Collective], ranks: maia_rt.Communicator, nbytes: int,
          rounds: int) -> Row:
    """One collective: each round measures the rate, then the collective."""
    done = call()
    done.synchronize()
    seconds, rates, fractions = [], [], []
    for _ in range(rounds):
        rates.append(ranks.measure(nbytes))
        done = call()
        done.synchronize()
        seconds.append(done.seconds)
        fractions.append(done.bound_fraction)
    middle, moved = statistics.median(seconds), done.bytes_moved
    return Row(name, done.algorithm, len(ranks), nbytes, moved, middle * 1e3, moved / middle / 1e9,
               statistics.median(rates) / 1e9, statistics.median(fractions), moved / min(seconds) / max(rates))


@click.command()
@click.option("--devices", default="2,4,8", help="How many, separated by commas.")
@click.option("--mib", default=16.0, help="MiB of a rank's buffer.")
@click.option("--rounds", default=11)
@click.option("--algorithm", type=click.Choice(["auto", "direct", "ring"]), default="auto")
@click.option("--json", "as_json", is_flag=True, help="One object on stdout instead of a table.")
def main(devices: str, mib: float, rounds: int, algorithm: str, as_json: bool) -> None:
    """Measure collectives on emulated devices against the rate of copies of the same run."""
    rows = [row for count in devices.split(",") for row in measure(int(count), int(mib * MIB), rounds, algorithm)]
    cores = len(os.sched_getaffinity(0))
    if as_json:
        print(json.dumps({"schema": 1, "emulated": True, "cores": cores, "rows": [asdict(row) for row in rows]}))
        return
    print(f"emulated devices, {mib:g} MiB a rank, {cores} cores, {rounds} rounds, medians")
    print("devices  collective            algorithm       ms    GB/s   copies GB/s   of the bound  undisturbed")
    for row in rows:
        print(f"{row.devices:7}  {row.collective:20}  {row.algorithm:9} {row.milliseconds:8.2f} "
              f"{row.bandwidth_gb_s:7.1f} {row.rate_gb_s:13.1f} {row.bound_fraction:14.2f} "
              f"{row.undisturbed_fraction:12.2f}")


if __name__ == "__main__":
    main()
