"""Promises about time, measured so that a busy machine does not break them.

    start = time.monotonic()
    device.close()
    promptly(start, 1.0)

What took too long raises :class:`TooSlow`; the test is then run again from its set-up, a few times (tests/conftest.py).
A promise that is never kept fails, one that another process's work broke once does not.
"""

import time


class TooSlow(AssertionError):
    """Something took longer than promised."""

    def __init__(self, took, allowed):
        super().__init__(f"took {took:.3f} s, less than {allowed} s are promised")
        self.allowed_seconds = allowed


def promptly(start, seconds, end=None):
    """Raise TooSlow unless `end`, or now, is less than `seconds` after `start`, of time.monotonic(); returns that."""
    took = (time.monotonic() if end is None else end) - start
    if not took < seconds:
        raise TooSlow(took, seconds)
    return took
