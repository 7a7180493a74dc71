"""Where in the program something happened, kept cheaply and told when somebody asks."""

from __future__ import annotations

import sys
from types import CodeType

_PACKAGE = "maia_rt."


class Place:
    """A line of the program: the innermost one outside of this package."""

    __slots__ = ("_at", "_code")

    def __init__(self, code: CodeType, at: int) -> None:
        self._code = code
        self._at = at

    def __str__(self) -> str:
        lines = [line for start, end, line in self._code.co_lines() if start <= self._at < end and line is not None]
        return f"{self._code.co_filename}:{lines[0] if lines else self._code.co_firstlineno}"


def here() -> Place | None:
    """Return the place from which the package was called; None where nothing but the package is on the stack."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return Place(frame.f_code, frame.f_lasti)
