"""Calling the kernel's VFIO: opening its nodes and issuing its ioctls, refusals as typed errors."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path

from maia_rt.errors import (
    DeviceBusy,
    DeviceLost,
    DeviceNotFound,
    DevicePermission,
    MaiaError,
    MemlockLimit,
    TransportError,
)


def open_node(path: Path, name: str, *, hint: str) -> int:
    """Open a device node close-on-exec; `name` is the device for error texts, `hint` what to do where it is missing."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTDIR):
            raise DeviceNotFound(f"{name}: there is no {path}", hint=hint) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise DevicePermission(f"{name}: {path} may not be opened: {error.strerror}",
                                   hint="give this user access to the node, for example by a udev rule") from None
        if error.errno == errno.EBUSY:
            raise DeviceBusy(f"{name}: {path} is in use", cause="another process drives the device",
                             hint=f"find it with: fuser -v {path}") from None
        raise TransportError(f"{name}: {path} cannot be opened: {error.strerror}", errno=error.errno or 0) from None


def call(fd: int, request: int, argument: int | bytearray | ctypes.Structure, what: str) -> int:
    """Issue one ioctl; a buffer is changed in place.

    Raises
    ------
    DeviceLost, DeviceBusy, MemlockLimit, TransportError
        The kernel refused; `what`, which names the device and the request, begins the text.
    """
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise refusal(error, what) from None


def refusal(error: OSError, what: str) -> MaiaError:
    """Return the typed error for the kernel's `error`."""
    code = error.errno or errno.EIO
    if code == errno.ENODEV:
        return DeviceLost(f"{what}: the device is gone", cause="it was unplugged or taken from vfio-pci")
    if code == errno.EBUSY:
        return DeviceBusy(f"{what}: busy", cause="another process or driver uses the device or its IOMMU group")
    if code == errno.ENOMEM:
        return MemlockLimit(f"{what}: no memory", cause="RLIMIT_MEMLOCK or the host's memory is used up",
                            hint="raise ulimit -l")
    return TransportError(f"{what}: {os.strerror(code)}", errno=code)
