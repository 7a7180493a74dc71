"""``maia reg``: registers by name, field or offset. Reading boots nothing and changes nothing."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from maia_rt.contract.commands import DOORBELL_STRIDE
from maia_rt.contract.register import Field, Register
from maia_rt.contract.registers import BAR0, DOORBELL
from maia_rt.errors import InvalidArgument
from maia_tools.output import print_json, print_table

if TYPE_CHECKING:
    from maia_rt.transport.protocol import Transport

NAME = re.compile(r"(?:Q(?P<queue>\d+)\.)?(?P<register>[A-Z_][A-Z0-9_]*)(?:\.(?P<field>[A-Z_][A-Z0-9_]*))?$")
OFFSET = re.compile(r"(?:BAR(?P<bar>\d):)?(?P<offset>0X[0-9A-F]+|\d+)$")

device_option = click.option("--device", "-d", metavar="SEL",
                             help="Which device: index, PCI address, socket path or 'emulated'.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@dataclass(frozen=True)
class Place:
    """One register, or 4 bytes that no register describes, and maybe one of its fields."""

    bar: int
    offset: int
    register: Register | None
    queue: int | None = None
    field: Field | None = None

    @property
    def size(self) -> int:
        """Bytes of one access."""
        return self.register.width_bytes if self.register else 4

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        if self.register is None:
            return f"BAR{self.bar}:{self.offset:#06x}"
        return (f"Q{self.queue}." if self.queue is not None else "") + self.register.name

    def read(self, transport: Transport) -> int:
        """Read it with one access."""
        return transport.read(self.bar, self.offset, self.size)

    def write(self, transport: Transport, value: int) -> None:
        """Write it with one access."""
        transport.write(self.bar, self.offset, self.size, value)

    def hex(self, value: int) -> str:
        """A value, padded to the register's width."""
        return f"{value:#0{2 + 2 * self.size}x}"


def find(text: str) -> Place:
    """What a name or offset means.

    Parameters
    ----------
    text : str
        ``STATUS``, ``STATUS.BOOT``, ``Q3.TAIL``, ``0x84``, ``BAR2:0x3000``; case does not matter. An offset that a
        register starts at is that register.

    Raises
    ------
    InvalidArgument
        There is no such register or field.
    """
    word = text.upper()
    match = OFFSET.match(word)
    if match:
        bar, offset = int(match["bar"] or 0), int(match["offset"], 0)
        return _at(bar, offset)
    match = NAME.match(word)
    if match is None:
        raise InvalidArgument(f"{text!r} is no register", hint="maia reg ls")
    queue = int(match["queue"]) if match["queue"] else None
    table = BAR0 if queue is None else DOORBELL
    register = table.get(match["register"])
    if register is None:
        hint = f"Q0.{match['register']}" if match["register"] in DOORBELL and queue is None else "maia reg ls"
        raise InvalidArgument(f"there is no register {match['register']}", hint=hint)
    field = None
    if match["field"]:
        try:
            field = register.field(match["field"])
        except KeyError:
            raise InvalidArgument(f"{register.name} has no field {match['field']}",
                                  hint=", ".join(f.name for f in register.fields)) from None
    if queue is None:
        return Place(0, register.offset, register, None, field)
    return Place(2, queue * DOORBELL_STRIDE + register.offset, register, queue, field)


def _at(bar: int, offset: int) -> Place:
    if offset % 4:
        raise InvalidArgument(f"offset {offset:#x} is not a multiple of 4")
    if bar == 0:
        for register in BAR0.values():
            if register.offset == offset:
                return Place(0, offset, register)
    return Place(bar, offset, None)


def as_data(place: Place, value: int) -> dict[str, Any]:
    """A register's value as JSON has it."""
    data: dict[str, Any] = {"name": place.name, "bar": place.bar, "offset": f"{place.offset:#x}",
                            "bits": 8 * place.size, "value": place.hex(value)}
    if place.register is not None:
        data["fields"] = {name: int(bits) for name, bits in place.register.decode(value).items()}
        names = {name: bits.name for name, bits in place.register.decode(value).items() if hasattr(bits, "name")}
        if names:
            data["names"] = names
    return data


def _field_text(register: Register, name: str, value: int) -> str:
    item = register.field(name)
    bits = register.decode(value)[name]
    if hasattr(bits, "name"):
        return f"{int(bits)} ({bits.name})"
    return f"{int(bits):#x}" if item.width > 16 else str(int(bits))


@click.group()
def reg() -> None:
    """List, read and write registers by name.

    A register is STATUS, a field STATUS.BOOT, a queue's doorbell Q3.TAIL; a place without a name is 0x84 (BAR 0) or
    BAR2:0x3000. The device is not booted, and nobody else may be driving it.
    """


@reg.command("ls")
@click.argument("pattern", default="")
@json_option
def list_registers(pattern: str, as_json: bool) -> None:
    """List registers and fields whose name or description contains PATTERN. No device is needed."""
    rows = []
    data = []
    for bar, table in ((0, BAR0), (2, DOORBELL)):
        for register in table.values():
            words = [register.name, register.description, *(f"{f.name} {f.description}" for f in register.fields)]
            if not any(pattern.lower() in text.lower() for text in words):
                continue
            name = register.name if bar == 0 else f"Qn.{register.name}"
            rows.append([f"BAR{bar}", f"{register.offset:#05x}", name, str(register.width_bits), "", "",
                         register.description.split(". ")[0].rstrip(".")])
            rows += [["", "", f"  .{f.name}", f"{f.lsb + f.width - 1}:{f.lsb}", f.access, f"{f.reset:#x}",
                      f.description.split(". ")[0].rstrip(".")] for f in register.fields]
            data.append({"name": name, "bar": bar, "offset": f"{register.offset:#x}", "bits": register.width_bits,
                         "description": register.description,
                         "fields": [{"name": f.name, "lsb": f.lsb, "width": f.width, "access": f.access,
                                     "reset": f.reset, "description": f.description} for f in register.fields]})
    if as_json:
        print_json("reg ls", {"registers": data})
    else:
        print_table(["bar", "offset", "register", "bits", "access", "reset", "meaning"], rows)


@reg.command("read")
@click.argument("names", nargs=-1)
@device_option
@json_option
def read_registers(names: tuple[str, ...], device: str | None, as_json: bool) -> None:
    """Read registers, fields or offsets; every readable register of BAR 0 without NAMES."""
    places = [find(n) for n in names] or [Place(0, r.offset, r) for r in BAR0.values() if r.readable]
    from maia_tools.selection import open_transport

    with open_transport(device) as transport:
        values = [(place, place.read(transport)) for place in places]
        shown = transport.name
    if as_json:
        print_json("reg read", {"device": shown, "registers": [as_data(p, v) for p, v in values]})
        return
    rows = []
    for place, value in values:
        if place.field is not None and place.register is not None:
            rows.append([f"{place.name}.{place.field.name}", _field_text(place.register, place.field.name, value), ""])
            continue
        fields = "" if place.register is None or len(place.register.fields) == 1 else "  ".join(
            f"{f.name}={_field_text(place.register, f.name, value)}" for f in place.register.fields)
        rows.append([place.name, place.hex(value), fields])
    print_table(["register", "value", "fields"], rows)


def new_value(place: Place, text: str, old: int) -> int:
    """The register value that a write of ``text`` to a register or field means.

    Of the other fields, rw ones keep their value; w1c and pulse ones are written as 0, which leaves them alone.

    Raises
    ------
    InvalidArgument
        Not a number, no name of the field's, or too large for it.
    """
    word = text.upper()
    if place.field is not None and place.field.enum is not None and word in place.field.enum.__members__:
        number = int(place.field.enum[word])
    else:
        try:
            number = int(text.replace("_", ""), 0)
        except ValueError:
            raise InvalidArgument(f"{text!r} is no number", hint="decimal or 0x...") from None
    width = place.field.width if place.field is not None else 8 * place.size
    if not 0 <= number < 1 << width:
        raise InvalidArgument(f"{text} does not fit the {width} bits of {place.name}")
    if place.field is None or place.register is None:
        return number
    return place.register.set(old & place.register.mask("rw"), place.field.name, number)


@reg.command("write")
@click.argument("name")
@click.argument("value")
@click.option("--yes", is_flag=True, help="Do not ask.")
@device_option
@json_option
def write_register(name: str, value: str, yes: bool, device: str | None, as_json: bool) -> None:
    """Write VALUE to a register, a field or an offset. Shows what changes, and asks first."""
    place = find(name)
    target = place.field or place.register
    if target is not None and not target.writable:
        raise InvalidArgument(f"{name.upper()} is read-only")
    if not yes and not sys.stdin.isatty():
        raise click.UsageError("a write needs --yes where nobody can be asked")
    from maia_tools.selection import open_transport

    with open_transport(device) as transport:
        old = place.read(transport)
        new = new_value(place, value, old)
        click.echo(f"{transport.name}: {place.name} {place.hex(old)}, write {place.hex(new)}", err=True)
        for field in place.register.fields if place.register is not None else ():
            if field.writable and (field.get(new) != field.get(old) or not field.readable):
                click.echo(f"  .{field.name} ({field.access})  {field.get(old):#x} -> {field.get(new):#x}", err=True)
        if not yes:
            click.confirm("Write?", abort=True, err=True)
        place.write(transport, new)
        after = place.read(transport)
        shown = transport.name
    if as_json:
        print_json("reg write", {"device": shown, "old": as_data(place, old), "written": place.hex(new),
                                 "new": as_data(place, after)})
    else:
        click.echo(f"{place.name} {place.hex(old)} -> {place.hex(after)}")
