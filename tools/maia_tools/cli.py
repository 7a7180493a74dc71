"""``maia``: the commands.

Exit codes: 0 ok, 1 a check failed or the request cannot be met, 2 usage, 3 no such device or it is busy, 4 permission,
5 device fault or device lost, 6 timeout, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

import click

from maia_tools.failure import FAILED, INTERRUPTED, OK, exit_code, explain, explain_usage, print_failure

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    "ls": ("maia_tools.binding:list_functions", "List PCI functions: driver, IOMMU group, whether each can be bound."),
    "bind": ("maia_tools.binding:bind", "Take PCI functions for a program to drive them through VFIO."),
    "release": ("maia_tools.binding:release", "Give PCI functions back to the drivers they had."),
    "info": ("maia_tools.info:info", "Show the devices: identity, capabilities, BARs, queues."),
    "reg": ("maia_tools.reg.command:reg", "List, read, watch, compare and write registers by name."),
    "emulate": ("maia_tools.emulate:emulate", "Serve an emulated device on a vfio-user socket."),
    "share": ("maia_tools.share:share", "Hold a device and give several programs a part of it each."),
    "topo": ("maia_tools.topo:topo", "Show who reaches whom among devices, how, and how fast."),
    "hang": ("maia_tools.hang:hang", "Show what running programs wait for on their devices."),
    "demo": ("maia_tools.demo:demo", "Run a sentence encoder on the device."),
    "bench": ("maia_tools.bench:bench", "Time submissions, waits, launches, graphs, copies and registers."),
}
"""Each command's object, imported when it is used, and the line that ``maia --help`` shows for it."""


class LazyGroup(click.Group):
    """A group that imports a command only to run it, so that ``maia`` starts at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import version

    click.echo(f"maia {version('maia-rt')}")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
              help="Show the version and exit.")
@click.option("--debug", is_flag=True, help="Show Python's traceback when something fails.")
@click.pass_context
def maia(ctx: click.Context, debug: bool) -> None:
    """Drive, watch and emulate MAIA-like accelerators."""
    ctx.meta["maia.debug"] = debug
    if os.environ.get("NO_COLOR"):
        ctx.color = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``maia`` and return its exit code; the entry point of the ``maia`` script."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Of the options before the command only: what follows belongs to the command.
    own = arguments[: next((i for i, word in enumerate(arguments) if not word.startswith("-")), len(arguments))]
    debug = "--debug" in own
    try:
        result = maia.main(arguments, prog_name="maia", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        click.echo("maia: interrupted", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        print_failure(*explain_usage(error))
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        click.echo("maia: interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone: nothing is left to say, and Python's flush at exit must not try.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        # Any error ends as three lines and a code; --debug shows where it came from.
        if debug:
            raise
        print_failure(*explain(error))
        return exit_code(error)
    return result if isinstance(result, int) else OK


if __name__ == "__main__":
    raise SystemExit(main())
