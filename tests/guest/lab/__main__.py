"""``python -m guest.lab``: build the lab, open a shell in a guest, or run one command in one."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.helpers.emulator import running

from . import cache, debian, kernel, qemu, root
from .guest import Guest


@click.group()
def lab():
    """Guests with a real kernel's VFIO, under QEMU without KVM."""


@lab.command()
def build():
    """Download and build all that guests need, unless it is there."""
    qemu.installed()
    for make in kernel.KERNELS.values():
        root.parts(make(), weights=True)
    click.echo(f"the guest lab is in {cache.folder()}")


def guest_options(command):
    """What both `shell` and `run` take."""
    for option in (
        click.option("--kernel", "kernel_name", type=click.Choice(list(kernel.KERNELS)), default="own",
                     show_default=True, help="Debian's (VFIO groups) or the small one (iommufd and cdev as well)."),
        click.option("--iommu", type=click.Choice(["intel", "virtio", "amd", "none"]), default="intel",
                     show_default=True),
        click.option("--maia", type=int, default=1, show_default=True, help="Emulated MAIA-like devices."),
        click.option("--edu", type=int, default=1, show_default=True, help="QEMU's edu devices."),
        click.option("--nvme/--no-nvme", default=True, show_default=True, help="QEMU's nvme, with a small disk."),
        click.option("--memory", type=int, default=1024, show_default=True, help="MiB."),
        click.option("--weights", is_flag=True, help="Bring the demo's model along."),
        click.option("--qemu", "arguments", multiple=True, help="One more word for QEMU."),
    ):
        command = option(command)
    return command


@contextlib.contextmanager
def guest(kernel_name, iommu, maia, edu, nvme, memory, weights, arguments):
    """A guest that is not yet booted, with what the options ask for; its emulator runs as long."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _, sockets = stack.enter_context(running(devices=maia)) if maia else (None, [])
        machine = qemu.Machine(kernel_name, iommu, sockets, edu, qemu.nvme_image(folder / "nvme") if nvme else None,
                               memory, arguments=list(arguments))
        yield Guest(machine, weights=weights)


@lab.command()
@guest_options
def shell(**options):
    """Open a shell in a guest; `exit` powers it off."""
    with guest(**options) as opened:
        opened.shell()


@lab.command()
@guest_options
@click.option("--timeout", type=float, default=600, show_default=True, help="Seconds.")
@click.argument("command", nargs=-1, required=True)
def run(command, timeout, **options):
    """Run COMMAND, a line of shell, in a guest; its exit code is this one's."""
    with guest(**options) as prepared:
        opened = prepared.boot()
        try:
            done = opened.run(" ".join(command), timeout=timeout, check=False)
        finally:
            errors = opened.stderr()
            opened.close()
    click.echo(done.output, nl=False)
    if errors:
        click.echo(f"QEMU said:\n{errors}", err=True)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    reason = debian.missing()
    if reason is not None:
        raise SystemExit(reason)
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    try:
        lab()
    except debian.LabError as error:
        raise SystemExit(f"guest lab: {error}") from None
