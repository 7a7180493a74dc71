"""How a command fails: three lines on stderr (what happened, the likely cause, what to try) and an exit code."""

from __future__ import annotations

import errno
import os

import click

OK, FAILED, USAGE, NO_DEVICE, PERMISSION, FAULT, TIMEOUT, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130

Kinds = tuple[type[BaseException], ...]
Row = tuple[Kinds, int, str, str]


def _table() -> tuple[Row, ...]:
    """Error classes, first match first: exit code, and cause and hint where the error itself has none."""
    from maia_rt import errors

    return (
        ((errors.DeviceNotFound,), NO_DEVICE, "it is not there, not bound to vfio-pci, or nothing serves its socket",
         "maia ls shows the PCI functions, maia info what can be opened"),
        ((errors.DeviceBusy,), NO_DEVICE, "another program drives it", "end that program, or take another device"),
        ((PermissionError,), PERMISSION, "it belongs to another user",
         "the same with sudo, or have it given to you: sudo maia bind ADDRESS --user NAME"),
        ((errors.DeviceFault,), FAULT, "the device refused a command", "reset the device, then try again"),
        ((errors.DeviceLost,), FAULT, "its link is down, its server has ended, or it was unplugged",
         "maia info shows what is there; dmesg may say more"),
        ((errors.DeviceTimeout,), TIMEOUT, "the device or its firmware hangs, or this machine is very busy",
         "once more; if it stays so, reset the device"),
        ((errors.InvalidArgument, errors.InvalidType), USAGE, "the command takes other values",
         "the command with --help lists them"),
        ((errors.MemlockLimit,), FAILED, "the limit on locked memory is low", "ulimit -l unlimited, as root"),
        ((errors.Unsupported,), FAILED, "the device, the kernel or this machine lacks it",
         "maia info shows what a device can do"),
        ((errors.MaiaError,), FAILED, "the device or the kernel refused it", "dmesg may say more; --debug shows where"),
        ((OSError,), FAILED, "the operating system refused it", "maia --debug shows where"),
    )


def exit_code(error: BaseException) -> int:
    """The exit code that stands for an error."""
    code = next((code for kinds, code, _, _ in _table() if isinstance(error, kinds)), FAILED)
    if code == FAILED and isinstance(error, OSError):
        return {errno.EACCES: PERMISSION, errno.EPERM: PERMISSION, errno.EBUSY: NO_DEVICE}.get(error.errno or 0, code)
    return code


def explain(error: BaseException) -> tuple[str, str, str]:
    """What happened, the likely cause, what to try: from the error, else from what its kind usually means."""
    from maia_rt.errors import MaiaError

    cause, hint = next(((cause, hint) for kinds, _, cause, hint in _table() if isinstance(error, kinds)), ("", ""))
    if not cause:
        return (f"{type(error).__name__}: {error}", "a bug in maia_rt",
                "the same with maia --debug in front shows where; please report it")
    if isinstance(error, MaiaError):
        return error.what, error.cause or cause, error.hint or hint
    if isinstance(error, OSError) and error.errno is not None:
        name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{name}{os.strerror(error.errno)}", cause, hint
    return str(error) or type(error).__name__, cause, hint


def explain_usage(error: click.ClickException) -> tuple[str, str, str]:
    """The same for a command line that click refuses."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return error.format_message(), "the command line is not one that maia takes", "maia --help"
    usage = context.command.get_usage(context).removeprefix("Usage: ")
    return error.format_message(), f"the usage is: {usage}", f"{context.command_path} --help"


def print_failure(what: str, cause: str, hint: str) -> None:
    """Print the three parts, each on a line of its own."""
    for label, text in (("maia: ", what), ("  cause: ", cause), ("  try: ", hint)):
        click.echo(label + " ".join(text.split()), err=True)
