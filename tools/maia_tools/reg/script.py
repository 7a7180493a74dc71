"""``maia reg script``: a Python file with the device's registers in it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from maia_rt.errors import InvalidArgument, MaiaError
from maia_tools.reg.access import Access
from maia_tools.reg.objects import Scripting
from maia_tools.reg.options import Target, audit_option, held_session, session, target_options


def run(access: Access, path: Path, arguments: tuple[str, ...]) -> int:
    """Run a file; its exit code. What it raises is shown with its traceback, but for what maia_rt raises."""
    try:
        code = compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError) as error:
        raise InvalidArgument(f"{path} is no Python file", cause=str(error), hint="correct it") from None
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read", cause=error.strerror or "",
                              hint="maia reg script FILE") from None
    argv, source = sys.argv, access.source
    sys.argv, access.source = [str(path), *arguments], f"script {path}"
    names = {"__name__": "__main__", "__file__": str(path), **Scripting(access).names()}
    try:
        exec(code, names)
    except SystemExit as error:
        return _exit_code(error)
    except (MaiaError, OSError, KeyboardInterrupt):
        raise
    except Exception as error:
        import traceback

        # From the script's own first line on: ours are of no use to its author.
        frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
        traceback.print_exception(type(error), error, frames)
        return 1
    finally:
        sys.argv, access.source = argv, source
    return 0


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    click.echo(error.code, err=True)
    return 1


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("arguments", nargs=-1)
@click.option("--write", "may_write", is_flag=True, help="The script may write registers.")
@audit_option
@target_options
def script(file: Path, arguments: tuple[str, ...], may_write: bool, audit_path: Path | None, target: Target) -> int:
    """Run a Python FILE with the device's registers in it.

    It has read("status.boot"), write("scratch", 5), wait("status.boot", "READY", timeout=5), the object reg
    (reg.status.boot.read(), reg.queue[3].tail == 0) and device, the open transport. sys.argv is FILE and ARGUMENTS.
    """
    held = held_session()
    if held is not None and may_write and not held.may_write:
        raise InvalidArgument("the script may not write: this session only reads",
                              cause="it was started without --write", hint="start it with --write")
    with session(target, audit_path=audit_path, may_write=may_write, source=f"script {file}") as access:
        return run(access, file, arguments)
