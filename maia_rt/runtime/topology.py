"""Which devices there are, who reaches whom and how, and where they sit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from maia_rt.errors import InvalidArgument, MaiaError
from maia_rt.pci import PciAddress, sysfs
from maia_rt.runtime import check
from maia_rt.runtime.device import Device


@dataclass(frozen=True)
class Place:
    """A device in a topology.

    Attributes
    ----------
    name : str
        A PCI address, a socket path, or ``emulated``.
    model : str
    numa_node, iommu_group : int or None
        What the kernel says of a PCI function; None where it says nothing.
    """

    name: str
    model: str
    numa_node: int | None
    iommu_group: int | None


@dataclass(frozen=True)
class Link:
    """The way from one device to another.

    Attributes
    ----------
    source, target : int
        Places in :attr:`Topology.devices`: `source` does the work.
    kind : {'direct', 'staged'}
    why : str
        Why it is not direct.
    bandwidth : float
        Bytes a second, measured when the path was proven.
    """

    source: int
    target: int
    kind: Literal["direct", "staged"]
    why: str
    bandwidth: float


@dataclass(frozen=True)
class Topology:
    """Devices and the ways between them; see :func:`topology`."""

    devices: tuple[Place, ...]
    links: tuple[Link, ...]


def topology(devices: Sequence[Device]) -> Topology:
    """Find out who reaches whom among open devices; each way is proven first.

    Parameters
    ----------
    devices : sequence of Device

    Raises
    ------
    InvalidArgument
        One of them is named twice.
    InvalidType, ClosedError, DeviceLost

    Examples
    --------
    >>> import maia_rt
    >>> with maia_rt.open("emulated") as one, maia_rt.open("emulated") as two:
    ...     [link.kind for link in maia_rt.topology([one, two]).links]
    ['direct', 'direct']
    """
    found = [check.instance(one, Device, "a device") for one in check.instance(devices, Sequence, "devices")]  # type: ignore[type-abstract]
    if len(set(found)) != len(found):
        raise InvalidArgument("a device is named twice")
    links = []
    for source, device in enumerate(found):
        for target, other in enumerate(found):
            if device is not other:
                path = device.peer(other)
                links.append(Link(source, target, path.kind, path.why, path.bandwidth))
    return Topology(tuple(_place(one) for one in found), tuple(links))


def _place(device: Device) -> Place:
    facts: Any = None
    try:
        address = PciAddress.parse(device.name)
        facts = sysfs.read_function(address)
    except (MaiaError, OSError):
        facts = None
    return Place(device.name, device.identity.model, getattr(facts, "numa_node", None),
                 getattr(facts, "iommu_group", None))
