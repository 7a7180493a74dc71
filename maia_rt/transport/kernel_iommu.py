"""The address space in which a function reaches memory, and why the kernel may refuse it."""

from __future__ import annotations

import errno
import resource
from pathlib import Path
from typing import Final, Protocol

from maia_rt.errors import DeviceBusy, InvalidArgument, MaiaError, MemlockLimit, TransportError
from maia_rt.pci import sysfs
from maia_rt.pci.address import PciAddress
from maia_rt.pci.host import Host
from maia_rt.pci.iommu import in_the_way, is_vfio
from maia_rt.pci.usage import vfio_uses
from maia_rt.transport.protocol import Access

LOAD: Final = "load the driver: modprobe vfio-pci; without hardware use the emulated device"
TURN_ON: Final = "turn the IOMMU on: intel_iommu=on or amd_iommu=on on the kernel's command line"
UNLIMITED: Final = (1 << 31) - 1


class Iommu(Protocol):
    """An address space that one function has to itself, and the function's descriptor.

    Attributes
    ----------
    kind : str
        ``vfio-group``, ``vfio-cdev`` or ``vfio-noiommu``.
    device_fd : int
    group : (number, descriptor), optional
        Of the IOMMU group, where the function was opened by it.
    page_sizes : int
        A bit mask.
    max_dma_maps : int
        How many mappings were left when it was opened.
    dma_limit : str
        What sets `max_dma_maps`.
    iova_ranges : list of (first, last)
        Empty without an IOMMU.
    """

    kind: str
    device_fd: int
    group: tuple[int, int] | None
    page_sizes: int
    max_dma_maps: int
    dma_limit: str
    iova_ranges: list[tuple[int, int]]

    def dma_map(self, iova: int, address: int, size: int, access: Access) -> None:
        """Map memory of this process, pinning it."""

    def dma_unmap(self, iova: int, size: int) -> None:
        """Unmap exactly one mapping."""

    def close(self) -> None:
        """Close every descriptor; idempotent."""


def not_viable(address: PciAddress, root: Path) -> DeviceBusy | None:
    """Say who else is in the function's IOMMU group and keeps it from being given away; None where nobody is."""
    foreign = in_the_way(address, Host(sys=root.parents[1]))
    if not foreign:
        return None
    names = ", ".join(f"{one.address} ({one.driver})" for one in foreign)
    return DeviceBusy(f"{address}: its IOMMU group cannot be given away",
                      cause=f"the kernel drives others of the same group: {names}",
                      hint=f"take them too: maia bind {address} --group")


def holder(address: PciAddress, dev: Path, root: Path) -> str:
    """Say who has the function, or another of its IOMMU group, open, as far as this user may see."""
    uses = vfio_uses(address, Host(sys=root.parents[1], dev=dev), probe=False)
    who = ", ".join(dict.fromkeys(use.text for use in uses)) or "this process, or another user's, has it open"
    names = [str(member) for member in sysfs.group_members(address, root=root) if member != address
             and is_vfio(sysfs.read_function(member, root=root).driver)]
    return f"{who}, for itself or for others of its IOMMU group: {', '.join(names)}" if names else who


def mapping_refusal(error: MaiaError, what: str, *, limit: str, account: str) -> MaiaError:
    """Return the error for memory that the kernel did not map.

    Parameters
    ----------
    error : MaiaError
        As :func:`maia_rt.transport.kernel_ioctl.call` raised it.
    what : str
        The device and the mapping.
    limit : str
        What limits the number of mappings.
    account : str
        Whose pinned memory RLIMIT_MEMLOCK counts.
    """
    if isinstance(error, MemlockLimit):
        soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if soft == resource.RLIM_INFINITY:
            return MemlockLimit(f"{what}: no memory", cause="the host has none left for the IOMMU's tables")
        hint = "ulimit -l " + ("unlimited" if hard == resource.RLIM_INFINITY else str(hard >> 10))
        if hard == soft:
            hint = "raise memlock in /etc/security/limits.conf, or LimitMEMLOCK= in the systemd unit"
        return MemlockLimit(f"{what}: the memory cannot be pinned", hint=hint,
                            cause=f"RLIMIT_MEMLOCK is {soft} bytes, which counts what {account} has pinned")
    code = error.errno if isinstance(error, TransportError) else 0
    if code == errno.EEXIST:
        return InvalidArgument(f"{what}: a part of it is mapped already", hint="unmap it first, or use another iova")
    if code == errno.ENOSPC:
        return MemlockLimit(f"{what}: no mapping is left", cause=f"the limit is {limit}",
                            hint="map fewer, larger regions, or raise it")
    return error
