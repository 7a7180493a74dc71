"""``maia reg read``, ``dump`` and ``walk``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from maia_rt.errors import InvalidArgument, TransportError
from maia_tools.options import json_option
from maia_tools.output import print_json, print_table
from maia_tools.reg import dump as dumps
from maia_tools.reg.access import Access, Reading
from maia_tools.reg.options import Target, finish, session, target_options, width_option
from maia_tools.reg.place import Place, of_register
from maia_tools.reg.show import line, print_left_out, print_readings, reading_json
from maia_tools.reg.space import CONFIG


def _all_single(access: Access) -> tuple[list[Place], list[tuple[Place, str]]]:
    """Every register of the device's own that may be read, arrays left out."""
    places = [of_register(s, r) for s in access.spaces if s.described for r in s.registers if not r.dimensions]
    if not places:
        raise InvalidArgument(f"{access.name} has no registers that are described",
                              cause="it is not one of ours, and no --rdl FILE was given",
                              hint="name some: maia reg read 'config.*' bar0:0x0")
    left = [(p, why) for p in places if (why := access.refusal(p))]
    return [p for p in places if not access.refusal(p)], left


@click.command()
@click.argument("names", nargs=-1)
@width_option
@target_options
@json_option
def read(names: tuple[str, ...], width: str | None, target: Target, as_json: bool) -> int:
    """Read registers, fields and places, with what each value means.

    Without NAMES: every register of the device that is described and can be read without an effect.
    """
    with session(target) as access:
        places, left = access.select(names, int(width) if width else None) if names else _all_single(access)
        readings = list(access.readings(places))
        if as_json:
            print_json("reg read", {"device": access.name, "registers": [reading_json(r) for r in readings]})
        else:
            print_readings(readings)
            print_left_out(left)
        return finish(access)


@click.command()
@click.argument("names", nargs=-1)
@click.option("--space", "spaces", multiple=True, metavar="SPACE", help="bar0, ..., config, rom; may be repeated.")
@click.option("--output", "-o", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Write a file for maia reg diff.")
@click.option("--hex", "as_hex", is_flag=True, help="Print bytes.")
@target_options
@json_option
def dump(names: tuple[str, ...], spaces: tuple[str, ...], output: Path | None, as_hex: bool, target: Target,
         as_json: bool) -> int:
    """Read everything, or NAMES and ranges, or whole spaces: a line a register, a file, or bytes.

    By default that is every register that is described, and configuration space. What reading would change is left
    out.
    """
    if as_hex and as_json:
        raise click.UsageError("--hex and --json exclude each other")
    with session(target) as access:
        places, left = dumps.choose(access, spaces, names)
        readings = list(access.readings(places))
        if output is not None:
            dumps.save(output, dumps.as_json(access, readings))
            click.echo(f"{output}: {len(readings)} registers of {access.name}", err=True)
        elif as_json:
            data = dumps.as_json(access, readings)
            print_json(dumps.KIND, {k: v for k, v in data.items() if k not in ("schema", "kind")})
        else:
            for text in dumps.hexdump(readings) if as_hex else map(line, readings):
                click.echo(text)
        print_left_out(left)
        return finish(access)


@click.command()
@click.argument("names", nargs=-1)
@target_options
@json_option
def walk(names: tuple[str, ...], target: Target, as_json: bool) -> int:
    """Read every register one by one, or NAMES, and say which answer and how fast.

    Code 1 where a read failed, 5 where the device does not answer.
    """
    with session(target) as access:
        places, left = access.select(names) if names else dumps.choose(access, (), ())
        rows: list[dict[str, Any]] = []
        for place in places:
            rows.append(_try(access, place))
        failed = sum(r["state"] == "failed" for r in rows)
        ones = sum(r["state"] == "all ones" for r in rows)
        differ = sum(r["differs"] for r in rows)
        times = sorted(r["time_us"] for r in rows)
        middle = times[len(times) // 2] if times else 0.0
        if as_json:
            print_json("reg walk", {"device": access.name, "registers": rows, "left_out": [
                {"name": p.full_name, "why": why} for p, why in left]})
        else:
            print_table(["address", "register", "value", "state", "time"],
                        [[r["address"], r["name"], r["value"], r["state"] + (", differs" if r["differs"] else ""),
                          f"{r['time_us']:.1f} us"] for r in rows], right=(4,))
            print_left_out(left)
        click.echo(f"{len(rows)} read, {failed} failed, {ones} all ones, {differ} differ from reset, "
                   f"{middle:.1f} us each (median)", err=True)
        return 1 if failed else finish(access)


def _try(access: Access, place: Place) -> dict[str, Any]:
    begin = time.perf_counter_ns()
    try:
        value = access.read(place)
    except TransportError as error:
        return {"name": place.full_name, "address": place.address, "value": "", "state": "failed", "error": str(error),
                "differs": False, "time_us": (time.perf_counter_ns() - begin) / 1000}
    reading = Reading(place, value, time.perf_counter_ns() - begin)
    state = "all ones" if value == place.all_ones and place.space.name != CONFIG else "ok"
    return {"name": place.full_name, "address": place.address, "value": place.hex(value), "state": state,
            "differs": reading.differs, "time_us": reading.nanoseconds / 1000}
