"""The heap of device memory (HBM)."""

from __future__ import annotations

from maia_rt.memory.address_space import AddressSpace


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
