"""Interrupts of a device as eventfds that are waited for with a deadline."""

from __future__ import annotations

import contextlib
import os
import select
import time
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Final

from maia_rt.errors import ClosedError, DeviceTimeout, ForkedError, InvalidArgument, MaiaError, Unsupported
from maia_rt.transport import fork
from maia_rt.transport.protocol import Transport
from maia_rt.transport.uapi import PciIrq

_BEST_FIRST: Final = (PciIrq.MSIX, PciIrq.MSI, PciIrq.INTX)


class Interrupts:
    """Vectors of one kind, enabled, each with an eventfd that counts how often it fired.

    MSI and MSI-X are writes of the device to memory: they arrive only while its bus mastering is on
    (:meth:`ConfigSpace.enable`). Any thread may call; several threads may wait for different vectors.

    Parameters
    ----------
    transport : Transport
    count : int
        How many vectors, from 0 on.
    kind : PciIrq, optional
        By default the best that has so many vectors: MSI-X, MSI, INTx.

    Attributes
    ----------
    kind : PciIrq
    fds : sequence of int
        The eventfds by vector, non-blocking, for a poll or event loop of one's own.

    Raises
    ------
    Unsupported
        The device has not so many vectors of the kind, or of any.

    Examples
    --------
    >>> with Interrupts(device, 2) as interrupts:                                           # doctest: +SKIP
    ...     start_the_device()
    ...     interrupts.wait(1, timeout=2.0)
    """

    def __init__(self, transport: Transport, count: int = 1, *, kind: PciIrq | None = None) -> None:
        self._closed = self._forked = False
        self._fds: list[int] = []
        if count < 1:
            raise InvalidArgument(f"{transport.name}: {count} vectors were asked for; there is vector 0 at least")
        have = {one: transport.irqs[one].count for one in PciIrq if one < len(transport.irqs)}
        if kind is None:
            kind = next((one for one in _BEST_FIRST if have.get(one, 0) >= count), None)
        if kind is None or have.get(kind, 0) < count:
            wanted = f"{count} {'' if kind is None else kind.name + ' '}vector{'s' * (count > 1)}"
            raise Unsupported(f"{transport.name}: the device has not the {wanted} asked for",
                              cause="it has " + ", ".join(f"{have.get(one, 0)} of {one.name}" for one in _BEST_FIRST),
                              hint="ask for fewer vectors, or poll")
        self._transport = transport
        self.kind = kind
        try:
            self._enable(count)
        except BaseException:
            self._close_fds()
            raise
        fork.follow(self)

    def _enable(self, count: int) -> None:
        first = len(self._fds)
        new: list[int] = []
        try:
            for _ in range(count):
                new.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self._transport.irq_enable(self.kind, first, new)
        except BaseException:
            for fd in new:
                os.close(fd)
            raise
        self._fds += new

    @property
    def fds(self) -> Sequence[int]:
        """The eventfds by vector."""
        return tuple(self._fds)

    def __len__(self) -> int:
        """How many vectors are enabled."""
        return len(self._fds)

    def add(self, count: int = 1) -> int:
        """Enable `count` more vectors; return the number of the first of them.

        Kernels before 6.5, and MSI always, cannot add to vectors that are enabled: the transport then enables the whole
        set anew and fires the earlier vectors once, since one that fired meanwhile was lost. Begin with all of them, or
        take a vector for a reason to look at the device, not for an answer.

        Raises
        ------
        Unsupported, InvalidArgument
            There are not so many. Nothing was changed.
        """
        self._check(0)
        first = len(self._fds)
        self._enable(count)
        return first

    def wait(self, vector: int = 0, *, timeout: float = 5.0) -> int:
        """Wait for a vector; return how often it fired since the last look.

        Parameters
        ----------
        vector : int
        timeout : float
            In seconds.

        Raises
        ------
        DeviceTimeout
            It did not fire in time.
        DeviceLost
            The device went away meanwhile.
        """
        fd = self._check(vector)
        liveness = self._transport.liveness_fd
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if liveness is not None:
            poll.register(liveness, select.POLLIN | select.POLLRDHUP)
        deadline = time.monotonic() + timeout
        while True:
            remaining = max(0.0, deadline - time.monotonic())
            ready = {one for one, _ in poll.poll(remaining * 1000)}
            count = self.take(vector)
            if count:
                return count
            if liveness in ready and not self._transport.service():
                time.sleep(0.0005)  # an answer to another thread, which will take it
            if not remaining:
                raise DeviceTimeout(
                    f"{self._transport.name}: {self.kind.name} vector {vector} did not fire within {timeout:g} s",
                    cause="the device has nothing to say, its interrupt is masked, or its bus mastering is off",
                    hint="look at the device's interrupt registers and at the command register")

    def take(self, vector: int = 0) -> int:
        """Return how often a vector fired since the last look, 0 for not at all; never waits."""
        fd = self._check(vector)
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(fd)
        return 0

    def rearm(self) -> None:
        """Let the next interrupt through, once the device has been told that this one was seen.

        INTx is a level, which the kernel masks when it fires: without this call there is no second one. MSI and MSI-X
        need nothing, and nothing is done, so that a driver need not know which it has.
        """
        self._check(0)
        if self.kind == PciIrq.INTX:
            self._transport.irq_unmask(self.kind)

    def trigger(self, vector: int = 0, count: int = 1) -> None:
        """Fire vectors without the device: shows that the way from the kernel or the server to here is open."""
        self._check(vector)
        self._transport.irq_trigger(self.kind, vector, count)

    def _check(self, vector: int) -> int:
        if self._forked:
            raise ForkedError(f"{self._transport.name}: the interrupts were enabled before fork",
                              hint="open the device anew in the child")
        if self._closed:
            raise ClosedError(f"{self._transport.name}: the interrupts have been closed")
        if not 0 <= vector < len(self._fds):
            raise InvalidArgument(f"{self._transport.name}: vector {vector} is not among the {len(self._fds)} enabled",
                                  hint="enable more of them")
        return self._fds[vector]

    @property
    def closed(self) -> bool:
        """Whether close has been called."""
        return self._closed

    def close(self) -> None:
        """Disable the vectors and close the eventfds; idempotent, also where the device is gone or closed."""
        if self._closed:
            return
        self._closed = True
        if not self._forked:
            with contextlib.suppress(MaiaError):
                self._transport.irq_disable(self.kind)
        self._close_fds()

    def _close_fds(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def _after_fork(self) -> None:
        self._forked = True
        self._close_fds()

    def __enter__(self) -> Interrupts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # The transport is not called: the garbage collector may run this inside one of its calls.
        if getattr(self, "_fds", None):
            if not self._forked:
                warnings.warn(f"{self._transport.name}: the interrupts were not closed", ResourceWarning, stacklevel=2)
            self._close_fds()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._fds)} vectors"
        return f"<Interrupts {self._transport.name}: {self.kind.name}, {state}>"
