"""Who uses a PCI function now: mounted disks, network interfaces that are up, processes with its nodes open."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from maia_rt.errors import DeviceLost, DeviceNotFound
from maia_rt.pci import sysfs
from maia_rt.pci.address import PciAddress
from maia_rt.pci.host import Host

_IFF_UP: Final = 1
_ANONYMOUS_VFIO: Final = "anon_inode:[vfio-device]"

Node = tuple[str, int]
"""A device node: "block" or "char", and its number."""


@dataclass(frozen=True)
class Process:
    """A process by number and name."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.name})"


@dataclass(frozen=True)
class Use:
    """One reason to leave a function where it is.

    Attributes
    ----------
    text : str
        As in ``/dev/nvme0n1 is mounted at /data``.
    pid : int or None
        The process, where it is one.
    blocks : bool
        The kernel would wait for it, so nobody can force it.
    """

    text: str
    pid: int | None = None
    blocks: bool = False


@dataclass(frozen=True)
class OpenNodes:
    """Which processes have device nodes open, as far as this user may see.

    Attributes
    ----------
    by_node : dict
        Node -> processes.
    vfio : tuple of Process
        Those with a VFIO function open whose address the kernel does not tell.
    """

    by_node: dict[Node, tuple[Process, ...]]
    vfio: tuple[Process, ...]


def open_nodes(host: Host) -> OpenNodes:
    """Walk ``/proc`` once. Without root only the user's own processes can be seen."""
    found: dict[Node, dict[int, Process]] = {}
    vfio: dict[int, Process] = {}
    for folder in host.proc.iterdir():
        if not folder.name.isdecimal():
            continue
        process = None
        for link, path in _links(folder):
            if not link.startswith("/dev/") and link != _ANONYMOUS_VFIO:
                continue
            process = process or Process(int(folder.name), _name(folder))
            if link == _ANONYMOUS_VFIO:
                vfio[process.pid] = process
                continue
            node = _node(path)
            if node is not None:
                found.setdefault(node, {})[process.pid] = process
    return OpenNodes({node: tuple(each.values()) for node, each in found.items()}, tuple(vfio.values()))


def _links(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield what a process has open or mapped: its name, and a path that leads to it."""
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        for name in os.listdir(folder / "fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(folder / "fd" / name), folder / "fd" / name
    # A mapping keeps a device open after its descriptor is closed.
    for line in _lines(folder / "maps"):
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(("/dev/vfio/", _ANONYMOUS_VFIO)):
            yield fields[5], Path(fields[5])


def _name(folder: Path) -> str:
    try:
        return (folder / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "ended"


def _node(path: Path) -> Node | None:
    try:
        found = path.stat()
    except OSError:
        return None
    if stat.S_ISBLK(found.st_mode):
        return "block", found.st_rdev
    return ("char", found.st_rdev) if stat.S_ISCHR(found.st_mode) else None


def kernel_uses(address: PciAddress, host: Host, nodes: OpenNodes | None = None) -> list[Use]:
    """List what uses a function through its kernel driver, most telling first.

    Parameters
    ----------
    address : PciAddress
    host : Host
    nodes : OpenNodes, optional
        From :func:`open_nodes`, where several functions are asked about.

    Returns
    -------
    list of Use
        Empty where nothing is known to use it; another user's processes can be seen by root only.
    """
    nodes = nodes or open_nodes(host)
    disks, others, interfaces = _children(address, host)
    found = [Use(f"network interface {path.name} is up") for path in interfaces if _is_up(path)]
    for name, number in disks.items():
        found += [Use(f"/dev/{name} {what}") for what in _disk_uses(name, number, host)]
        found += _opened(("block", number), f"/dev/{name}", nodes)
    if disks and not found:
        # Mounts of other namespaces, RAID members: the kernel itself says whether somebody has claimed the disk.
        found = [Use(f"/dev/{name} is claimed by the kernel") for name in disks
                 if _is_busy(host.dev / name, exclusive=True)]
    for name, number in others.items():
        found += _opened(("char", number), f"/dev/{name}", nodes)
    return found


def vfio_uses(address: PciAddress, host: Host, nodes: OpenNodes | None = None, *, probe: bool = True) -> list[Use]:
    """List who drives a function, or another of its IOMMU group, through VFIO. Nothing can take it from them.

    Parameters
    ----------
    address, host, nodes
        As for :func:`kernel_uses`.
    probe : bool
        Open the group's node for a moment, which finds programs that hide. One that opens it at that moment is refused.
    """
    nodes = nodes or open_nodes(host)
    found: list[Use] = []
    try:
        group = sysfs.read_function(address, root=host.pci).iommu_group
    except (DeviceNotFound, DeviceLost):
        return []
    if group is None:
        return []
    for member in sysfs.group_members(address, root=host.pci):
        with contextlib.suppress(DeviceNotFound, DeviceLost):
            cdev = sysfs.read_function(member, root=host.pci).vfio_cdev
            if cdev is not None:
                found += _opened_node(host.dev / "vfio/devices" / cdev, nodes)
    for name in (str(group), f"noiommu-{group}"):
        path = host.dev / "vfio" / name
        opened = _opened_node(path, nodes)
        # The group's file lives as long as any function of it is open, mapped or held by descriptor.
        if probe and not opened and not found and path.exists() and _is_busy(path):
            perhaps = ", ".join(map(str, nodes.vfio))
            opened = [Use(f"{path} is in use{f', perhaps by {perhaps}' if perhaps else ''}",
                          nodes.vfio[0].pid if len(nodes.vfio) == 1 else None, blocks=True)]
        found += opened
    return found


def _opened_node(path: Path, nodes: OpenNodes) -> list[Use]:
    node = _node(path)
    return [] if node is None else _opened(node, str(path), nodes, blocks=True)


def _opened(node: Node, name: str, nodes: OpenNodes, *, blocks: bool = False) -> list[Use]:
    return [Use(f"{process} has {name} open", process.pid, blocks) for process in nodes.by_node.get(node, ())]


def _children(address: PciAddress, host: Host) -> tuple[dict[str, int], dict[str, int], list[Path]]:
    """Return disks with their numbers, other nodes with theirs, and network interfaces."""
    disks: dict[str, int] = {}
    others: dict[str, int] = {}
    interfaces: list[Path] = []
    for folder, _, files in os.walk(os.path.realpath(sysfs.directory(address, root=host.pci))):
        path = Path(folder)
        if path.name == "vfio-dev" or path.parent.name == "vfio-dev":
            continue  # asked about by vfio_uses
        if "dev" in files:
            with contextlib.suppress(OSError, ValueError):
                major, minor = map(int, (path / "dev").read_text(encoding="ascii").split(":"))
                subsystem = os.path.basename(os.readlink(path / "subsystem"))
                (disks if subsystem == "block" else others)[path.name] = os.makedev(major, minor)
        if path.parent.name == "net" and "flags" in files:
            interfaces.append(path)
    return disks, others, interfaces


def _is_up(interface: Path) -> bool:
    try:
        return bool(int((interface / "flags").read_text(encoding="ascii"), 16) & _IFF_UP)
    except (OSError, ValueError):
        return False


def _disk_uses(name: str, number: int, host: Host) -> Iterator[str]:
    wanted = f"{os.major(number)}:{os.minor(number)}"
    for line in _lines(host.proc / "self/mountinfo"):
        # proc(5): 36 35 98:0 /root /mount/point options ...
        fields = line.split(" ")
        if len(fields) > 4 and fields[2] == wanted:
            yield f"is mounted at {fields[4]}"
    for line in _lines(host.proc / "swaps"):
        if line.split(" ")[0].split("\t")[0] == f"/dev/{name}":
            yield "is swap space"
    with contextlib.suppress(OSError):
        for holder in sorted(os.listdir(host.sys / "class/block" / name / "holders")):
            yield f"is part of /dev/{holder}"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _is_busy(path: Path, *, exclusive: bool = False) -> bool:
    """Whether the kernel refuses to open it because somebody has it."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL if exclusive else os.O_RDWR))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False
