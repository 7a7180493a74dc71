"""Memory that a client shows to the device through its share."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from typing import Final

import numpy as np

from maia_rt.share.partition import Partition
from maia_rt.transport.dma_table import DmaTable
from maia_rt.transport.protocol import Access, Transport

MAX_MAPS: Final = 1024
"""Of one client."""


class ClientMemory:
    """A piece of a client's file in memory; a :class:`maia_rt.transport.DmaMemory`.

    Parameters
    ----------
    fd : int
        Stays the caller's, who keeps it open as long as it is needed; the mapping has its own.
    offset, size : int
        In bytes, multiples of the page size.

    Raises
    ------
    OSError
        EINVAL: it is no file in memory, one that could shrink under whoever uses it, or too short.
    """

    def __init__(self, fd: int, offset: int, size: int) -> None:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if not seals & fcntl.F_SEAL_SHRINK:
            raise OSError(errno.EINVAL, "the file is not sealed against shrinking")
        if offset + size > os.fstat(fd).st_size:
            raise OSError(errno.EINVAL, "the file is shorter than that")
        self.fd = fd
        self.offset = offset
        self.size = size
        self._view = memoryview(mmap.mmap(fd, size, offset=offset))
        self.address = int(np.frombuffer(self._view, np.uint8).ctypes.data)

    def view(self) -> memoryview:
        """Return the memory, shared with the client, who may change it at any time."""
        return self._view


class ClientMaps:
    """What one client has shown to the device: in its own window, and nowhere else.

    Parameters
    ----------
    transport : Transport
        The device.
    partition : Partition
    """

    def __init__(self, transport: Transport, partition: Partition) -> None:
        self._transport = transport
        self._partition = partition
        self._lock = threading.RLock()
        self._table = DmaTable(transport.name, MAX_MAPS, mmap.PAGESIZE, limit="the share")

    def map(self, iova: int, memory: ClientMemory, access: Access) -> None:
        """Map it for the device too. MaiaError or OSError where that cannot be."""
        if not (self._partition.host_first <= iova and iova + memory.size - 1 <= self._partition.host_last):
            raise OSError(errno.EINVAL, "the address is not within the share")
        with self._lock:
            self._table.check(iova, memory)
            self._transport.dma_map(iova, memory, access)
            self._table.add(iova, memory, access)

    def unmap(self, iova: int, size: int) -> None:
        """Take one mapping back, exactly as it was made."""
        with self._lock:
            self._table.require(iova, size)
            self._transport.dma_unmap(iova, size)
            self._table.remove(iova)

    def unmap_all(self) -> None:
        """Take back everything."""
        for iova, size in list(self._table):
            self.unmap(iova, size)

    def holds(self, iova: int, size: int) -> bool:
        """Whether the device may read and write all of a range."""
        try:
            for access in (Access.READ, Access.WRITE):
                self._pieces(iova, size, access)
        except OSError:
            return False
        return True

    def read(self, iova: int, size: int) -> bytes:
        """Read the client's memory, once. OSError where it is not mapped."""
        return b"".join(bytes(piece) for piece in self._pieces(iova, size, Access.READ))

    def write(self, iova: int, data: bytes) -> None:
        """Write to the client's memory. OSError where it is not mapped for writing."""
        rest = memoryview(data)
        for piece in self._pieces(iova, len(data), Access.WRITE):
            piece[:] = rest[:len(piece)]
            rest = rest[len(piece):]

    def _pieces(self, iova: int, size: int, access: Access) -> list[memoryview]:
        with self._lock:
            return self._table.pieces(iova, size, access)
