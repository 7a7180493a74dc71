"""What arguments must be: the checks that the runtime's public calls share."""

from __future__ import annotations

import operator
from typing import Any, TypeVar

import numpy as np

from maia_rt.contract.program import Image
from maia_rt.errors import InvalidArgument, InvalidType
from maia_rt.queue import LONGEST_SECONDS

T = TypeVar("T")


def seconds(value: Any, what: str = "a time-out") -> float:
    """Return a time in seconds; InvalidType or InvalidArgument where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InvalidType(f"{what} is {type(value).__name__}, not a number of seconds")
    if not 0 <= value <= LONGEST_SECONDS:
        raise InvalidArgument(f"{what} is 0 to {LONGEST_SECONDS:g} seconds, not {value}",
                              hint="no wait is without a deadline; give a long one")
    return float(value)


def integer(value: Any, what: str, least: int, most: int) -> int:
    """Return a whole number from `least` to `most`; InvalidType or InvalidArgument where it is none."""
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidType(f"{what} is {type(value).__name__}, not a whole number") from None
    if not least <= number <= most:
        raise InvalidArgument(f"{what} is {least:,} to {most:,}, not {number:,}")
    return number


def instance(value: Any, kind: type[T], what: str, hint: str = "") -> T:
    """Return a value of the kind asked for; InvalidType for others."""
    if not isinstance(value, kind):
        raise InvalidType(f"{what} is {type(value).__name__}, not {_a(kind.__name__)}", hint=hint)
    return value


def image(value: Any) -> Any:
    """Return a program image, as bytes or parsed."""
    if not isinstance(value, bytes | bytearray | memoryview | Image):
        raise InvalidType(f"a program image is {type(value).__name__}, not bytes", hint="read the file in mode 'rb'")
    return value


def dtype(value: Any) -> np.dtype[Any]:
    """Return a dtype of plain numbers; InvalidType for what is none, and for Python objects."""
    try:
        kind: np.dtype[Any] = np.dtype(value)
    except TypeError:
        raise InvalidType(f"{value!r:.40} is no dtype", hint="pass what numpy.dtype takes, such as numpy.float32"
                          ) from None
    if kind.hasobject:
        raise InvalidType("a dtype of Python objects is no memory of a device")
    return kind


def shape(value: Any, what: str = "a shape") -> tuple[int, ...]:
    """Return the extents of an array, none of them negative."""
    if isinstance(value, str | bytes):
        raise InvalidType(f"{what} is {type(value).__name__}, not a number or a tuple of numbers")
    try:
        extents = tuple(value)
    except TypeError:
        extents = (value,)
    return tuple(integer(extent, f"an extent of {what}", 0, (1 << 63) - 1) for extent in extents)


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOU' else 'a'} {noun}"
