"""``maia reg``: the group of commands."""

from __future__ import annotations

import click

from maia_tools.reg.comparing import diff
from maia_tools.reg.listing import info, list_registers, search
from maia_tools.reg.reading import dump, read, walk
from maia_tools.reg.script import script
from maia_tools.reg.shell import shell
from maia_tools.reg.watching import watch
from maia_tools.reg.writing import write


@click.group()
def reg() -> None:
    """Registers of any PCI device, by name, field or offset.

    A register is status, a field status.boot, one of an array queue[3].tail or q3.tail, several 'queue*' or
    queue[0..4].tail (4 is left out). Configuration space is config.command.bus_master. A place without a name is
    bar0:0x84, a range bar0:0x80..0xa0 or 0x80+32. Case does not matter.

    The device is not booted, and nobody else may be driving it. Nothing is written but by write, and by shell and
    script with --write.
    """


VERBS = (list_registers, info, search, read, dump, walk, watch, diff, write, shell, script)
for verb in VERBS:
    reg.add_command(verb)
