"""Carries out what was planned for PCI functions: all of it, or none, with the previous drivers back in place."""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from maia_rt.errors import DeviceLost, DeviceTimeout, InvalidArgument, MaiaError, TransportError
from maia_rt.pci import record, sysfs
from maia_rt.pci.address import PciAddress
from maia_rt.pci.attribute import Attributes
from maia_rt.pci.host import Host

_log = logging.getLogger(__name__)

NO_OVERRIDE: Final = "(null)"
"""What ``driver_override`` reads as when it is not set."""
_SETTLE_SECONDS: Final = 2.0
_BIND_CAUSES: Final = {
    errno.ENODEV: "the driver does not know this device, or did not find what it expects of it",
    errno.EINVAL: "the function has no IOMMU group that VFIO can use",
    errno.EBUSY: "a program has a function of its IOMMU group open, or its virtual functions are enabled",
    errno.EAGAIN: "the driver waits for another one that is not loaded",
}


class Action(enum.Enum):
    """What a step does."""

    MODPROBE = "modprobe"
    OVERRIDE = "override"
    UNBIND = "unbind"
    BIND = "bind"
    PROBE = "probe"
    CHOWN = "chown"
    CHMOD = "chmod"


@dataclass(frozen=True)
class Step:
    """One change. ``str(step)`` is the line of shell that does the same.

    Attributes
    ----------
    action : Action
    target : str
        The file that is written or given away; a module's name.
    value : str
        What is written, or who gets it.
    address : PciAddress or None
        The function that it is done for.
    """

    action: Action
    target: str
    value: str = ""
    address: PciAddress | None = None

    def __str__(self) -> str:
        if self.action is Action.MODPROBE:
            return f"modprobe {self.target}"
        if self.action in (Action.CHOWN, Action.CHMOD):
            return f"{self.action.value} {self.value} {self.target}"
        return f"echo {shlex.quote(self.value) if self.value else ''}".rstrip() + f" > {self.target}"


@dataclass(frozen=True)
class State:
    """A function's driver and its ``driver_override``, None where there is none."""

    driver: str | None
    override: str | None

    def __str__(self) -> str:
        override = "" if self.override is None else f", driver_override {self.override}"
        return f"{f'driver {self.driver}' if self.driver else 'no driver'}{override}"


@dataclass(frozen=True)
class Change:
    """What happens to one function.

    Attributes
    ----------
    address : PciAddress
    before : State
    steps : tuple of Step
        Empty where everything is as wanted.
    recorded, record : Record or None
        What is remembered of it before and after.
    notes : tuple of str
        What the user should know.
    """

    address: PciAddress
    before: State
    steps: tuple[Step, ...]
    recorded: record.Record | None
    record: record.Record | None
    notes: tuple[str, ...] = ()

    @property
    def moves(self) -> bool:
        """Whether the driver or ``driver_override`` changes."""
        return any(step.action not in (Action.CHOWN, Action.CHMOD) for step in self.steps)


@dataclass(frozen=True)
class Plan:
    """Every step of a bind or release, checked and not yet done.

    Attributes
    ----------
    modules : tuple of Step
        Done first and left in place whatever follows.
    changes : tuple of Change
        One a function.
    """

    modules: tuple[Step, ...]
    changes: tuple[Change, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps in their order."""
        return self.modules + tuple(step for change in self.changes for step in change.steps)


class Transaction:
    """Carries out one plan.

    Parameters
    ----------
    host : Host
    attributes : Attributes
        Its time limit holds for each step.
    """

    def __init__(self, host: Host, attributes: Attributes) -> None:
        self._host = host
        self._attributes = attributes
        self._given: list[tuple[Path, os.stat_result]] = []

    def run(self, plan: Plan) -> None:
        """Do every step, or put back what was there before and say so in the error.

        Raises
        ------
        InvalidArgument
            A driver does not exist.
        TransportError
            The kernel refused a step; ``errno`` says why.
        DeviceTimeout
            A step took too long. The kernel may still finish it.
        """
        touched: list[Change] = []
        try:
            for step in plan.modules:
                self._modprobe(step.target)
            for change in plan.changes:
                touched.append(change)
                if change.record is not None:
                    # First of all, so that a release finds it however this ends.
                    record.store(change.address, change.record, self._host)
                for step in change.steps:
                    self._do(step)
        except BaseException as error:
            outcome = self._put_back(touched, error)
            if isinstance(error, MaiaError) and outcome:
                raise _told(error, outcome) from error
            if outcome:
                _log.warning("%s", outcome)
            raise
        for change in plan.changes:
            if change.record is None:
                record.store(change.address, None, self._host)

    # --- steps -------------------------------------------------------------------------------------------------------

    def _do(self, step: Step) -> None:
        path, address = Path(step.target), step.address
        if step.action is Action.CHOWN:
            for node in self._nodes_of(step):
                self._given.append((node, node.stat()))
                os.chown(node, _user_id(step.value), -1)
        elif step.action is Action.CHMOD:
            self._given.append((path, path.stat()))
            path.chmod(int(step.value, 8))
        elif address is not None:
            if step.action is Action.OVERRIDE:
                self._override(address, step.value or None)
            elif step.action is Action.UNBIND:
                self._unbind(address, path)
            elif step.action is Action.BIND:
                self._bind(address, path.parent.name)
            else:
                self._attributes.write(path, step.value)

    def _nodes_of(self, step: Step) -> list[Path]:
        """Find the node that a step gives away, waiting a moment for a new one; a kernel may have no cdev nodes."""
        path, number, _ = step.target.partition("$(")
        if number and step.address is not None:
            function = sysfs.read_function(step.address, root=self._host.pci)
            if path.endswith("/devices/"):
                nodes = [] if function.vfio_cdev is None else [Path(path + function.vfio_cdev)]
                return [node for node in nodes if node.exists()]
            path += str(function.iommu_group)
        deadline = time.monotonic() + _SETTLE_SECONDS
        while not os.path.exists(path):
            if time.monotonic() > deadline:
                raise TransportError(f"there is no {path} after the bind", errno=errno.ENOENT,
                                     cause="neither devtmpfs nor udev keeps /dev here")
            time.sleep(0.02)
        return [Path(path)]

    def _modprobe(self, module: str) -> None:
        search = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
        program = shutil.which("modprobe", path=search)
        said = "there is no modprobe on this machine"
        if program is not None:
            try:
                done = subprocess.run([program, module], capture_output=True, text=True, errors="replace",
                                      timeout=self._attributes.seconds, check=False, stdin=subprocess.DEVNULL)
            except subprocess.TimeoutExpired:
                raise DeviceTimeout(f"modprobe {module} has not ended within {self._attributes.seconds:g} s",
                                    hint="dmesg may say what the module waits for") from None
            said = " ".join(done.stderr.split()) or f"modprobe ended with {done.returncode}"
            if done.returncode == 0:
                return
        raise InvalidArgument(f"there is no kernel driver {module}", cause=said,
                              hint=f"ls {self._host.pci / 'drivers'} shows the drivers that are there")

    def _override(self, address: PciAddress, value: str | None) -> None:
        path = sysfs.directory(address, root=self._host.pci) / "driver_override"
        self._attributes.write(path, value or "")
        if self.override(address) != value:
            raise TransportError(f"{address}: driver_override is not {value or 'clear'} after it was written",
                                 errno=errno.EIO, hint="another program may bind drivers at the same time")

    def _unbind(self, address: PciAddress, path: Path) -> None:
        try:
            self._attributes.write(path, str(address))
        except TransportError as error:
            if error.errno == errno.ENODEV and self.driver(address) is None:
                return  # somebody was faster
            raise
        self._settle(address, None)

    def _bind(self, address: PciAddress, driver: str) -> None:
        path = self._host.pci / "drivers" / driver / "bind"
        try:
            self._attributes.write(path, str(address))
        except TransportError as error:
            if self.driver(address) == driver:
                return  # it was bound when the driver was loaded
            number = error.errno or errno.EIO
            raise TransportError(f"{address}: the driver {driver} does not take the function: {os.strerror(number)}",
                                 errno=number, cause=_BIND_CAUSES.get(number, ""), hint="dmesg may say more") from error
        self._settle(address, driver)

    def _settle(self, address: PciAddress, driver: str | None) -> None:
        deadline = time.monotonic() + _SETTLE_SECONDS
        while self.driver(address) != driver:
            if time.monotonic() > deadline:
                now = self.driver(address)
                raise TransportError(f"{address}: the function has {f'driver {now}' if now else 'no driver'}, "
                                     f"not {driver or 'none'}, though the kernel refused nothing", errno=errno.EIO,
                                     cause="another program binds drivers at the same time", hint="dmesg may say more")
            time.sleep(0.02)

    # --- state -------------------------------------------------------------------------------------------------------

    def driver(self, address: PciAddress) -> str | None:
        """Name the driver that has the function now."""
        return sysfs.driver(address, root=self._host.pci)

    def override(self, address: PciAddress) -> str | None:
        """Read ``driver_override``."""
        text = self._attributes.read(sysfs.directory(address, root=self._host.pci) / "driver_override").strip()
        return None if text in ("", NO_OVERRIDE) else text

    # --- the way back ------------------------------------------------------------------------------------------------

    def _put_back(self, touched: Sequence[Change], error: BaseException) -> str:
        """Put every touched function back; return what became of them."""
        for node, was in reversed(self._given):
            with contextlib.suppress(OSError):
                os.chown(node, was.st_uid, was.st_gid)
                node.chmod(was.st_mode & 0o7777)
        told = []
        for change in reversed(touched):
            if isinstance(error, DeviceTimeout) and change is touched[-1]:
                # The kernel still holds the function's lock. The record stays, for a release to finish the work.
                told.append(f"{change.address} is still in the kernel's hands: run maia release {change.address} "
                            "when it has let go")
                continue
            try:
                self._restore(change)
            except (MaiaError, OSError) as failure:
                what = failure.what if isinstance(failure, MaiaError) else str(failure)
                told.append(f"{change.address} could NOT be put back to {change.before}: {what}")
            else:
                told.append(f"{change.address} is as before: {change.before}")
                with contextlib.suppress(OSError):
                    record.store(change.address, change.recorded, self._host)
        return "; ".join(told)

    def _restore(self, change: Change) -> None:
        address, before = change.address, change.before
        now = self.driver(address)
        if now != before.driver:
            if now is not None:
                self._unbind(address, self._host.pci / "drivers" / now / "unbind")
            if before.driver is not None:
                # Set for the moment: what had bound the function before may not match any more.
                self._override(address, before.driver)
                self._bind(address, before.driver)
        if self.override(address) != before.override:
            self._override(address, before.override)


def _user_id(value: str) -> int:
    import pwd

    try:
        return pwd.getpwnam(value).pw_uid
    except KeyError:
        return int(value)


def _told(error: MaiaError, outcome: str) -> MaiaError:
    """Return the same error with what became of the functions."""
    what = f"{error.what} ({outcome})"
    if isinstance(error, TransportError):
        return TransportError(what, errno=error.errno or 0, cause=error.cause, hint=error.hint)
    if isinstance(error, (DeviceTimeout, DeviceLost, InvalidArgument)):
        return type(error)(what, cause=error.cause, hint=error.hint)
    return MaiaError(what, cause=error.cause, hint=error.hint)
