"""How one device reaches another's memory and semaphores: the seam to the transports."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from maia_rt.errors import MaiaError, Unsupported
from maia_rt.memory.peer import PeerMemory
from maia_rt.transport.uapi import PciRegion

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device


class _Shared(PeerMemory):
    """A peer's region with the file behind it, where the transport has one."""

    def __init__(self, device: Device, region: int) -> None:
        super().__init__(device.transport, region)
        self._file = getattr(device.transport, "_fds", {}).get(region, (-1, 0))

    @property
    def fd(self) -> int:
        return int(self._file[0])

    @property
    def offset(self) -> int:
        return int(self._file[1])


class Path:
    """From a device to a peer."""

    def __init__(self, device: Device, peer: Device) -> None:
        self._device = device
        self._maps: list[tuple[int, PeerMemory]] = []
        hbm = self._map(_Shared(peer, PciRegion.BAR4))
        doorbells = self._map(_Shared(peer, PciRegion.BAR2))
        self._memory = hbm - peer.capabilities.hbm_base
        self._window = doorbells + peer.capabilities.semaphore_window

    def _map(self, memory: PeerMemory) -> int:
        if memory.fd < 0:
            raise Unsupported(f"{self._device.name}: the peer's memory has no file")
        iova = self._device._pool._iovas.allocate(memory.size)
        self._device.transport.dma_map(iova, memory)
        self._maps.append((iova, memory))
        return iova

    def address(self, address: int) -> int:
        """Where the device sees an address of the peer's HBM."""
        return self._memory + address

    def semaphore(self, index: int) -> int:
        """Where it sees a semaphore of the peer."""
        return self._window + 4 * index

    def close(self) -> None:
        """Take the mappings back."""
        while self._maps:
            iova, memory = self._maps.pop()
            if not self._device.closed:
                with contextlib.suppress(MaiaError):
                    self._device.transport.dma_unmap(iova, memory.size)
                self._device._pool._iovas.free(iova)
            memory.close()
