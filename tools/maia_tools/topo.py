"""``maia topo``: the devices of this machine, and who reaches whom."""

from __future__ import annotations

import contextlib
from dataclasses import asdict

import click

import maia_rt
from maia_rt.errors import DeviceNotFound
from maia_tools.options import json_option
from maia_tools.output import print_json, print_table

_LEGEND = ("X  the device itself", "P  direct: the row's device reaches the column's memory by itself",
           "H  staged: copies go through host memory")


@click.command()
@click.argument("selectors", nargs=-1)
@json_option
def topo(selectors: tuple[str, ...], as_json: bool) -> int:
    """Show who reaches whom among devices, how, and how fast.

    SELECTORS are indices, PCI addresses and socket paths; without them all PCI functions and sockets are taken. Each is
    opened for a moment, and each way is tried with data.
    """
    names: list[int | str] = [int(name) if name.isdecimal() else name for name in selectors]
    names = names or [one.selector for one in maia_rt.devices() if one.kind != "emulated"]
    if not names:
        raise DeviceNotFound("there are no devices", hint="maia emulate --socket PATH --devices 2 serves two; name "
                                                          "their sockets, or list them in MAIA_SOCKETS")
    with contextlib.ExitStack() as stack:
        found = maia_rt.topology([stack.enter_context(maia_rt.open(name)) for name in names])
    if as_json:
        print_json("topology", asdict(found))
        return 0
    links = {(link.source, link.target): link for link in found.links}
    count = range(len(found.devices))
    rows = []
    for source, place in enumerate(found.devices):
        cells = ["X" if source == target else f"{'P' if links[source, target].kind == 'direct' else 'H'} "
                 f"{links[source, target].bandwidth / 1e9:.1f} GB/s" for target in count]
        rows.append([f"{source}", *cells, "-" if place.numa_node is None else f"{place.numa_node}", place.name])
    print_table(["", *map(str, count), "NUMA", "device"], rows)
    click.echo("\n" + "\n".join(_LEGEND))
    for link in found.links:
        if link.why:
            click.echo(f"{link.source} to {link.target}: {link.why}")
    return 0
