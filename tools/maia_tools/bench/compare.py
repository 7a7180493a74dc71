"""A run held against an earlier one: what became slower, by more than noise."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

KIND, SCHEMA = "bench", 1


@dataclass(frozen=True)
class Change:
    """One measurement of both runs.

    Attributes
    ----------
    name : str
    before, now : float
        Of what is compared: over the reference of the same run where there is one, which is what holds on another
        machine and in another hour; else nanoseconds.
    relative : bool
        Whether it is that ratio.
    """

    name: str
    before: float
    now: float
    relative: bool

    @property
    def factor(self) -> float:
        """How many times as slow as before."""
        return self.now / self.before


def load(path: Path) -> dict[str, Any]:
    """Read a file that ``maia bench --json`` wrote.

    Raises
    ------
    click.ClickException
        It is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{path} cannot be compared with: {error}") from None
    if not isinstance(data, dict) or data.get("kind") != KIND or data.get("schema") != SCHEMA:
        raise click.ClickException(f"{path} is no output of maia bench --json with schema {SCHEMA}")
    results = data.get("results")
    if not isinstance(results, list) or not all(
            isinstance(row, dict) and isinstance(row.get("name"), str)
            and isinstance(row.get("median_ns"), (int, float)) and row["median_ns"] > 0 for row in results):
        raise click.ClickException(f"{path}: its results are damaged; write it anew with maia bench --json")
    return data


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """What both runs have measured, in the order of this one."""
    old = {row["name"]: row for row in before["results"]}
    found = []
    for row in now["results"]:
        was = old.get(row["name"])
        if was is None:
            continue
        relative = bool(row.get("ratio") and was.get("ratio")) and row["reference"] == was.get("reference")
        key = "ratio" if relative else "median_ns"
        found.append(Change(row["name"], was[key], row[key], relative))
    return found
