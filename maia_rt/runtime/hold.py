"""Who has a device: a record beside a lock that the kernel lets go of when its holder ends, however it ends.

A second process is told who the holder is instead of waiting, and one that finds the lock free but the record still
there knows that the last holder was killed with the device in its hands.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from maia_rt.errors import DeviceBusy
from maia_rt.transport import fork

_RECORD_BYTES: Final = 4096
_GRACE_SECONDS: Final = 0.5
"""A process that was just killed takes a moment to let go."""


@dataclass(frozen=True)
class Holder:
    """A process that has, or had, a device.

    Attributes
    ----------
    pid : int
    command : str
        Its command line.
    since : float
        When it opened the device, in seconds since the epoch.
    """

    pid: int
    command: str
    since: float

    def __str__(self) -> str:
        whose = "this process" if self.pid == os.getpid() else f"process {self.pid}"
        return f"{whose} ({self.command}), since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.since))}"


class Hold:
    """This process's hold on a device. Made by :func:`take_hold`.

    Attributes
    ----------
    died : Holder or None
        Who had the device last and ended without closing it.
    """

    def __init__(self, path: Path, fd: int, died: Holder | None) -> None:
        self._path = path
        self._fd = fd
        self.died = died
        fork.follow(self)

    def release(self) -> None:
        """Say that the device was left in order, and let others have it; idempotent."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            self._drop()

    def _drop(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _after_fork(self) -> None:
        # Closing lets go of nothing: the lock belongs to the open file, which the parent still has.
        self._drop()

    def __del__(self) -> None:
        # The record stays: nobody closed the device.
        self._drop()


def take_hold(name: str, selector: str) -> Hold | None:
    """Take hold of a device, before it is opened.

    Parameters
    ----------
    name : str
        For error texts.
    selector : str
        A PCI address, or the path of a socket.

    Returns
    -------
    Hold or None
        None where this user has no folder to keep records in, or there is no such socket.

    Raises
    ------
    DeviceBusy
        Another process of this user, or this one, has the device; the text says which.
    """
    path = _record_path(selector)
    if path is None:
        return None
    deadline = time.monotonic() + _GRACE_SECONDS
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _read(fd)
            os.close(fd)
            if (holder is not None and holder.pid == os.getpid()) or time.monotonic() > deadline:
                raise busy(name, holder) from None
            time.sleep(0.02)
            continue
        if os.fstat(fd).st_nlink:
            break
        os.close(fd)        # its last holder removed it between the two calls
    died = _read(fd)
    command = Path("/proc/self/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    row = {"pid": os.getpid(), "command": command[:_RECORD_BYTES // 8], "since": time.time()}
    os.truncate(fd, 0)
    os.pwrite(fd, json.dumps(row).encode(), 0)
    return Hold(path, fd, died)


def holder_of(selector: str) -> Holder | None:
    """Who has a device, as far as this user's records say."""
    path = _record_path(selector)
    if path is None:
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _read(fd)
    finally:
        os.close(fd)
    return None


def busy(name: str, holder: Holder | None) -> DeviceBusy:
    """The refusal that names the holder."""
    return DeviceBusy(f"{name} is in use", cause="somebody else has it open" if holder is None else f"held by {holder}",
                      hint="wait for it or end it; several programs share a device through: maia share")


def _read(fd: int) -> Holder | None:
    try:
        row = json.loads(os.pread(fd, _RECORD_BYTES, 0))
        return Holder(int(row["pid"]), str(row["command"]), float(row["since"]))
    except (ValueError, KeyError, TypeError):
        return None


def _record_path(selector: str) -> Path | None:
    key = selector.replace(":", "-")
    if "/" in selector or os.path.exists(selector):
        try:
            status = os.stat(selector)
        except OSError:
            return None
        key = f"socket-{status.st_dev}-{status.st_ino}"
    folder = _folder()
    return None if folder is None else folder / f"{key}.holder"


def _folder() -> Path | None:
    """The folder of records: this user's, closed to others."""
    given = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(given, "maia") if given else Path(tempfile.gettempdir(), f"maia-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if mine else None
