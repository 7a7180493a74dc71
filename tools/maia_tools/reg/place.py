"""A place: one register, one of its fields, or some bytes that no register describes."""

from __future__ import annotations

from dataclasses import dataclass

from maia_tools.reg.model import Field, Register
from maia_tools.reg.space import Space


@dataclass(frozen=True)
class Place:
    """Where one value is read and written.

    Attributes
    ----------
    offset, size : int
        In bytes; `size` is the register's.
    access_size : int
        Bytes of one access; a larger place takes several, from the lowest address up.
    register : Register or None
    indexes : tuple of int
        Of an array's register.
    field : Field or None
        Where a field was named.
    """

    space: Space
    offset: int
    size: int
    access_size: int
    register: Register | None = None
    indexes: tuple[int, ...] = ()
    field: Field | None = None

    @property
    def address(self) -> str:
        """``bar0:0x084``."""
        return f"{self.space.name}:{self.offset:#0{2 + self.space.digits}x}"

    @property
    def name(self) -> str:
        """The register as it is written on the command line."""
        return self.address if self.register is None else self.register.name_at(self.indexes)

    @property
    def full_name(self) -> str:
        """With the field, where one was named."""
        return f"{self.name}.{self.field.name}" if self.field is not None else self.name

    @property
    def all_ones(self) -> int:
        """What a device that is gone reads as."""
        return (1 << 8 * self.size) - 1

    def hex(self, value: int) -> str:
        """A value, padded to the place's width."""
        return f"{value:#0{2 + 2 * self.size}x}"


def of_register(space: Space, register: Register, indexes: tuple[int, ...] = (), field: Field | None = None) -> Place:
    """The place of a register, or one of an array."""
    return Place(space, register.offset_at(indexes), register.size, register.access_size, register, indexes, field)


def every(space: Space) -> list[Place]:
    """Every register of a space, arrays in full, by offset."""
    found = [of_register(space, r, i) for r in space.registers for i in r.indexes(space.size)]
    return sorted(found, key=lambda p: p.offset)
