"""What lies at a device address, or once did: for the texts of faults."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from maia_rt.runtime.buffer import Memory

NEAR: Final = 1 << 20
"""Bytes from a buffer within which an address is taken for a slip off its end."""
_REMEMBERED: Final = 1024


class Freed(NamedTuple):
    """What is left of memory that was given back; its text is made when somebody asks."""

    kind: str
    start: int
    nbytes: int
    dtype: object
    shape: tuple[int, ...]
    place: object

    def __str__(self) -> str:
        what = f"{self.nbytes} bytes" if self.dtype is None else f"{self.dtype} {self.shape}"
        where = f", freed at {self.place}" if self.place else ""
        return f"<{self.kind} {what} at {self.start:#x}{where}>"


class AddressBook:
    """The buffers of a device by address, and the newest of those that were freed.

    Parameters
    ----------
    memories : set
        Those that were made and are still referred to. It is read only when an address is looked up.

    Attributes
    ----------
    closings : int
        How often memory or a program was closed: graphs look again at what they use where it has changed.
    """

    def __init__(self, memories: Collection[Memory]) -> None:
        self._memories = memories
        self._freed: deque[Freed] = deque(maxlen=_REMEMBERED)
        self.closings = 0

    def forget(self, freed: Freed) -> None:
        """Remember that memory was given back, and what it was."""
        self._freed.append(freed)
        self.closings += 1

    def describe(self, address: int) -> str:
        """Say what an address hits or nearly hits.

        Returns
        -------
        str
            Such as ``in <Buffer ...>``, ``64 bytes past the end of <Buffer ...>``, ``in <Buffer ...>, which was
            closed``; empty where nothing is near.
        """
        found = [(memory._address, memory.nbytes, repr(memory)) for memory in self._open()]
        for start, nbytes, text in found:
            if start <= address < start + nbytes:
                return f"{address - start} bytes into {text}"
        for freed in reversed(self._freed):
            if freed.start <= address < freed.start + max(freed.nbytes, 1):
                return f"{address - freed.start} bytes into {freed}, which was closed"
        near = min(((_distance(address, start, nbytes), start, text) for start, nbytes, text in found), default=None)
        if near is None or near[0] > NEAR:
            return ""
        distance, start, text = near
        return f"{distance} bytes {'before' if address < start else 'past the end of'} {text}"

    def _open(self) -> list[Memory]:
        while True:
            try:
                return [memory for memory in list(self._memories) if not memory.closed]
            except RuntimeError:  # another thread has just allocated some
                continue


def _distance(address: int, start: int, nbytes: int) -> int:
    return start - address if address < start else address - (start + nbytes)
