"""Which line of the program submitted a command: for error texts."""

from __future__ import annotations

import sys
from types import CodeType


class SubmissionSites:
    """Remembers the submitting line of a ring's newest commands. A note costs half a microsecond, a look-up is slow.

    Parameters
    ----------
    entries : int
        How many commands are remembered, a power of two.
    package : str
        The package whose own frames are passed over.
    """

    def __init__(self, entries: int, package: str = "maia_rt.") -> None:
        self._sites: list[tuple[int, CodeType, int] | None] = [None] * entries
        self._mask = entries - 1
        self._package = package

    def note(self, sequence: int) -> None:
        """Remember who called into the package to submit the command `sequence`."""
        frame = sys._getframe(2)
        while frame.f_globals.get("__name__", "").startswith(self._package):
            if frame.f_back is None:
                return
            frame = frame.f_back
        self._sites[sequence & self._mask] = (sequence, frame.f_code, frame.f_lasti)

    def find(self, sequence: int) -> str:
        """Return ``file:line``, empty where it is not known (any more)."""
        site = self._sites[sequence & self._mask]
        if site is None or site[0] != sequence:
            return ""
        _, code, at = site
        lines = [line for start, end, line in code.co_lines() if start <= at < end and line is not None]
        return f"{code.co_filename}:{lines[0] if lines else code.co_firstlineno}"
