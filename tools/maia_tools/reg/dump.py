"""Dumps: registers and raw bytes of a device at one time, as a file, and how two of them differ."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from maia_rt.errors import InvalidArgument
from maia_tools.reg.access import Access, Reading
from maia_tools.reg.place import Place, every
from maia_tools.reg.show import reading_json
from maia_tools.reg.space import CONFIG

SCHEMA: Final = 1
KIND: Final = "reg dump"
MOST_BYTES: Final = 1 << 20
LINE: Final = 16


def choose(access: Access, spaces: Sequence[str], texts: Sequence[str]) -> tuple[list[Place], list[tuple[Place, str]]]:
    """What a dump takes in: what is named, or every register of these spaces, or of all that are described.

    A space without any description is taken in word by word, where it was named and reading it is harmless.

    Raises
    ------
    InvalidArgument
        A space that does not exist, cannot be dumped without ``--unsafe``, or is too large.
    """
    if texts and spaces:
        raise InvalidArgument("names and --space exclude each other", cause="a name says its space",
                              hint="bar0:0x0..0x100 names a part of a space")
    if texts:
        return access.select(texts)
    known = {space.name: space for space in access.spaces}
    for name in spaces:
        if name.lower() not in known:
            raise InvalidArgument(f"{access.name} has no space {name}", cause="its spaces are other ones",
                                  hint=", ".join(known))
    wanted = [known[n.lower()] for n in spaces] or [s for s in access.spaces if s.described or s.name == CONFIG]
    chosen: list[Place] = []
    left: list[tuple[Place, str]] = []
    for space in wanted:
        if space.described or space.name == CONFIG:
            places = every(space)
        else:
            size = space.size or 0
            if size > MOST_BYTES:
                raise InvalidArgument(f"{space.name} has {size:#x} bytes", cause="that is too much for one dump",
                                      hint=f"a part of it: {space.name}:0x0+4096")
            if not (space.reads_are_safe or access.unsafe):
                raise InvalidArgument(f"{space.name} is not dumped", cause="nothing describes its registers, and "
                                      "reading may have effects: it is not prefetchable",
                                      hint="--rdl FILE describes them; --unsafe reads all the same")
            places = access.resolve(f"{space.name}:0..{size}", 4)
        for place in places:
            why = access.refusal(place)
            if why:
                left.append((place, why))
            else:
                chosen.append(place)
    return chosen, left


def as_json(access: Access, readings: Sequence[Reading]) -> dict[str, Any]:
    """A dump as the file has it."""
    return {"schema": SCHEMA, "kind": KIND, "device": access.name,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "registers": [reading_json(r) for r in readings]}


def save(path: Path, data: dict[str, Any]) -> None:
    """Write a dump file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(part, path)


def hexdump(readings: Sequence[Reading]) -> Iterator[str]:
    """16 bytes a line: address, bytes in the order of their addresses, and what of them is printable ASCII."""
    run = bytearray()
    start: tuple[str, int, int] | None = None
    for reading in [*readings, None]:
        place = reading.place if reading is not None else None
        follows = (place is not None and start is not None and place.space.name == start[0]
                   and place.offset == start[1] + len(run))
        if start is not None and not follows:
            yield from _lines(*start, bytes(run))
            run.clear()
            start = None
        if reading is not None and place is not None:
            start = start or (place.space.name, place.offset, place.space.digits)
            run += reading.value.to_bytes(place.size, "little")


def _lines(space: str, offset: int, digits: int, run: bytes) -> Iterator[str]:
    for at in range(0, len(run), LINE):
        part = run[at : at + LINE]
        text = "".join(chr(b) if 32 <= b < 127 else "." for b in part)
        yield f"{space}:{offset + at:0{digits}x}  {part.hex(' '):<{3 * LINE - 1}}  {text}"


@dataclass(frozen=True)
class Difference:
    """A register or field that two sides hold different values of; None where a side has none."""

    name: str
    left: str | None
    right: str | None


def is_file(text: str) -> bool:
    """Whether a word names a dump file rather than a device: a regular file."""
    try:
        return stat.S_ISREG(os.stat(text).st_mode)
    except OSError:
        return text.endswith(".json")


def load(path: str) -> dict[str, dict[str, Any]]:
    """The registers of a dump file by name.

    Raises
    ------
    InvalidArgument
        It is no dump, or of another schema.
    """
    try:
        data = json.loads(Path(path).read_text())
        if data["kind"] != KIND:
            raise KeyError
        if data["schema"] != SCHEMA:
            raise InvalidArgument(f"{path} has schema {data['schema']}, this version reads {SCHEMA}",
                                  cause="another version made it",
                                  hint="dump again with this version")
        return {r["name"]: {**r, "value": int(r["value"], 16)} for r in data["registers"]}
    except FileNotFoundError:
        raise InvalidArgument(f"there is no file {path}", cause="it has another name",
                              hint="maia reg dump -o FILE makes one") from None
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"{path} is no dump of registers", cause="maia reg dump -o FILE has not made it, or it "
                              "is damaged", hint="maia reg dump -o FILE") from None


def compare(left: dict[str, dict[str, Any]], right: dict[str, dict[str, Any]]) -> Iterator[Difference]:
    """Every register that differs, by field where both sides have the same fields."""
    for name in dict.fromkeys([*left, *right]):
        one, two = left.get(name), right.get(name)
        if one is None or two is None:
            yield Difference(name, _value(one), _value(two))
        elif one["value"] != two["value"]:
            fields = list(zip(one.get("fields", ()), two.get("fields", ()), strict=False))
            changed = [(a, b) for a, b in fields if a["name"] == b["name"] and a["value"] != b["value"]]
            if not changed or len(fields) == 1 or len(one.get("fields", ())) != len(two.get("fields", ())):
                yield Difference(name, _value(one), _value(two))
                continue
            for a, b in changed:
                yield Difference(f"{name}.{a['name']}", _field(a), _field(b))


def _value(register: dict[str, Any] | None) -> str | None:
    return None if register is None else f"{register['value']:#0{2 + 2 * register['size_bytes']}x}"


def _field(field: dict[str, Any]) -> str:
    name = field.get("value_name")
    number = field["value"] if field["value"] < 256 else f"{field['value']:#x}"
    return f"{number} {name}" if name else str(number)
