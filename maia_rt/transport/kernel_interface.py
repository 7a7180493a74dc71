"""Which of the kernel's interfaces a function is opened through: by what the host has and this user may use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from maia_rt.errors import DeviceBusy, DeviceNotFound, InvalidArgument, Unsupported
from maia_rt.pci import sysfs
from maia_rt.pci.address import PciAddress
from maia_rt.pci.iommu import is_vfio
from maia_rt.transport.kernel_group import GroupIommu
from maia_rt.transport.kernel_iommu import LOAD, TURN_ON, Iommu
from maia_rt.transport.kernel_iommufd import IommufdIommu

Interface = Literal["group", "cdev"]
"""A group in a container, or a function's own character device in an iommufd."""


def open_iommu(address: PciAddress, *, interface: Interface | None, no_iommu: bool, dev: Path, root: Path) -> Iommu:
    """Open a function by the interface asked for, or by the one that the host has and this user may use.

    Raises
    ------
    DeviceNotFound, DeviceBusy, DevicePermission, Unsupported, TransportError
        See :meth:`maia_rt.transport.kernel.KernelDevice.open`.
    """
    if interface is not None and interface not in get_args(Interface):
        raise InvalidArgument(f"{address}: {interface!r} is not an interface of VFIO", hint="use 'group' or 'cdev'")
    if interface == "cdev" and no_iommu:
        raise InvalidArgument(f"{address}: the cdev interface needs an IOMMU", hint="leave `interface` out")
    function = _bound(address, no_iommu=no_iommu, dev=dev, root=root)
    # A kernel without the interface names the device in sysfs all the same.
    cdev = dev / "vfio/devices" / function.vfio_cdev if function.vfio_cdev is not None else None
    cdev = cdev if cdev is not None and cdev.exists() else None
    group = dev / "vfio" / str(function.iommu_group)
    unguarded = dev / "vfio" / f"noiommu-{function.iommu_group}"
    if no_iommu:
        if not unguarded.exists() and (group.exists() or cdev is not None):
            raise InvalidArgument(f"{address}: an IOMMU guards the function, so it cannot be opened without one",
                                  hint="leave `no_iommu` out")
        return GroupIommu(address, function.iommu_group, unguarded, dev=dev, root=root)
    if unguarded.exists() and not group.exists():
        raise Unsupported(f"{address}: no IOMMU protects the host from this function",
                          cause="it was bound in the kernel's no-IOMMU mode, where it reaches all of the host's memory",
                          hint=f"{TURN_ON}; or, where the device may have all memory, pass no_iommu=True")
    if interface == "cdev" and cdev is None:
        raise Unsupported(f"{address}: the kernel has no character device for the function",
                          cause="it is older than Linux 6.6, or was built without CONFIG_VFIO_DEVICE_CDEV",
                          hint="leave `interface` out, or use 'group'")
    if interface is None:
        interface = _choose(cdev, group, dev)
    if interface == "cdev" and cdev is not None:
        return IommufdIommu(address, cdev, dev=dev, root=root)
    return GroupIommu(address, function.iommu_group, group, dev=dev, root=root)


def _bound(address: PciAddress, *, no_iommu: bool, dev: Path, root: Path) -> sysfs.Function:
    """Read what sysfs says about the function; raise unless a driver of VFIO has it."""
    function = sysfs.read_function(address, root=root)
    if not (dev / "vfio").exists():
        raise DeviceNotFound(f"{address}: the host has no VFIO: there is no {dev / 'vfio'}", hint=LOAD)
    if function.driver is not None and not is_vfio(function.driver):
        raise DeviceBusy(f"{address}: the kernel drives the function with {function.driver}",
                         cause="it was not bound to vfio-pci", hint=f"maia bind {address}")
    if function.iommu_group is None and not no_iommu:
        raise Unsupported(f"{address}: no IOMMU protects the host from this function",
                          cause="it is off, or the machine has none", hint=TURN_ON)
    if function.driver is None:
        raise DeviceNotFound(f"{address}: no driver holds the function", cause="it was not bound to vfio-pci",
                             hint=f"bind it to vfio-pci: maia bind {address}")
    return function


def _choose(cdev: Path | None, group: Path, dev: Path) -> Interface:
    # The newer interface where the host has both its ends, unless this user may use the older one only.
    if cdev is None or not (dev / "iommu").exists():
        return "group" if cdev is None or group.exists() else "cdev"
    return "group" if _may_use(group) and not (_may_use(cdev) and _may_use(dev / "iommu")) else "cdev"


def _may_use(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK, effective_ids=True)
