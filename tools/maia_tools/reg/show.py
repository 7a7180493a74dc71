"""How registers and their values are printed, for people and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import click

from maia_tools.output import print_table
from maia_tools.reg.access import Reading
from maia_tools.reg.change import Change
from maia_tools.reg.model import Field, Register
from maia_tools.reg.place import Place
from maia_tools.reg.space import Space

COLUMNS = 100
DIFFERS = " *"
"""Marks a value that is not the one reset leaves."""


# Values.


def field_json(field: Field, value: int) -> dict[str, Any]:
    """A field of a register value."""
    bits = field.get(value)
    data: dict[str, Any] = {"name": field.name, "bits": field.bits, "access": field.access, "value": bits}
    if bits in field.names:
        data["value_name"] = field.names[bits][0]
    if field.reset is not None:
        data["reset"] = field.reset
        data["differs"] = field.readable and bits != field.reset
    return data


def reading_json(reading: Reading) -> dict[str, Any]:
    """A register's value, or a field's."""
    place, register = reading.place, reading.place.register
    data: dict[str, Any] = {"name": place.full_name, "space": place.space.name, "offset": f"{place.offset:#x}",
                            "size_bytes": place.size, "value": place.hex(reading.value)}
    if register is not None:
        data["access"] = register.access
        if register.reset is not None:
            data["reset"] = place.hex(register.reset)
            data["differs"] = reading.differs
        data["fields"] = [field_json(f, reading.value) for f in ([place.field] if place.field else register.fields)]
    return data


def reset_text(field: Field, value: int) -> str:
    """What reset leaves, marked where the value is another one."""
    if field.reset is None:
        return ""
    return field.text(field.reset) + (DIFFERS if field.readable and field.get(value) != field.reset else "")


def print_readings(readings: Sequence[Reading]) -> None:
    """A line a register and a line a field, with access kind and reset value."""
    rows: list[list[str]] = []
    for reading in readings:
        place, register, value = reading.place, reading.place.register, reading.value
        if place.field is not None:
            field = place.field
            rows.append([place.full_name, place.address, field.bits, field.access, field.text(field.get(value)),
                         reset_text(field, value)])
            continue
        reset, access = "", ""
        if register is not None:
            access = register.access
            if register.reset is not None:
                reset = place.hex(register.reset) + (DIFFERS if reading.differs else "")
        rows.append([place.name, place.address, "", access, place.hex(value), reset])
        if register is not None and not trivial(register):
            rows += [[f"  .{f.name}", "", f.bits, f.access, f.text(f.get(value)) if f.readable else "-",
                      reset_text(f, value)] for f in register.fields]
    print_table(["register", "address", "bits", "access", "value", "reset"], rows)
    if any(row[-1].endswith(DIFFERS) for row in rows):
        click.echo("* differs from reset", err=True)


def trivial(register: Register) -> bool:
    """Whether its only field is all of it and says no more than the register's value does."""
    return len(register.fields) == 1 and register.fields[0].mask == register.mask and not register.fields[0].names


def line(reading: Reading) -> str:
    """A register and its fields in one line, for dumps."""
    place, register = reading.place, reading.place.register
    text = f"{place.address}  {place.hex(reading.value)}"
    if register is None:
        return text
    text += f"  {place.name}"
    if not trivial(register):
        text += "  " + "  ".join(f"{f.name}={f.text(f.get(reading.value))}" for f in register.fields if f.readable)
    return text + (DIFFERS if reading.differs else "")


def print_left_out(left: Sequence[tuple[Place, str]]) -> None:
    """Say what was left out, and why, one line a reason."""
    reasons: dict[str, list[Place]] = {}
    for place, why in left:
        reasons.setdefault(why, []).append(place)
    for why, places in reasons.items():
        names = ", ".join(p.name for p in places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
        click.echo(f"left out: {names}: {why}", err=True)


# A change.


def print_change(device: str, change: Change) -> None:
    """What a write would change, field by field, on stderr."""
    place = change.place
    old = "-" if change.old is None else place.hex(change.old)
    click.echo(f"{device}: {place.name} ({place.address})  {old} -> {place.hex(change.new)}", err=True)
    for field, before, after in change.rows():
        shown = "-" if before is None else field.text(before)
        click.echo(f"  .{field.name} ({field.access})  {shown} -> {field.text(after)}{effect(field, after)}", err=True)


def effect(field: Field, bits: int) -> str:
    """What writing these bits does, where it is something else than storing them."""
    does = {"w1c": "clears what is 1", "w1s": "sets what is 1", "w1t": "toggles what is 1", "w0c": "clears what is 0",
            "w0s": "sets what is 0", "w0t": "toggles what is 0", "pulse": "acts once", "wclr": "any write clears it",
            "wset": "any write sets it", "wuser": "any write acts", "ro": "read-only", "na": "no access"}
    return f"  [{does[field.access]}]" if field.access in does and (bits or field.access[:2] != "w1") else ""


# Registers without their values.


def register_json(space: Space, register: Register) -> dict[str, Any]:
    """What is known of a register."""
    return {
        "name": register.name, "space": space.name, "offset": f"{register.offset:#x}", "size_bytes": register.size,
        "access": register.access, "count": register.count, "relative_to": register.relative_to,
        "strides_bytes": [stride for _, stride in register.dimensions], "description": register.description,
        "reset": None if register.reset is None else f"{register.reset:#0{2 + 2 * register.size}x}",
        "fields": [{"name": f.name, "lsb": f.lsb, "width": f.width, "access": f.access, "reset": f.reset,
                    "on_read": f.on_read, "description": f.description,
                    "values": {str(bits): name for bits, (name, _) in f.names.items()}} for f in register.fields],
    }


def address_text(space: Space, register: Register) -> str:
    """``bar2:0x000+n*0x1000``."""
    start = f"{register.relative_to}+{register.offset:#04x}" if register.relative_to else (
        f"{register.offset:#0{2 + space.digits}x}")
    return f"{space.name}:{start}" + "".join(f"+{'nmijk'[min(i, 4)]}*{stride:#x}"
                                             for i, (_, stride) in enumerate(register.dimensions))


def print_register(space: Space, register: Register) -> None:
    """One register in full."""
    head = f"{click.style(register.name, bold=True)}  {address_text(space, register)}, {8 * register.size} bits"
    head += f", {register.access}"
    if register.reset is not None:
        head += f", reset {register.reset:#0{2 + 2 * register.size}x}"
    click.echo(head)
    if register.dimensions:
        counts = ", ".join(f"{'nmijk'[min(i, 4)]} is 0 to {count - 1}" for i, (count, _) in
                           enumerate(register.dimensions))
        click.echo(counts)
    for text in textwrap.wrap(register.description, COLUMNS):
        click.echo(text)
    click.echo()
    for text in diagram(register):
        click.echo(text)
    click.echo()
    rows = []
    for field in register.fields:
        rows.append([field.bits, field.name, field.access + (f", read {field.on_read}s" if field.on_read else ""),
                     "" if field.reset is None else field.text(field.reset), field.description])
        rows += [["", "", "", f"  {bits}", f"{name}{': ' if text else ''}{text}"]
                 for bits, (name, text) in field.names.items()]
    print_table(["bits", "field", "access", "reset", "meaning"], rows)


def diagram(register: Register) -> list[str]:
    """The register's bits as boxes, highest first, in rows that fit a terminal."""
    boxes: list[tuple[str, str]] = []
    at = 8 * register.size
    for field in reversed(register.fields):
        if field.lsb + field.width < at:
            boxes.append((_bits(at - 1, field.lsb + field.width), "-"))
        boxes.append((_bits(field.lsb + field.width - 1, field.lsb), field.name))
        at = field.lsb
    if at:
        boxes.append((_bits(at - 1, 0), "-"))
    rows: list[list[tuple[str, str]]] = [[]]
    width = 1
    for bits, name in boxes:
        need = max(len(bits), len(name)) + 3
        if rows[-1] and width + need > COLUMNS:
            rows.append([])
            width = 1
        rows[-1].append((bits, name))
        width += need
    lines = []
    for row in rows:
        widths = [max(len(bits), len(name)) for bits, name in row]
        rule = "+" + "+".join("-" * (w + 2) for w in widths) + "+"
        numbers, names = ([f" {box[i].center(w)} " for box, w in zip(row, widths, strict=True)] for i in (0, 1))
        lines += [" " + " ".join(numbers).rstrip(), rule, "|" + "|".join(names) + "|", rule]
    return lines


def _bits(high: int, low: int) -> str:
    return str(high) if high == low else f"{high}:{low}"
