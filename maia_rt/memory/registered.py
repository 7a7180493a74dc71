"""Host memory that is there already, shown to a device as it is."""

from __future__ import annotations

import ctypes
from typing import Any

from maia_rt.transport.mapping import PAGE_SIZE


class RegisteredMemory:
    """The pages around a piece of this process's memory; a :class:`maia_rt.transport.DmaMemory`.

    It has no file: a vfio-user server reaches it by messages to this process, the kernel's VFIO pins its pages.

    Parameters
    ----------
    owner : object
        What keeps the memory; held as long as anybody holds a view.
    address, size : int
        In bytes, of any alignment.
    readonly : bool
        Whether its views are.
    """

    def __init__(self, owner: object, address: int, size: int, *, readonly: bool = False) -> None:
        first = address // PAGE_SIZE * PAGE_SIZE
        end = -(-(address + size) // PAGE_SIZE) * PAGE_SIZE
        self._address = first
        self._size = end - first
        self._readonly = readonly
        # A type of its own has attributes: the views hold the pages, the pages hold the owner.
        kind: Any = type("Pages", (ctypes.c_ubyte * self._size,), {})
        self._pages = kind.from_address(first)
        self._pages.owner = owner

    @property
    def fd(self) -> int:
        """-1: there is no file."""
        return -1

    @property
    def offset(self) -> int:
        """0."""
        return 0

    @property
    def size(self) -> int:
        """Bytes of all its pages."""
        return self._size

    @property
    def address(self) -> int:
        """The address of its first page."""
        return self._address

    def view(self) -> memoryview:
        """Return the pages as bytes."""
        view = memoryview(self._pages).cast("B")
        return view.toreadonly() if self._readonly else view
