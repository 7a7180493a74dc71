"""Waiting for a word that a device changes, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from maia_rt.errors import DeviceTimeout, InvalidArgument

_SHORTEST_PAUSE: Final = 1e-6
_LONGEST_PAUSE: Final = 0.01


def poll_until(read: Callable[[], int], *, mask: int, value: int, timeout: float, what: str) -> int:
    """Call `read` until its bits in `mask` are `value`: at once, then ever less often, up to every 10 ms.

    Parameters
    ----------
    read : callable
        Returns the word: ``partial(words.read32, offset)``.
    mask, value : int
    timeout : float
        In seconds. The word is read at least once, and once after the deadline.
    what : str
        Who should change it, for the error text.

    Returns
    -------
    int
        The whole word, as last read.

    Raises
    ------
    InvalidArgument
        `value` has bits outside `mask`.
    DeviceTimeout
        The deadline passed.

    Examples
    --------
    >>> words = iter([0x0, 0x4, 0x5])
    >>> hex(poll_until(words.__next__, mask=0x1, value=0x1, timeout=1.0, what="CSTS"))
    '0x5'
    """
    if value & ~mask:
        raise InvalidArgument(f"{what}: {value:#x} has bits outside the mask {mask:#x}: it would never be read")
    deadline = time.monotonic() + timeout
    pause = _SHORTEST_PAUSE
    while True:
        left = deadline - time.monotonic()
        got = read()
        if got & mask == value:
            return got
        if left <= 0:
            raise DeviceTimeout(f"{what} reads {got:#x} after {timeout:g} s; {value:#x} was waited for in its bits "
                                f"{mask:#x}", cause="the device needs longer, hangs, or was not told to begin",
                                hint="give it more time, or reset it")
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)
