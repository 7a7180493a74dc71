"""Plans what to do with PCI functions, and refuses what cannot or should not be done; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from maia_rt.errors import DeviceBusy, InvalidArgument
from maia_rt.pci import iommu, record, sysfs, usage
from maia_rt.pci.address import PciAddress
from maia_rt.pci.attribute import Attributes
from maia_rt.pci.class_code import class_name, is_endpoint
from maia_rt.pci.host import Host
from maia_rt.pci.transaction import Action, Change, Plan, State, Step, Transaction

_FOR_USERSPACE: Final = {"uio_pci_generic", "igb_uio", "pci-stub"}


class Planner:
    """Looks at functions, and refuses or lists the steps."""

    def __init__(self, host: Host, attributes: Attributes) -> None:
        self._host = host
        self._state = Transaction(host, attributes)
        self._nodes: usage.OpenNodes | None = None
        self._opened_iommufd = False

    # --- bind --------------------------------------------------------------------------------------------------------

    def bind(self, addresses: Sequence[PciAddress], driver: str, *, group: bool, user: str | None, no_iommu: bool,
             force: bool) -> Plan:
        """Plan what :func:`maia_rt.pci.binding.bind` does, which describes parameters and errors."""
        _check_name(driver)
        user = _known_user(user)
        vfio = iommu.is_vfio(driver)
        functions = self._read(addresses, group=group)
        changes = []
        for function in functions:
            notes: list[str] = []
            if not is_endpoint(function.class_code):
                raise InvalidArgument(f"{function.address}: a function of class {class_name(function.class_code)} "
                                      "is not for userspace", cause="the kernel drives other devices through it",
                                      hint="maia ls shows what can be bound")
            if vfio:
                notes += self._check_iommu(function, no_iommu=no_iommu)
                self._check_group(function, functions)
                if user is not None:
                    notes.append(f"memory that {user} maps for DMA counts against RLIMIT_MEMLOCK: raise it, as with "
                                 f"'{user} - memlock unlimited' in /etc/security/limits.d")
            changes.append(replace(self._bind_one(function, driver, user, force=force), notes=tuple(notes)))
        return Plan(self._modules(driver, vfio=vfio) if any(c.moves for c in changes) else (), tuple(changes))

    def _check_iommu(self, function: sysfs.Function, *, no_iommu: bool) -> list[str]:
        unguarded = function.iommu_group is None or iommu.is_no_iommu(function, self._host)
        if not unguarded:
            return [f"{function.address} has an IOMMU, so --no-iommu changes nothing"] if no_iommu else []
        if not no_iommu:
            raise iommu.absent(function.address, self._host)
        iommu.check_no_iommu_mode(function.address, self._host)
        return [f"WARNING: no IOMMU guards the host from {function.address}: whoever drives it can read and write "
                "all memory"]

    def _check_group(self, function: sysfs.Function, functions: Sequence[sysfs.Function]) -> None:
        taken = {one.address for one in functions}
        others = [one for one in iommu.in_the_way(function.address, self._host) if one.address not in taken]
        if others:
            movable = all(is_endpoint(one.class_code) for one in others)
            raise DeviceBusy(f"{function.address}: IOMMU group {function.iommu_group} cannot be given away",
                             cause=f"the kernel drives others of the group: {_named(others)}",
                             hint="bind the whole group with --group" if movable else
                             "move the card to a slot that has a group of its own")

    def _bind_one(self, function: sysfs.Function, driver: str, user: str | None, *, force: bool) -> Change:
        address = function.address
        before = State(function.driver, self._state.override(address))
        known = record.load(function, self._host)
        nodes = self._node_steps(function, user) if user is not None and iommu.is_vfio(driver) else []
        if before.driver == driver:
            return Change(address, before, tuple(nodes), known, known)
        if _has_virtual_functions(address, self._host):
            raise DeviceBusy(f"{address}: a function with virtual functions enabled stays with its driver",
                             cause="vfio-pci refuses it, since they would share the device",
                             hint=f"bind a virtual function, or echo 0 > {self._path(address)}/sriov_numvfs")
        self._check_unused(function, taken_by_vfio=iommu.is_vfio(driver), force=force)
        # Of a function that goes from one driver for userspace to another, what it was before both counts.
        first = known if known is not None and before.driver == known.bound_to else None
        remembered = record.Record(function.vendor, function.device, first.driver if first else before.driver,
                                   first.override if first else before.override, driver)
        return Change(address, before, (
            *self._override_steps(address, before.override, driver),
            *self._unbind_steps(address, before.driver),
            self._step(Action.BIND, self._host.pci / "drivers" / driver / "bind", address),
            *nodes,
        ), known, remembered)

    def _node_steps(self, function: sysfs.Function, user: str) -> list[Step]:
        # Numbers that only the bind will give stand as the shell would ask for them.
        address, path, folder = function.address, self._path(function.address), self._host.dev / "vfio"
        group = f"{folder}/{function.iommu_group}"
        if function.iommu_group is None:
            group = f"{folder}/noiommu-$(basename $(readlink {path}/iommu_group))"
        elif iommu.is_no_iommu(function, self._host):
            group = f"{folder}/noiommu-{function.iommu_group}"
        steps = [Step(Action.CHOWN, group, user, address)]
        iommufd = self._host.dev / "iommu"
        if iommufd.exists() and function.iommu_group is not None:
            steps.append(Step(Action.CHOWN, f"{folder}/devices/$(ls {path}/vfio-dev)", user, address))
            if iommufd.stat().st_mode & 0o006 != 0o006 and not self._opened_iommufd:
                # As /dev/vfio/vfio is from the start: it gives no device away, and the function's own node needs it.
                self._opened_iommufd = True
                steps.append(Step(Action.CHMOD, str(iommufd), "0666", address))
        return steps

    def _modules(self, driver: str, *, vfio: bool) -> tuple[Step, ...]:
        steps = []
        if not (self._host.pci / "drivers" / driver).is_dir():
            steps.append(Step(Action.MODPROBE, driver))
        if vfio and not self._host.module("vfio_iommu_type1").is_dir() and not (self._host.dev / "iommu").exists():
            steps.append(Step(Action.MODPROBE, "vfio_iommu_type1"))
        return tuple(steps)

    # --- release -----------------------------------------------------------------------------------------------------

    def release(self, addresses: Sequence[PciAddress], driver: str | None, *, group: bool, force: bool) -> Plan:
        """Plan what :func:`maia_rt.pci.binding.release` does."""
        if driver is not None:
            _check_name(driver)
        changes = tuple(self._release_one(function, driver, force=force)
                        for function in self._read(addresses, group=group))
        modules: tuple[Step, ...] = ()
        if driver is not None and any(c.steps for c in changes) and not (self._host.pci / "drivers" / driver).is_dir():
            modules = (Step(Action.MODPROBE, driver),)
        return Plan(modules, changes)

    def _release_one(self, function: sysfs.Function, driver: str | None, *, force: bool) -> Change:
        address = function.address
        before = State(function.driver, self._state.override(address))
        known = record.load(function, self._host)
        given = before.driver is not None and (
            iommu.is_vfio(before.driver) or before.driver in _FOR_USERSPACE
            or (known is not None and before.driver == known.bound_to))
        if before.driver is not None and not given:
            if driver not in (None, before.driver):
                raise InvalidArgument(f"{address}: the function is with {before.driver}, which is no driver for "
                                      "userspace, so there is nothing to release",
                                      hint=f"maia bind {address} --driver {driver}")
            left = before.override not in (None, before.driver)
            return Change(address, before, self._override_steps(address, before.override, None) if left else (),
                          known, None)
        if before.driver is not None and before.driver == driver:
            return Change(address, before, (), known, known)
        if before.driver is None and before.override is None and known is None and driver is None:
            return Change(address, before, (), None, None)
        self._check_unused(function, taken_by_vfio=False, force=force)
        target, override = driver, None
        notes: tuple[str, ...] = ()
        if driver is None and known is not None:
            target = known.driver
            override = known.override if known.override == target else None
            if target is not None and not (self._host.pci / "drivers" / target).is_dir():
                notes = (f"{address} was with {target}, which is not loaded: the kernel chooses",)
                target = override = None
        last = (self._step(Action.PROBE, self._host.pci / "drivers_probe", address) if target is None else
                self._step(Action.BIND, self._host.pci / "drivers" / target / "bind", address))
        return Change(address, before, (
            *self._override_steps(address, before.override, override),
            *self._unbind_steps(address, before.driver),
            last,
        ), known, None, notes)

    # --- both --------------------------------------------------------------------------------------------------------

    def _read(self, addresses: Sequence[PciAddress], *, group: bool) -> list[sysfs.Function]:
        found = {address: sysfs.read_function(address, root=self._host.pci) for address in addresses}
        if group:
            for address in addresses:
                found.update((one.address, one) for one in iommu.members(address, self._host)
                             if is_endpoint(one.class_code))
        return [found[address] for address in sorted(found)]

    def _check_unused(self, function: sysfs.Function, *, taken_by_vfio: bool, force: bool) -> None:
        """Refuse what is in use. A group that userspace has open can take another member, and give none away."""
        if self._nodes is None:
            self._nodes = usage.open_nodes(self._host)
        address = function.address
        if not taken_by_vfio or iommu.is_vfio(function.driver):
            blocking = usage.vfio_uses(address, self._host, self._nodes)
            if blocking:
                pids = " ".join(str(one.pid) for one in blocking if one.pid is not None)
                raise DeviceBusy(f"{address}: the function cannot change its driver: its IOMMU group is in use",
                                 cause="; ".join(dict.fromkeys(one.text for one in blocking)),
                                 hint=f"end it (kill {pids}), then try again" if pids else
                                 "end the program that drives it, then try again")
        if function.driver is None or iommu.is_vfio(function.driver) or force:
            return
        used = usage.kernel_uses(address, self._host, self._nodes)
        if used:
            raise DeviceBusy(f"{address}: the function is in use through {function.driver}",
                             cause="; ".join(dict.fromkeys(one.text for one in used)),
                             hint="unmount, set down or end it first; or take it away all the same with --force")

    def _path(self, address: PciAddress) -> Path:
        return sysfs.directory(address, root=self._host.pci)

    @staticmethod
    def _step(action: Action, path: Path, address: PciAddress) -> Step:
        return Step(action, str(path), str(address), address)

    def _override_steps(self, address: PciAddress, now: str | None, wanted: str | None) -> tuple[Step, ...]:
        if now == wanted:
            return ()
        return (Step(Action.OVERRIDE, str(self._path(address) / "driver_override"), wanted or "", address),)

    def _unbind_steps(self, address: PciAddress, driver: str | None) -> tuple[Step, ...]:
        if driver is None:
            return ()
        return (self._step(Action.UNBIND, self._host.pci / "drivers" / driver / "unbind", address),)


def obstacle(function: sysfs.Function, host: Host = Host(),  # noqa: B008
             nodes: usage.OpenNodes | None = None) -> str | None:
    """Say in a few words why a function cannot be bound to vfio-pci now, None where it can (or is).

    Parameters
    ----------
    function : Function
    host : Host
    nodes : OpenNodes, optional
        From :func:`maia_rt.pci.usage.open_nodes`, where several functions are asked about.
    """
    if not is_endpoint(function.class_code):
        return f"{class_name(function.class_code)}: stays with the kernel"
    others = iommu.in_the_way(function.address, host)
    if others:
        return f"the kernel drives others of group {function.iommu_group}: {_named(others)}"
    if iommu.is_vfio(function.driver):
        return None
    if function.iommu_group is None:
        return "no IOMMU group"
    if _has_virtual_functions(function.address, host):
        return "its virtual functions are enabled"
    used = usage.kernel_uses(function.address, host, nodes) if function.driver else []
    return f"in use: {used[0].text}" if used else None


def _check_name(driver: str) -> None:
    if not driver or "/" in driver or driver.startswith((".", "-")) or any(c.isspace() for c in driver):
        raise InvalidArgument(f"{driver!r} is no name of a driver", hint="ls /sys/bus/pci/drivers")


def _known_user(user: str | None) -> str | None:
    if user is None or user.isdecimal():
        return user
    import pwd

    try:
        pwd.getpwnam(user)
    except KeyError:
        raise InvalidArgument(f"there is no user {user!r}", hint="getent passwd lists them") from None
    return user


def _has_virtual_functions(address: PciAddress, host: Host) -> bool:
    # Not sriov_numvfs: to read it takes the device's lock.
    return (sysfs.directory(address, root=host.pci) / "virtfn0").exists()


def _named(functions: Iterable[sysfs.Function]) -> str:
    return ", ".join(f"{one.address} ({class_name(one.class_code)}, {one.driver or 'no driver'})" for one in functions)
