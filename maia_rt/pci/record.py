"""What functions were before they were bound, and the lock that lets one bind or release run at a time.

One JSON file a function in a folder that root owns, by default ``/run/maia-rt/binding``: written whole and renamed, so
a reader sees the old one or the new one, and gone with the next boot, when every function is back with its own driver.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from maia_rt.errors import DeviceBusy, DevicePermission
from maia_rt.pci.address import PciAddress
from maia_rt.pci.host import Host
from maia_rt.pci.sysfs import Function

_log = logging.getLogger(__name__)
_LOCK: Final = "lock"
_LOCK_POLL_SECONDS: Final = 0.05
SCHEMA: Final = 1


@dataclass(frozen=True)
class Record:
    """A function before it was bound.

    Attributes
    ----------
    vendor, device : int
        Whose record it is: another card may be in the slot by now.
    driver : str or None
        The driver that had it.
    override : str or None
        What ``driver_override`` was.
    bound_to : str
        The driver that it was given to.
    """

    vendor: int
    device: int
    driver: str | None
    override: str | None
    bound_to: str


def load(function: Function, host: Host) -> Record | None:
    """Read a function's record; None where there is none, or none that can be trusted."""
    path = _path(function.address, host)
    try:
        with path.open(encoding="ascii") as file:
            owner = os.fstat(file.fileno()).st_uid
            data = json.load(file)
        if owner not in (0, os.geteuid()):
            _log.warning("%s belongs to user %d: it is left aside", path, owner)
            return None
        if data.pop("schema") != SCHEMA:
            return None
        found = Record(**data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("%s cannot be read and is left aside: %s", path, error)
        return None
    return found if (found.vendor, found.device) == (function.vendor, function.device) else None


def store(address: PciAddress, record: Record | None, host: Host) -> None:
    """Write a function's record, or take it away."""
    path = _path(address, host)
    if record is None:
        path.unlink(missing_ok=True)
        return
    # The pid is enough: whoever writes holds the lock.
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with fresh.open("w", encoding="ascii") as file:
            json.dump({"schema": SCHEMA, **asdict(record)}, file)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(host: Host, seconds: float) -> Iterator[None]:
    """Hold the lock of all binding on this machine.

    Raises
    ------
    DeviceBusy
        Another process has held it for `seconds`.
    DevicePermission
        The folder may not be made or written.
    """
    try:
        host.state.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = os.open(host.state / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DevicePermission(f"{host.state} cannot be written: {error.strerror}",
                               cause="binding is root's work", hint="sudo maia ...") from error
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
                    raise DeviceBusy("another bind or release is at work",
                                     cause=f"process {holder} holds {host.state / _LOCK}" if holder else
                                     f"somebody holds {host.state / _LOCK}",
                                     hint="try again when it has ended") from None
                time.sleep(_LOCK_POLL_SECONDS)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
        os.ftruncate(lock, 0)
    finally:
        os.close(lock)


def _path(address: PciAddress, host: Host) -> Path:
    return host.state / f"{address}.json"
