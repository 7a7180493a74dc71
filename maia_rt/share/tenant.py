"""A client's part of the device: its context, queues and programs, from its boot to its end."""

from __future__ import annotations

import collections
import contextlib
import os
import select
import threading
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from maia_rt.contract.commands import DOORBELL_STRIDE, FAULT_LOG_ENTRIES, QueueState
from maia_rt.contract.registers import BAR0
from maia_rt.errors import MaiaError
from maia_rt.firmware import Firmware
from maia_rt.memory import DmaRegion, PinnedPool
from maia_rt.share.client_memory import ClientMaps
from maia_rt.share.partition import Partition
from maia_rt.transport.protocol import Transport
from maia_rt.transport.uapi import PciIrq

_FAULT: Final = BAR0["ERRORS"].field("FAULT").mask
_STATE_OFFSET: Final = 8


class Tenant:
    """What one client has of a device. Its session's thread and the broker's call; one lock orders them.

    Parameters
    ----------
    transport : Transport
    firmware : Firmware
    pool : PinnedPool
        The broker's.
    partition : Partition

    Attributes
    ----------
    maps : ClientMaps
    doorbells : DmaRegion
        The client's doorbell pages, one a queue, in memory of the broker's that the client maps: it rings its queues
        without the broker, and cannot take the page away.
    queues : dict
        The share's numbers of the queues there are, and where their progress blocks lie.
    programs : dict
        First handle -> kernels.
    errors : int
        The share's ERRORS register.
    faults : deque of FAULT records
        As the device gave them, newest last.
    """

    def __init__(self, transport: Transport, firmware: Firmware, pool: PinnedPool, partition: Partition) -> None:
        self._transport = transport
        self._firmware = firmware
        self._pool = pool
        self.partition = partition
        self.maps = ClientMaps(transport, partition)
        self.lock = threading.RLock()
        self.context = 0
        self.queues: dict[int, int] = {}
        self.programs: dict[int, int] = {}
        self.errors = 0
        self.faults: collections.deque[npt.NDArray[Any]] = collections.deque(maxlen=FAULT_LOG_ENTRIES)
        self._known_stopped: set[int] = set()
        self._event_fd = -1
        self.doorbells = DmaRegion(partition.queues * DOORBELL_STRIDE)
        try:
            self._doorbells_iova = pool.map(self.doorbells)
        except BaseException:
            self.doorbells.release()
            raise

    # --- life --------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make the client's context."""
        with self.lock:
            self.context = self._firmware.create_context(self.partition.ranges, self.partition.bounds)
            self.errors = 0
            self.faults.clear()
            self.doorbells.view()[:] = bytes(self.doorbells.size)

    def end(self) -> None:
        """Delete all that the client made, and leave nothing to read of it: memory, SRAM and semaphores are zero."""
        with self.lock:
            for queue in list(self.queues):
                self._firmware.delete_queue(self.partition.first_queue + queue)
                del self.queues[queue]
            self.programs.clear()
            self._known_stopped.clear()
            if self.context:
                self._firmware.delete_context(self.context, scrub=True)
                self.context = 0

    def close(self) -> None:
        """End, and let go of the client's memory and descriptors.

        Raises
        ------
        MaiaError
            The device did not do so: its share must not be given to anybody else.
        """
        try:
            self.end()
            self.maps.unmap_all()
            self.clear_vectors()
        finally:
            self._drop_event_fd()
            with contextlib.suppress(MaiaError):
                self._pool.unmap(self._doorbells_iova)
            self.doorbells.release()

    def doorbell(self, queue: int) -> int:
        """The host address of a queue's doorbell page."""
        return self._doorbells_iova + queue * DOORBELL_STRIDE

    # --- interrupts --------------------------------------------------------------------------------------------------

    def set_vector(self, vector: int, fd: int) -> None:
        """Send a vector to an eventfd of the client's, which stays the caller's: the device writes to it itself."""
        if vector == 0:
            self._drop_event_fd()
            self._event_fd = os.dup(fd)
        else:
            self._transport.irq_enable(PciIrq.MSIX, self.partition.first_queue + vector, [fd])

    def clear_vectors(self) -> None:
        """Send all vectors to nobody."""
        self._drop_event_fd()
        first = 1 + self.partition.first_queue
        self._transport.irq_enable(PciIrq.MSIX, first, self._firmware.vectors[first:first + self.partition.queues])

    def fire(self) -> None:
        """Fire vector 0."""
        with self.lock:
            if self._event_fd < 0:
                return
            room = select.poll()
            room.register(self._event_fd, select.POLLOUT)
            if room.poll(0):        # else its counter is at the top, and who waits for it awake
                os.eventfd_write(self._event_fd, 1)

    def _drop_event_fd(self) -> None:
        with self.lock:
            fd, self._event_fd = self._event_fd, -1
            if fd >= 0:
                os.close(fd)

    # --- faults ------------------------------------------------------------------------------------------------------

    def look(self) -> bool:
        """Say whether a queue of the client's has stopped since the last look."""
        with self.lock:
            stopped = {queue for queue, progress in self.queues.items() if self._state(progress) == QueueState.STOPPED}
            new = stopped - self._known_stopped
            self._known_stopped = stopped
            return bool(new)

    def _state(self, progress: int) -> int:
        try:
            return int.from_bytes(self.maps.read(progress + _STATE_OFFSET, 4), "little")
        except OSError:
            return QueueState.RUNNING       # the client has unmapped it, and will not be told

    def note(self, faults: npt.NDArray[Any]) -> None:
        """Keep the records of the client's queues that are new."""
        first, count = self.partition.first_queue, self.partition.queues
        with self.lock:
            newest = self.faults[-1]["time_ns"] if self.faults else 0
            for row in faults:
                if first <= row["queue"] < first + count and row["time_ns"] > newest and self.context:
                    self.faults.append(row.copy())

    def tell(self) -> None:
        """Set ERRORS.FAULT, and fire vector 0."""
        with self.lock:
            self.errors |= _FAULT
        self.fire()

    def forget_stop(self, queue: int) -> None:
        """A queue was reset: its next stop is news."""
        with self.lock:
            self._known_stopped.discard(queue)


def as_rows(found: list[npt.NDArray[Any]], dtype: np.dtype[np.void]) -> bytes:
    """Records one behind the other."""
    return b"".join(row.tobytes() for row in np.array(found, dtype)) if found else b""
