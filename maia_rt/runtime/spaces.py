"""The device's memories and what is free in them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from maia_rt.capabilities import Capabilities
from maia_rt.contract.commands import SRAM_STRIDE_LOG2
from maia_rt.errors import InvalidArgument
from maia_rt.memory import DeviceHeap, SpaceStatistics, SramHeap
from maia_rt.memory.space import Space

if TYPE_CHECKING:
    from maia_rt.runtime.program import Kernel

_HEAP_ALIGNMENT: Final = 256


class DeviceSpaces:
    """The heaps of a device: HBM, and one for each cluster's and tile's SRAM, made when first asked for.

    Parameters
    ----------
    capabilities : Capabilities
    """

    def __init__(self, capabilities: Capabilities) -> None:
        self._capabilities = capabilities
        self._lock = threading.Lock()
        self.hbm = DeviceHeap(capabilities.hbm_base, capabilities.hbm_bytes, granule=_HEAP_ALIGNMENT)
        self._sram: dict[Space, SramHeap] = {}
        self.tiles: dict[int, SramHeap] = {}
        """The heaps of tiles in which something was ever allocated. Empty: launches need no check."""

    def heap(self, space: Space) -> DeviceHeap | SramHeap:
        """Return the heap of a space.

        Raises
        ------
        InvalidArgument
            The device has no such cluster or tile.
        """
        if space.kind == "hbm":
            return self.hbm
        capabilities = self._capabilities
        if space.kind == "cluster":
            count, base = capabilities.clusters, capabilities.cluster_sram_base
            size = capabilities.cluster_sram_bytes
        else:
            count, base, size = capabilities.tiles, capabilities.tile_sram_base, capabilities.tile_sram_bytes
        if not 0 <= space.index < count:
            raise InvalidArgument(f"there is no {space}: the device has {count} {space.kind}s")
        with self._lock:
            heap = self._sram.get(space)
            if heap is None:
                heap = self._sram[space] = SramHeap(base + (space.index << SRAM_STRIDE_LOG2), size,
                                                    name=f"the SRAM of {space}", granule=_HEAP_ALIGNMENT)
                if space.kind == "tile":
                    self.tiles[space.index] = heap
            return heap

    def statistics(self, space: Space) -> SpaceStatistics:
        """Return how full a space is."""
        return self.heap(space).statistics()

    def check_launch(self, kernel: Kernel, clusters: int, settle: Callable[[Space], object]) -> None:
        """Raise InvalidArgument where a kernel would run over allocated tile SRAM of a cluster it may run on.

        Parameters
        ----------
        kernel : Kernel
        clusters : int
            A mask, 0 is all.
        settle : callable
            Called with a tile's space before a launch is refused: frees what was closed there.
        """
        need = kernel.sram_bytes
        for tile, heap in list(self.tiles.items()):
            cluster = tile // self._capabilities.tiles_per_cluster
            if clusters and not clusters >> cluster & 1:
                continue
            if len(heap) and need > heap.floor:
                settle(Space.tile(tile))
            if len(heap) and need > heap.floor:
                raise InvalidArgument(
                    f"kernel {kernel.name!r} uses the first {need} bytes of a tile's SRAM, and in tile {tile} of "
                    f"cluster {cluster}, where it may run, everything from byte {heap.floor} on is allocated",
                    hint="free that buffer, or launch with clusters= that leaves the cluster out")
