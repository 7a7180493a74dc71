"""A BAR as registers: every access is one access of its width, mapped where the device lets it be, else through the
transport."""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import Final

from maia_rt._fast.words import SharedWords
from maia_rt.errors import ClosedError, DeviceLost, InvalidArgument, Unsupported
from maia_rt.transport.polling import poll_until
from maia_rt.transport.protocol import Transport
from maia_rt.transport.uapi import PciRegion

_REVISION_AND_CLASS: Final = 0x08


class Bar:
    """The registers of one region of a device.

    Offsets are in bytes from the region's start; values are unsigned, and little endian on the bus. A write comes after
    every store that this thread made to memory before it (so a doorbell may be rung at once), a read before every load
    after it. Writes are posted, as PCI writes are: read a register of the device back where they must have arrived.

    Any thread may call. The object holds views of the region, so close it before the transport.

    Parameters
    ----------
    transport : Transport
        Its memory space must be on (:meth:`ConfigSpace.enable`): under the kernel's VFIO a mapped access to a function
        that does not answer kills the process with SIGBUS, where one through the transport raises.
    index : int
        The region: 0 to 5 for a BAR.
    mapped : bool
        False sends every access through the transport: a system call or message each, and what there is to use while
        the device may be away.

    Raises
    ------
    Unsupported
        The device has no such region.

    Examples
    --------
    >>> with Bar(device, 0) as registers:                                                   # doctest: +SKIP
    ...     registers.write32(0x14, registers.read32(0x14) | 1)
    ...     registers.poll32(0x1C, mask=1, value=1, timeout=2.0, what="CSTS.RDY")
    """

    def __init__(self, transport: Transport, index: int = 0, *, mapped: bool = True) -> None:
        region = transport.region(index)
        if not region.size:
            present = ", ".join(str(one.index) for one in transport.regions[:PciRegion.ROM] if one.size) or "none"
            raise Unsupported(f"{transport.name}: the device has no BAR {index}", cause=f"it has BAR {present}",
                              hint="choose another, or bind the function whose registers you mean")
        self.name = f"{transport.name} BAR {index}"
        self.index = index
        self.size = region.size
        self._transport = transport
        self._closed = False
        self._areas: list[tuple[int, int, SharedWords]] = []
        try:
            for start, length in region.areas if mapped else ():
                view = transport.map(index, start, length)
                self._areas.append((start, start + length, SharedWords(view, self.name)))
        except BaseException:
            self.close()
            raise

    def read8(self, offset: int) -> int:
        """Read one byte."""
        words, at = self._find(offset, 1)
        return words.read8(at) if words else self._transport.read(self.index, offset, 1)

    def read16(self, offset: int) -> int:
        """Read 2 bytes at a multiple of 2."""
        words, at = self._find(offset, 2)
        return words.read16(at) if words else self._transport.read(self.index, offset, 2)

    def read32(self, offset: int) -> int:
        """Read 4 bytes at a multiple of 4.

        Raises
        ------
        InvalidArgument
            The register is not aligned, or not within the region.
        ClosedError, ForkedError
            The registers have been closed, or were opened before fork.
        TransportError, DeviceLost
            An access through the transport failed. A mapped one cannot: it reads as all ones where the device is gone;
            :meth:`check_alive` tells.
        """
        words, at = self._find(offset, 4)
        return words.read32(at) if words else self._transport.read(self.index, offset, 4)

    def read64(self, offset: int) -> int:
        """Read 8 bytes at a multiple of 8, as one access; not every device takes those."""
        words, at = self._find(offset, 8)
        return words.read64(at) if words else self._transport.read(self.index, offset, 8)

    def write8(self, offset: int, value: int) -> None:
        """Write one byte."""
        words, at = self._find(offset, 1)
        if words:
            words.write8(at, value)
        else:
            self._transport.write(self.index, offset, 1, value)

    def write16(self, offset: int, value: int) -> None:
        """Write 2 bytes at a multiple of 2."""
        words, at = self._find(offset, 2)
        if words:
            words.write16(at, value)
        else:
            self._transport.write(self.index, offset, 2, value)

    def write32(self, offset: int, value: int) -> None:
        """Write 4 bytes at a multiple of 4. Raises as :meth:`read32`, and InvalidArgument for a value of more bits."""
        words, at = self._find(offset, 4)
        if words:
            words.write32(at, value)
        else:
            self._transport.write(self.index, offset, 4, value)

    def write64(self, offset: int, value: int) -> None:
        """Write 8 bytes at a multiple of 8, as one access; not every device takes those."""
        words, at = self._find(offset, 8)
        if words:
            words.write64(at, value)
        else:
            self._transport.write(self.index, offset, 8, value)

    def poll32(self, offset: int, *, mask: int, value: int, timeout: float, what: str = "") -> int:
        """Read a 32-bit register until its bits in `mask` read `value`.

        Parameters
        ----------
        offset, mask, value : int
        timeout : float
            In seconds. The register is read at least once, and once after the deadline.
        what : str
            The register or the state, for error texts.

        Returns
        -------
        int
            The whole register, as last read.

        Raises
        ------
        DeviceTimeout
            The deadline passed; see :func:`poll_until`.
        DeviceLost
            It reads as all ones, and so does configuration space.
        """
        register = f"{what}, the register at {offset:#x}," if what else f"the register at {offset:#x}"
        return poll_until(partial(self._read_alive, offset), mask=mask, value=value, timeout=timeout,
                          what=f"{self.name}: {register}")

    def _read_alive(self, offset: int) -> int:
        value = self.read32(offset)
        if value == 0xFFFFFFFF:
            self.check_alive()
        return value

    def check_alive(self) -> None:
        """Raise DeviceLost where the function does not answer, so that reading all ones is known from being gone.

        Configuration space is asked for revision and class: of the vendor the kernel's VFIO answers from a copy.
        """
        if self._transport.read(PciRegion.CONFIG, _REVISION_AND_CLASS, 4) == 0xFFFFFFFF:
            raise DeviceLost(f"{self._transport.name}: the device reads as all ones, configuration space too",
                             cause="the link is down, or the device was removed or is in reset",
                             hint="look at the slot, rescan the bus, then open the device anew")

    def _find(self, offset: int, width: int) -> tuple[SharedWords | None, int]:
        """Return the mapped area that has the register, None for the transport, and the offset there."""
        if offset % width:
            raise InvalidArgument(f"{self.name}: {width} bytes at {offset:#x} are not aligned",
                                  hint="access them at a multiple of their width, or in narrower pieces")
        for start, end, words in self._areas:
            if start <= offset < end:
                return words, offset - start
        if self._closed:
            raise ClosedError(f"{self.name} has been closed")
        return None, offset

    @property
    def closed(self) -> bool:
        """Whether close has been called."""
        return self._closed

    def close(self) -> None:
        """Let go of the mapped areas; idempotent."""
        self._closed = True
        while self._areas:
            self._areas.pop()[2].close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        mapped = sum(end - start for start, end, _ in self._areas)
        return f"<Bar {self.name}: {self.size:#x} bytes, {mapped:#x} mapped{', closed' if self._closed else ''}>"
