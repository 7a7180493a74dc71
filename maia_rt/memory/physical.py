"""Physical addresses of host memory, for devices that no IOMMU guards.

Source: the kernel's Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import ctypes
import os
import struct

from maia_rt.errors import DevicePermission, MemlockLimit, TransportError
from maia_rt.transport.mapping import PAGE_SIZE
from maia_rt.transport.protocol import DmaMemory

_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1
_libc = ctypes.CDLL(None, use_errno=True)


def physical_ranges(memory: DmaMemory) -> list[tuple[int, int]]:
    """Lock memory and return where it lies: (physical address, bytes), in the memory's order.

    For a device opened with ``no_iommu``, which names host memory so. A wrong address makes it write over somebody
    else's memory.

    Locked pages are not swapped out, but the kernel may still move them (compaction, memory hot-unplug): only an IOMMU
    mapping pins them. Huge pages are moved least; take the memory from them and keep it.

    Parameters
    ----------
    memory : DmaMemory
        Such as a :class:`DmaRegion`.

    Raises
    ------
    DevicePermission
        Only CAP_SYS_ADMIN may see physical addresses.
    MemlockLimit
        So much memory may not be locked.
    """
    if _libc.mlock(ctypes.c_void_p(memory.address), ctypes.c_size_t(memory.size)):
        code = ctypes.get_errno()
        raise MemlockLimit(f"{memory.size} bytes cannot be locked: {os.strerror(code)}", hint="raise ulimit -l")
    count = memory.size // PAGE_SIZE
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            data = os.pread(pagemap.fileno(), 8 * count, memory.address // PAGE_SIZE * 8)
        entries = struct.unpack(f"={count}Q", data)
    except PermissionError:
        entries = (_PRESENT,)
    ranges: list[tuple[int, int]] = []
    for entry in entries:
        if not entry & _PRESENT:
            raise TransportError("the memory is not present, though locked", hint="write to it first")
        if not entry & _FRAME:
            raise DevicePermission("physical addresses are hidden from this user", cause="they need CAP_SYS_ADMIN",
                                   hint="run as root, or turn the IOMMU on")
        address = (entry & _FRAME) * PAGE_SIZE
        if ranges and sum(ranges[-1]) == address:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + PAGE_SIZE)
        else:
            ranges.append((address, PAGE_SIZE))
    return ranges
