"""``maia info``: every device that can be opened, and what it is."""

from __future__ import annotations

from typing import Any

import click

import maia_rt
from maia_rt.contract.registers import Profile
from maia_rt.errors import DeviceNotFound, MaiaError
from maia_rt.transport.uapi import PciRegion
from maia_tools.options import device_option, json_option
from maia_tools.output import bytes_text, print_json
from maia_tools.selection import selector

CONFIG_IDS = 0
CONFIG_CLASS = 8
OPTIONAL_COMMANDS = ("indirect", "list_options", "branch", "signal_remote", "wait_value", "crc", "crc_compare")
"""Capabilities that stand for commands, or for what they can do."""


def describe(device: maia_rt.Device) -> dict[str, Any]:
    """A device as ``--json`` shows it."""
    c, transport = device.capabilities, device.transport
    ids, class_code = (transport.read(PciRegion.CONFIG, at, 4) for at in (CONFIG_IDS, CONFIG_CLASS))
    regions = [(region, transport.region(region)) for region in list(PciRegion)[:6]]
    return {
        "name": device.name,
        "transport": transport.info.kind,
        "pci": {"vendor": f"{ids & 0xFFFF:#06x}", "device": f"{ids >> 16:#06x}", "class": f"{class_code >> 8:#08x}"},
        "identity": {"model": device.identity.model, "firmware": device.identity.firmware,
                     "serial": f"{c.serial:#018x}", "revision": c.revision, "profile": _profile(c.profile),
                     "emulated": c.emulated, "contract": f"{c.contract[0]}.{c.contract[1]}"},
        "capabilities": {
            "clusters": c.clusters, "tiles": c.tiles, "tile_sram_bytes": c.tile_sram_bytes,
            "cluster_sram_bytes": c.cluster_sram_bytes, "hbm_bytes": c.hbm_bytes,
            "dtypes": sorted(d.name for d in c.dtypes), "semaphores": c.semaphores, "contexts": c.max_contexts,
            "kernels": c.max_kernels, **{name: getattr(c, name) for name in OPTIONAL_COMMANDS},
            "needs_wake": c.needs_wake, "host_address_bits": c.host_address_bits},
        "bars": [{"bar": int(region), "bytes": found.size, "mappable_bytes": sum(size for _, size in found.areas)}
                 for region, found in regions if found.size],
        "queues": {"max": c.max_queues, "entries_min": 1 << c.min_entries_log2, "entries_max": 1 << c.max_entries_log2,
                   "vectors": transport.irqs[2].count, "priorities": c.priorities},
    }


def _profile(number: int) -> str:
    try:
        return Profile(number).name.lower()
    except ValueError:
        return f"{number}"


def _show(index: int, found: maia_rt.DeviceInfo, data: dict[str, Any] | None, why: str) -> None:
    click.echo(click.style(f"{index}  {found.selector}", bold=True) + f"  ({found.description})")
    if data is None:
        click.echo(f"   cannot be opened: {why}")
        return
    identity, c, queues, pci = data["identity"], data["capabilities"], data["queues"], data["pci"]
    lines = [
        ("model", f"{identity['model']}, serial {identity['serial']}, revision {identity['revision']}"),
        ("firmware", f"{identity['firmware']}, contract {identity['contract']}, "
                     f"{'emulated' if identity['emulated'] else 'hardware'}"),
        ("transport", f"{data['transport']}, PCI {pci['vendor'][2:]}:{pci['device'][2:]}, class {pci['class'][2:]}"),
        ("units", f"{c['clusters']} clusters, {c['tiles']} tiles; {bytes_text(c['tile_sram_bytes'])} of SRAM a tile, "
                  f"{bytes_text(c['cluster_sram_bytes'])} a cluster"),
        ("memory", f"{bytes_text(c['hbm_bytes'])} of HBM"),
        ("types", ", ".join(c["dtypes"])),
        ("queues", f"{queues['max']} of {queues['entries_min']} to {queues['entries_max']} commands, "
                   f"{queues['vectors']} vectors, {queues['priorities']} priorities, {c['semaphores']} semaphores, "
                   f"{c['contexts']} contexts"),
        ("commands", ", ".join(["the basic ones", *(n.upper() for n in OPTIONAL_COMMANDS if c[n])])),
    ]
    lines += [("BAR " + str(bar["bar"]), f"{bytes_text(bar['bytes'])}, "
               f"{bytes_text(bar['mappable_bytes']) + ' mapped' if bar['mappable_bytes'] else 'trapped'}")
              for bar in data["bars"]]
    for name, text in lines:
        click.echo(f"   {name:10} {text}")


@click.command()
@device_option
@json_option
def info(device: str | None, as_json: bool) -> int:
    """Show every device that can be opened: transport, identity, capabilities, BARs, queues.

    Each is booted for a moment; one that somebody else drives is left alone and said to be busy.
    """
    wanted = selector(device)
    found = maia_rt.devices()
    if isinstance(wanted, int):
        found = found[wanted : wanted + 1]
    elif wanted is not None:
        kind = "emulated" if wanted == "emulated" else "socket" if "/" in wanted else "pci"
        found = [maia_rt.DeviceInfo(wanted, kind, "as asked for")]
    if not found:
        raise DeviceNotFound(f"there is no device {device}" if device else "there are no devices",
                                            hint="maia emulate --socket PATH serves one")
    rows: list[dict[str, Any]] = []
    for index, one in enumerate(found):
        data, why = None, ""
        try:
            with maia_rt.open(one.selector) as opened:
                data = describe(opened)
        except (MaiaError, OSError) as error:
            if device is not None:
                raise
            why = " ".join(str(error).split())
        rows.append({"index": index, "selector": one.selector, "kind": one.kind, **(data or {"error": why})})
        if not as_json:
            _show(index, one, data, why)
    if as_json:
        print_json("info", {"devices": rows})
    return 0 if any("error" not in row for row in rows) else 1
