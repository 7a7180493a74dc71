"""Reads and writes of a function's regions through its descriptor, as the kernel's VFIO lays them out there.

The kernel takes an access apart where it is not aligned, and makes each aligned one of 1, 2, 4 or 8 bytes a single
access to the device (8 only where the machine can; configuration space: at most 4). Registers that VFIO keeps for
itself it answers itself: the MSI-X table reads as ones and ignores writes, the vendor and device ids are a copy.
Source: Linux 6.12, drivers/vfio/pci/vfio_pci_rdwr.c and vfio_pci_config.c.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import Final

from maia_rt.errors import ClosedError, DeviceLost, ForkedError, InvalidArgument, InvalidType, MaiaError, TransportError
from maia_rt.transport import uapi
from maia_rt.transport.described import Described
from maia_rt.transport.kernel_ioctl import refusal
from maia_rt.transport.protocol import check_access

_SIZES: Final = (1, 2, 4, 8)
_REVISION_AND_CLASS: Final = 0x08
"""The first word of configuration space that VFIO passes through unchanged, and that no device has all ones in."""


class KernelRegisters(Described):
    """The registers of a function, and whether it is still open and there."""

    def __init__(self, name: str, fd: int) -> None:
        self._name = name
        self._fd = fd
        self._lock = threading.RLock()
        self._closed = self._forked = False
        self._regions = ()
        self._irqs = ()
        # Where each region begins in the file.
        self._bases: list[int] = []

    def _check_open(self) -> None:
        """Raise what the state calls for; under the lock, so that no descriptor closes before its use."""
        if self._forked:
            raise ForkedError(f"{self._name}: the device was opened before fork", hint="open it anew in the child")
        if self._closed:
            raise ClosedError(f"{self._name}: the device has been closed")

    def read(self, region: int, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes."""
        self._check(region, offset, size, uapi.REGION_FLAG_READ)
        return int.from_bytes(self._pread(region, offset, size), "little")

    def write(self, region: int, offset: int, size: int, value: int, *, posted: bool = False) -> None:
        """Write 1, 2, 4 or 8 bytes; the kernel posts nothing, so `posted` changes nothing."""
        self._check(region, offset, size, uapi.REGION_FLAG_WRITE)
        try:
            data = value.to_bytes(size, "little")
        except OverflowError:
            raise InvalidArgument(f"{self._name}: {value!r} does not fit into {size} bytes") from None
        except AttributeError:
            raise InvalidType(f"{self._name}: values are integers, not {type(value).__name__}") from None
        self._pwrite(region, offset, data)

    def read_bytes(self, region: int, offset: int, size: int) -> bytes:
        """Read a block."""
        self._check(region, offset, size, uapi.REGION_FLAG_READ, block=True)
        return self._pread(region, offset, size)

    def write_bytes(self, region: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write a block."""
        view = memoryview(data).cast("B")
        self._check(region, offset, len(view), uapi.REGION_FLAG_WRITE, block=True)
        self._pwrite(region, offset, view)

    def check_present(self) -> None:
        """Raise DeviceLost where the function no longer answers: unplugged, its link down, its slot without power.

        An absent function reads as all ones. Registers may too, so configuration space is asked: its revision and
        class, which VFIO does not keep a copy of.
        """
        with self._lock:
            self._check_open()
            config = uapi.PciRegion.CONFIG
            if len(self._regions) <= config or self._regions[config].size < _REVISION_AND_CLASS + 4:
                return
            try:
                word = os.pread(self._fd, 4, self._bases[config] + _REVISION_AND_CLASS)
            except OSError as error:
                raise refusal(error, f"{self._name}: asking whether the device is there") from None
            if word == b"\xff" * 4:
                raise DeviceLost(f"{self._name}: the device reads as all ones",
                                 cause="it was unplugged, its link is down, or whoever serves it has ended",
                                 hint="close it; when it is back, bind it to vfio-pci and open it anew")

    def _check(self, region: int, offset: int, size: int, flag: int, *, block: bool = False) -> None:
        self._check_open()
        check_access(self._name, self._regions, region, offset=offset, size=size, flag=flag,
                     sizes=() if block else _SIZES)

    def _pread(self, region: int, offset: int, size: int) -> bytes:
        parts: list[bytes] = []
        with self._lock:
            self._check_open()
            done = 0
            while done < size:
                try:
                    part = os.pread(self._fd, size - done, self._bases[region] + offset + done)
                except OSError as error:
                    raise self._refused(error, f"reading {size} bytes", region, offset) from None
                if not part:
                    raise TransportError(f"{self._name}: only {done} of {size} bytes at {offset:#x} of region {region} "
                                         "could be read", errno=errno.EIO)
                parts.append(part)
                done += len(part)
            result = b"".join(parts)
            if size and result.count(0xFF) == size:
                self.check_present()
        return result

    def _pwrite(self, region: int, offset: int, data: bytes | memoryview) -> None:
        with self._lock:
            self._check_open()
            done = 0
            while done < len(data):
                try:
                    count = os.pwrite(self._fd, data[done:], self._bases[region] + offset + done)
                except OSError as error:
                    raise self._refused(error, f"writing {len(data)} bytes", region, offset) from None
                if not count:
                    raise TransportError(f"{self._name}: only {done} of {len(data)} bytes at {offset:#x} of region "
                                         f"{region} could be written", errno=errno.EIO)
                done += count

    def _refused(self, error: OSError, verb: str, region: int, offset: int) -> MaiaError:
        what = f"{self._name}: {verb} at {offset:#x} of region {region}"
        if error.errno == errno.EIO and region < uapi.PciRegion.CONFIG:
            return TransportError(
                f"{what}: {os.strerror(errno.EIO)}", errno=errno.EIO,
                cause="the function's memory space is off in its command register, or it sleeps (D3)",
                hint="turn it on: maia_rt.pci.config.set_memory_space")
        return refusal(error, what)
