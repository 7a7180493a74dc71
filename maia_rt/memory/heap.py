"""The heaps of the device's memories: HBM, and the SRAM of tiles and clusters."""

from __future__ import annotations

from typing import Final

from maia_rt.errors import InvalidArgument
from maia_rt.memory.address_space import AddressSpace, SpaceStatistics

_MAX_SRAM_ALIGNMENT: Final = 4096


class DeviceHeap(AddressSpace):
    """Allocates device memory; the memory itself stays on the device and is never touched.

    Parameters
    ----------
    base, size : int
        The device addresses to hand out, in bytes.
    granule : int
        Every allocation is a multiple of it, in bytes.

    Examples
    --------
    >>> heap = DeviceHeap(0x1_0000_0000, 1 << 20)
    >>> a = heap.allocate(1000, alignment=4096)
    >>> hex(a), heap.statistics().used
    ('0x100000000', 1024)
    >>> heap.free(a)
    """

    def __init__(self, base: int, size: int, *, granule: int = 256) -> None:
        super().__init__([(base, base + size - 1)], granule=granule, name="device memory",
                         hint="free buffers, or use smaller batches")


class SramHeap:
    """Allocates the SRAM of one tile or cluster, from the top downwards.

    Kernels lay out a tile's SRAM from its first byte upwards; what lies above :attr:`floor` is out of their reach.

    Parameters
    ----------
    base, size : int
        Its device addresses, in bytes.
    name : str
        For error texts.
    granule : int
        Every allocation is a multiple of it, in bytes.

    Examples
    --------
    >>> heap = SramHeap(0x3_0000_0000, 1 << 20, name="the SRAM of tile 0")
    >>> hex(heap.allocate(1000, 256)), hex(heap.floor)
    ('0x3000ffc00', '0xffc00')
    """

    def __init__(self, base: int, size: int, *, name: str, granule: int = 256) -> None:
        self._base = base
        # The same addresses, counted downwards from the end: the lowest of them is the top of the memory.
        self._end = size // _MAX_SRAM_ALIGNMENT * _MAX_SRAM_ALIGNMENT
        self._down = AddressSpace([(0, self._end - 1)], granule=granule, name=name,
                                  hint="free buffers there, or use another tile or cluster")
        self._allocated: dict[int, tuple[int, int]] = {}

    @property
    def floor(self) -> int:
        """Bytes below the lowest allocation, counted from the first byte of the SRAM."""
        return min((address for address in list(self._allocated)), default=self._base + self._end) - self._base

    def __len__(self) -> int:
        """How many allocations there are."""
        return len(self._allocated)

    def allocate(self, size: int, alignment: int = 1) -> int:
        """Return the device address of `size` free bytes.

        Raises
        ------
        OutOfMemory
        InvalidArgument
            The alignment is no power of two, or more than 4,096.
        """
        if alignment > _MAX_SRAM_ALIGNMENT:
            raise InvalidArgument(f"{self._down.name}: SRAM is aligned to {_MAX_SRAM_ALIGNMENT} bytes at most, not "
                                  f"{alignment}")
        if size <= 0:
            raise InvalidArgument(f"{self._down.name}: the size must be positive, not {size}")
        step = max(alignment, self._down.granule)
        rounded = -(-size // step) * step
        down = self._down.allocate(rounded, alignment)
        address = self._base + self._end - down - rounded
        self._allocated[address] = down, rounded
        return address

    def free(self, address: int) -> None:
        """Take back what starts at `address`. Finalizers may call this."""
        down, _ = self._allocated.pop(address)
        self._down.free(down)

    def statistics(self) -> SpaceStatistics:
        """Return the figures of this moment."""
        return self._down.statistics()
