"""``maia reg write``: one register, shown before, asked for, recorded, and read back on request."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from maia_rt.errors import InvalidArgument
from maia_tools.options import json_option
from maia_tools.output import print_json
from maia_tools.reg import change
from maia_tools.reg.options import Number, Target, audit_option, held_session, session, target_options, width_option
from maia_tools.reg.show import print_change


@click.command()
@click.argument("name")
@click.argument("value")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@click.option("--verify", is_flag=True, help="Read back, and compare the rw bits.")
@click.option("--mask", type=Number(), help="Change only these bits: read, modify, write.")
@width_option
@audit_option
@target_options
@json_option
def write(name: str, value: str, yes: bool, dry_run: bool, verify: bool, mask: int | None, width: str | None,
          audit_path: Path | None, target: Target, as_json: bool) -> int:
    """Write VALUE to a register, a field or a place. Shows what changes, and asks first.

    VALUE is a number; of a field also one of its names; of a register also FIELD=VALUE,FIELD=VALUE. Other fields keep
    what they hold. Code 1 where the answer is no, or where --verify finds another value.
    """
    held = held_session()
    if not (yes or dry_run) and not sys.stdin.isatty():
        raise InvalidArgument("a write needs --yes where nobody can be asked", cause="standard input is no terminal",
                              hint="--yes, or --dry-run to see what would change")
    if held is not None and not held.may_write and not dry_run:
        raise InvalidArgument(f"{name} is not written: this session only reads",
                              cause="it was started without --write", hint="start it with --write")
    with session(target, audit_path=audit_path, may_write=not dry_run) as access:
        planned = change.plan(access, access.one(name, int(width) if width else None), value, mask)
        print_change(access.name, planned)
        place = planned.place
        data: dict[str, Any] = {
            "device": access.name, "name": place.full_name, "space": place.space.name, "offset": f"{place.offset:#x}",
            "old": None if planned.old is None else place.hex(planned.old), "new": place.hex(planned.new),
            "written": False}
        wrong: list[str] = []
        if not dry_run:
            if not yes and not click.confirm("Write?", err=True):
                click.echo("not written", err=True)
                return 1
            change.make(access, planned)
            data["written"] = True
            if verify:
                after, wrong = change.verify(access, planned)
                data |= {"after": place.hex(after), "wrong": wrong}
        if as_json:
            print_json("reg write", data)
        else:
            old = "-" if planned.old is None else place.hex(planned.old)
            click.echo(f"{place.name} {old} -> {place.hex(planned.new)}" + (
                " (dry run: not written)" if dry_run else ", reads back" if verify and not wrong else ""))
        for text in wrong:
            click.echo(f"verify: {text}", err=True)
        return 1 if wrong else 0
