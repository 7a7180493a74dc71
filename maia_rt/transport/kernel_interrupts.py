"""The interrupts of a function under the kernel's VFIO: which vectors signal which eventfds.

Source: Linux 6.12, drivers/vfio/pci/vfio_pci_intrs.c. What it does that its header does not say:

- One of INTx, MSI and MSI-X is enabled at a time.
- Where one vector of a request cannot be had, the kernel disables every vector that the request named, also those
  that were enabled before.
- Where the host has fewer vectors to give than asked for, the call succeeds and returns how many there are.
- Since Linux 6.5 vectors are added to an enabled MSI-X set (NORESIZE is clear); otherwise the set is enabled anew.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import logging
import os
from collections.abc import Callable, Sequence
from typing import Final

from maia_rt.errors import DeviceBusy, DeviceLost, InvalidArgument, MaiaError, ResourceExhausted, Unsupported
from maia_rt.transport import kernel_uapi as k
from maia_rt.transport import uapi
from maia_rt.transport.protocol import IrqInfo, check_irq
from maia_rt.transport.uapi import PciIrq

_log = logging.getLogger(__name__)
_EXCLUSIVE: Final = (PciIrq.INTX, PciIrq.MSI, PciIrq.MSIX)


class KernelInterrupts:
    """The enabled vectors of a function. Not locked: the device that owns it is.

    It keeps duplicates of the eventfds: their numbers may be closed, and be another file's, by the time a set has to be
    enabled anew.

    Parameters
    ----------
    name : str
        For error texts.
    irqs : sequence of IrqInfo
    call : callable
        ``call(request, argument, what) -> int`` issues an ioctl on the function.
    """

    def __init__(self, name: str, irqs: Sequence[IrqInfo], call: Callable[[int, bytearray, str], int]) -> None:
        self._name = name
        self._irqs = irqs
        self._call = call
        self._vectors: dict[int, list[int]] = {}

    @property
    def enabled(self) -> list[int]:
        """The interrupt indexes with vectors."""
        return sorted(self._vectors)

    def enable(self, index: int, start: int, eventfds: Sequence[int]) -> None:
        """Send vectors to eventfds; -1 takes a vector away."""
        check_irq(self._name, self._irqs, index, start=start, count=len(eventfds), flag=uapi.IRQ_FLAG_EVENTFD)
        for other in self._vectors:
            if other != index and {index, other} <= set(_EXCLUSIVE):
                raise InvalidArgument(
                    f"{self._name}: {PciIrq(other).name} is enabled, so {PciIrq(index).name} cannot be",
                    cause="a function signals in one way at a time", hint=f"irq_disable({int(other)}) first")
        copies = self._duplicate(eventfds)
        before = self._vectors.get(index, [])
        after = before + [-1] * (start + len(copies) - len(before))
        after[start:start + len(copies)] = copies
        try:
            if before and len(after) > len(before) and self._irqs[index].flags & uapi.IRQ_FLAG_NORESIZE:
                self._enable_anew(index, before, after)
            else:
                self._enable_some(index, start, before, copies)
        except BaseException:
            _close(copies)
            raise
        replaced = before[start:start + len(copies)]
        self._vectors[index] = after
        _close(replaced)

    def _duplicate(self, eventfds: Sequence[int]) -> list[int]:
        copies: list[int] = []
        try:
            for fd in eventfds:
                copies.append(os.dup(fd) if fd >= 0 else -1)
        except OSError as error:
            _close(copies)
            if error.errno == errno.EBADF:
                raise InvalidArgument(f"{self._name}: descriptor {fd} is not open",
                                      hint="keep the eventfds open until the vectors are enabled") from None
            raise ResourceExhausted(f"{self._name}: no descriptor is left for {len(eventfds)} eventfds: "
                                    f"{error.strerror}", hint="raise ulimit -n") from None
        return copies

    def _enable_some(self, index: int, start: int, before: list[int], copies: list[int]) -> None:
        try:
            self._trigger(index, uapi.IRQ_SET_DATA_EVENTFD, start, copies)
        except MaiaError:
            kept = before[start:start + len(copies)]
            if kept:
                self._restore(index, start, kept)
            raise

    def _enable_anew(self, index: int, before: list[int], after: list[int]) -> None:
        self._trigger(index, uapi.IRQ_SET_DATA_NONE, 0, ())
        try:
            self._trigger(index, uapi.IRQ_SET_DATA_EVENTFD, 0, after)
        except BaseException:
            self._restore(index, 0, before)
            raise
        finally:
            # What fired between the two is lost. A signal too many makes everybody look; one too few, nobody.
            with contextlib.suppress(MaiaError):
                self.trigger(index, 0, len(before))

    def _restore(self, index: int, start: int, fds: list[int]) -> None:
        try:
            self._trigger(index, uapi.IRQ_SET_DATA_EVENTFD, start, fds)
        except MaiaError as error:
            _log.error("%s: vectors %d to %d of interrupt index %d are lost: %s", self._name, start,
                       start + len(fds) - 1, index, error)
            self._vectors[index][start:start + len(fds)] = [-1] * len(fds)
            _close(fds)

    def disable(self, index: int) -> None:
        """Disable every vector of an interrupt index; nothing where none is enabled."""
        check_irq(self._name, self._irqs, index, start=0, count=1)
        if index in self._vectors:
            self._trigger(index, uapi.IRQ_SET_DATA_NONE, 0, ())
            _close(self._vectors.pop(index))

    def mask(self, index: int, start: int, count: int) -> None:
        """Hold vectors back."""
        self._maskable(index, start, count)
        self._set(uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_MASK, index, start, count)

    def unmask(self, index: int, start: int, count: int) -> None:
        """Let vectors through again."""
        self._maskable(index, start, count)
        self._set(uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_UNMASK, index, start, count)

    def unmask_by(self, index: int, eventfd: int) -> None:
        """Let vector 0 through again whenever `eventfd` is signalled; -1 ends that."""
        self._maskable(index, 0, 1)
        self._set(uapi.IRQ_SET_DATA_EVENTFD | uapi.IRQ_SET_ACTION_UNMASK, index, 0, 1,
                  array.array("i", [eventfd]).tobytes())

    def _maskable(self, index: int, start: int, count: int) -> None:
        check_irq(self._name, self._irqs, index, start=start, count=count, flag=uapi.IRQ_FLAG_MASKABLE)
        self._check_enabled(index)

    def trigger(self, index: int, start: int, count: int) -> None:
        """Fire vectors as if the device had."""
        check_irq(self._name, self._irqs, index, start=start, count=count)
        if index in _EXCLUSIVE:
            self._check_enabled(index)
        self._set(uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_TRIGGER, index, start, count)

    def _check_enabled(self, index: int) -> None:
        if index not in self._vectors:
            raise InvalidArgument(f"{self._name}: no vector of interrupt index {index} is enabled",
                                  hint="irq_enable it first")

    def notify(self, index: int, eventfd: int) -> None:
        """Have ERR or REQ signalled to an eventfd that its owner keeps."""
        self._trigger(index, uapi.IRQ_SET_DATA_EVENTFD, 0, [eventfd])

    def _trigger(self, index: int, data: int, start: int, fds: Sequence[int]) -> None:
        self._set(data | uapi.IRQ_SET_ACTION_TRIGGER, index, start, len(fds), array.array("i", fds).tobytes())

    def _set(self, flags: int, index: int, start: int, count: int, data: bytes = b"") -> None:
        what = f"VFIO_DEVICE_SET_IRQS of {count} vectors from {start} on of index {index}"
        size = ctypes.sizeof(k.VfioIrqSet) + len(data)
        request = bytearray(k.VfioIrqSet(size, flags, index, start, count)) + data
        try:
            there = self._call(k.VFIO_DEVICE_SET_IRQS, request, what)
        except (DeviceBusy, DeviceLost) as error:
            if index != PciIrq.INTX or not data:
                raise
            if isinstance(error, DeviceLost):  # ENODEV means something else here
                raise Unsupported(f"{self._name}: no interrupt line leads from the function to the host",
                                  hint="use MSI or MSI-X, or poll") from None
            raise DeviceBusy(f"{self._name}: the interrupt line is another device's too",
                             cause="the function cannot mask its INTx, so it would need the line to itself",
                             hint="use MSI or MSI-X") from None
        if there > 0:
            raise ResourceExhausted(f"{self._name}: {what}: the host can give it {there}",
                                    cause="interrupt remapping is off, or the host's vectors are used up",
                                    hint=f"enable vectors 0 to {there - 1} only")

    def close(self) -> None:
        """Close the duplicates; idempotent. The kernel disables the vectors with the function's last descriptor."""
        for fds in self._vectors.values():
            _close(fds)
        self._vectors.clear()


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)
