"""Staging: pinned memory through which a stream copies from and to memory that the device cannot reach."""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple, Protocol

from maia_rt.memory import PinnedBlock
from maia_rt.queue import QueuePair

STAGING_BYTES: Final = 2 << 20
CHUNK_BYTES: Final = 256 << 10
"""A chunk fits into a core's cache, so its second copy does not go to memory again."""


_WORD_BYTES: Final = 64


class Target(Protocol):
    """Where staged bytes go."""

    def copy_from(self, address: int, start: int, size: int, /) -> None:
        """Take `size` bytes from an address in this process; `start` is where they go."""


class _Piece(NamedTuple):
    end: int
    address: int
    size: int
    queue: QueuePair
    sequence: int
    target: Target | None
    start: int


class Staging:
    """A ring of bytes. Pieces are taken in order and come back in order, as the queue's commands that use them retire.

    Not thread safe: the stream's lock is held around every call.

    Parameters
    ----------
    block : PinnedBlock
        The memory; given back by :meth:`close`.
    timeout : float
        How long it waits for a piece, in seconds.
    """

    def __init__(self, block: PinnedBlock, timeout: float) -> None:
        self._timeout = timeout
        self._block = block
        self._size = block.size - _WORD_BYTES
        self._head = self._tail = self._end = self._at = self._taken = 0
        self._used: deque[_Piece] = deque()

    def take(self, size: int) -> tuple[int, int]:
        """Return a free piece, as device address and host address; wait for the oldest ones where there is none.

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
        self._end = self._head + skip + rounded
        self._at = 0 if skip else start
        self._taken = size
        return self._block.iova + self._at, self._block.address + self._at

    def use(self, mark: tuple[QueuePair, int], target: Target | None = None, start: int = 0) -> None:
        """Say up to which command of which queue the stream uses the piece just taken.

        And to where in `target` its contents go when that is done.
        """
        self._head = self._end
        self._used.append(_Piece(self._end, self._block.address + self._at, self._taken, *mark, target, start))

    def finish(self) -> None:
        """Wait until everything that has a target is there."""
        while any(piece.target is not None for piece in self._used):
            self._finish_oldest()

    def forget_targets(self) -> None:
        """Leave the targets alone: the copy that named them has failed."""
        self._used = deque(piece._replace(target=None) for piece in self._used)

    @property
    def word(self) -> int:
        """The device address of a word that is the stream's own, for checksums."""
        return self._block.iova + self._size

    def read_word(self) -> int:
        """Return what the word holds."""
        return int.from_bytes(self._block.view()[self._size:self._size + 4], "little")

    def reset(self) -> None:
        """Take everything back: the queue has been reset."""
        self._used.clear()
        self._tail = self._head

    def close(self) -> None:
        """Give the memory back; the device must be done with it."""
        self._used.clear()
        self._block.free()

    def _finish_oldest(self) -> None:
        piece = self._used[0]
        piece.queue.wait(piece.sequence, self._timeout)
        if piece.target is not None:
            piece.target.copy_from(piece.address, piece.start, piece.size)
        self._used.popleft()
        self._tail = piece.end
