"""The host's limits on pinned memory, checked before the kernel refuses."""

from __future__ import annotations

import resource
from pathlib import Path

from maia_rt.errors import MemlockLimit

_CAP_IPC_LOCK = 14


def check_memlock(size: int) -> None:
    """Raise unless `size` more bytes may be pinned on this process's account.

    The kernel's VFIO charges mapped memory to RLIMIT_MEMLOCK: type1 as locked (VmLck), iommufd as pinned (VmPin).
    CAP_IPC_LOCK lifts the limit.

    Raises
    ------
    MemlockLimit
        With the figures.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    if int(status["CapEff"], 16) >> _CAP_IPC_LOCK & 1:
        return
    used = sum(int(status.get(key, "0").split()[0]) for key in ("VmLck", "VmPin")) * 1024
    if used + size > soft:
        hint = "ulimit -l " + ("unlimited" if hard == resource.RLIM_INFINITY else str(hard // 1024))
        if hard == soft:
            hint = "raise memlock in /etc/security/limits.conf, or LimitMEMLOCK= in the systemd unit"
        raise MemlockLimit(f"{size} bytes cannot be pinned: RLIMIT_MEMLOCK is {soft} bytes, {used} are in use",
                           hint=hint)
