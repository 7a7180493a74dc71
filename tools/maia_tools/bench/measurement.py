"""One thing that is timed, what it is compared with, and what is wanted of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ENOUGH = {"p99_ns": (99, 100), "p99_9_ns": (99.9, 1000)}
"""Percentiles of rare cases, and of how many samples they are taken at least."""


@dataclass(frozen=True)
class Bar:
    """At most ``times`` what the reference takes, and ``plus_ns``; the reference may be none, with ``times`` 0."""

    times: float = 0.0
    plus_ns: float = 0.0

    def limit(self, reference_ns: float) -> float:
        """Nanoseconds."""
        return self.times * reference_ns + self.plus_ns

    @property
    def text(self) -> str:
        """As a table has it."""
        parts = [f"{self.times:.3g} x"] if self.times else []
        parts += [f"{self.plus_ns:,.0f} ns"] if self.plus_ns else []
        return " + ".join(parts)


@dataclass
class Measurement:
    """One thing that is timed: ``run`` does it ``count`` times, after ``prepare`` and before ``finish``.

    ``run`` may return how long each of them took, in nanoseconds; else the whole is divided by ``count``.
    """

    name: str
    count: int
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    finish: Callable[[], object] = lambda: None
    nbytes: int = 0
    reference: str = ""
    """The name of what it is compared with."""
    bar: Bar | None = None
    series: tuple[str, float] | None = None
    """Which line of a plot it is a point of, and where."""
    rounds: list[list[float]] = field(default_factory=list)
    """The samples of each, in nanoseconds."""

    def sample(self) -> None:
        """Take a round's samples."""
        self.prepare()
        begin = time.perf_counter_ns()
        each = self.run()
        took = time.perf_counter_ns() - begin
        self.rounds.append(each.tolist() if isinstance(each, np.ndarray) else [took / self.count])
        self.finish()

    @property
    def median(self) -> float:
        """Nanoseconds."""
        return float(np.median(np.concatenate(self.rounds)))

    def ratio(self, reference: Measurement) -> float:
        """To a reference measured in the same rounds: the median of the rounds' ratios.

        Samples of one round lie a fraction of a second apart, so what slows a machine down for seconds weighs little.
        """
        return float(np.median([np.median(ours) / np.median(theirs)
                                for ours, theirs in zip(self.rounds, reference.rounds, strict=True)]))

    def data(self, others: Mapping[str, Measurement]) -> dict[str, Any]:
        """As JSON has it; ``others`` are all measurements of the run."""
        samples = np.concatenate(self.rounds)
        low, high = np.percentile(samples, (10, 90))
        found: dict[str, Any] = {
            "name": self.name, "median_ns": round(self.median, 1), "p10_ns": round(float(low), 1),
            "p90_ns": round(float(high), 1), "samples": len(samples),
        }
        for key, (rank, least) in ENOUGH.items():
            if len(samples) >= least:
                found[key] = round(float(np.percentile(samples, rank)), 1)
        if self.nbytes:
            found |= {"bytes": self.nbytes, "bytes_per_second": round(self.nbytes / self.median * 1e9)}
        if self.series:
            found["series"] = {"line": self.series[0], "at": self.series[1]}
        reference = others.get(self.reference)
        if reference is not None:
            found |= {"reference": self.reference, "reference_ns": round(reference.median, 1),
                      "ratio": round(self.ratio(reference), 4)}
        if self.bar is not None and (reference is not None or not self.bar.times):
            limit = self.bar.limit(reference.median if reference else 0.0)
            took = self.ratio(reference) * reference.median if reference and self.bar.times else self.median
            found |= {"bar": self.bar.text, "bar_ns": round(limit, 1), "met": took <= limit}
        return found


def each(count: int, once: Callable[[], object]) -> np.ndarray[Any, Any]:
    """Do something ``count`` times; how long each took, in nanoseconds."""
    clock = time.perf_counter_ns
    marks = [0] * (count + 1)
    marks[0] = clock()
    for number in range(1, count + 1):
        once()
        marks[number] = clock()
    return np.diff(np.array(marks, np.int64)).astype(float)


def parts(count: int, size: int, part: Callable[[], object]) -> np.ndarray[Any, Any]:
    """Do ``part``, which is ``size`` operations, until there are ``count``; the mean of each, in nanoseconds."""
    return each(count // size, part) / size
