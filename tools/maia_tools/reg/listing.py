"""``maia reg ls``, ``info`` and ``search``: what there is. None of them needs a device."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase

import click

from maia_rt.errors import InvalidArgument
from maia_tools.options import json_option
from maia_tools.output import bytes_text, print_json, print_table
from maia_tools.reg.address import is_pattern, resolve
from maia_tools.reg.model import Register
from maia_tools.reg.options import Target, known_spaces, target_options
from maia_tools.reg.show import address_text, print_register, register_json
from maia_tools.reg.space import CONFIG, Space


def _plain(register: Register) -> str:
    return ".".join(s.name for s in register.segments).lower()


def _sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")


def _table(found: list[tuple[Space, Register]], fields: bool) -> None:
    rows = []
    for space, register in found:
        reset = "" if register.reset is None else f"{register.reset:#0{2 + 2 * register.size}x}"
        rows.append([address_text(space, register), register.name, str(8 * register.size), register.access, reset,
                     _sentence(register.description)])
        rows += [["", f"  .{f.name}", f.bits, f.access, "" if f.reset is None else f"{f.reset:#x}",
                  _sentence(f.description)] for f in register.fields if fields]
    print_table(["address", "register", "bits", "access", "reset", "meaning"], rows)


def _print(kind: str, found: list[tuple[Space, Register]], as_json: bool, fields: bool) -> None:
    if as_json:
        print_json(kind, {"registers": [register_json(s, r) for s, r in found]})
    elif found:
        _table(found, fields)


@click.command("ls")
@click.argument("pattern", default="")
@click.option("--fields", "-l", is_flag=True, help="List fields too.")
@click.option("--spaces", is_flag=True, help="List the spaces instead: BARs and configuration space.")
@target_options
@json_option
def list_registers(pattern: str, fields: bool, spaces: bool, target: Target, as_json: bool) -> None:
    """List registers whose name contains PATTERN, or fits it where it has * or ?.

    Without --device these are our own device's, or those of --rdl. Configuration space is listed where PATTERN asks
    for it: 'config.*'.
    """
    with known_spaces(target) as known:
        if spaces:
            _list_spaces(known, as_json)
            return
        text = pattern.lower()
        fits: Callable[[str], bool] = (lambda name: fnmatchcase(name, text)) if is_pattern(text) else (
            lambda name: text in name)
        listed = known if text else [s for s in known if s.name != CONFIG] if any(
            s.registers for s in known if s.name != CONFIG) else known
        found = [(s, r) for s in listed for r in s.registers
                 if fits(_plain(r)) or any(fits(f"{_plain(r)}.{f.name.lower()}") for f in r.fields)]
        _none_found(found, pattern)
        _print("reg ls", found, as_json, fields)


def _none_found(found: list[tuple[Space, Register]], text: str) -> None:
    if not found:
        raise InvalidArgument(f"nothing is named like {text!r}", cause="it has another name, or is of another device",
                              hint=f"maia reg search {text.strip('*')}")


def _list_spaces(known: list[Space], as_json: bool) -> None:
    if as_json:
        print_json("reg spaces", {"spaces": [
            {"name": s.name, "size_bytes": s.size, "registers": len(s.registers), "described": s.described,
             "reads_are_safe": s.reads_are_safe} for s in known]})
        return
    print_table(["space", "size", "registers", "reads without a description"],
                [[s.name, "" if s.size is None else bytes_text(s.size), str(len(s.registers)),
                  "are harmless" if s.reads_are_safe else "may have effects"] for s in known])


@click.command()
@click.argument("names", nargs=-1, required=True)
@target_options
@json_option
def info(names: tuple[str, ...], target: Target, as_json: bool) -> None:
    """Show registers in full: bits, fields, access kinds, reset values, named values, meaning."""
    with known_spaces(target) as known:
        default = f"bar{target.description.bar}" if target.description else "bar0"
        found: list[tuple[Space, Register]] = []
        for name in names:
            # Any one of an array stands for all.
            for place in resolve(_with_indexes(name, known), known, default=default):
                if place.register is None:
                    raise InvalidArgument(f"no register is described at {place.address}",
                                          cause="nothing is known of it", hint="maia reg ls")
                if (place.space, place.register) not in found:
                    found.append((place.space, place.register))
        if as_json:
            _print("reg info", found, True, True)
            return
        for number, (space, register) in enumerate(found):
            if number:
                click.echo()
            print_register(space, register)


def _with_indexes(name: str, known: list[Space]) -> str:
    """``queue[n].tail`` and ``queue.tail`` as ``queue[0].TAIL``."""
    bare = re.sub(r"\[[^\]]*\]", "", name).lower()
    if is_pattern(bare):
        return name
    for space in known:
        for register in space.registers:
            if register.dimensions and (bare == _plain(register) or bare.rpartition(".")[0] == _plain(register)):
                return register.name_at(tuple(0 for _ in register.dimensions)) + bare[len(_plain(register)):]
    return name


@click.command()
@click.argument("text")
@target_options
@json_option
def search(text: str, target: Target, as_json: bool) -> None:
    """Search TEXT in the names and descriptions of registers, fields and named values."""
    word = text.lower()
    with known_spaces(target) as known:
        found: list[tuple[Space, Register]] = []
        rows = []
        for space in known:
            for register in space.registers:
                hits = [(register.name, register.description)]
                hits += [(f"{register.name}.{f.name}", f.description) for f in register.fields]
                hits += [(f"{register.name}.{f.name}={name}", meaning) for f in register.fields
                         for name, meaning in f.names.values()]
                hits = [(name, meaning) for name, meaning in hits if word in f"{name} {meaning}".lower()]
                if hits:
                    found.append((space, register))
                    rows += [[address_text(space, register), name, meaning] for name, meaning in hits]
        if not found:
            raise InvalidArgument(f"nothing speaks of {text!r}",
                                  cause="it is called otherwise, or is of another device",
                                  hint="maia reg ls")
        if as_json:
            _print("reg search", found, True, True)
        else:
            print_table(["address", "name", "meaning"], rows)
