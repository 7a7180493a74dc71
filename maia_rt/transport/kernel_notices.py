"""What the kernel tells the user of a function unasked: that it wants it back, and that PCI Express reported an error.

Both are interrupt indexes of VFIO with an eventfd each (``VFIO_PCI_REQ_IRQ_INDEX``, ``VFIO_PCI_ERR_IRQ_INDEX``). One
epoll descriptor stands for them, so that whoever waits for the device needs to watch one.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Sequence
from typing import Final

from maia_rt.errors import MaiaError
from maia_rt.transport.protocol import IrqInfo
from maia_rt.transport.uapi import PciIrq

INDEXES: Final = (PciIrq.REQ, PciIrq.ERR)


class Notices:
    """The eventfds of REQ and ERR, as far as a function has these.

    Parameters
    ----------
    irqs : sequence of IrqInfo
    send : callable
        ``send(index, eventfd)`` tells the kernel where to signal; it raises where the kernel refuses.
    """

    def __init__(self, irqs: Sequence[IrqInfo], send: Callable[[int, int], object]) -> None:
        self._fds: dict[int, int] = {}
        self._send = send
        self._poll = select.epoll()
        try:
            for index in INDEXES:
                if index < len(irqs) and irqs[index].count:
                    self._fds[index] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                    self._poll.register(self._fds[index], select.EPOLLIN)
                    self.listen(index)
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """Readable when there is a notice."""
        return self._poll.fileno()

    def listen(self, index: int) -> None:
        """Have the kernel signal `index` here, again after its user has taken it."""
        if index in self._fds:
            with contextlib.suppress(MaiaError):  # a kernel without it has nothing to tell
                self._send(index, self._fds[index])

    def take(self) -> dict[int, int]:
        """Return how often each index was signalled since the last call."""
        taken: dict[int, int] = {}
        for index, fd in self._fds.items():
            with contextlib.suppress(BlockingIOError):
                taken[index] = os.eventfd_read(fd)
        return taken

    def close(self) -> None:
        """Close the descriptors; idempotent. The kernel keeps its own hold on them until it is told otherwise."""
        self._poll.close()
        while self._fds:
            os.close(self._fds.popitem()[1])
