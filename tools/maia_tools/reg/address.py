"""What a name or an address on the command line means.

    status              a register; case does not matter            queue[3].tail    q3.tail    one of an array
    status.boot         a field                                     queue[0..4].tail queue[*].tail   several
    config.msix.control configuration space, by capability          'queue*' 'status.*'    every name that fits
    0x84  bar0:0x84  bar2+0x3010  config:0x04    by offset           bar0:0x80..0xa0  0x80+32    a range's registers

``a..b`` leaves b out, in ranges and in indexes alike.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Final, NoReturn

from maia_rt.errors import InvalidArgument
from maia_tools.reg.model import Field, Register
from maia_tools.reg.place import Place, of_register
from maia_tools.reg.space import CONFIG, REGIONS, Space

WIDTHS: Final = (1, 2, 4, 8)
MOST_PLACES: Final = 65536
WORD: Final = 4

_NUMBER = r"0x[0-9a-f_]+|\d+"
_ADDRESS = re.compile(rf"(?:(?P<space>{'|'.join(REGIONS)})[:+])?(?P<start>{_NUMBER})"
                      rf"(?:\.\.(?P<end>{_NUMBER})|\+(?P<length>{_NUMBER}))?$", re.IGNORECASE)
_SPACE = re.compile(rf"(?P<space>{'|'.join(REGIONS)}):(?P<path>.+)$", re.IGNORECASE)
_PART = re.compile(r"(?P<name>[\w*?]+)(?P<indexes>(?:\[[^\]]*\])*)$")
_INDEX = re.compile(rf"\*|(?P<start>{_NUMBER})(?:\.\.(?P<end>{_NUMBER}))?$", re.IGNORECASE)
_OLD_QUEUE = re.compile(r"q(\d+)(?=\.)", re.IGNORECASE)
_SUGGESTIONS = 4

Part = tuple[str, tuple[str, ...]]
"""A name between two dots, and its index texts."""


def resolve(text: str, spaces: list[Space], *, default: str = "bar0", width: int | None = None) -> list[Place]:
    """Every place that `text` names, in the order of their offsets.

    Parameters
    ----------
    default : str
        The space of an offset that names none.
    width : int, optional
        Bytes of one access, where it is not to be the register's own.

    Raises
    ------
    InvalidArgument
        There is no such register, field, space or index; the nearest names are offered. Or the access would be
        misaligned, or outside of the space.
    """
    word = text.strip()
    if match := _ADDRESS.match(word):
        return list(_range(_space(spaces, match["space"] or default), match, width))
    wanted = spaces
    if match := _SPACE.match(word):
        wanted, word = [_space(spaces, match["space"])], match["path"]
    found = _by_name(word, wanted)
    if not found:
        _unknown(text, word, wanted)
    if len(found) > MOST_PLACES:
        raise InvalidArgument(f"{text} names {len(found)} registers", cause="a wildcard takes in arrays as a whole",
                              hint=f"name at most {MOST_PLACES} at one time")
    return [_checked(p if width is None else _with_width(p, width)) for p in found]


def number(text: str) -> int:
    """A decimal or hexadecimal number.

    Raises
    ------
    InvalidArgument
        It is none.
    """
    try:
        return int(text.replace("_", ""), 0)
    except ValueError:
        raise InvalidArgument(f"{text!r} is no number", cause="numbers are decimal, or hexadecimal with 0x",
                              hint="decimal or 0x...") from None


def is_pattern(text: str) -> bool:
    """Whether a text has wildcards outside of brackets."""
    return any(c in re.sub(r"\[[^\]]*\]", "", text) for c in "*?")


def _space(spaces: list[Space], name: str) -> Space:
    for space in spaces:
        if space.name == name.lower():
            return space
    known = ", ".join(s.name for s in spaces)
    raise InvalidArgument(f"the device has no {name.lower()}",
                          cause=f"its spaces are {known}" if known else "it has no regions",
                          hint="maia reg ls --spaces")


def _range(space: Space, match: re.Match[str], width: int | None) -> Iterator[Place]:
    start = number(match["start"])
    if match["end"] is None and match["length"] is None:
        yield _at(space, start, width)
        return
    end = number(match["end"]) if match["end"] else start + number(match["length"])
    if end <= start:
        raise InvalidArgument(f"the range {match[0]} is empty", cause="its end is left out",
                              hint=f"{start:#x}+16 for 16 bytes")
    if space.size is not None and end > space.size:
        raise InvalidArgument(f"{match[0]} ends beyond {space.name}, which has {space.size:#x} bytes",
                              cause="the range is too long",
                              hint=f"{space.name}:{start:#x}..{space.size:#x}")
    if (end - start) // (width or 1) > MOST_PLACES * 8:
        raise InvalidArgument(f"{match[0]} has {end - start} bytes", cause="that is more than one command reads",
                              hint="take a part of it")
    at = start
    while at < end:
        place = _at(space, at, width)
        if at + place.size > end:
            place = _at(space, at, _largest(at, end - at))
        yield place
        at += place.size


def _largest(offset: int, room: int) -> int:
    return max(w for w in WIDTHS if w <= room and offset % w == 0)


def _at(space: Space, offset: int, width: int | None) -> Place:
    """The register that starts at an offset, or bytes."""
    known = space.starting_at(offset)
    if known is not None and width in (None, known[0].size):
        return _checked(of_register(space, *known))
    size = width or WORD
    return _checked(Place(space, offset, size, size))


def _with_width(place: Place, width: int) -> Place:
    if width > place.size:
        raise InvalidArgument(f"{place.name} has {place.size} bytes, so it cannot be accessed by {width}",
                              cause="an access of a register stays within it",
                              hint=f"by offset: {place.address} --width {width}")
    return replace(place, access_size=width)


def _checked(place: Place) -> Place:
    space = place.space
    if space.size is not None and place.offset + place.size > space.size:
        raise InvalidArgument(f"{place.size} bytes at {place.offset:#x} are not within {space.name}, which has "
                              f"{space.size:#x} bytes", cause="the offset is too large",
                              hint=f"the last place is {space.size - place.size:#x}")
    if place.offset % place.access_size:
        fits = _largest(place.offset, place.access_size)
        raise InvalidArgument(f"offset {place.offset:#x} is not a multiple of an access's {place.access_size} bytes",
                              cause="a misaligned access reaches a device as several, or not at all",
                              hint=f"--width {fits}, or offset {place.offset - place.offset % place.access_size:#x}")
    return place


# By name.


def _by_name(text: str, spaces: list[Space]) -> list[Place]:
    if is_pattern(text) and "[" not in text:
        return _by_pattern(text.lower(), spaces)
    parts = _parts(_OLD_QUEUE.sub(r"queue[\1]", text, count=1))
    found: list[Place] = []
    for space in spaces:
        for register in space.registers:
            found += _match(space, register, parts)
    return found


def _by_pattern(pattern: str, spaces: list[Space]) -> list[Place]:
    """Whole registers where the pattern fits any, else fields. ``*`` takes in configuration space only if asked to."""
    registers: list[Place] = []
    fields: list[Place] = []
    for space in spaces:
        if space.name == CONFIG and len(spaces) > 1 and not pattern.startswith(CONFIG):
            continue
        for register in space.registers:
            name = ".".join(s.name for s in register.segments).lower()
            if fnmatchcase(name, pattern):
                registers += [of_register(space, register, i) for i in register.indexes(space.size)]
            elif not registers:
                for field in register.fields:
                    if fnmatchcase(f"{name}.{field.name.lower()}", pattern):
                        fields += [of_register(space, register, i, field) for i in register.indexes(space.size)]
    return registers or fields


def _parts(text: str) -> list[Part]:
    found: list[Part] = []
    for word in re.split(r"\.(?![^\[]*\])", text):
        match = _PART.match(word)
        if match is None:
            raise InvalidArgument(f"{text!r} is no register",
                                  cause="a name is words and indexes with dots between them",
                                  hint="like status.boot, queue[3].tail, bar0:0x84; maia reg ls")
        found.append((match["name"].lower(), tuple(re.findall(r"\[([^\]]*)\]", match["indexes"]))))
    return found


def _match(space: Space, register: Register, parts: list[Part]) -> list[Place]:
    depth = len(register.segments)
    if len(parts) not in (depth, depth + 1):
        return []
    if not all(fnmatchcase(s.name.lower(), name) for s, (name, _) in zip(register.segments, parts, strict=False)):
        return []
    fields: list[Field | None] = [None]
    if len(parts) > depth:
        name, indexes = parts[depth]
        fields = [f for f in register.fields if fnmatchcase(f.name.lower(), name)]
        if not fields or indexes:
            return []
    chosen: list[tuple[int, ...]] = [()]
    for segment, (_, texts) in zip(register.segments, parts, strict=False):
        if len(texts) != len(segment.dimensions):
            _wrong_indexes(register, segment.name, len(segment.dimensions), len(texts))
        for (count, _), text in zip(segment.dimensions, texts, strict=True):
            chosen = [(*c, i) for c in chosen for i in _index(segment.name, text, count)]
            if len(chosen) > MOST_PLACES:
                raise InvalidArgument(f"{register.name} with these indexes is more than {MOST_PLACES} registers",
                                      cause="the array is long",
                                      hint=f"fewer of them: {segment.name}[0..64]")
    return [of_register(space, register, i, f) for i in chosen for f in fields]


def _wrong_indexes(register: Register, segment: str, have: int, given: int) -> NoReturn:
    example = register.name_at(tuple(0 for _ in register.dimensions))
    raise InvalidArgument(f"{segment} takes {have or 'no'} {'index' if have == 1 else 'indexes'}, not {given}",
                          cause=f"it is written {register.name}", hint=example)


def _index(name: str, text: str, count: int) -> range:
    match = _INDEX.match(text.strip())
    if match is None:
        raise InvalidArgument(f"{name}[{text}]: {text!r} is no index", cause="an index is a number, a range or *",
                              hint=f"{name}[0], {name}[0..4] or {name}[*]")
    if match["start"] is None:
        return range(count)
    start = number(match["start"])
    end = number(match["end"]) if match["end"] else start + 1
    if not start < end <= count:
        raise InvalidArgument(f"{name}[{text}] is not among {name}[0] to {name}[{count - 1}]",
                              cause="the device has fewer, or the range is empty", hint=f"{name}[0..{count}] is all")
    return range(start, end)


# What to say of a name that there is none of.


def _unknown(text: str, word: str, spaces: list[Space]) -> NoReturn:
    plain = re.sub(r"\[[^\]]*\]", "", word).lower()
    if is_pattern(plain):
        raise InvalidArgument(f"no register or field fits {text!r}",
                              cause="a wildcard takes in configuration space only where it starts with config",
                              hint="maia reg ls; 'config.*' for configuration space")
    candidates: dict[str, str] = {}
    owner: Register | None = None
    for space in spaces:
        for register in space.registers:
            name = ".".join(s.name for s in register.segments)
            shown = register.name_at(tuple(0 for _ in register.dimensions))
            candidates.setdefault(name.lower(), shown)
            if plain.rpartition(".")[0] == name.lower():
                owner = register
            for field in register.fields:
                candidates.setdefault(f"{name}.{field.name}".lower(), f"{shown}.{field.name}")
    if owner is not None:
        names = {f.name.lower(): f.name for f in owner.fields}
        near = difflib.get_close_matches(plain.rpartition(".")[2], names, _SUGGESTIONS, 0.5) or list(names)[:8]
        raise InvalidArgument(f"{owner.name} has no field {plain.rpartition('.')[2].upper()}",
                              cause="it is misspelt, or of another register",
                              hint=", ".join(names[n] for n in near))
    # The last part alone, `tail`, may be all that somebody remembers.
    ends = [c for c in candidates if c.endswith("." + plain)][:_SUGGESTIONS]
    near = ends or difflib.get_close_matches(plain, candidates, _SUGGESTIONS, 0.6)
    raise InvalidArgument(f"there is no register {text}",
                          cause="it is misspelt" if near else "it is of another device, or not named here",
                          hint=", ".join(candidates[n] for n in near) if near else "maia reg ls, maia reg search TEXT")
