"""Peers: how a device reaches another's memory and semaphores."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import select
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from maia_rt._fast.way import Way
from maia_rt.errors import (
    ClosedError,
    DeviceFault,
    DeviceLost,
    DeviceTimeout,
    InvalidArgument,
    MaiaError,
    ProtocolError,
    ResourceExhausted,
    TransportError,
    Unsupported,
)
from maia_rt.memory import PeerMemory
from maia_rt.memory.space import Space
from maia_rt.queue import QueuePair
from maia_rt.runtime import check
from maia_rt.runtime.buffer import Buffer, Memory
from maia_rt.runtime.in_use import Use, wait_for_use
from maia_rt.runtime.peer_link import PeerLink
from maia_rt.runtime.peer_proof import Mismatch, measure, prove
from maia_rt.runtime.semaphore import Semaphore
from maia_rt.transport.mapping import PAGE_SIZE
from maia_rt.transport.uapi import PciRegion

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device

_log = logging.getLogger(__name__)
PEER_CHECKS: Final = 256
"""Of so many direct copies to or from a peer one is checked, unless the device was opened with another number."""
_WORD_BYTES: Final = 4
_REFUSED: Final = (Unsupported, TransportError, ResourceExhausted, InvalidArgument)
"""What says that a device cannot have the other's memory mapped. DeviceLost and ClosedError say something else."""


class PeerPath(Way):
    """The way from a device to a peer's memory and semaphores; made by :meth:`maia_rt.Device.peer`.

    It goes one way in the sense that `device` does the work: it reads from and writes to `other`.

    Attributes
    ----------
    device, other : Device
    checks : int
        Direct copies that were compared with their source by checksum, both ends by the device whose memory they are.
    mismatches : int
        How many of them had arrived otherwise. The first one makes the path staged, and is mended.
    """

    def __init__(self, device: Device, other: Device, every: int) -> None:
        self.device = device
        self.other = other
        self.checks = self.mismatches = 0
        self._every = every
        self._copies = 0
        # Order: this lock, then any of a device's. A close takes it never, as it holds a device's.
        self._lock = threading.RLock()
        self._kind: Literal["direct", "staged"] | None = None
        self._why = ""
        self._bandwidth = 0.0
        self._closed = False
        self._maps: list[tuple[int, PeerMemory]] = []
        self._hbm = self._window = 0
        self._link = PeerLink(device, other)

    @property
    def kind(self) -> Literal["direct", "staged"]:
        """Whether the device reaches the peer's memory by itself, or copies go through pinned host memory."""
        return self._kind or "staged"

    @property
    def why(self) -> str:
        """Why it is not direct, a sentence; empty where it is."""
        return self._why

    @property
    def bandwidth(self) -> float:
        """Bytes a second that were measured when the path was made."""
        return self._bandwidth

    @property
    def closed(self) -> bool:
        """Whether one of the two devices has been closed."""
        return self._closed or self.device.closed or self.other.closed

    def address(self, memory: Memory | int) -> int:
        """Return the address by which the device reaches memory of the peer.

        Parameters
        ----------
        memory : Buffer or int
            In the peer's HBM; or an address of it, as the peer's own commands use it.

        Returns
        -------
        int
            For commands of `device`, as long as the path is open. A close of the buffer waits for those that use it.

        Raises
        ------
        Unsupported
            The path is staged, or the buffer lies in SRAM or on the host.
        InvalidArgument, InvalidType
            It is no memory of the peer.
        ClosedError, DeviceLost
            The text names the device that was closed or is gone.
        """
        self._require_direct()
        capabilities = self.other.capabilities
        if not isinstance(memory, Memory):
            first = capabilities.hbm_base
            return self._hbm + check.integer(memory, f"an address of {self.other.name}'s HBM", first,
                                             first + capabilities.hbm_bytes - 1)
        if memory.device is not self.other:
            raise InvalidArgument(f"{memory!r} belongs to {memory.device.name}, not to the peer {self.other.name}")
        if not isinstance(memory, Buffer) or memory.space != Space.hbm():
            where = f"the SRAM of {memory.space}" if isinstance(memory, Buffer) else "host memory"
            raise Unsupported(f"{memory!r} lies in {where}, which peers do not reach", hint="use a buffer in HBM")
        return self._hbm + memory.address

    def semaphore(self, semaphore: Semaphore | int) -> int:
        """Return the address of a semaphore of the peer, to which the device posts by SIGNAL_REMOTE.

        Parameters
        ----------
        semaphore : Semaphore or int
            Of the peer, or its index.

        Raises
        ------
        Unsupported, InvalidArgument, InvalidType, ClosedError, DeviceLost
            As :meth:`address`; or the device has no SIGNAL_REMOTE.
        """
        self._require_direct()
        if not self.device.capabilities.signal_remote:
            raise Unsupported(f"{self.device.name}: the device has no SIGNAL_REMOTE")
        if not isinstance(semaphore, Semaphore):
            index = check.integer(semaphore, "the index of a semaphore", 0, self.other.capabilities.semaphores - 1)
            return self._window + _WORD_BYTES * index
        if semaphore.device is not self.other:
            raise InvalidArgument(f"{semaphore.name} belongs to {semaphore.device.name}, not to the peer "
                                  f"{self.other.name}")
        semaphore._require_open()
        return self._window + _WORD_BYTES * semaphore.index

    def __repr__(self) -> str:
        state = "closed" if self.closed else self._kind or "not proven"
        return f"<PeerPath {self.device.name} to {self.other.name}, {state}>"

    # --- for the devices ---------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Find out what kind it is, once, and again after a reset."""
        if self._kind is None:
            with self._lock:
                if self._kind is None:
                    self._require_open()
                    self._find_kind()
        self._require_open()

    def _find_kind(self) -> None:
        try:
            if not self._maps:
                self._map()
            self._bandwidth = prove(self)
        except (*_REFUSED, DeviceFault, DeviceTimeout, Mismatch) as error:
            self._require_open()
            if isinstance(error, ProtocolError):
                raise
            self._stage(error.what if isinstance(error, MaiaError) else str(error))
            self._bandwidth = measure(self)
        else:
            self._kind, self._why = "direct", ""
            capabilities = self.other.capabilities
            self._make_plain(self._hbm, capabilities.hbm_base, capabilities.hbm_bytes,
                             (self.device.transport.liveness_fd, self.other.transport.liveness_fd))

    def _map(self) -> None:
        """Have the peer's HBM, and its semaphore window, mapped for the device."""
        capabilities, transport = self.other.capabilities, self.other.transport
        pinned, fd = self.device.transport.needs_pinning, transport.region_file(PciRegion.BAR4)[0]
        if pinned and fd >= 0:
            raise Unsupported(f"the memory of {self.other.name} is ordinary memory, which would all have to be pinned")
        if pinned and _in_a_guest():
            # A virtual IOMMU maps such a BAR page by page, and may run out of room for whatever is mapped after it.
            raise Unsupported("this machine is virtual: its IOMMU may map a BAR in many small pieces")
        if not pinned and fd < 0:
            raise Unsupported(f"the memory of {self.other.name} has no file that a server could map")
        hbm = self._map_part(PciRegion.BAR4, 0, None)
        start = capabilities.semaphore_window
        first = start - start % PAGE_SIZE
        length = -(-(start + _WORD_BYTES * capabilities.semaphores - first) // PAGE_SIZE) * PAGE_SIZE
        length = min(length, transport.region(PciRegion.BAR2).size - first)
        self._window = self._map_part(PciRegion.BAR2, first, length) + start - first
        self._hbm = hbm - capabilities.hbm_base

    def _map_part(self, region: PciRegion, offset: int, size: int | None) -> int:
        memory = PeerMemory(self.other.transport, region, offset, size)
        try:
            iova = self.device._pool.map(memory, pinned=False)
        except BaseException:
            memory.close()
            raise
        self._maps.append((iova, memory))
        if self._closed:  # meanwhile
            self._unmap()
            self._require_open()
        return iova

    def _stage(self, why: str) -> None:
        self._make_special()
        self._why = why
        self._kind = "staged"

    def _require_open(self) -> None:
        for one, peer in ((self.device, self.other), (self.other, self.device)):
            if one.closed:
                raise ClosedError(f"{one.name} has been closed, and with it its path to or from {peer.name}")
            if _is_gone(one):
                raise DeviceLost(f"{one.name}, a peer of {peer.name}, is gone",
                                 cause="its server ended or its link is down", hint="close it and open it anew")
        if self._closed:
            raise ClosedError(f"the path from {self.device.name} to {self.other.name} has been closed")

    def _require_direct(self) -> None:
        self._open()
        if self._kind != "direct":
            raise Unsupported(f"{self.device.name} does not reach {self.other.name} by itself", cause=self._why,
                              hint="stream.copy goes through the host")

    def _semaphore_at(self, index: int) -> int | None:
        """Where the device sees a semaphore of the peer; None where nothing is mapped."""
        return self._window + _WORD_BYTES * index if self._maps and self._window else None

    def _hbm_at(self, address: int) -> int | None:
        """Where the device sees an address of the peer's; None where it does not."""
        first, size = self.other.capabilities.hbm_base, self.other.capabilities.hbm_bytes
        return self._hbm + address if self._maps and self._window and first <= address < first + size else None

    def _due(self) -> bool:
        """Count a direct copy; say whether it is to be checked."""
        self._copies += 1
        return self._every > 0 and self._copies % self._every == 0

    def _distrust(self, nbytes: int, at: int) -> None:
        """Note that a copy arrived otherwise than it left: no direct one from now on."""
        self.mismatches += 1
        first = self._kind != "staged"
        self._stage(f"a copy of {nbytes} bytes at {at:#x} arrived with another checksum than it left with")
        if first:
            text = (f"the path from {self.device.name} to {self.other.name} is given up: {self._why}; the "
                    "copy has been made anew through the host")
            _log.error("%s", text)
            warnings.warn(text, RuntimeWarning, stacklevel=7)

    def _find_use(self, start: int, end: int) -> Use | None:
        """Find a command of the device that uses an address of the peer."""
        if not self._maps or not self._hbm or self.device.closed:
            return None
        use = self.device._look_for_use(start + self._hbm, end + self._hbm)
        if use is not None:
            use.device = self.device.name
        return use

    def _settle(self, deadline: float) -> None:
        """Wait until no command of the device uses the peer's memory."""
        capabilities = self.other.capabilities
        first, end = capabilities.hbm_base, capabilities.hbm_base + capabilities.hbm_bytes
        wait_for_use(lambda: self._find_use(first, end), max(deadline - time.monotonic(), 0))

    def _close(self, deadline: float) -> None:
        self._closed = True
        self._make_special()
        if not self.device.closed:
            with contextlib.suppress(MaiaError):
                self._settle(deadline)
        self._link.close()
        self._unmap()

    def _unmap(self) -> None:
        while self._maps:
            iova, memory = self._maps.pop()
            with contextlib.suppress(MaiaError):
                self.device._pool.unmap(iova)
            memory.close()


class PeerTable:
    """The paths of a device: to its peers, and from them.

    Parameters
    ----------
    device : Device
    every : int
        One of so many copies is checked, 0 for none.

    Attributes
    ----------
    ways : dict
        By other device, the path there.
    """

    def __init__(self, device: Device, every: int) -> None:
        self._device = device
        self._every = every
        self._lock = threading.Lock()
        self.ways: dict[Device, PeerPath] = {}
        self._into: tuple[PeerPath, ...] = ()

    def to(self, other: Device) -> PeerPath:
        """Return the path to another device, opened."""
        if other is self._device:
            raise InvalidArgument(f"{other.name} is not its own peer", hint="copy with its own streams")
        other._require_open()
        path = self.ways.get(other)
        if path is None:
            with self._lock:
                path = self.ways.get(other)
                if path is None:
                    path = PeerPath(self._device, other, self._every)
                    other._peers._add(path)
                    self.ways[other] = path
        path._open()
        return path

    def _add(self, path: PeerPath) -> None:
        self._into = (*self._into, path)

    def __iter__(self) -> Iterator[PeerPath]:
        """Yield the paths from this device."""
        return iter(list(self.ways.values()))

    def queues(self) -> list[QueuePair]:
        """Return the queues whose commands may use this device's memory, of other devices."""
        return [queue for path in self._into if path._maps and not path.device.closed for queue in path.device._queues]

    def find_use(self, start: int, end: int) -> Use | None:
        """Find a command of another device that uses one of this device's addresses."""
        return next((use for path in self._into if (use := path._find_use(start, end)) is not None), None)

    def settle(self, deadline: float) -> None:
        """Have every path proven anew: the device is about to be reset. Waits for what others have under way."""
        for path in self._into:
            path._settle(deadline)
        for path in (*self._into, *self.ways.values()):
            path._link.forget()
            path._make_special()
            path._kind = None

    def close(self, deadline: float) -> None:
        """End every path; what others have under way on this device's memory has until `deadline`."""
        into, self._into = self._into, ()
        for path in into:
            path.device._peers._forget(path)
            path._close(deadline)
        for path in list(self.ways.values()):
            path.other._peers._into = tuple(one for one in path.other._peers._into if one is not path)
            path._close(deadline)
        self.ways.clear()

    def _forget(self, path: PeerPath) -> None:
        self.ways.pop(path.other, None)


def _is_gone(device: Device) -> bool:
    """Whether a device's server has hung up; one look, without a word to it."""
    fd = device.transport.liveness_fd
    if fd is None:
        return False
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return any(events & (select.POLLHUP | select.POLLRDHUP | select.POLLNVAL | select.POLLERR)
               for _, events in poll.poll(0))


@functools.cache
def _in_a_guest() -> bool:
    """Whether the processor says that there is a hypervisor."""
    try:
        return re.search(r"^flags\s*:.*\bhypervisor\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE) is not None
    except OSError:
        return False
