"""Where the lab keeps what it downloads and builds: outside the checkout, each piece made once, by one process."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from pathlib import Path

KEEP_SECONDS = 7 * 24 * 3600
"""Another version of a piece that nobody used for so long is deleted when a new one is made."""


def folder() -> Path:
    """``$MAIA_GUEST_CACHE``, else ``maia-rt/guest`` in the user's cache."""
    path = os.environ.get("MAIA_GUEST_CACHE")
    if not path:
        path = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "maia-rt/guest")
    found = Path(path).absolute()
    found.mkdir(parents=True, exist_ok=True)
    return found


def key(*parts: object) -> str:
    """A name for what was made of `parts`: texts, and files by their content."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def locked(name):
    """One process at a time; the others wait."""
    with open(folder() / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def made(name, version, make) -> Path:
    """The piece `name` of that `version`; where it is not there, ``make(path)`` makes it, all of it or nothing."""
    path = folder() / f"{name}-{version}"
    if not path.exists():
        with locked(name):
            if not path.exists():
                _make(name, path, make)
    os.utime(path)
    return path


def _make(name, path, make):
    started = time.monotonic()
    print(f"guest lab: making {name} ...", flush=True)
    new = path.with_name(f".{path.name}.new")
    remove(new)
    try:
        make(new)
        new.rename(path)
    except BaseException:
        remove(new)
        raise
    print(f"guest lab: made {name} in {time.monotonic() - started:.0f} s", flush=True)
    for old in folder().glob(f"{name}-*"):
        if old != path and time.time() - old.stat().st_mtime > KEEP_SECONDS:
            remove(old)


def remove(path):
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
