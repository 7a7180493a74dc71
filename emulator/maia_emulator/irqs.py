"""The function's interrupt indexes as VFIO numbers them, and the SET_IRQS message that works on them.

MSI-X carries everything that the device has to say. INTx is there because PCI software expects a pin: it answers
loopback triggers, the device never raises it by itself. ERR and REQ likewise wait for a client that tests them.
"""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from maia_rt.transport import wire

if TYPE_CHECKING:
    from maia_emulator.engine import Engine


class IrqIndex(Protocol):
    """What SET_IRQS needs of an interrupt index."""

    count: int
    flags: int

    def assign(self, vector: int, eventfd: int) -> None:
        """Give a vector an eventfd, of which a duplicate is kept, or -1 for none."""

    def mask(self, vector: int, masked: bool) -> None:
        """Mask or unmask a vector."""

    def trigger(self, vector: int) -> None:
        """Raise a vector."""


class MsixIrq:
    """The MSI-X vectors, which live in the engine."""

    flags = wire.IRQ_FLAG_EVENTFD | wire.IRQ_FLAG_MASKABLE

    def __init__(self, engine: Engine, count: int) -> None:
        self.count = count
        self.assign = engine.set_vector
        self.mask = engine.mask_vector
        self.trigger = engine.trigger


class LineIrq:
    """An index of one interrupt, or of none.

    Parameters
    ----------
    flags : int
        IRQ_FLAG_*. With IRQ_FLAG_AUTOMASKED a delivered interrupt masks itself, as a level-triggered one must.
    """

    def __init__(self, flags: int, count: int = 1) -> None:
        self.flags = flags
        self.count = count
        self._lock = threading.Lock()
        self._eventfd = -1
        self._masked = False
        self._pending = False

    def assign(self, vector: int, eventfd: int) -> None:
        """Give the interrupt an eventfd, of which a duplicate is kept, or -1 for none; either way it is unmasked."""
        kept = os.dup(eventfd) if eventfd >= 0 else -1
        with self._lock:
            old, self._eventfd = self._eventfd, kept
            self._masked = self._pending = False
        if old >= 0:
            os.close(old)

    def mask(self, vector: int, masked: bool) -> None:
        """Mask or unmask; what came meanwhile is delivered when unmasked."""
        with self._lock:
            self._masked = masked
            if self._pending and not masked:
                self._deliver()

    def trigger(self, vector: int) -> None:
        """Raise the interrupt."""
        with self._lock:
            self._pending = True
            if not self._masked:
                self._deliver()

    def _deliver(self) -> None:
        if self._eventfd < 0:
            return
        self._pending = False
        self._masked = bool(self.flags & wire.IRQ_FLAG_AUTOMASKED)
        room = select.poll()
        room.register(self._eventfd, select.POLLOUT)
        if room.poll(0):  # else its counter is at the top: the client has an interrupt to find already
            os.eventfd_write(self._eventfd, 1)


def set_irqs(indexes: Sequence[IrqIndex], body: bytes, fds: Sequence[int]) -> None:
    """Check a SET_IRQS message in every respect, then do what it says (vfio-user: DEVICE_SET_IRQS).

    Raises
    ------
    OSError
        EINVAL, with nothing changed.
    """
    if len(body) < wire.IRQ_SET.size:
        raise _invalid(f"{len(body)} bytes")
    argsz, flags, number, start, count = wire.IRQ_SET.unpack_from(body)
    data = flags & wire.IRQ_SET_DATA_MASK
    action = flags & wire.IRQ_SET_ACTION_MASK_ALL
    bools = body[wire.IRQ_SET.size :]
    if flags & ~(wire.IRQ_SET_DATA_MASK | wire.IRQ_SET_ACTION_MASK_ALL):
        raise _invalid(f"flags {flags:#x}")
    if data.bit_count() != 1 or action.bit_count() != 1:
        raise _invalid(f"flags {flags:#x} name not exactly one kind of data and one action")
    if number >= len(indexes):
        raise _invalid(f"index {number}")
    index = indexes[number]
    if argsz < wire.IRQ_SET.size or len(bools) != (count if data == wire.IRQ_SET_DATA_BOOL else 0):
        raise _invalid(f"argsz {argsz}, {len(bools)} bytes of data for {count} interrupts")
    if data == wire.IRQ_SET_DATA_BOOL and argsz < wire.IRQ_SET.size + count:
        raise _invalid(f"argsz {argsz} leaves out some of {count} bool bytes")
    if fds and (data != wire.IRQ_SET_DATA_EVENTFD or len(fds) != count):
        raise _invalid(f"{len(fds)} descriptors for {count} interrupts")
    trigger = action == wire.IRQ_SET_ACTION_TRIGGER
    if count == 0:
        if data != wire.IRQ_SET_DATA_NONE or not trigger or start:
            raise _invalid("count 0 means disabling the index: DATA_NONE, ACTION_TRIGGER, start 0")
        for vector in range(index.count):
            index.assign(vector, -1)
        return
    if start + count > index.count:
        raise _invalid(f"interrupts {start} to {start + count - 1} of {index.count}")
    if not trigger and not index.flags & wire.IRQ_FLAG_MASKABLE:
        raise _invalid(f"index {number} cannot be masked")
    vectors = range(start, start + count)
    if data == wire.IRQ_SET_DATA_EVENTFD:
        if not trigger:
            raise _invalid("masking through an eventfd is not offered")
        if not all(is_eventfd(fd) for fd in fds):
            raise _invalid("a descriptor is no eventfd")
        for vector, fd in zip(vectors, fds or [-1] * count, strict=True):
            index.assign(vector, fd)
        return
    for vector in (v for i, v in enumerate(vectors) if data == wire.IRQ_SET_DATA_NONE or bools[i]):
        if trigger:
            index.trigger(vector)
        else:
            index.mask(vector, action == wire.IRQ_SET_ACTION_MASK)


def is_eventfd(fd: int) -> bool:
    """Whether a descriptor is an eventfd: writing to anything else could block an engine."""
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"


def _invalid(what: str) -> OSError:
    return OSError(errno.EINVAL, f"SET_IRQS: {what}")
