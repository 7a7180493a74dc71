"""Keeps the tables of docs/contract.md at what the code says.

A table between ``<!-- KIND NAME -->`` and ``<!-- end -->`` gets its names, offsets, sizes and values from the
contract's sources; the last column, the meaning, is written by hand and kept. Kinds: ``layout`` and ``payload``
(structures), ``enum``, ``constants``, ``faults``.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from maia_rt import errors
from maia_rt.contract import commands, program

PAGE = "docs/contract.md"
_BLOCK = re.compile(r"(<!-- (layout|payload|enum|constants|faults) ?([\w ]*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_HEAD_BYTES = commands.COMMAND.fields["payload"][1]  # type: ignore[index]


def _source(name: str) -> object:
    for module in (commands, program, errors):
        if hasattr(module, name):
            return getattr(module, name)
    raise SystemExit(f"{PAGE} has a table of {name}, which the contract does not have")


def _type(dtype: np.dtype) -> str:  # type: ignore[type-arg]
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return f"{_type(base)}[{shape[0]}]"
    if dtype.names:
        return {commands.SEMAPHORE_OP: "SEMAPHORE_OP", program.OPERAND: "OPERAND"}[dtype]
    return {"u": "u", "i": "i", "f": "f", "S": "text "}[dtype.kind] + str(
        dtype.itemsize if dtype.kind == "S" else dtype.itemsize * 8)


def _rows(kind: str, name: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows without the meaning; the first column is the key."""
    if kind == "constants":
        return ["name", "value"], [[f"`{n}`", f"{v:#x}" if v > 1 << 12 else str(v)]
                                   for n in name.split() for v in [int(_source(n))]]  # type: ignore[call-overload]
    source = _source(name)
    if kind == "enum":
        return ["value", "name"], [[f"{m.value:#04x}" if max(source) > 15 else str(m.value), f"`{m.name}`"]  # type: ignore[attr-defined, call-overload, type-var]
                                   for m in source]  # type: ignore[attr-defined]
    if not isinstance(source, np.dtype) or source.fields is None:
        raise SystemExit(f"{PAGE}: {name} is no structure")
    rows = []
    for field in source.names or ():
        dtype, offset = source.fields[field][:2]
        if kind == "layout" or offset >= _HEAD_BYTES:
            rows.append([f"{offset}", f"{dtype.itemsize}", _type(dtype), f"`{field}`"])
    return ["offset", "bytes", "type", "field"], rows


def _table(kind: str, name: str, old: str) -> str:
    if kind == "faults":
        lines = ["| code | name | meaning | recovery |", "|---|---|---|---|"]
        lines += [f"| {f.code.value} | `{f.code.name}` | {f.meaning} | {f.recovery} |" for f in errors.FAULTS.values()]
        return "\n".join(lines) + "\n"
    meanings = {}
    for line in old.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        for cell in cells[:-1]:
            if cell.startswith("`"):
                meanings[cell] = cells[-1]
    header, rows = _rows(kind, name)
    lines = [f"| {' | '.join([*header, 'meaning'])} |", "|" + "---|" * (len(header) + 1)]
    for row in rows:
        key = next(c for c in row if c.startswith("`"))
        default = "zero" if key.startswith("`reserved") else "?"
        lines.append(f"| {' | '.join([*row, meanings.get(key, default)])} |")
    return "\n".join(lines) + "\n"


def markdown(root: Path) -> str:
    """docs/contract.md with its tables brought up to date."""
    return _BLOCK.sub(lambda m: m[1] + _table(m[2], m[3], m[4]) + m[5], (root / PAGE).read_text())
