"""``maia hang``: ask running programs what their devices wait for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from maia_rt.errors import DeviceNotFound, DevicePermission, DeviceTimeout, InvalidArgument, MaiaError
from maia_rt.observe import live
from maia_rt.pci import PciAddress
from maia_tools.failure import FAILED, NO_DEVICE, OK, PERMISSION, TIMEOUT
from maia_tools.options import json_option
from maia_tools.output import print_json

_CODES = {DeviceTimeout: TIMEOUT, DevicePermission: PERMISSION, DeviceNotFound: NO_DEVICE}


def _ask(pid: int, request: dict[str, str], timeout: float) -> list[dict[str, Any]]:
    """Ask a process; what goes wrong as an error of ours."""
    try:
        found: list[dict[str, Any]] = live.ask(pid, request, timeout)
    except TimeoutError:
        raise DeviceTimeout(f"process {pid} does not answer within {timeout:g} s",
                            cause="it has been stopped, or something in it holds Python's interpreter lock",
                            hint=f"py-spy dump --pid {pid}, or gdb, shows where it is") from None
    except PermissionError:
        raise DevicePermission(f"process {pid} belongs to another user", hint="ask as that user, or as root") from None
    except OSError as error:
        raise DeviceNotFound(f"process {pid} drives no device", cause=f"it does not listen: {error}",
                             hint="maia hang without a target asks all; MAIA_LIVE=0 keeps a process silent") from None
    except ValueError as error:
        raise MaiaError(f"process {pid} refused: {error}", cause="another version of maia_rt") from None
    return found


def _same(name: str, target: str) -> bool:
    """Whether a device's name is what the user typed: a socket by any path to it, a PCI address in any form."""
    try:
        return PciAddress.parse(name) == PciAddress.parse(target)
    except InvalidArgument:
        return name == target or ("/" in name and os.path.realpath(name) == os.path.realpath(target))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _wanted(target: str | None, timeout: float) -> list[tuple[int, dict[str, str]]]:
    """Whom to ask what."""
    if target is not None and target.isdecimal():
        return [(int(target), {"call": "hang"})]
    found = live.processes()
    if target is None:
        return [(pid, {"call": "hang"}) for pid in found]
    wanted, silent = [], []
    for pid in found:
        try:
            devices = _ask(pid, {"call": "devices"}, timeout)
        except MaiaError as error:
            silent.append(error)
            continue
        wanted += [(pid, {"call": "hang", "device": str(one["name"])}) for one in devices
                   if _same(str(one["name"]), target)]
    if not wanted:
        # One that does not answer may be the one.
        raise next((e for e in silent if isinstance(e, DeviceTimeout | DevicePermission)), None) or DeviceNotFound(
            f"no process drives {target}", cause=f"{len(found)} processes with devices were asked",
            hint="maia hang without a target shows all")
    return wanted


@click.command()
@click.argument("target", required=False)
@click.option("--timeout", default=10.0, show_default=True, type=click.FloatRange(0.1, 600),
              help="Seconds that a process has to answer.")
@json_option
def hang(target: str | None, timeout: float, as_json: bool) -> int:
    """Show what running programs wait for on their devices, followed to the root.

    TARGET is a process id, a device's PCI address, or the path of its socket; without it, all processes of this user
    (of all users, for root) are asked. The code is 0 where nothing hangs, 1 where something waits.
    """
    rows: list[dict[str, Any]] = []
    code = OK
    for pid, request in _wanted(target, timeout):
        row: dict[str, Any] = {"pid": pid, "command": _command(pid)}
        try:
            row["reports"] = _ask(pid, request, timeout)
        except MaiaError as error:
            if target is not None:
                raise
            row["error"] = error.what
            code = code or next((value for kind, value in _CODES.items() if isinstance(error, kind)), FAILED)
        rows.append(row)
    if not rows:
        raise DeviceNotFound("no process drives a device", hint="MAIA_LIVE=0 keeps a process silent")
    if any(report.get("hangs") for row in rows for report in row.get("reports", ())):
        code = FAILED
    if as_json:
        print_json("hang", {"processes": rows})
        return code
    for row in rows:
        click.echo(click.style(f"process {row['pid']}", bold=True) + f"  {row['command']}".rstrip())
        texts = [report["text"] for report in row.get("reports", ())] or [row["error"]]
        for text in texts:
            click.echo("\n".join(f"  {line}" for line in text.splitlines()))
    return code
