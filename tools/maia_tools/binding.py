"""``maia bind``, ``maia release``, ``maia ls``: which driver has a PCI function, and how a program gets it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from maia_rt.pci import binding, functions, iommu, plan, record, usage
from maia_rt.pci.class_code import class_name, is_endpoint
from maia_rt.pci.host import Host
from maia_rt.pci.sysfs import Function
from maia_rt.pci.transaction import Plan
from maia_tools.output import print_json, print_table

addresses_argument = click.argument("addresses", metavar="ADDRESS...", nargs=-1, required=True)
group_option = click.option("--group", is_flag=True, help="Every endpoint of the IOMMU group with it.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Check, print the steps as shell commands, do nothing.")
force_option = click.option("--force", is_flag=True, help="Even if disks are mounted, interfaces up, files open.")
timeout_option = click.option("--timeout", type=click.FloatRange(min=0.1), default=binding.TIMEOUT_SECONDS,
                              show_default=True, metavar="SECONDS", help="The limit for each step.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@addresses_argument
@click.option("--driver", default=binding.VFIO_PCI, show_default=True, metavar="NAME", help="The driver to give it to.")
@click.option("--user", metavar="NAME", help="Who may open it afterwards without being root.")
@group_option
@click.option("--no-iommu", is_flag=True, help="Without an IOMMU: the device can then reach all memory of this host.")
@force_option
@dry_run_option
@timeout_option
@json_option
def bind(addresses: tuple[str, ...], driver: str, user: str | None, group: bool, no_iommu: bool, force: bool,
         dry_run: bool, timeout: float, as_json: bool) -> None:
    """Take PCI functions from the kernel's drivers for a program to drive them through VFIO.

    All of them or none: if a step fails, each has its previous driver back. That driver is remembered until the next
    boot, for maia release.
    """
    if dry_run:
        _show_plan("bind", binding.plan_bind(addresses, driver=driver, group=group, user=user, no_iommu=no_iommu,
                                             force=force, timeout=timeout), as_json)
        return
    _show("bind", binding.bind(addresses, driver=driver, group=group, user=user, no_iommu=no_iommu, force=force,
                               timeout=timeout), as_json)


@click.command()
@addresses_argument
@click.option("--driver", metavar="NAME", help="Another driver than the one it had.")
@group_option
@force_option
@dry_run_option
@timeout_option
@json_option
def release(addresses: tuple[str, ...], driver: str | None, group: bool, force: bool, dry_run: bool, timeout: float,
            as_json: bool) -> None:
    """Give PCI functions back to the drivers they had before maia bind, or to the kernel's choice.

    Clears driver_override too. All of them or none.
    """
    if dry_run:
        _show_plan("release", binding.plan_release(addresses, driver=driver, group=group, force=force,
                                                   timeout=timeout), as_json)
        return
    _show("release", binding.release(addresses, driver=driver, group=group, force=force, timeout=timeout), as_json)


@click.command("ls")
@click.option("--all", "everything", is_flag=True, help="Bridges and parts of the platform too.")
@json_option
def list_functions(everything: bool, as_json: bool) -> None:
    """List the PCI functions of this machine: driver, IOMMU group, VFIO nodes, and whether each can be bound.

    "with" names the others of the IOMMU group, which can only be given away together.
    """
    host = Host()
    nodes = usage.open_nodes(host)
    found = [one for one in functions() if everything or is_endpoint(one.class_code)]
    rows = [_row(one, host, nodes) for one in found]
    if as_json:
        print_json("ls", {"functions": rows})
        return
    if not rows:
        click.echo("this machine shows no PCI functions", err=True)
    print_table(["address", "id", "class", "driver", "group", "vfio", "bind"], [
        [row["address"], f"{row['vendor'][2:]}:{row['device'][2:]}", row["class_name"], _driver_text(row),
         "-" if row["iommu_group"] is None else str(row["iommu_group"]), " ".join(row["vfio_nodes"]) or "-",
         _bind_text(row)] for row in rows])


def _row(function: Function, host: Host, nodes: usage.OpenNodes) -> dict[str, Any]:
    address = function.address
    known = record.load(function, host)
    is_bound = iommu.is_vfio(function.driver)
    obstacle = plan.obstacle(function, host, nodes)
    users = [one.text for one in usage.vfio_uses(address, host, nodes, probe=False)] if is_bound else []
    return {
        "address": str(address), "vendor": f"{function.vendor:#06x}", "device": f"{function.device:#06x}",
        "class": f"{function.class_code:#08x}", "class_name": class_name(function.class_code),
        "driver": function.driver,
        "previous_driver": known.driver if known and known.bound_to == function.driver else None,
        "iommu_group": function.iommu_group, "no_iommu": iommu.is_no_iommu(function, host),
        "vfio_nodes": [str(node) for node in binding.vfio_nodes(function, host)] if is_bound else [],
        "bound": is_bound, "bindable": obstacle is None, "obstacle": obstacle, "in_use_by": users,
        "group_members": [{"address": str(one.address), "class_name": class_name(one.class_code), "driver": one.driver,
                           "endpoint": is_endpoint(one.class_code)} for one in iommu.members(address, host)],
    }


def _driver_text(row: dict[str, Any]) -> str:
    was = f" (was {row['previous_driver']})" if row["previous_driver"] else ""
    return f"{row['driver'] or '-'}{was}"


def _bind_text(row: dict[str, Any]) -> str:
    if row["in_use_by"]:
        text = row["in_use_by"][0]
    elif row["obstacle"]:
        text = f"no: {row['obstacle']}"
    else:
        text = "bound" if row["bound"] else "yes"
    if row["no_iommu"]:
        text += ", WITHOUT an IOMMU"
    others = ", ".join(one["address"] for one in row["group_members"] if one["endpoint"])
    return text + (f"; with {others}" if others and not row["obstacle"] else "")


def _say(notes: Iterable[str]) -> None:
    for note in dict.fromkeys(notes):
        click.echo(f"maia: {note}", err=True)


def _show_plan(verb: str, planned: Plan, as_json: bool) -> None:
    notes = [note for change in planned.changes for note in change.notes]
    _say(notes)
    if as_json:
        print_json(f"{verb} plan", {"steps": [str(step) for step in planned.steps], "notes": notes})
        return
    for step in planned.steps:
        click.echo(str(step))
    if not planned.steps:
        click.echo("maia: nothing to do", err=True)


def _show(verb: str, done: tuple[binding.Binding, ...], as_json: bool) -> None:
    _say(note for one in done for note in one.notes)
    if as_json:
        print_json(verb, {"functions": [
            {"address": str(one.address), "changed": one.changed, "previous_driver": one.before, "driver": one.driver,
             "iommu_group": one.iommu_group, "vfio_nodes": [str(node) for node in one.nodes], "notes": list(one.notes)}
            for one in done]})
        return
    for one in done:
        nodes = "".join(f", {node}" for node in one.nodes)
        group = f", IOMMU group {one.iommu_group}" if nodes else ""
        now = one.driver or "no driver"
        if not one.changed:
            text = f"already with {now}" if one.driver else "has no driver already"
        elif one.before == one.driver:
            text = f"stays with {now}, driver_override cleared" if one.driver else "no driver wants it"
        else:
            text = f"{one.before or 'no driver'} -> {now}"
        click.echo(f"{one.address}: {text}{group}{nodes}")
