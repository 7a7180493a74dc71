"""Finding devices and opening them."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Final

from maia_rt.contract.function import DEVICE_ID, VENDOR_ID
from maia_rt.errors import DeviceBusy, DeviceNotFound, InvalidArgument, InvalidType
from maia_rt.pci import PciAddress, functions
from maia_rt.queue import DEFAULT_TIMEOUT
from maia_rt.runtime import check
from maia_rt.runtime.device import Device
from maia_rt.runtime.embedded import EmbeddedEmulator
from maia_rt.runtime.hold import Hold, busy, holder_of, take_hold
from maia_rt.runtime.peer import PEER_CHECKS
from maia_rt.transport import Transport
from maia_rt.transport.kernel import KernelDevice
from maia_rt.transport.vfio_user import VfioUserClient

EMULATED: Final = "emulated"
"""The selector of the embedded device, private to whoever opens it."""


SHARE: Final = "share:"
"""Before the path of a socket that a broker listens on (``maia share``): a part of a device, a device of its own."""


_SHARE_SECONDS: Final = 20.0
"""A broker answers within seconds that all shares are taken; one on a busy host has others to serve first."""


@dataclass(frozen=True)
class DeviceInfo:
    """A device that can be opened; see :func:`devices`.

    Attributes
    ----------
    selector : str
        What :func:`open` takes: a PCI address, a socket path, or ``emulated``.
    kind : str
        ``pci``, ``socket`` or ``emulated``.
    description : str
        For people.
    """

    selector: str
    kind: str
    description: str


def devices() -> list[DeviceInfo]:
    """List the devices that can be opened, without opening any.

    Returns
    -------
    list of DeviceInfo
        PCI functions bound to vfio-pci in bus order, the sockets named in ``MAIA_SOCKETS`` (separated by colons), and
        last the embedded emulator. ``MAIA_VISIBLE_DEVICES``, a list of indices into this, PCI addresses and socket
        paths separated by commas, leaves only those, in its order.

    Raises
    ------
    DeviceNotFound
        ``MAIA_VISIBLE_DEVICES`` names a device there is none of.
    """
    found = [DeviceInfo(str(f.address), "pci", f"PCI function {f.vendor:04x}:{f.device:04x} on vfio-pci")
             for f in functions(vendor=VENDOR_ID, device=DEVICE_ID) if f.driver == "vfio-pci"]
    found += [DeviceInfo(path, "socket", "vfio-user socket")
              for path in os.environ.get("MAIA_SOCKETS", "").split(":") if path]
    if importlib.util.find_spec("maia_emulator") is not None:
        found.append(DeviceInfo(EMULATED, EMULATED, "emulator of its own, in another process"))
    visible = os.environ.get("MAIA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return [_named(word.strip(), found) for word in visible.split(",") if word.strip()]


def _named(word: str, found: list[DeviceInfo]) -> DeviceInfo:
    if word.isdecimal():
        if int(word) < len(found):
            return found[int(word)]
    else:
        for info in found:
            if word == info.selector or (info.kind == "pci" and _is_address(word, info.selector)):
                return info
        if "/" in word:
            return DeviceInfo(word, "socket", "vfio-user socket")
    raise DeviceNotFound(f"MAIA_VISIBLE_DEVICES names {word!r}, which is none of {[i.selector for i in found]}",
                         hint="name devices by index, PCI address or socket path")


def _is_address(word: str, address: str) -> bool:
    try:
        return str(PciAddress.parse(word)) == address
    except InvalidArgument:
        return False


def open(selector: int | str | os.PathLike[str] | None = None, *, timeout: float = DEFAULT_TIMEOUT,
         validate: bool | None = None, sites: bool = True, max_queues: int | None = None,
         peer_checks: int | None = None) -> Device:
    """Open a device.

    Parameters
    ----------
    selector : int, str or path, optional
        An index into :func:`devices`, a PCI address such as ``0000:3b:00.0``, the path of a vfio-user socket,
        ``share:PATH`` for a share of a device that ``maia share`` holds, or
        ``emulated`` for an emulator of one's own. None is the first device: hardware where there is any, the embedded
        emulator where there is none.
    timeout : float
        How long streams and waits of the device have, in seconds, unless they are told otherwise.
    validate : bool, optional
        Whether each command is compared with those of other streams before it is submitted: what is a race or a
        certain deadlock raises RaceError or DeadlockError. For development: it costs tens of microseconds a command.
        By default what ``MAIA_VALIDATE`` says, 1 for yes.
    sites : bool
        Whether each command's line in the program is remembered, for the texts of faults and time-outs: it costs less
        than 100 ns a command.
    max_queues : int, optional
        How many hardware queues the program uses at most; all that the device has by default. Streams share them.
    peer_checks : int, optional
        Of so many direct copies of its streams to or from another device one is compared with its source, 0 for none.
        By default what ``MAIA_PEER_CHECKS`` says, or 256.

    Returns
    -------
    Device
        Booted. Use it as a context manager, or close it.

    Raises
    ------
    DeviceNotFound
        There is no such device, or none at all.
    DevicePermission, DeviceBusy
        It may not be opened, or somebody else has it; the text names the holder where this user may know.
    ContractMismatch
        It is none of ours, or speaks another major version.
    FirmwareError, DeviceTimeout, DeviceLost
        It does not boot.

    Examples
    --------
    >>> import maia_rt
    >>> with maia_rt.open("emulated") as device:
    ...     device.upload([1, 2, 3]).copy_to_host()  # doctest: +SKIP
    """
    timeout = check.seconds(timeout)
    if max_queues is not None:
        max_queues = check.integer(max_queues, "max_queues", 1, 1 << 16)
    if validate is None:
        validate = os.environ.get("MAIA_VALIDATE", "0") not in ("", "0")
    check.instance(validate, bool, "validate")
    if peer_checks is None:
        said = os.environ.get("MAIA_PEER_CHECKS", str(PEER_CHECKS))
        if not said.isdecimal():
            raise InvalidArgument(f"MAIA_PEER_CHECKS is {said!r:.40}, not a whole number")
        peer_checks = int(said)
    peer_checks = check.integer(peer_checks, "peer_checks", 0, 1 << 31)
    transport, emulator, hold = connect_alone(selector)
    return Device(transport, emulator, timeout, validate=validate, sites=sites, max_queues=max_queues, hold=hold,
                  peer_checks=peer_checks)


def connect_alone(selector: int | str | os.PathLike[str] | None) -> tuple[Transport, EmbeddedEmulator | None,
                                                                           Hold | None]:
    """As :func:`connect`, and take hold of the device, so that others learn who has it.

    Returns
    -------
    transport : Transport
    emulator : EmbeddedEmulator or None
    hold : Hold or None
        To be released last, when the device is left in order.
    """
    chosen = _choose(selector)
    hold = None if chosen == EMULATED or chosen.startswith(SHARE) else take_hold(chosen, chosen)
    try:
        return *connect(chosen), hold
    except BaseException:
        if hold is not None:
            hold.release()
        raise


def connect(selector: int | str | os.PathLike[str] | None = None) -> tuple[Transport, EmbeddedEmulator | None]:
    """Connect to a device without booting it: for tools that look at registers.

    Returns
    -------
    transport : Transport
    emulator : EmbeddedEmulator or None
        To be closed after the transport.

    Raises
    ------
    DeviceNotFound, DevicePermission, DeviceBusy
        As :func:`open`.
    """
    chosen = _choose(selector)
    if chosen == EMULATED:
        emulator = EmbeddedEmulator()
        return emulator.transport, emulator
    try:
        if chosen.startswith(SHARE):
            return VfioUserClient.connect(chosen.removeprefix(SHARE), _SHARE_SECONDS), None
        if "/" in chosen or os.path.exists(chosen):
            return VfioUserClient.connect(chosen), None
        return KernelDevice.open(chosen), None
    except DeviceBusy as error:
        holder = holder_of(chosen)
        if holder is None or holder.pid == os.getpid():
            raise
        raise busy(chosen, holder) from error


def _choose(selector: int | str | os.PathLike[str] | None) -> str:
    if selector is None or isinstance(selector, int):
        found = devices()
        index = selector or 0
        if not 0 <= index < len(found):
            raise DeviceNotFound(f"there is no device {index}; {len(found)} can be opened",
                                 cause="no function is bound to vfio-pci and no emulator is installed"
                                 if not found else "the index is too large",
                                 hint="list them with: maia info")
        return found[index].selector
    try:
        text = os.fspath(selector)
    except TypeError:
        raise InvalidType(f"a device is named by an index, a PCI address or a path, not by {type(selector).__name__}",
                          hint="list them with: maia info") from None
    if text == EMULATED or text.startswith(SHARE) or "/" in text or os.path.exists(text):
        return text
    try:
        return str(PciAddress.parse(text))
    except InvalidArgument:
        raise DeviceNotFound(f"{text!r} is neither a PCI address nor a socket that exists",
                             hint="list devices with: maia info") from None
