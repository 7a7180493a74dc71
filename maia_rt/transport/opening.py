"""Opening any PCI device by what names it: its address where the kernel's VFIO has it, or a vfio-user socket."""

from __future__ import annotations

import os
from typing import Literal

from maia_rt.errors import InvalidArgument
from maia_rt.pci.address import PciAddress
from maia_rt.transport.protocol import Transport


def open_device(
    address_or_socket: PciAddress | str | os.PathLike[str], *, interface: Literal["group", "cdev"] | None = None,
    no_iommu: bool = False,
) -> Transport:
    """Open a PCI device.

    Parameters
    ----------
    address_or_socket : PciAddress, str or path
        A PCI address as ``lspci -D`` writes it (``0000:3b:00.0``; the domain may be left out), of a function that is
        bound to vfio-pci; or the path of a vfio-user server's socket. A name with a slash, and one of a file that
        exists, is a path.
    interface : {'group', 'cdev'}, optional
        For a PCI address only: which of the kernel's two interfaces to use; by default what the host has.
    no_iommu : bool
        For a PCI address only: without the protection of an IOMMU. Never the default.

    Returns
    -------
    Transport
        Use it as a context manager, or close it.

    Raises
    ------
    InvalidArgument
        It is neither an address nor a path.
    DeviceNotFound, DevicePermission, DeviceBusy, Unsupported, TransportError
        As :meth:`maia_rt.transport.kernel.KernelDevice.open` and
        :meth:`maia_rt.transport.vfio_user.VfioUserClient.connect`.

    Examples
    --------
    >>> from maia_rt.transport import open_device
    >>> with open_device("0000:00:02.0") as device:  # doctest: +SKIP
    ...     hex(device.read(0, 0, 4))
    '0x10000ed'
    """
    if not isinstance(address_or_socket, PciAddress):
        name = os.fspath(address_or_socket)
        if "/" in name or os.path.exists(name):
            if interface is not None or no_iommu:
                raise InvalidArgument(f"{name}: a vfio-user socket has neither an interface to choose nor an IOMMU")
            # Imported where it is used: the emulator imports this package for its wire formats alone.
            from maia_rt.transport.vfio_user import VfioUserClient

            return VfioUserClient.connect(name)
        address_or_socket = PciAddress.parse(name)
    from maia_rt.transport.kernel import KernelDevice

    return KernelDevice.open(address_or_socket, interface=interface, no_iommu=no_iommu)
