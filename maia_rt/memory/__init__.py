"""Memory that a device can reach: I/O addresses, pinned host memory, and the heap of device memory."""

from maia_rt.memory.address_space import AddressSpace, SpaceStatistics
from maia_rt.memory.heap import DeviceHeap, SramHeap
from maia_rt.memory.iova import IovaAllocator
from maia_rt.memory.limits import check_memlock
from maia_rt.memory.peer import PeerMemory
from maia_rt.memory.physical import physical_ranges
from maia_rt.memory.pinned import PinnedBlock, PinnedPool
from maia_rt.memory.regions import DmaRegion
from maia_rt.memory.registered import RegisteredMemory

__all__ = [
    "AddressSpace",
    "DeviceHeap",
    "DmaRegion",
    "IovaAllocator",
    "PeerMemory",
    "PinnedBlock",
    "PinnedPool",
    "RegisteredMemory",
    "SpaceStatistics",
    "SramHeap",
    "check_memlock",
    "physical_ranges",
]
