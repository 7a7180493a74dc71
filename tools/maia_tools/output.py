"""How the commands print: tables for people, JSON with a schema version for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

SCHEMA = 1
"""Version of every ``--json`` output; grows when a key changes its meaning or goes."""


def print_json(kind: str, data: dict[str, object]) -> None:
    """Print one JSON object; ``kind`` says which command it is from."""
    click.echo(json.dumps({"schema": SCHEMA, "kind": kind, **data}, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print columns as wide as their contents; those in ``right`` are aligned right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    for number, row in enumerate(table):
        cells = [cell.rjust(w) if i in right else cell.ljust(w)
                 for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        line = "  ".join(cells).rstrip()
        click.echo(click.style(line, bold=True) if number == 0 else line)


def bytes_text(count: int) -> str:
    """A size in the largest binary unit that divides it."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit and count % unit == 0:
            return f"{count // unit} {name}"
    return f"{count} B"
