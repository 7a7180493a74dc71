"""Registers as Python objects, for scripts: ``reg.status.boot.read()``, ``reg.queue[3].tail.write(5)``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from maia_rt.errors import DeviceTimeout, InvalidArgument
from maia_tools.reg import change
from maia_tools.reg.access import Access
from maia_tools.reg.place import Place

POLL_SECONDS = 0.001
DEADLINE_SECONDS = 10.0


class Value(int):
    """What was read: an integer that knows its fields and its name.

    Attributes
    ----------
    name : str
        The named value that a field holds, else ``""``.
    fields : dict of str to Value
        A register's fields, by name; empty of a field.
    """

    name: str
    fields: dict[str, Value]
    _text: str

    def __new__(cls, value: int, place: Place) -> Value:
        """A register's value; of a place with a field, the field's."""
        field = place.field
        bits = value if field is None else field.get(value)
        made = super().__new__(cls, bits)
        made.name = field.names[bits][0] if field is not None and bits in field.names else ""
        made.fields = {}
        made._text = place.hex(value) if field is None else field.text(bits)
        if field is None and place.register is not None:
            for one in place.register.fields:
                made.fields[one.name] = Value(value, replace(place, field=one))
        return made

    def __getattr__(self, name: str) -> Value:
        """A field, by its name; case does not matter."""
        for key, value in self.__dict__.get("fields", {}).items():
            if key.lower() == name.lower():
                found: Value = value
                return found
        raise AttributeError(name)

    def __eq__(self, other: object) -> bool:
        """Equal to a number, or to the name of the value."""
        if isinstance(other, str):
            return bool(self.name) and self.name.lower() == other.lower()
        return int(self) == other

    def __hash__(self) -> int:
        return hash(int(self))

    def __repr__(self) -> str:
        return self._text

    __str__ = __repr__


class Scripting:
    """What a script may call: `read`, `write`, `wait` and the object ``reg``."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self.reg = Node(self, "")

    def read(self, name: str) -> Value:
        """Read a register, a field or a place: ``read("status.boot")``."""
        place = self._access.one(name)
        return Value(self._access.read(place), place)

    def write(self, name: str, value: int | str, *, mask: int | None = None, verify: bool = False) -> None:
        """Write a register, a field or a place; only where the session was started with ``--write``.

        Raises
        ------
        InvalidArgument
            The session is read-only, the value does not fit, or the write is refused without ``--unsafe``.
        AssertionError
            With `verify`: another value was read back.
        """
        planned = change.plan(self._access, self._access.one(name), value, mask)
        change.make(self._access, planned)
        if verify:
            _, wrong = change.verify(self._access, planned)
            if wrong:
                raise AssertionError("; ".join(wrong))

    def wait(self, name: str, wanted: int | str | Callable[[Value], bool], *,
             timeout: float = DEADLINE_SECONDS) -> Value:
        """Read until a value is there: ``wait("status.boot", "READY", timeout=5)``.

        Parameters
        ----------
        wanted : int, str or callable
            A number, a named value, or a function of the value.
        timeout : float
            In seconds.

        Raises
        ------
        DeviceTimeout
            It did not come; the last value is in the text.
        """
        deadline = time.monotonic() + timeout
        while True:
            value = self.read(name)
            if wanted(value) if callable(wanted) else value == wanted:
                return value
            if time.monotonic() >= deadline:
                shown = getattr(wanted, "__name__", wanted)
                raise DeviceTimeout(f"{name} is {value}, not {shown}, after {timeout:g} s",
                                    cause="what should set it does not run", hint="a longer timeout, or maia reg watch")
            time.sleep(POLL_SECONDS)

    def names(self) -> dict[str, Any]:
        """The globals of a script."""
        return {"device": self._access.transport, "read": self.read, "write": self.write, "wait": self.wait,
                "reg": self.reg}


class Node:
    """A part of a name: ``reg.queue[3].tail``. What it names is looked up when it is read or written."""

    def __init__(self, scripting: Scripting, path: str) -> None:
        self._scripting = scripting
        self._path = path

    def __getattr__(self, name: str) -> Node:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self._path}.{name}" if self._path else name
        node = Node(self._scripting, path)
        if name.lower() not in (n.lower() for n in dir(self)):
            # Say now, with the nearest names, rather than at the read.
            self._scripting._access.resolve(path)
        return node

    def __getitem__(self, index: int) -> Node:
        if not isinstance(index, int) or index < 0:
            raise InvalidArgument(f"{self._path}[{index!r}]: an index is a number from 0 on",
                                  cause="several are read with read('queue[*].tail')", hint=f"{self._path}[0]")
        return Node(self._scripting, f"{self._path}[{index}]")

    def __dir__(self) -> list[str]:
        """The names that may follow, for completion and for people."""
        import re

        parts = re.sub(r"\[[^\]]*\]", "", self._path).lower().split(".") if self._path else []
        found: dict[str, None] = {}
        for space in self._scripting._access.spaces:
            for register in space.registers:
                names = [s.name for s in register.segments]
                if [n.lower() for n in names[:len(parts)]] != parts:
                    continue
                if len(names) > len(parts):
                    found[names[len(parts)]] = None
                else:
                    found.update(dict.fromkeys(f.name for f in register.fields))
        return [*found, "read", "write", "wait"]

    def read(self) -> Value:
        """Read it."""
        return self._scripting.read(self._path)

    def write(self, value: int | str, **options: Any) -> None:
        """Write it; options as of the script's ``write``."""
        self._scripting.write(self._path, value, **options)

    def wait(self, wanted: int | str | Callable[[Value], bool], **options: Any) -> Value:
        """Wait for it; options as of the script's ``wait``."""
        return self._scripting.wait(self._path, wanted, **options)

    def __int__(self) -> int:
        return int(self.read())

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        """Read it and compare: ``reg.status.boot == "READY"``."""
        if isinstance(other, Node):
            return self.read() == other.read()
        return self.read() == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<register {self._path or 'names'}>"
