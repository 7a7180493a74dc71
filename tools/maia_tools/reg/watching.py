"""``maia reg watch``: what changes, when, and from what to what."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from typing import Any

import click

from maia_tools.failure import INTERRUPTED, OK
from maia_tools.options import json_option
from maia_tools.output import SCHEMA
from maia_tools.reg.access import Reading
from maia_tools.reg.model import Field
from maia_tools.reg.options import Target, finish, session, target_options, width_option
from maia_tools.reg.show import print_left_out, reading_json

DEFAULT_SECONDS = 0.1


def changes(before: Reading, after: Reading) -> list[tuple[str, str, str]]:
    """Name, old and new text of each field that changed; of the register where it has none."""
    place, register = after.place, after.place.register
    if before.value == after.value:
        return []
    if place.field is not None:
        fields: tuple[Field, ...] = (place.field,)
    elif register is not None and len(register.fields) > 1:
        fields = register.fields
    else:
        return [(place.full_name, place.hex(before.value), place.hex(after.value))]
    return [(f"{place.name}.{f.name}", f.text(f.get(before.value)), f.text(f.get(after.value)))
            for f in fields if f.get(before.value) != f.get(after.value)]


def _emit(event: dict[str, Any], text: str, as_json: bool) -> None:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, "kind": "reg watch", "time": now, **event}))
    else:
        click.echo(f"{now[11:23]}  {text}")


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--interval", "-i", type=click.FloatRange(min=0), default=DEFAULT_SECONDS, show_default=True, metavar="S",
              help="Seconds between reads.")
@click.option("--count", "-n", type=click.IntRange(min=1), help="End after so many reads; by default at Ctrl-C.")
@width_option
@target_options
@json_option
def watch(names: tuple[str, ...], interval: float, count: int | None, width: str | None, target: Target,
          as_json: bool) -> int:
    """Read registers again and again, and print only what changes: time (UTC), field, old and new value.

    Ctrl-C ends it with code 0; with --count, before the last read, with code 130.
    """
    rounds = found = 0
    code = OK
    with session(target) as access:
        places, left = access.select(names, int(width) if width else None)
        print_left_out(left)
        known: list[Reading] = []
        try:
            due = time.monotonic()
            while count is None or rounds < count:
                if rounds:
                    due = max(due + interval, time.monotonic())
                    time.sleep(max(0.0, due - time.monotonic()))
                now = list(access.readings(places))
                for number, reading in enumerate(now):
                    place = reading.place
                    if not known:
                        value = place.field.text(place.field.get(reading.value)) if place.field else place.hex(
                            reading.value)
                        _emit({"event": "start", "register": reading_json(reading)}, f"{place.full_name}  {value}",
                              as_json)
                        continue
                    for name, old, new in changes(known[number], reading):
                        found += 1
                        _emit({"event": "change", "name": name, "old": old, "new": new}, f"{name}  {old} -> {new}",
                              as_json)
                known = now
                rounds += 1
        except KeyboardInterrupt:
            code = INTERRUPTED if count is not None else OK
        click.echo(f"{rounds} reads, {found} changes", err=True)
        return code or finish(access)
