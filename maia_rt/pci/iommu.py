"""IOMMU groups: what else is in one, whether it can be given away, and what a machine without an IOMMU lacks.

A group is the smallest set of functions whose DMA the IOMMU can tell from that of others, so VFIO gives it away whole:
while the kernel drives one member, nobody may open another (Documentation/driver-api/vfio.rst).
"""

from __future__ import annotations

import contextlib
from typing import Final

from maia_rt.errors import DeviceLost, DeviceNotFound, Unsupported
from maia_rt.pci import sysfs
from maia_rt.pci.address import PciAddress
from maia_rt.pci.class_code import is_bridge
from maia_rt.pci.host import Host

_NEUTRAL: Final = {"pcieport", "pci-stub"}
"""Drivers that do no DMA of their own: a group stays whole with them in it."""


def is_vfio(driver: str | None) -> bool:
    """Whether a driver gives functions to userspace through VFIO; vendors have variants of vfio-pci."""
    return driver is not None and "vfio" in driver


def members(address: PciAddress, host: Host) -> list[sysfs.Function]:
    """Read the functions of `address`'s group, itself left out, in bus order."""
    found = []
    for other in sysfs.group_members(address, root=host.pci):
        if other != address:
            with contextlib.suppress(DeviceNotFound, DeviceLost):
                found.append(sysfs.read_function(other, root=host.pci))
    return found


def in_the_way(address: PciAddress, host: Host) -> list[sysfs.Function]:
    """Read the other functions of the group that the kernel drives, and that so keep it from userspace."""
    return [one for one in members(address, host)
            if one.driver is not None and one.driver not in _NEUTRAL and not is_vfio(one.driver)
            and not is_bridge(one.class_code)]


def is_no_iommu(function: sysfs.Function, host: Host) -> bool:
    """Whether its group is the stand-in that VFIO makes for a function that no IOMMU guards."""
    if function.iommu_group is None:
        return False
    try:
        name = (host.sys / "kernel/iommu_groups" / str(function.iommu_group) / "name").read_text(encoding="ascii")
    except OSError:
        return False
    return name.strip() == "vfio-noiommu"


def check_no_iommu_mode(address: PciAddress, host: Host) -> None:
    """See that the kernel is allowed to go without an IOMMU; never changes it.

    Raises
    ------
    Unsupported
        It is not, or cannot.
    """
    vfio = host.module("vfio")
    switch = vfio / "parameters/enable_unsafe_noiommu_mode"
    if not vfio.is_dir():
        raise Unsupported(f"{address}: VFIO is not loaded", cause="nothing has needed it yet",
                          hint="modprobe vfio enable_unsafe_noiommu_mode=1, if this function may reach all memory")
    try:
        allowed = switch.read_text(encoding="ascii").strip() == "Y"
    except OSError:
        raise Unsupported(f"{address}: this kernel has no no-IOMMU mode",
                          cause="it was built without CONFIG_VFIO_NOIOMMU",
                          hint=f"turn the IOMMU on: {_switch_on(host)}") from None
    if not allowed:
        raise Unsupported(f"{address}: the kernel's no-IOMMU mode is off",
                          cause="with it a function can reach all of the host's memory, so only you can allow it",
                          hint=f"if that may be: echo 1 > {switch}")


def absent(address: PciAddress, host: Host) -> Unsupported:
    """Explain that no IOMMU guards a function."""
    try:
        anywhere = any((host.sys / "kernel/iommu_groups").iterdir())
    except OSError:
        anywhere = False
    if anywhere:
        return Unsupported(f"{address}: no IOMMU guards this function, though this machine has one",
                           cause="it is part of the platform, or the IOMMU leaves its bus out",
                           hint="maia ls shows the functions that have a group")
    return Unsupported(f"{address}: this machine has no IOMMU that is on, so no function can be given away safely",
                       cause="it is off in the firmware (VT-d, AMD-Vi, SMMU) or on the kernel's command line",
                       hint=f"turn it on: {_switch_on(host)}, then reboot; "
                            "or, for a function you trust with all memory, --no-iommu")


def _switch_on(host: Host) -> str:
    """Say how, for this machine's maker."""
    try:
        text = (host.proc / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    if "GenuineIntel" in text:
        return "intel_iommu=on on the kernel's command line, VT-d in the firmware"
    if "AuthenticAMD" in text:
        return "amd_iommu=on on the kernel's command line, IOMMU in the firmware"
    return "intel_iommu=on or amd_iommu=on on the kernel's command line, VT-d or AMD-Vi in the firmware"
