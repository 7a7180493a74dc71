"""A short notation for register layouts, used for PCI configuration space.

    0x04 2 command      Command                      offset, bytes, name, description
      0     rw io_space   Answers I/O accesses       bits, access kind, name[=reset], description {value: name, ...}

A description that starts with @ is of a part of an address. Offsets are from the start of the header or capability. A
line that starts further right continues the one above it.
"""

from __future__ import annotations

import re

from maia_tools.reg.model import Field, Register, Segment

_REGISTER = re.compile(r"(?P<offset>0x[0-9a-f]+) +(?P<size>[1248]) +(?P<name>\w+) +(?P<text>.+)$")
_FIELD = re.compile(r"  (?P<bits>\d+(?::\d+)?) +(?P<access>\w+) +(?P<name>\w+)(?:=(?P<reset>\w+))? +(?P<text>[^{]+)"
                    r"(?:\{(?P<names>.*)\})?$")
_NAME = re.compile(r"(\w+): ([^,]+)")


def parse(layout: str, *prefix: str, base: int = 0, relative_to: str = "") -> list[Register]:
    """The registers of a layout.

    Parameters
    ----------
    layout : str
    *prefix : str
        Names outside of the registers', as ``"config", "msix"``.
    base : int
        Added to every offset, in bytes.
    relative_to : str
        Said of every register whose capability's place is not known.
    """
    found: list[Register] = []
    fields: list[Field] = []
    head: re.Match[str] | None = None

    def finish() -> None:
        if head is not None:
            size = int(head["size"])
            whole = (Field("value", 0, 8 * size, "ro", None, head["text"]),)
            found.append(Register((*map(Segment, prefix), Segment(head["name"])), base + int(head["offset"], 16), size,
                                  tuple(fields) or whole, head["text"], access_size=min(size, 4),
                                  relative_to=relative_to))

    for line in re.sub(r"\n {3,}", " ", layout.strip("\n")).splitlines():
        if not line.strip():
            continue
        if match := _REGISTER.match(line):
            finish()
            head, fields = match, []
        elif match := _FIELD.match(line):
            fields.append(_field(match))
        else:
            raise ValueError(f"a layout line that cannot be read: {line!r}")
    finish()
    return found


def _field(match: re.Match[str]) -> Field:
    high, _, low = match["bits"].partition(":")
    lsb = int(low or high)
    names = {int(number, 0): (name.strip(), "") for number, name in _NAME.findall(match["names"] or "")}
    return Field(match["name"], lsb, int(high) - lsb + 1, match["access"],
                 int(match["reset"], 0) if match["reset"] else None, match["text"].strip().removeprefix("@ "),
                 in_place=match["text"].startswith("@ "), names=names)
