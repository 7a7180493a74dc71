"""I/O virtual addresses: what a device uses to name host memory."""

from __future__ import annotations

from collections.abc import Iterable

from maia_rt.errors import InvalidArgument, ResourceExhausted
from maia_rt.memory.address_space import AddressSpace


class IovaAllocator(AddressSpace):
    """Hands out I/O virtual addresses from the usable ranges.

    The ranges have holes: on x86 the interrupt window at 0xfee00000, and whatever the firmware reserved
    (``/sys/kernel/iommu_groups/N/reserved_regions``). Page 0 is never handed out, so that 0 can mean "no address".

    Parameters
    ----------
    ranges : iterable of (first, last)
        Inclusive, as ``Transport.iova_ranges``.
    page_sizes : int
        A bit mask, as ``Transport.page_sizes``; the smallest page is the granule.
    address_bits : int
        How many address bits the device drives, where fewer than 64 (QEMU's edu: 28).

    Raises
    ------
    InvalidArgument
        No usable address is left.
    """

    exhausted = ResourceExhausted

    def __init__(self, ranges: Iterable[tuple[int, int]], page_sizes: int, *, address_bits: int = 64) -> None:
        page = page_sizes & -page_sizes
        top = (1 << address_bits) - 1
        usable = [(max(first, page), min(last, top)) for first, last in ranges]
        super().__init__([(first, last) for first, last in usable if first <= last], granule=page,
                         name="I/O virtual addresses", hint="unmap memory that is no longer needed")
        if not self.size:
            raise InvalidArgument(f"no I/O virtual address below {address_bits} bits is usable",
                                  cause="the IOMMU's usable ranges all lie above what the device drives")
