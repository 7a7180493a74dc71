"""All the devices of a process that may wait for each other, looked at together."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from maia_rt.runtime.insight import look_inside
from maia_rt.runtime.outstanding import Outstanding, Scene, Signaller, label

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.peer import PeerPath

_known: Final[weakref.WeakSet[Device]] = weakref.WeakSet()
_lock: Final = threading.Lock()
"""Held while `_known` grows or is gone through: devices are opened by any thread."""


class Scenes:
    """Devices at one moment.

    Parameters
    ----------
    devices : sequence of Device

    Attributes
    ----------
    all : tuple of Scene
        In the order of the devices.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        insights = look_inside([device._firmware for device in devices])
        self._by_device: dict[Device, Scene] = {}
        for device, name, insight in zip(devices, _names(devices), insights, strict=True):
            self._by_device[device] = Scene(device, name, insight, self)
        self.all = tuple(self._by_device.values())

    def of(self, device: Device) -> Scene | None:
        """The scene of a device, None where it is not among them."""
        return self._by_device.get(device)

    def signallers(self, scene: Scene, semaphore: int) -> Iterator[Signaller]:
        """Every command that posts to a semaphore, the device's own and other devices'; see :meth:`Scene.signallers`.
        """
        yield from scene.signallers(semaphore)
        for other, path in self._paths_to(scene):
            address = path._semaphore_at(semaphore)
            if address is not None:
                yield from other.remote_signallers(address)

    def writers(self, scene: Scene, address: int) -> Iterator[Signaller]:
        """Every outstanding command that writes to a byte of a device's memory, other devices' too."""
        yield from scene.writers(address)
        for other, path in self._paths_to(scene):
            seen = path._hbm_at(address)
            if seen is not None:
                yield from other.writers(seen)

    def newest_signal(self, scene: Scene, semaphore: int) -> tuple[Outstanding, int] | None:
        """Find another device's newest command that has posted to a semaphore, as far as is remembered."""
        for other, path in self._paths_to(scene):
            address = path._semaphore_at(semaphore)
            found = None if address is None else other.newest_signal(address)
            if found is not None:
                return found
        return None

    def _paths_to(self, scene: Scene) -> Iterator[tuple[Scene, PeerPath]]:
        for other in self.all:
            for path in other.device._peers:
                if path.other is scene.device:
                    yield other, path


def know(device: Device) -> None:
    """Note that there is a device, for as long as it is open."""
    with _lock:
        _known.add(device)


def linked(device: Device) -> list[Device]:
    """A device and, over any number of others, all that wait for it or signal it."""
    known = [one for one in _open() if one is not device]
    found = [device]
    for one in found:
        found += [other for other in known if other not in found and (_reaches(one, other) or _reaches(other, one))]
    return found


def groups() -> list[list[Device]]:
    """All open devices of the process; together in a list those that may wait for each other."""
    left = _open()
    made: list[list[Device]] = []
    while left:
        made.append(linked(left[0]))
        left = [one for one in left if one not in made[-1]]
    return made


def _open() -> list[Device]:
    with _lock:
        known = list(_known)
    return sorted((one for one in known if not one.closed), key=label)


def _reaches(one: Device, other: Device) -> bool:
    """Whether a device has a path to another, waits for it, or signals it through the host."""
    crossings = one._crossings
    return (any(path.other is other for path in one._peers) or any(crossing.device is other for crossing in crossings)
            or any(relay.device is other for relay in crossings.relays))


def _names(devices: Iterable[Device]) -> Iterator[str]:
    """What the devices are called: their names where those differ, or there is but one."""
    found = list(devices)
    if len(found) == 1:
        yield found[0].name
        return
    names = [label(device) for device in found]
    for at, name in enumerate(names):
        before = names[:at].count(name)
        yield name + (f" (opened again, {before + 1})" if before else "")
