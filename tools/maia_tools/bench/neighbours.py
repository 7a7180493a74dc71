"""What other runtimes take for like work, in the same run: io_uring, PyOpenCL on PoCL, tinygrad, PyTorch.

Each runs in a process of its own, with all cores, and is asked for one sample of each thing a round. What is not
installed is left out. None of them does the same as a MAIA device does: what is compared is what a program pays to have
something done and know it; docs/performance.md says what each includes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress

import click
import numpy as np
import numpy.typing as npt

from maia_tools.bench.measurement import Measurement
from maia_tools.bench.subject import Subject

NAMES = ("io_uring", "pyopencl", "tinygrad", "torch")


def neighbours(subject: Subject) -> list[Measurement]:
    """Those that are installed; each beside what of ours does like work."""
    found = []
    for name in NAMES:
        process = subprocess.Popen([sys.executable, "-m", "maia_tools.bench.neighbour", name], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        subject.stack.callback(_end, process)
        os.sched_setaffinity(process.pid, subject.cores.all)
        assert process.stdout is not None
        told = process.stdout.readline()
        if not told:
            click.echo(f"{name} is left out: it is not installed, or does not work here", err=True)
        for index, (title, ours) in enumerate(json.loads(told or "[]")):
            found.append(Measurement(title, 1, lambda at=index, of=process: _ask(of, at),  # type: ignore[misc]
                                     subject.stream.synchronize, reference=ours))
    return found


def _ask(process: subprocess.Popen[str], index: int) -> npt.NDArray[np.float64]:
    """One sample of a neighbour's item, in nanoseconds."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        print(index, file=process.stdin, flush=True)
    told = process.stdout.readline()
    if not told:
        raise click.ClickException(f"a neighbour ended in the middle, {process.args!r}: leave out --only neighbours")
    return np.array([float(told)])


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
