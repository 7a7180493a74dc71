"""The function's regions as VFIO numbers them: what a read or write of each one reaches."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import Final

from maia_emulator.config_space import CONFIG_BYTES, ConfigSpace
from maia_emulator.register_file import BLOCK_BYTES, RegisterFile
from maia_rt.contract.registers import BAR0_BYTES, MSIX_PBA_BYTES, MSIX_PBA_OFFSET, MSIX_TABLE_OFFSET
from maia_rt.transport import wire

ACCESS: Final = wire.REGION_FLAG_READ | wire.REGION_FLAG_WRITE
MSIX_ENTRY_BYTES: Final = 16


class Region:
    """A region of the function; this one is absent.

    Attributes
    ----------
    size : int
        Bytes.
    flags : int
        REGION_FLAG_*.
    fd : int
        What a client maps, from offset 0; -1 where it cannot.
    areas : tuple of (offset, size)
        The mappable parts; none where the whole region is, or nothing.
    """

    size = 0
    flags = 0
    fd = -1
    areas: tuple[tuple[int, int], ...] = ()

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`; bounds are checked before."""
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`; bounds are checked before."""


class RegisterBar(Region):
    """BAR 0: registers, then MSI-X table and pending bits.

    The table is memory without effect: a VFIO client assigns eventfds instead of writing messages.
    """

    size = BAR0_BYTES
    flags = ACCESS

    def __init__(self, registers: RegisterFile, vectors: int, pending: Callable[[], int]) -> None:
        self._registers = registers
        self._pending = pending
        self._table = bytearray(vectors * MSIX_ENTRY_BYTES)
        self.reset()

    def reset(self) -> None:
        """Mask every vector in the table, as after a reset (PCIe 6.0, 7.7.2.2)."""
        entry = bytes(12) + b"\1\0\0\0"
        self._table[:] = entry * (len(self._table) // MSIX_ENTRY_BYTES)

    def read(self, offset: int, size: int) -> bytes:
        """Serve registers, table and pending bits; what lies between reads as zero."""
        if offset < BLOCK_BYTES:
            return self._registers.read(offset, size)
        at = offset - MSIX_TABLE_OFFSET
        if 0 <= at < len(self._table):
            return bytes(self._table[at : at + size]).ljust(size, b"\0")
        at = offset - MSIX_PBA_OFFSET
        if 0 <= at < MSIX_PBA_BYTES:
            return self._pending().to_bytes(MSIX_PBA_BYTES, "little")[at : at + size].ljust(size, b"\0")
        return bytes(size)

    def write(self, offset: int, data: bytes) -> None:
        """Serve registers and table; everything else is read-only."""
        if offset < BLOCK_BYTES:
            self._registers.write(offset, data)
            return
        at = offset - MSIX_TABLE_OFFSET
        if 0 <= at < len(self._table):
            data = data[: len(self._table) - at]
            self._table[at : at + len(data)] = data


class DoorbellBar(Region):
    """BAR 2: doorbell pages and the semaphore window; the client maps it, or stores through messages."""

    flags = ACCESS | wire.REGION_FLAG_MMAP

    def __init__(self, fd: int, size: int, wake: Callable[[], None]) -> None:
        self.fd = fd
        self.size = size
        self._wake = wake
        self._memory = mmap.mmap(fd, size)
        view = memoryview(self._memory)
        self._words = {4: view.cast("I"), 8: view.cast("Q")}

    def read(self, offset: int, size: int) -> bytes:
        """Load with one access where the size is a word's."""
        words = self._words.get(size)
        if words is not None and offset % size == 0:
            return words[offset // size].to_bytes(size, "little")
        return self._memory[offset : offset + size]

    def write(self, offset: int, data: bytes) -> None:
        """Store with one access where the size is a word's; a trapped store needs no WAKE after it."""
        words = self._words.get(len(data))
        if words is not None and offset % len(data) == 0:
            words[offset // len(data)] = int.from_bytes(data, "little")
        else:
            self._memory[offset : offset + len(data)] = data
        self._wake()

    def close(self) -> None:
        """Drop the mapping."""
        for words in self._words.values():
            words.release()
        self._memory.close()


class HbmBar(Region):
    """BAR 4: device memory. Where HBM is no power of two, the rest of the BAR reads as zero.

    Parameters
    ----------
    fd : int
        The memory.
    size, backed : int
        Bytes of the BAR, and of HBM.
    """

    flags = ACCESS | wire.REGION_FLAG_MMAP

    def __init__(self, fd: int, size: int, backed: int) -> None:
        self.fd = fd
        self.size = size
        self._backed = backed
        if backed < size:
            self.areas = ((0, backed),)

    def read(self, offset: int, size: int) -> bytes:
        """Read HBM."""
        return os.pread(self.fd, max(0, min(size, self._backed - offset)), offset).ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Write HBM."""
        os.pwrite(self.fd, data[: max(0, self._backed - offset)], offset)


class Removed(Region):
    """A region of a function that was removed, as it were: reads as all ones. What is mapped stays mapped.

    Parameters
    ----------
    region : Region
        The one that was there.
    """

    def __init__(self, region: Region) -> None:
        self.size, self.flags, self.fd, self.areas = region.size, region.flags, region.fd, region.areas

    def read(self, offset: int, size: int) -> bytes:
        """Return ones, as a root port does for a function that does not answer (PCIe 6.0, 2.3.2)."""
        return b"\xff" * size


class ConfigRegion(Region):
    """PCI configuration space."""

    size = CONFIG_BYTES
    flags = ACCESS

    def __init__(self, config: ConfigSpace) -> None:
        self.read = config.read  # type: ignore[method-assign]
        self.write = config.write  # type: ignore[method-assign]
