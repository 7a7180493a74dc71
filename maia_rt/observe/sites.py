"""The line of the program that submitted a command, in words."""

from __future__ import annotations

from types import CodeType


def describe(site: tuple[CodeType, int] | None) -> str:
    """Return ``file:line`` of a code object and a byte offset in it; empty where there is none."""
    if site is None:
        return ""
    code, at = site
    lines = [line for start, end, line in code.co_lines() if start <= at < end and line is not None]
    return f"{code.co_filename}:{lines[0] if lines else code.co_firstlineno}"
