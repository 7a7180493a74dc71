"""The record of writes: one line of JSON each, appended before the write is made."""

from __future__ import annotations

import json
import os
import pwd
from datetime import datetime, timezone
from pathlib import Path

from maia_rt.errors import DevicePermission


def default_path() -> Path:
    """``$XDG_STATE_HOME/maia-rt/registers.log``, by default in ``~/.local/state``."""
    return state_folder() / "registers.log"


def state_folder() -> Path:
    """Where this tool keeps what outlives it: the record of writes, the shell's history."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base) / "maia-rt"


def user() -> str:
    """Who is at the keyboard: before sudo, where there was one."""
    if name := os.environ.get("SUDO_USER"):
        return name
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def record(path: Path, **facts: object) -> None:
    """Append one line.

    Raises
    ------
    DevicePermission
        It cannot be written; nothing may be written to the device then.
    """
    line = json.dumps({"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "user": user(),
                       "pid": os.getpid(), **facts}) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)
    except OSError as error:
        raise DevicePermission(f"the write was not made: {path} cannot be appended to", cause=error.strerror or "",
                               hint="--audit FILE names another record") from None
