"""Hot reset: the reset of a whole slot or bus, which functions share, and that works where a function has none itself.

Source: ``linux/vfio.h``, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO and VFIO_DEVICE_PCI_HOT_RESET; Linux 6.12,
drivers/vfio/pci/vfio_pci_core.c.
"""

from __future__ import annotations

import array
import ctypes
import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from maia_rt.errors import DeviceBusy, DeviceLost, TransportError, Unsupported
from maia_rt.pci.address import PciAddress
from maia_rt.transport import kernel_uapi as k

Call = Callable[[int, bytearray, str], int]
"""``call(request, argument, what)`` issues an ioctl on the function."""

_MOST_FUNCTIONS: Final = 256 * 8
_HEADER: Final = ctypes.sizeof(k.VfioPciHotResetInfo)
_ENTRY: Final = ctypes.sizeof(k.VfioPciDependentDevice)


@dataclass(frozen=True)
class AffectedFunction:
    """A function that a hot reset resets along.

    Attributes
    ----------
    address : PciAddress
    owned : bool
        Whether it belongs to this open device: the same function, or one of its IOMMU group.
    """

    address: PciAddress
    owned: bool


def hot_reset_info(name: str, group: int | None, call: Call) -> list[AffectedFunction]:
    """Ask which functions a hot reset of this one resets.

    Parameters
    ----------
    name : str
        For error texts.
    group : int or None
        The function's IOMMU group where it was opened by group; in an iommufd the kernel knows.
    call : Call

    Raises
    ------
    Unsupported
        Neither its slot nor its bus can be reset: a device on the root bus.
    """
    room = 8
    while True:
        request = bytearray(_HEADER + room * _ENTRY)
        info = k.VfioPciHotResetInfo.from_buffer(request)
        info.argsz = len(request)
        try:
            call(k.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, request, "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO")
            break
        except DeviceLost:  # ENODEV means something else here
            raise Unsupported(f"{name}: neither the function's slot nor its bus can be reset",
                              cause="it sits on the root bus, or others behind the same bridge forbid it") from None
        except TransportError as error:
            if error.errno != errno.ENOSPC or not room < info.count <= _MOST_FUNCTIONS:
                raise
            room = info.count
    entries = [k.VfioPciDependentDevice.from_buffer_copy(request, _HEADER + n * _ENTRY) for n in range(info.count)]
    by_id = bool(info.flags & k.VFIO_PCI_HOT_RESET_FLAG_DEV_ID)
    return [AffectedFunction(
        PciAddress(entry.segment, entry.bus, entry.devfn >> 3, entry.devfn & 7),
        entry.group_id != k.VFIO_PCI_DEVID_NOT_OWNED if by_id else entry.group_id == group) for entry in entries]


def hot_reset(name: str, group_fd: int | None, affected: list[AffectedFunction], call: Call) -> None:
    """Reset the slot or bus.

    Parameters
    ----------
    name : str
    group_fd : int or None
        The group's descriptor, the proof that the group is ours; None in an iommufd.
    affected : list of AffectedFunction
        From :func:`hot_reset_info`.
    call : Call

    Raises
    ------
    DeviceBusy
        Functions that are not ours would be reset along. Nothing was changed.
    """
    foreign = [str(one.address) for one in affected if not one.owned]
    if foreign:
        raise DeviceBusy(f"{name}: a hot reset would also reset {', '.join(foreign)}",
                         cause="they share its slot or bus, and are not of its IOMMU group or not bound to vfio-pci",
                         hint="reset() where the function can alone; or unbind them from their drivers, bind them to "
                              "vfio-pci")
    fds = [] if group_fd is None else [group_fd]
    data = array.array("i", fds).tobytes()
    size = ctypes.sizeof(k.VfioPciHotReset)
    request = bytearray(k.VfioPciHotReset(size + len(data), 0, len(fds))) + data
    try:
        call(k.VFIO_DEVICE_PCI_HOT_RESET, request, "VFIO_DEVICE_PCI_HOT_RESET")
    except TransportError as error:
        if error.errno == errno.EINVAL:
            others = ", ".join(str(one.address) for one in affected if str(one.address) != name)
            raise DeviceBusy(f"{name}: the kernel refuses the hot reset", hint="bind these to vfio-pci, too",
                             cause=f"not all that it would reset are bound to vfio-pci: {others or 'bridges behind'}"
                             ) from None
        if error.errno == errno.ENOTTY:
            raise TransportError(f"{name}: the slot was reset, but its link did not come up in time",
                                 errno=errno.ENOTTY, cause="the device or its slot; the kernel's log has the details",
                                 hint="look whether the device answers, then reset it again") from None
        raise
