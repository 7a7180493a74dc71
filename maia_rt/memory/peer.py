"""Another device's BAR as memory for DMA: the way of peer-to-peer transfers."""

from __future__ import annotations

import numpy as np

from maia_rt.errors import ClosedError
from maia_rt.transport.protocol import Transport


class PeerMemory:
    """A mappable part of a device's region, to be mapped for another device; a :class:`maia_rt.transport.DmaMemory`.

        peer = PeerMemory(second, PciRegion.BAR4, size=1 << 20)
        first.dma_map(iova, peer)          # first now reads and writes second's BAR at iova

    A vfio-user server gets the file behind the region, where the peer's server gave one, and moves the bytes by itself.
    The kernel's VFIO takes the memory through the group interface (type1); an iommufd of Linux 6.12 maps ordinary
    memory only and refuses with Unsupported. Whether transactions between two devices get through is the platform's
    decision: some root complexes drop them. :meth:`maia_rt.Device.peer` tries before it trusts.

    While it is mapped it holds a view of the region, so the peer stays open for the kernel, even past its own close.

    Parameters
    ----------
    transport : Transport
        The device whose memory it is.
    region : int
    offset, size : int
        In bytes, multiples of the page size; by default all of the mappable area.

    Raises
    ------
    Unsupported
        The range is not inside one mappable area.
    """

    def __init__(self, transport: Transport, region: int, offset: int = 0, size: int | None = None) -> None:
        self._transport = transport
        self._region = region
        self._start = offset
        self._name = f"region {region} of {transport.name}"
        self._view: memoryview | None = transport.map(region, offset, size)
        self._size = self._view.nbytes
        self._address = int(np.frombuffer(self._view, np.uint8).ctypes.data)

    @property
    def fd(self) -> int:
        """The file behind the peer's region, which ends with the peer's transport; -1 where it has none."""
        return self._transport.region_file(self._region)[0]

    @property
    def offset(self) -> int:
        """Where in that file the memory starts, in bytes; 0 without one."""
        fd, base = self._transport.region_file(self._region)
        return base + self._start if fd >= 0 else 0

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    @property
    def address(self) -> int:
        """Where this process has it mapped."""
        return self._address

    def view(self) -> memoryview:
        """Return the memory, shared with the device.

        Raises
        ------
        ClosedError
        """
        if self._view is None:
            raise ClosedError(f"{self._name}: the peer memory has been closed")
        return self._view

    def close(self) -> None:
        """Let go of the view; idempotent."""
        self._view = None

    def __enter__(self) -> PeerMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PeerMemory {self._size:#x} bytes, {self._name}{', closed' if self._view is None else ''}>"
