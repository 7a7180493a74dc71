"""``maia reg diff``: two dumps, two devices, or one of each."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import click

from maia_rt.errors import InvalidArgument
from maia_tools.options import json_option
from maia_tools.output import print_json, print_table
from maia_tools.reg import audit, dump
from maia_tools.reg.access import Access, opened
from maia_tools.reg.options import Target, held_session, target_options
from maia_tools.reg.show import reading_json

Registers = dict[str, dict[str, Any]]


def _of_device(word: str, target: Target, names: list[str] | None, spaces: tuple[str, ...]) -> Registers:
    held = held_session()
    if held is not None and word in ("device", held.name):
        return _read(held, names, spaces)
    with opened(word, target.description, audit=audit.default_path(), unsafe=target.unsafe) as access:
        return _read(access, names, spaces)


def _read(access: Access, names: list[str] | None, spaces: tuple[str, ...]) -> Registers:
    places = _same(access, names) if names is not None else dump.choose(access, spaces, ())[0]
    return {r.place.full_name: {**reading_json(r), "value": r.value} for r in access.readings(places)}


def _same(access: Access, names: list[str]) -> list[Any]:
    """The places of a dump that this device has too; those it lacks show as missing."""
    found = []
    for name in names:
        try:
            found += [p for p in access.resolve(name) if not access.refusal(p)]
        except InvalidArgument:
            continue
    return found


@click.command()
@click.argument("left", metavar="A")
@click.argument("right", metavar="B")
@click.option("--space", "spaces", multiple=True, metavar="SPACE", help="Of two devices: only these spaces.")
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Leave out registers or fields that fit it.")
@target_options
@json_option
def diff(left: str, right: str, spaces: tuple[str, ...], ignore: tuple[str, ...], target: Target, as_json: bool) -> int:
    """Compare two dump files, two devices, or a dump with a device, by register and field.

    Of a device that is compared with a dump, only what the dump has is read. Code 0 where both are alike, 1 where
    they differ.
    """
    if target.device is not None:
        raise click.UsageError("diff names its devices as A and B")
    sides: list[Registers | None] = [dump.load(word) if dump.is_file(word) else None for word in (left, right)]
    for number, word in enumerate((left, right)):
        if sides[number] is None:
            other = sides[1 - number]
            sides[number] = _of_device(word, target, list(other) if other is not None else None, spaces)
    one, two = sides[0] or {}, sides[1] or {}
    patterns = [p.lower() for p in ignore]
    found = [d for d in dump.compare(one, two) if not any(
        fnmatchcase(d.name.lower(), p) or d.name.lower().startswith(p + ".") for p in patterns)]
    if as_json:
        print_json("reg diff", {"a": left, "b": right, "compared": len(one.keys() & two.keys()), "differences": [
            {"name": d.name, "a": d.left, "b": d.right} for d in found]})
    elif found:
        print_table(["register", "A", "B"], [[d.name, d.left or "missing", d.right or "missing"] for d in found])
    plural = "" if len(found) == 1 else "s"
    click.echo(f"{len(one.keys() & two.keys())} registers compared, {len(found)} difference{plural}", err=True)
    return 1 if found else 0
