"""Staging: pinned memory through which a stream copies from and to memory that the device cannot reach."""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np
import numpy.typing as npt

from maia_rt.memory import PinnedBlock
from maia_rt.queue import QueuePair

STAGING_BYTES: Final = 2 << 20
CHUNK_BYTES: Final = 256 << 10
"""A chunk fits into a core's cache, so its second copy does not go to memory again."""

Bytes = npt.NDArray[np.uint8]


class Staging:
    """A ring of bytes. Pieces are taken in order and come back in order, as the queue's commands that use them retire.

    Not thread safe: the stream's lock is held around every call.

    Parameters
    ----------
    queue : QueuePair
    block : PinnedBlock
        The memory; given back by :meth:`close`.
    """

    def __init__(self, queue: QueuePair, block: PinnedBlock) -> None:
        self._queue = queue
        self._block = block
        self._bytes: Bytes = np.frombuffer(block.view(), np.uint8)
        self._size = len(self._bytes)
        self._head = self._tail = 0
        # (end of the piece, sequence of the command that uses it, where its contents go, the piece)
        self._used: deque[tuple[int, int, Bytes | None, Bytes]] = deque()
        self._piece = self._bytes[:0]

    def take(self, size: int) -> tuple[int, Bytes]:
        """Return a free piece, as device address and bytes; wait for the oldest ones where there is none.

        Raises
        ------
        DeviceFault, DeviceTimeout, DeviceLost
            Of the wait.
        """
        rounded = size + 63 & ~63
        start = self._head % self._size
        skip = self._size - start if start + rounded > self._size else 0
        while self._head + skip + rounded - self._tail > self._size:
            self._finish_oldest()
        start = (self._head + skip) % self._size
        self._end = self._head + skip + rounded
        self._piece = self._bytes[start:start + size]
        return self._block.iova + start, self._piece

    def use(self, sequence: int, target: Bytes | None = None) -> None:
        """Say which command uses the piece just taken, and where its contents go when the command is done."""
        self._head = self._end
        self._used.append((self._end, sequence, target, self._piece))

    def finish(self) -> None:
        """Wait until everything that has a target is there."""
        while any(target is not None for _, _, target, _ in self._used):
            self._finish_oldest()

    def forget_targets(self) -> None:
        """Leave the targets alone: the copy that named them has failed."""
        self._used = deque((end, sequence, None, piece) for end, sequence, _, piece in self._used)

    def reset(self) -> None:
        """Take everything back: the queue has been reset."""
        self._used.clear()
        self._tail = self._head

    def close(self) -> None:
        """Give the memory back; the device must be done with it."""
        self._used.clear()
        self._bytes = self._piece = self._bytes[:0].copy()
        self._block.free()

    def _finish_oldest(self) -> None:
        end, sequence, target, piece = self._used[0]
        self._queue.wait(sequence)
        if target is not None:
            np.copyto(target, piece)
        self._used.popleft()
        self._tail = end
