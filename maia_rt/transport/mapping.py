"""Shared memory mapped into this process: whole files for DMA, and the mappable areas of a device's regions.

The standard ``mmap`` is not used: it keeps a duplicate of the descriptor (a forked child would hold the device open
through it), and its finalizer would unmap, in such a child, whatever came to live at the same address.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import weakref
from typing import Final

from maia_rt.errors import InvalidArgument, ProtocolError, TransportError, Unsupported
from maia_rt.transport import uapi
from maia_rt.transport.protocol import RegionInfo

PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE")

_PROT_READ, _PROT_WRITE = 1, 2
_MAP_SHARED, _MAP_POPULATE = 1, 0x8000
_MADV_DONTFORK = 10
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class SharedMapping:
    """A shared mapping of a file, absent from forked children (MADV_DONTFORK).

    The memory lives as long as the object or any view of it does.

    Parameters
    ----------
    fd : int
        Not kept.
    size, offset : int
        In bytes; `offset` a multiple of the page size.
    writable : bool
    populate : bool
        Touch every page now.

    Raises
    ------
    TransportError
        With mmap's errno.
    """

    def __init__(self, fd: int, size: int, offset: int = 0, *, writable: bool = True, populate: bool = False) -> None:
        protection = _PROT_READ | (_PROT_WRITE if writable else 0)
        flags = _MAP_SHARED | (_MAP_POPULATE if populate else 0)
        address = _libc.mmap(None, size, protection, flags, fd, offset)
        if address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise TransportError(f"mapping {size} bytes failed: {os.strerror(code)}", errno=code)
        # A forked child that went on using, or unmapping, the device's memory is the fault this prevents. Memory that
        # cannot take the advice (some device memory) is mapped all the same.
        _libc.madvise(address, size, _MADV_DONTFORK)
        self.address: int = address
        self.size = size
        self.writable = writable
        self._array: ctypes.Array[ctypes.c_ubyte] | None = (ctypes.c_ubyte * size).from_address(address)
        # Every view, slice and numpy array keeps the ctypes array alive, so its end is the end of the last of them.
        weakref.finalize(self._array, _unmap, address, size, os.getpid()).atexit = False

    def view(self) -> memoryview:
        """Return the mapping as bytes."""
        if self._array is None:
            raise InvalidArgument("the mapping has been closed")
        view = memoryview(self._array).cast("B")
        return view if self.writable else view.toreadonly()

    def try_close(self) -> bool:
        """Unmap the memory if no view of it is left; otherwise change nothing and return False."""
        if self._array is None:
            return True
        watch = weakref.ref(self._array)
        self._array = None
        self._array = watch()
        return self._array is None

    def release(self) -> None:
        """Let go of the memory; it is unmapped now, or with its last view."""
        self._array = None


def _unmap(address: int, size: int, pid: int) -> None:
    # In a forked child the address may by now be somebody else's memory.
    if os.getpid() == pid:
        _libc.munmap(address, size)


class RegionMaps:
    """The mappings of one device's regions: one per mappable area, made on first use."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._maps: dict[tuple[int, int], SharedMapping] = {}

    def __len__(self) -> int:
        return len(self._maps)

    def map(self, region: RegionInfo, fd: int, base: int, offset: int, size: int | None) -> memoryview:
        """Return a view of `size` bytes at `offset` of `region`, whose byte 0 stands at `base` of the file `fd`.

        Raises
        ------
        InvalidArgument
            `offset` is not page aligned.
        Unsupported
            The range is not inside one mappable area.
        ProtocolError
            The file is shorter than the area: touching it would kill the process.
        """
        if offset % PAGE_SIZE:
            raise InvalidArgument(f"{self._name}: offset {offset:#x} of region {region.index} is not page aligned")
        for start, length in region.areas:
            if start <= offset < start + length:
                take = start + length - offset if size is None else size
                if 0 < take <= start + length - offset:
                    whole = self._area(region, fd, base, start, length)
                    return whole[offset - start:offset - start + take]
        areas = ", ".join(f"{start:#x}+{length:#x}" for start, length in region.areas) or "none"
        wanted = "" if size is None else f"+{size:#x}"
        raise Unsupported(f"{self._name}: {offset:#x}{wanted} of region {region.index} cannot be mapped",
                          cause=f"mappable areas are: {areas}", hint="use read and write")

    def _area(self, region: RegionInfo, fd: int, base: int, start: int, length: int) -> memoryview:
        mapping = self._maps.get((region.index, start))
        if mapping is None:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_size < base + start + length:
                raise ProtocolError(
                    f"{self._name}: the file behind region {region.index} has {status.st_size} bytes, "
                    f"{base + start + length} are announced", errno=errno.EINVAL)
            mapping = SharedMapping(fd, length, base + start, writable=region.writable)
            self._maps[region.index, start] = mapping
        return mapping.view()

    def close(self) -> int:
        """Drop every mapping; return how many live on because somebody still holds a view."""
        held = 0
        for mapping in self._maps.values():
            if not mapping.try_close():
                mapping.release()
                held += 1
        self._maps.clear()
        return held


def region_info(
    index: int, flags: int, size: int, *, areas: list[tuple[int, int]] | None, kind: tuple[int, int] | None,
    mappable: bool,
) -> RegionInfo:
    """Build a region's description from what the kernel or a server says.

    Parameters
    ----------
    index, flags, size : int
    areas : list of (offset, size) or None
        The sparse mmap capability; None where there is none: then the whole region can be mapped, if any.
    kind : (type, subtype) or None
    mappable : bool
        Whether there is a file to map.

    Raises
    ------
    ProtocolError
        An area is not page aligned or not inside the region.
    """
    if not (flags & uapi.REGION_FLAG_MMAP and mappable and size):
        return RegionInfo(index, size, flags & ~uapi.REGION_FLAG_MMAP, (), kind)
    if areas is None:
        areas = [(0, size)]
    for start, length in areas:
        # The last page of a region may be cut short by its end.
        if start % PAGE_SIZE or start + length > size or (length % PAGE_SIZE and start + length != size):
            raise ProtocolError(f"the mappable area {start:#x}+{length:#x} does not fit into {size:#x} bytes by pages",
                                errno=errno.EINVAL)
    return RegionInfo(index, size, flags, tuple(sorted(area for area in areas if area[1])), kind)
