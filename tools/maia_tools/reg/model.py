"""What a register is to this tool: fields with any of SystemRDL's access kinds, at a place that may be repeated.

The contract's own `maia_rt.contract.register.Register` knows five access kinds and no arrays; other people's devices
have more of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

NEUTRAL_ZERO: Final = frozenset({"w1c", "w1s", "w1t", "pulse", "wo", "w1"})
"""Kinds whose bits a write leaves alone where it has a 0."""
NEUTRAL_ONE: Final = frozenset({"w0c", "w0s", "w0t"})
"""Kinds whose bits a write leaves alone where it has a 1."""
UNAVOIDABLE: Final = frozenset({"wclr", "wset", "wuser"})
"""Kinds that any write of the register acts on."""


@dataclass(frozen=True)
class Field:
    """Some neighbouring bits.

    Attributes
    ----------
    lsb, width : int
    access : str
        ``ro``, ``rw``, ``wo``, ``w1c``, ``w1s``, ``w1t``, ``w0c``, ``w0s``, ``w0t``, ``wclr``, ``wset``, ``wuser``,
        ``rw1`` and ``w1`` (written once after reset), ``pulse`` (a written 1 acts once), ``na``.
    reset : int or None
        None where it is not known, or is not the same on every device.
    on_read : str
        What reading does to the field: ``""`` nothing, ``clear``, ``set`` or ``other``.
    in_place : bool
        Part of an address whose lower bits are others': shown with them as 0, too.
    names : mapping of int to (name, description)
        Named values.
    """

    name: str
    lsb: int
    width: int
    access: str = "ro"
    reset: int | None = None
    description: str = ""
    on_read: str = ""
    in_place: bool = False
    names: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def mask(self) -> int:
        """The field's bits, in place."""
        return ((1 << self.width) - 1) << self.lsb

    @property
    def bits(self) -> str:
        """``7:4``, or ``3`` of a single bit."""
        return f"{self.lsb + self.width - 1}:{self.lsb}" if self.width > 1 else f"{self.lsb}"

    @property
    def readable(self) -> bool:
        """Whether a read returns the field's value."""
        return self.access not in ("wo", "w1", "pulse", "na")

    @property
    def writable(self) -> bool:
        """Whether a write has an effect."""
        return self.access not in ("ro", "na")

    def get(self, value: int) -> int:
        """The field's value in a register's value."""
        return (value & self.mask) >> self.lsb

    def text(self, bits: int) -> str:
        """A value of the field for people: its name where it has one, hexadecimal where the field is wide."""
        number = f"{bits:#x}" if self.width > 8 else str(bits)
        if self.in_place:
            number += f" (address {bits << self.lsb:#x})"
        return f"{number} {self.names[bits][0]}" if bits in self.names else number


@dataclass(frozen=True)
class Segment:
    """One part of a register's name, and how often it repeats: ``queue`` with ((64, 4096),) is ``queue[0..64]``.

    Attributes
    ----------
    dimensions : tuple of (count, stride)
        Outermost first; the stride in bytes.
    """

    name: str
    dimensions: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Register:
    """A register, or an array of alike ones.

    Attributes
    ----------
    segments : tuple of Segment
        Its name, from the outside in.
    offset : int
        Bytes from the start of the region, of the first one.
    size : int
        In bytes.
    access_size : int
        Bytes of one access: as `size`, or less where the register takes several.
    fields : tuple of Field
        From the lowest bit up; empty where nothing is known of the bits.
    relative_to : str
        Name of the capability that `offset` counts from, where no device was asked where it stands.
    plain : bool
        Plain memory: every bit is rw though no field says so.
    """

    segments: tuple[Segment, ...]
    offset: int
    size: int
    fields: tuple[Field, ...] = ()
    description: str = ""
    access_size: int = 0
    relative_to: str = ""
    plain: bool = False

    def __post_init__(self) -> None:
        if not self.access_size:
            object.__setattr__(self, "access_size", min(self.size, 8))

    @cached_property
    def name(self) -> str:
        """``queue[n].TAIL``."""
        return ".".join(s.name + "".join(f"[{'nmijk'[min(i, 4)]}]" for i in range(len(s.dimensions)))
                        for s in self.segments)

    @cached_property
    def dimensions(self) -> tuple[tuple[int, int], ...]:
        """Every (count, stride) of the name, outermost first."""
        return tuple(d for s in self.segments for d in s.dimensions)

    @property
    def count(self) -> int:
        """How many there are."""
        number = 1
        for count, _ in self.dimensions:
            number *= count
        return number

    def name_at(self, indexes: tuple[int, ...]) -> str:
        """``queue[3].TAIL``."""
        left = iter(indexes)
        return ".".join(s.name + "".join(f"[{next(left)}]" for _ in s.dimensions) for s in self.segments)

    def offset_at(self, indexes: tuple[int, ...]) -> int:
        """Bytes from the start of the region, of one of them."""
        return self.offset + sum(i * stride for i, (_, stride) in zip(indexes, self.dimensions, strict=True))

    def indexes(self, within: int | None = None) -> Iterator[tuple[int, ...]]:
        """Every one's indexes, the last running fastest; of those that end within `within` bytes only."""
        def below(dimensions: tuple[tuple[int, int], ...], at: int) -> Iterator[tuple[int, ...]]:
            if not dimensions:
                yield ()
                return
            (count, stride), rest = dimensions[0], dimensions[1:]
            for i in range(count):
                if within is not None and at + i * stride + self.size > within:
                    return
                for more in below(rest, at + i * stride):
                    yield (i, *more)
        return below(self.dimensions, self.offset)

    @cached_property
    def mask(self) -> int:
        """All bits of the register."""
        return (1 << 8 * self.size) - 1

    def mask_of(self, kinds: frozenset[str]) -> int:
        """The bits of the fields with one of these access kinds."""
        return sum(f.mask for f in self.fields if f.access in kinds)

    @cached_property
    def readable(self) -> bool:
        """Whether a read tells anything."""
        return not self.fields or any(f.readable for f in self.fields)

    @cached_property
    def writable(self) -> bool:
        """Whether a write has an effect; unknown bits may."""
        return not self.fields or any(f.writable for f in self.fields)

    @cached_property
    def changed_by_reading(self) -> bool:
        """Whether a read has a side effect."""
        return any(f.on_read for f in self.fields)

    @cached_property
    def access(self) -> str:
        """The kinds of its fields, as ``ro`` or ``rw/w1c``."""
        return "/".join(sorted({f.access for f in self.fields})) or ("rw" if self.plain else "?")

    @cached_property
    def reset(self) -> int | None:
        """The value after reset, None where no field's is known."""
        known = [f for f in self.fields if f.reset is not None]
        return sum((f.reset or 0) << f.lsb for f in known) if known else None

    @cached_property
    def reset_mask(self) -> int:
        """The readable bits whose value after reset is known."""
        return sum(f.mask for f in self.fields if f.reset is not None and f.readable)

    def differs_from_reset(self, value: int) -> bool:
        """Whether a value has other bits than reset leaves, where that is known."""
        return self.reset is not None and bool((value ^ self.reset) & self.reset_mask)

    def find(self, name: str) -> Field | None:
        """The field of that name; case does not matter."""
        return next((f for f in self.fields if f.name.lower() == name.lower()), None)

    def neutral(self, old: int) -> int:
        """A value whose write changes as little as can be: what was read, and nothing that clears, sets or starts."""
        return old & ~self.mask_of(NEUTRAL_ZERO) | self.mask_of(NEUTRAL_ONE)
