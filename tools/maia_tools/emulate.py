"""``maia emulate``: the emulator's own command line."""

from __future__ import annotations

import click


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False)
@click.pass_context
def emulate(ctx: click.Context) -> int:
    """Serve an emulated device on a vfio-user socket; see ``maia emulate --help``."""
    from maia_emulator.cli import main

    try:
        return main(ctx.args) or 0
    except SystemExit as end:
        # argparse ends this way, after --help too.
        return end.code if isinstance(end.code, int) else 0
