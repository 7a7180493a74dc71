"""Host memory that devices reach: a sealed file in memory, shared with whoever gets its descriptor."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import warnings
from pathlib import Path
from types import TracebackType
from typing import Final

from maia_rt.errors import ClosedError, ForkedError, InvalidArgument, OutOfMemory, TransportError
from maia_rt.transport import fork
from maia_rt.transport.mapping import PAGE_SIZE, SharedMapping

_log = logging.getLogger(__name__)
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_said: set[str] = set()


class DmaRegion:
    """A piece of host memory for DMA; a :class:`maia_rt.transport.DmaMemory`.

    The memory is a memfd, so that a vfio-user server can map the same pages, sealed against resizing: neither process
    can make the other trip over a shortened file. Its pages exist from the start, a touch never fails. Forked children
    do not get it.

    Parameters
    ----------
    size : int
        In bytes, rounded up to whole pages.
    huge_pages : bool
        Whether to try huge pages for a size of at least one. Where the host has none, ordinary pages are used and the
        log says once why.
    name : str
        Shows in ``/proc/PID/maps``.

    Raises
    ------
    OutOfMemory
        The host has not so much.
    """

    def __init__(self, size: int, *, huge_pages: bool = True, name: str = "maia-dma") -> None:
        if size <= 0:
            raise InvalidArgument(f"a DMA region's size must be positive, not {size}")
        self._pid = os.getpid()
        self._closed = False
        huge = huge_page_size()
        self._fd = -1
        if huge_pages and huge and size >= huge:
            self._try_huge(size, huge, name)
        if self._fd < 0:
            # The kernel would not refuse: it would start to kill processes.
            available = _meminfo("MemAvailable")
            if available and size > available:
                raise OutOfMemory(f"the host has {available} bytes left, a DMA region of {size} was asked for",
                                  hint="free memory, or use smaller buffers")
            self._make(size, PAGE_SIZE, name, 0)
        fork.follow(self)

    def _try_huge(self, size: int, page: int, name: str) -> None:
        try:
            self._make(size, page, name, os.MFD_HUGETLB)
        except (OSError, OutOfMemory) as error:
            # The amount differs from call to call; what is said once is that the host lacks huge pages.
            reason = f"no {page >> 10} KiB huge pages for DMA memory, using {PAGE_SIZE >> 10} KiB pages"
            if reason not in _said:
                _said.add(reason)
                _log.info("%s: %s (reserve some in /proc/sys/vm/nr_hugepages)", reason, error)

    def _make(self, size: int, page: int, name: str, flags: int) -> None:
        size = -(-size // page) * page
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
        try:
            os.ftruncate(fd, size)
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                    raise
                raise OutOfMemory(f"the host has no {size} bytes for a DMA region: {error.strerror}",
                                  hint="free memory, or use smaller buffers") from None
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            try:
                self._mapping = SharedMapping(fd, size)
            except TransportError as error:
                raise OutOfMemory(f"a DMA region of {size} bytes cannot be mapped: {error.what}") from None
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self.page_size = page
        """The size of its pages, in bytes."""

    @property
    def fd(self) -> int:
        """The memfd."""
        return self._fd

    @property
    def offset(self) -> int:
        """Where in the file the memory starts: 0."""
        return 0

    @property
    def size(self) -> int:
        """Bytes, a multiple of the page size."""
        return self._mapping.size

    @property
    def address(self) -> int:
        """The address in this process."""
        return self._mapping.address

    @property
    def closed(self) -> bool:
        """Whether close or release has been called."""
        return self._closed

    def view(self) -> memoryview:
        """Return the memory as writable bytes. It lives as long as any view.

        Raises
        ------
        ClosedError
        ForkedError
            In a child made by fork, which does not have the memory.
        """
        if os.getpid() != self._pid:
            raise ForkedError("the DMA region was made before fork", hint="make a new one in the child")
        if self._closed:
            raise ClosedError("the DMA region has been closed")
        return self._mapping.view()

    def close(self) -> None:
        """Give the memory back; idempotent.

        Raises
        ------
        InvalidArgument
            A view is still held, by a buffer, an array, or a transport that has it mapped. Nothing was changed.
        """
        if self._closed or os.getpid() != self._pid:
            return
        if not self._mapping.try_close():
            raise InvalidArgument(f"a DMA region of {self.size} bytes is still in use",
                                  cause="a view of it, an array over it, or a device mapping lives",
                                  hint="unmap it and release the views first")
        self.release()

    def release(self) -> None:
        """Let go: the memory goes now, or with the last view of it. For owners that close while users hold views."""
        if not self._closed and os.getpid() == self._pid:
            self._closed = True
            self._mapping.release()
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> DmaRegion:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and os.getpid() == self._pid and self._fd >= 0:
            warnings.warn(f"a DMA region of {self.size} bytes was not closed", ResourceWarning, stacklevel=2)
            self.release()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.size} bytes, {self.page_size >> 10} KiB pages"
        return f"<DmaRegion {state}>"

    def _after_fork(self) -> None:
        # The child's copy of the descriptor would keep the memory alive after its owner freed it.
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def huge_page_size() -> int:
    """Return the host's default huge page size in bytes, 0 where it has none."""
    return _meminfo("Hugepagesize")


def _meminfo(key: str) -> int:
    """Return a line of ``/proc/meminfo`` in bytes, 0 where it is missing."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    return 0
