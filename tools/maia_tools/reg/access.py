"""Reading registers: what is refused, what is left out, and what a device that does not answer is told by."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from maia_rt.errors import InvalidArgument
from maia_rt.transport import Transport
from maia_tools.reg import address, liveness
from maia_tools.reg.place import Place
from maia_tools.reg.space import Description, Space, of_device


@dataclass(frozen=True)
class Reading:
    """A value, and how long its read took."""

    place: Place
    value: int
    nanoseconds: int = 0

    @property
    def differs(self) -> bool:
        """Whether it is another value than reset leaves, where that is known; of the field, where one was named."""
        register, field = self.place.register, self.place.field
        if register is None:
            return False
        if field is not None:
            return field.reset is not None and field.readable and field.get(self.value) != field.reset
        return register.differs_from_reset(self.value)


@dataclass
class Access:
    """The registers of one open device.

    Attributes
    ----------
    unsafe : bool
        Whether reads with side effects and what no register describes may be touched.
    may_write : bool
        Whether anything may be written at all.
    audit : Path
        Where writes are recorded.
    source : str
        Who writes, for that record: ``write``, ``shell``, ``script FILE``.
    silent : list of Place
        What has read as all ones, with nothing to show that the device is alive.
    """

    transport: Transport
    spaces: list[Space]
    default: str
    audit: Path
    unsafe: bool = False
    may_write: bool = False
    source: str = "write"

    def __post_init__(self) -> None:
        self.silent: list[Place] = []
        self.answered = 0

    @property
    def name(self) -> str:
        """The device's."""
        return self.transport.name

    def resolve(self, text: str, width: int | None = None) -> list[Place]:
        """Every place of a name or address; see `address.resolve`."""
        return address.resolve(text, self.spaces, default=self.default, width=width)

    def one(self, text: str, width: int | None = None) -> Place:
        """The place of a name or address that means one only.

        Raises
        ------
        InvalidArgument
            It means several, or none.
        """
        places = self.resolve(text, width)
        if len(places) != 1:
            raise InvalidArgument(f"{text} means {len(places)} places", cause="one is wanted here",
                                  hint=f"for instance {places[0].full_name}")
        return places[0]

    def select(self, texts: Iterable[str], width: int | None = None) -> tuple[list[Place], list[tuple[Place, str]]]:
        """The places that may be read, and those left out with the reason.

        Of a wildcard, an index range or an address range, what may not be read is left out. What was named alone is
        refused.

        Raises
        ------
        InvalidArgument
            Something was named that does not exist or may not be read.
        """
        chosen: list[Place] = []
        left: list[tuple[Place, str]] = []
        for text in texts:
            places = self.resolve(text, width)
            for place in places:
                why = self.refusal(place)
                if not why:
                    chosen.append(place)
                elif len(places) == 1:
                    raise InvalidArgument(f"{place.full_name} is not read", cause=why,
                                          hint="--unsafe reads it all the same")
                else:
                    left.append((place, why))
        return chosen, left

    def refusal(self, place: Place) -> str:
        """Why a place may not be read, or nothing."""
        if self.unsafe:
            return ""
        if place.register is not None:
            if place.register.changed_by_reading:
                fields = [f for f in place.register.fields if f.on_read]
                verb = {"clear": "clears", "set": "sets"}.get(fields[0].on_read, "acts on")
                return f"reading it {verb} {', '.join(f.name for f in fields)}"
            if not (place.field or place.register).readable:
                return "write-only"
            return ""
        for register, indexes in place.space.covering(place.offset, place.size):
            if register.changed_by_reading:
                return f"it reads {register.name_at(indexes)}, which reading changes"
        space = place.space
        if space.described and not space.reads_are_safe and not space.describes(place.offset, place.size):
            return "no register is described there"
        return ""

    def read(self, place: Place) -> int:
        """Read a place's register.

        Raises
        ------
        InvalidArgument
            It may not be read.
        DeviceLost
            The device does not answer.
        """
        why = self.refusal(place)
        if why:
            raise InvalidArgument(f"{place.full_name} is not read", cause=why, hint="--unsafe reads it all the same")
        return self.read_raw(place)

    def read_raw(self, place: Place) -> int:
        """Read without asking whether one may; DeviceLost as in `read`."""
        value = 0
        for at in range(0, place.size, place.access_size):
            value |= self.transport.read(place.space.region, place.offset + at, place.access_size) << 8 * at
        if value != place.all_ones or liveness.check(self.transport, self.spaces, place):
            self.answered += 1
        else:
            self.silent.append(place)
        return value

    def readings(self, places: Sequence[Place]) -> Iterator[Reading]:
        """Read one after the other; a register of which several fields were named is read once."""
        known: dict[tuple[int, int, int], int] = {}
        for place in places:
            key = (place.space.region, place.offset, place.size)
            begin = time.perf_counter_ns()
            if key not in known or place.field is None:
                known[key] = self.read(place)
            yield Reading(place, known[key], time.perf_counter_ns() - begin)

    @property
    def doubtful(self) -> bool:
        """Whether all that was read was all ones, and nothing could tell whether anybody answers."""
        return bool(self.silent) and not self.answered


@contextmanager
def opened(device: str | None, description: Description | None, *, audit: Path, unsafe: bool = False,
           may_write: bool = False, source: str = "write") -> Iterator[Access]:
    """Open a device to look at its registers; nothing is booted."""
    from maia_tools.selection import open_transport

    with open_transport(device) as transport:
        spaces = of_device(transport, description)
        default = f"bar{description.bar}" if description is not None else "bar0"
        yield Access(transport, spaces, default, audit, unsafe, may_write, source)
