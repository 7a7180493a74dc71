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


class _Freed(NamedTuple):
    start: int
    nbytes: int
    text: str


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
        self._freed: deque[_Freed] = deque(maxlen=_REMEMBERED)
        self.closings = 0

    def forget(self, address: int, nbytes: int, text: str) -> None:
        """Remember that memory was given back; `text` says what it was."""
        self._freed.append(_Freed(address, nbytes, text))
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
                return f"{address - freed.start} bytes into {freed.text}, which was closed"
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
