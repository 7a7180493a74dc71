"""Gives PCI functions to userspace and back: bind to vfio-pci, release to the driver that had them.

A plan is made and checked first (:mod:`maia_rt.pci.plan`): :func:`plan_bind` and :func:`plan_release` change nothing.
:func:`bind` and :func:`release` carry it out, all of it or none (:mod:`maia_rt.pci.transaction`). What a function was
before is remembered in :mod:`maia_rt.pci.record`. Any PCI function will do, whatever it is.

Sources: the kernel's Documentation/ABI/testing/sysfs-bus-pci (``driver_override``, ``bind``, ``unbind``,
``drivers_probe``) and Documentation/driver-api/vfio.rst.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from maia_rt.errors import DeviceNotFound, DevicePermission, InvalidArgument
from maia_rt.pci import iommu, record, sysfs
from maia_rt.pci.address import PciAddress
from maia_rt.pci.attribute import Attributes
from maia_rt.pci.host import Host
from maia_rt.pci.plan import Planner
from maia_rt.pci.transaction import Change, Plan, Transaction

VFIO_PCI: Final = "vfio-pci"
TIMEOUT_SECONDS: Final = 30.0
"""The limit for one step: a driver may take a while to start or stop its device."""
LOCK_SECONDS: Final = 10.0
"""How long a bind or release waits for another one to end."""

Addresses = PciAddress | str | Iterable[PciAddress | str]
"""One function or several."""


@dataclass(frozen=True)
class Binding:
    """What became of one function.

    Attributes
    ----------
    address : PciAddress
    changed : bool
        False where everything was as wanted.
    before, driver : str or None
        The driver that had it, and the one that has it now.
    iommu_group : int or None
    nodes : tuple of Path
        What a program opens to drive it: the group's node and, where the kernel has one, its own.
    notes : tuple of str
        What the user should know.
    """

    address: PciAddress
    changed: bool
    before: str | None
    driver: str | None
    iommu_group: int | None
    nodes: tuple[Path, ...]
    notes: tuple[str, ...]


def bind(addresses: Addresses, *, driver: str = VFIO_PCI, group: bool = False, user: str | None = None,
         no_iommu: bool = False, force: bool = False, timeout: float = TIMEOUT_SECONDS,
         host: Host = Host()) -> tuple[Binding, ...]:  # noqa: B008 (frozen)
    """Give functions to a driver for userspace, all of them or none.

    Parameters
    ----------
    addresses : PciAddress or str, or several
    driver : str
        vfio-pci, a vendor's variant of it, or any other driver; it is told to take the function whatever its ids.
    group : bool
        Take every endpoint of the IOMMU groups: VFIO gives a group away whole.
    user : str, optional
        The user who gets the device nodes, by name or number.
    no_iommu : bool
        Go without an IOMMU, where the kernel allows it already: the function can then reach all of the host's memory.
    force : bool
        Take disks that are mounted, interfaces that are up and devices that programs have open.
    timeout : float
        Seconds for each step.
    host : Host

    Returns
    -------
    tuple of Binding
        In bus order.

    Raises
    ------
    InvalidArgument
        No address, a bridge, an unknown driver or user.
    DeviceNotFound
        There is no such function.
    DeviceBusy
        It is in use, or the kernel drives others of its IOMMU group; or another bind is at work.
    DevicePermission
        Binding is root's work.
    Unsupported
        No IOMMU guards the function.
    TransportError, DeviceTimeout
        A step failed. What was there before is back, or the error says what is not.

    Examples
    --------
    >>> print(*plan_bind("0000:00:03.0").steps, sep="\\n")  # doctest: +SKIP
    echo vfio-pci > /sys/bus/pci/devices/0000:00:03.0/driver_override
    echo 0000:00:03.0 > /sys/bus/pci/drivers/nvme/unbind
    echo 0000:00:03.0 > /sys/bus/pci/drivers/vfio-pci/bind
    """
    wanted = _parse(addresses)
    _check_root(host)
    with record.locked(host, LOCK_SECONDS), Attributes(timeout) as attributes:
        plan = Planner(host, attributes).bind(wanted, driver, group=group, user=user, no_iommu=no_iommu, force=force)
        Transaction(host, attributes).run(plan)
    return tuple(_result(change, host) for change in plan.changes)


def release(addresses: Addresses, *, driver: str | None = None, group: bool = False, force: bool = False,
            timeout: float = TIMEOUT_SECONDS, host: Host = Host()) -> tuple[Binding, ...]:  # noqa: B008
    """Give functions back to the drivers that had them, or to whichever the kernel chooses; all of them or none.

    ``driver_override`` is cleared in any case, unless somebody had set it to the driver that gets the function back.

    Parameters
    ----------
    addresses : PciAddress or str, or several
    driver : str, optional
        Another driver than the one remembered; one that knows the function's ids.
    group : bool
        Release every endpoint of the IOMMU groups.
    force : bool
        Take functions from a driver that is not for VFIO even if programs have them open.
    timeout : float
        Seconds for each step.
    host : Host

    Returns
    -------
    tuple of Binding
        In bus order.

    Raises
    ------
    DeviceBusy
        A program has a function of the IOMMU group open.
    InvalidArgument, DeviceNotFound, DevicePermission, TransportError, DeviceTimeout
        As :func:`bind`.
    """
    wanted = _parse(addresses)
    _check_root(host)
    with record.locked(host, LOCK_SECONDS), Attributes(timeout) as attributes:
        plan = Planner(host, attributes).release(wanted, driver, group=group, force=force)
        Transaction(host, attributes).run(plan)
    return tuple(_result(change, host) for change in plan.changes)


def plan_bind(addresses: Addresses, *, driver: str = VFIO_PCI, group: bool = False, user: str | None = None,
              no_iommu: bool = False, force: bool = False, timeout: float = TIMEOUT_SECONDS,
              host: Host = Host()) -> Plan:  # noqa: B008
    """Check what :func:`bind` would do, without doing it. Anybody may; only root sees all open files."""
    with Attributes(timeout) as attributes:
        return Planner(host, attributes).bind(_parse(addresses), driver, group=group, user=user, no_iommu=no_iommu,
                                               force=force)


def plan_release(addresses: Addresses, *, driver: str | None = None, group: bool = False, force: bool = False,
                 timeout: float = TIMEOUT_SECONDS, host: Host = Host()) -> Plan:  # noqa: B008
    """Check what :func:`release` would do, without doing it."""
    with Attributes(timeout) as attributes:
        return Planner(host, attributes).release(_parse(addresses), driver, group=group, force=force)


def vfio_nodes(function: sysfs.Function, host: Host = Host()) -> tuple[Path, ...]:  # noqa: B008
    """List the nodes that a program opens to drive a function, as far as they exist."""
    names = [] if function.iommu_group is None else [str(function.iommu_group), f"noiommu-{function.iommu_group}"]
    paths = [host.dev / "vfio" / name for name in names]
    if function.vfio_cdev is not None:
        paths.append(host.dev / "vfio/devices" / function.vfio_cdev)
    return tuple(path for path in paths if path.exists())


def _result(change: Change, host: Host) -> Binding:
    function = sysfs.read_function(change.address, root=host.pci)
    nodes = vfio_nodes(function, host) if iommu.is_vfio(function.driver) else ()
    return Binding(change.address, change.moves, change.before.driver, function.driver, function.iommu_group, nodes,
                   change.notes)


def _parse(addresses: Addresses) -> list[PciAddress]:
    # A PciAddress is a tuple itself.
    several = [addresses] if isinstance(addresses, (PciAddress, str)) else addresses
    found = sorted({one if isinstance(one, PciAddress) else PciAddress.parse(one) for one in several})
    if not found:
        raise InvalidArgument("no PCI address was given", hint="maia ls shows them")
    return found


def _check_root(host: Host) -> None:
    probe = host.pci / "drivers_probe"
    if not probe.exists():
        raise DeviceNotFound("this machine shows no PCI bus", cause=f"there is no {host.pci}",
                             hint="in a container, run it on the host")
    if not os.access(probe, os.W_OK):
        user = os.geteuid()
        raise DevicePermission("drivers can be bound by root only",
                               cause=f"this is user {user}" if user else "sysfs is read-only here, as in a container",
                               hint="the same with sudo; --dry-run shows the steps to anybody" if user else
                               "run it on the host")
