"""What a register is: the types that the generated tables in ``registers.py`` are made of."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Literal

Access = Literal["ro", "rw", "wo", "w1c", "pulse"]
"""``ro`` ignores writes; ``wo`` reads as zero; ``w1c``: a written 1 clears the bit; ``pulse``: a written 1 acts once.
"""


@dataclass(frozen=True)
class Field:
    """Some neighbouring bits of a register.

    Attributes
    ----------
    name : str
    lsb, width : int
        Number of the lowest bit, and count of bits.
    access : {'ro', 'rw', 'wo', 'w1c', 'pulse'}
    reset : int
        Value of the field (not shifted) after reset; 0 where the description says "by profile".
    enum : type of IntEnum or None
        The field's named values.
    description : str
    """

    name: str
    lsb: int
    width: int
    access: Access
    reset: int
    enum: type[enum.IntEnum] | None
    description: str

    @property
    def mask(self) -> int:
        """The field's bits, in place."""
        return ((1 << self.width) - 1) << self.lsb

    @property
    def readable(self) -> bool:
        """Whether a read returns the field's value; if not it reads as zero."""
        return self.access not in ("wo", "pulse")

    @property
    def writable(self) -> bool:
        """Whether a write has an effect."""
        return self.access != "ro"

    def get(self, value: int) -> int:
        """The field's value in a register value."""
        return (value & self.mask) >> self.lsb


@dataclass(frozen=True)
class Register:
    """A register: where it lies, and its fields from the lowest bit up.

    Attributes
    ----------
    name : str
    offset : int
        Bytes from the start of the BAR (`BAR0`) or of the queue's doorbell page (`DOORBELL`).
    width_bits : int
        32 or 64.
    fields : tuple of Field
    description : str
    """

    name: str
    offset: int
    width_bits: int
    fields: tuple[Field, ...]
    description: str
    _by_name: dict[str, Field] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {f.name: f for f in self.fields})

    @property
    def width_bytes(self) -> int:
        """4 or 8."""
        return self.width_bits // 8

    @property
    def reset(self) -> int:
        """Value after reset, as far as the contract fixes it."""
        return sum(f.reset << f.lsb for f in self.fields)

    @property
    def readable(self) -> bool:
        """Whether any field can be read."""
        return any(f.readable for f in self.fields)

    @property
    def writable(self) -> bool:
        """Whether a write to any field has an effect."""
        return any(f.writable for f in self.fields)

    def mask(self, *access: Access) -> int:
        """The bits of all fields with one of these access kinds."""
        return sum(f.mask for f in self.fields if f.access in access)

    def field(self, name: str) -> Field:
        """The field of that name.

        Raises
        ------
        KeyError
            The register has no such field.
        """
        return self._by_name[name]

    def get(self, value: int, name: str) -> int:
        """A field's value in the register value ``value``."""
        return self._by_name[name].get(value)

    def set(self, value: int, name: str, to: int) -> int:
        """The register value ``value`` with one field replaced.

        Raises
        ------
        ValueError
            ``to`` does not fit the field.
        """
        item = self._by_name[name]
        if not 0 <= to < 1 << item.width:
            raise ValueError(f"{self.name}.{name} has {item.width} bits; {to:#x} does not fit")
        return (value & ~item.mask) | (to << item.lsb)

    def decode(self, value: int) -> dict[str, int]:
        """Each field's value, from the lowest bit up; an IntEnum member where the value has a name.

        Examples
        --------
        >>> from maia_rt.contract.registers import BAR0
        >>> BAR0["STATUS"].decode(0x2)
        {'BOOT': <BootState.READY: 2>, 'ERROR': 0}
        """
        result: dict[str, int] = {}
        for item in self.fields:
            bits = item.get(value)
            if item.enum is not None and bits in item.enum._value2member_map_:
                bits = item.enum(bits)
            result[item.name] = bits
        return result
