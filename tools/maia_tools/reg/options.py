"""Options of every ``maia reg`` command that looks at a device, and how they open it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from maia_rt.errors import InvalidArgument
from maia_tools.failure import FAULT, OK, print_failure
from maia_tools.options import device_option
from maia_tools.reg import audit, space
from maia_tools.reg.access import Access, opened
from maia_tools.reg.address import number
from maia_tools.reg.space import Description, Space

Command = TypeVar("Command", bound=Callable[..., Any])


class Number(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Decimal or 0x..."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse it; a bad one is a usage error."""
        if isinstance(value, int):
            return value
        try:
            return number(value)
        except InvalidArgument as error:
            return self.fail(error.what, param, ctx)


@dataclasses.dataclass(frozen=True)
class Target:
    """Which device, and by which names."""

    device: str | None
    description: Description | None
    unsafe: bool


width_option = click.option("--width", "-w", type=click.Choice(["1", "2", "4", "8"]),
                            help="Bytes of one access; by default the register's, or 4.")
audit_option = click.option("--audit", "audit_path", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
                            help="Where writes are recorded; by default $XDG_STATE_HOME/maia-rt/registers.log.")


def target_options(command: Command) -> Command:
    """Options that say what is looked at; the command gets one ``target``."""
    def with_target(*args: Any, device: str | None, rdl: str | None, bar: int | None, base: int | None, unsafe: bool,
                    **rest: Any) -> Any:
        if rdl is None and (bar is not None or base is not None):
            raise click.UsageError("--bar and --base say where the registers of --rdl lie")
        description = Description.parse(rdl, bar or 0, base or 0) if rdl is not None else None
        return command(*args, target=Target(device, description, unsafe), **rest)

    with_target.__doc__, with_target.__name__ = command.__doc__, command.__name__
    if params := getattr(command, "__click_params__", None):
        with_target.__click_params__ = params  # type: ignore[attr-defined]
    for option in reversed((
        device_option,
        click.option("--rdl", metavar="FILE[:TOP]", help="Name registers by a SystemRDL file."),
        click.option("--bar", type=click.IntRange(0, 5), help="The BAR that --rdl describes; 0 by default."),
        click.option("--base", type=Number(), help="Where in it the description starts, in bytes; 0 by default."),
        click.option("--unsafe", is_flag=True, help="Touch what no register describes, and what reading changes."),
    )):
        with_target = option(with_target)
    return with_target  # type: ignore[return-value]


@contextmanager
def session(target: Target, *, audit_path: Path | None = None, may_write: bool = False,
            source: str = "write") -> Iterator[Access]:
    """The device of a command: the shell's, where it runs inside of one, else one opened for it."""
    held = held_session()
    if held is None:
        with opened(target.device, target.description, audit=audit_path or audit.default_path(), unsafe=target.unsafe,
                    may_write=may_write, source=source) as access:
            yield access
        return
    if target.device is not None or target.description is not None or audit_path is not None:
        raise InvalidArgument("--device, --rdl and --audit are given when the shell is started",
                              cause="this shell has its device open", hint="leave the shell, or start another one")
    before = held.unsafe
    held.unsafe = before or target.unsafe
    held.silent.clear()
    held.answered = 0
    try:
        yield held
    finally:
        held.unsafe = before


def held_session() -> Access | None:
    """The shell's or script's device, where the command runs inside of one."""
    context = click.get_current_context(silent=True)
    return context.find_object(Access) if context is not None else None


@contextmanager
def known_spaces(target: Target) -> Iterator[list[Space]]:
    """The spaces to speak of: a device's where one was named, else what is known without any."""
    if target.device is None and held_session() is None:
        yield space.offline(target.description)
        return
    with session(target) as access:
        yield access.spaces


def finish(access: Access) -> int:
    """The exit code of a command that has read: 5 where all was all ones and nothing shows a sign of life."""
    if not access.doubtful:
        return OK
    print_failure(f"{access.name}: every read gave all ones", "nothing answers there, or the device is gone",
                  "maia reg read 'config.*'; another offset or width; reset the device")
    return FAULT
