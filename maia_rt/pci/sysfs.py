"""What Linux says about PCI functions under ``/sys/bus/pci``.

Every function takes the root as a parameter: a copy of the tree (a bug report, another machine's) reads the same way.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from maia_rt.errors import DeviceLost, DeviceNotFound
from maia_rt.pci.address import PciAddress

ROOT: Final = Path("/sys/bus/pci")


@dataclass(frozen=True)
class Resource:
    """One line of ``resource``: a BAR (index 0-5), the ROM (6) or a bridge window.

    Attributes
    ----------
    start, size : int
        Bus address and bytes.
    flags : int
        The kernel's IORESOURCE bits (``linux/ioport.h``).
    """

    index: int
    start: int
    size: int
    flags: int

    @property
    def is_memory(self) -> bool:
        """Whether it is memory space rather than I/O ports."""
        return bool(self.flags & 0x200)

    @property
    def is_prefetchable(self) -> bool:
        """Whether reads have no side effects."""
        return bool(self.flags & 0x2000)

    @property
    def is_64bit(self) -> bool:
        """Whether the BAR takes two registers."""
        return bool(self.flags & 0x100000)


@dataclass(frozen=True)
class Function:
    """One PCI function as the kernel knows it.

    Attributes
    ----------
    driver : str or None
        The kernel driver bound to it.
    iommu_group : int or None
        None where no IOMMU protects it.
    numa_node : int or None
    vfio_cdev : str or None
        The name under ``/dev/vfio/devices``, where the kernel has one for it.
    """

    address: PciAddress
    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    class_code: int
    revision: int
    driver: str | None
    iommu_group: int | None
    numa_node: int | None
    vfio_cdev: str | None
    resources: tuple[Resource, ...]


def functions(*, vendor: int | None = None, device: int | None = None, class_code: int | None = None,
              root: Path = ROOT) -> list[Function]:
    """List the machine's functions in bus order.

    Parameters
    ----------
    vendor, device, class_code : int, optional
        Only functions with these ids; `class_code` has 24 bits.
    root : Path

    Returns
    -------
    list of Function
        Empty on a machine without PCI. A function that is unplugged during the walk is left out.
    """
    try:
        names = os.listdir(root / "devices")
    except FileNotFoundError:
        return []
    found = []
    for address in sorted(PciAddress.parse(name) for name in names):
        try:
            function = read_function(address, root=root)
        except (DeviceNotFound, DeviceLost):
            continue
        if (vendor in (None, function.vendor) and device in (None, function.device)
                and class_code in (None, function.class_code)):
            found.append(function)
    return found


def read_function(address: PciAddress, *, root: Path = ROOT) -> Function:
    """Read what sysfs says about one function.

    Raises
    ------
    DeviceNotFound
        There is no such function.
    DeviceLost
        It went away while it was read.
    """
    path = directory(address, root=root)
    if not path.is_dir():
        raise DeviceNotFound(f"there is no PCI function {address}",
                             cause="the address is of another machine or slot, or the device was removed",
                             hint="list them with lspci -D")
    try:
        group = _link(path / "iommu_group")
        node = int(_text(path / "numa_node") or "-1")
        return Function(
            address=address,
            vendor=_hex(path / "vendor"),
            device=_hex(path / "device"),
            subsystem_vendor=_hex(path / "subsystem_vendor"),
            subsystem=_hex(path / "subsystem_device"),
            class_code=_hex(path / "class"),
            revision=_hex(path / "revision"),
            driver=_link(path / "driver"),
            iommu_group=int(group) if group is not None else None,
            numa_node=node if node >= 0 else None,
            vfio_cdev=_cdev(path),
            resources=_resources(path / "resource"),
        )
    except (OSError, ValueError) as error:
        raise DeviceLost(f"PCI function {address} went away while it was read: {error}") from error


def directory(address: PciAddress, *, root: Path = ROOT) -> Path:
    """Return the function's directory, whether or not it exists."""
    return root / "devices" / str(address)


def driver(address: PciAddress, *, root: Path = ROOT) -> str | None:
    """Name the kernel driver bound to a function, None where there is none."""
    return _link(directory(address, root=root) / "driver")


def group_members(address: PciAddress, *, root: Path = ROOT) -> list[PciAddress]:
    """Return every function of `address`'s IOMMU group, itself included: they can only be given away together."""
    try:
        names = os.listdir(directory(address, root=root) / "iommu_group" / "devices")
    except FileNotFoundError:
        return []
    return sorted(PciAddress.parse(name) for name in names)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None


def _hex(path: Path) -> int:
    # Bridges have no subsystem ids.
    return int(_text(path) or "0", 16)


def _link(path: Path) -> str | None:
    try:
        return os.path.basename(os.readlink(path))
    except FileNotFoundError:
        return None


def _cdev(path: Path) -> str | None:
    try:
        return next(iter(sorted(os.listdir(path / "vfio-dev"))), None)
    except FileNotFoundError:
        return None


def _resources(path: Path) -> tuple[Resource, ...]:
    found = []
    for index, line in enumerate((_text(path) or "").splitlines()):
        start, end, flags = (int(word, 16) for word in line.split())
        if flags:
            found.append(Resource(index, start, end - start + 1, flags))
    return tuple(found)
