"""A space: one region of a device, a BAR or configuration space, and the registers known in it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from maia_rt.contract.function import DEVICE_ID, VENDOR_ID
from maia_rt.contract.registers import BAR0
from maia_rt.errors import InvalidArgument
from maia_rt.pci import config
from maia_rt.transport import Transport
from maia_rt.transport.uapi import PciRegion
from maia_tools.reg import config_space, contract, rdl
from maia_tools.reg.model import Field, Register, Segment

CONFIG: Final = config_space.CONFIG
REGIONS: Final = {**{f"bar{n}": n for n in range(6)}, "rom": int(PciRegion.ROM), CONFIG: int(PciRegion.CONFIG)}
"""Names of spaces, and the region index of each."""
WORD: Final = 4


@dataclass(frozen=True)
class Description:
    """An RDL file the user names registers by: ``--rdl FILE[:TOP] --bar N --base OFFSET``."""

    path: str
    top: str | None
    bar: int
    base: int

    @classmethod
    def parse(cls, text: str, bar: int, base: int) -> Description:
        """``FILE`` or ``FILE:TOP``; a colon that is a part of an existing file's name belongs to the name."""
        import os

        path, colon, top = text.rpartition(":")
        if not colon or os.path.exists(text):
            return cls(text, None, bar, base)
        return cls(path, top, bar, base)


@dataclass
class Space:
    """One region and what is known of it.

    Attributes
    ----------
    region : int
        The transport's index.
    size : int or None
        Bytes; None where no device was asked.
    registers : list of Register
        Sorted by their offsets.
    reads_are_safe : bool
        Whether reading what no register describes has no side effect: configuration space, a prefetchable BAR.
    described : bool
        Whether the contract or a file describes it, so that what is not described is not meant to be touched.
    """

    name: str
    region: int
    size: int | None = None
    registers: list[Register] = field(default_factory=list)
    reads_are_safe: bool = False
    described: bool = False

    @property
    def digits(self) -> int:
        """Hexadecimal digits of an offset."""
        return max(3, len(f"{(self.size or 0x1000) - 1:x}"))

    @cached_property
    def _plain(self) -> list[tuple[int, Register]]:
        single = [r for r in self.registers if not (r.dimensions or r.relative_to)]
        return sorted(((r.offset, r) for r in single), key=lambda pair: pair[0])

    def starting_at(self, offset: int) -> tuple[Register, tuple[int, ...]] | None:
        """The register that starts at an offset, and its indexes."""
        at = bisect_right(self._plain, offset, key=lambda pair: pair[0]) - 1
        if at >= 0 and self._plain[at][0] == offset:
            return self._plain[at][1], ()
        for register in self.registers:
            indexes = _indexes(register, offset) if register.dimensions else None
            if indexes is not None and register.offset_at(indexes) == offset:
                return register, indexes
        return None

    def covering(self, offset: int, size: int) -> Iterator[tuple[Register, tuple[int, ...]]]:
        """Every register that some of these bytes belong to."""
        for register in self.registers:
            if register.relative_to:
                continue
            if not register.dimensions:
                if register.offset < offset + size and offset < register.offset + register.size:
                    yield register, ()
                continue
            seen: set[tuple[int, ...]] = set()
            for byte in range(offset, offset + size):
                indexes = _indexes(register, byte)
                if indexes is not None and indexes not in seen:
                    seen.add(indexes)
                    yield register, indexes

    def describes(self, offset: int, size: int) -> bool:
        """Whether every byte belongs to a register."""
        left = set(range(offset, offset + size))
        for register, indexes in self.covering(offset, size):
            start = register.offset_at(indexes)
            left -= set(range(start, start + register.size))
        return not left


def _indexes(register: Register, offset: int) -> tuple[int, ...] | None:
    """Indexes of the one of an array that the byte at `offset` belongs to."""
    found, rest = [], offset - register.offset
    for count, stride in register.dimensions:
        index, rest = divmod(rest, stride)
        if not 0 <= index < count:
            return None
        found.append(index)
    return tuple(found) if 0 <= rest < register.size else None


def offline(description: Description | None) -> list[Space]:
    """The spaces that can be spoken of without a device: the contract's or the description's, and PCI's."""
    if description is not None:
        found = rdl.load(description.path, description.top, base=description.base)
        spaces = [Space(f"bar{description.bar}", description.bar, None, found, described=True)]
    else:
        spaces = [Space("bar0", 0, None, contract.bar0(), described=True),
                  Space("bar2", 2, None, contract.bar2(), described=True)]
    return [*spaces, Space(CONFIG, REGIONS[CONFIG], 4096, config_space.generic(), reads_are_safe=True)]


def of_device(transport: Transport, description: Description | None) -> list[Space]:
    """The spaces of an open device.

    Raises
    ------
    InvalidArgument
        The device has no BAR of the number that the description is for, or the description is larger than it.
    DeviceLost
        Configuration space reads as all ones.
    """
    spaces = {name: Space(name, index, transport.regions[index].size) for name, index in REGIONS.items()
              if index < len(transport.regions) and transport.regions[index].size}
    ours = False
    if CONFIG in spaces and transport.info.is_pci:
        space = spaces[CONFIG]

        def read(offset: int, size: int) -> int:
            return transport.read(space.region, offset, size)

        space.registers = config_space.registers(read, space.size or 0)
        space.reads_are_safe = True
        ours = (read(0, 2), read(2, 2)) == (VENDOR_ID, DEVICE_ID)
        _prefetchable(spaces, config.read_header(read))
        if transport.info.kind == "vfio-user":
            # The kernel's VFIO keeps the table to itself and answers reads of it with all ones.
            _vectors(spaces, config.msix(read))
    if ours and (description is None or description.bar != 0):
        _contract(transport, spaces)
    if description is not None:
        _describe(transport.name, spaces, description)
    for space in spaces.values():
        space.registers.sort(key=lambda r: r.offset)
    return list(spaces.values())


def _prefetchable(spaces: dict[str, Space], header: config.Header) -> None:
    for index, raw in enumerate(header.bars):
        if raw & 0b1001 == 0b1000 and f"bar{index}" in spaces:
            spaces[f"bar{index}"].reads_are_safe = True


def _vectors(spaces: dict[str, Space], msix: config.MsiX | None) -> None:
    if msix is None:
        return
    if table := spaces.get(f"bar{msix.table_bar}"):
        outer = Segment("msix_table", ((msix.vectors, 16),))
        for at, size, name, item in (
            (0, 8, "address", Field("address", 0, 64, "rw", None, "Where the message is written.")),
            (8, 4, "data", Field("data", 0, 32, "rw", None, "What is written.")),
            (12, 4, "control", Field("mask", 0, 1, "rw", 1, "The vector does not fire.")),
        ):
            table.registers.append(Register((outer, Segment(name)), msix.table_offset + at, size, (item,),
                                            f"MSI-X vector: {name}.", access_size=WORD))
    if pba := spaces.get(f"bar{msix.pba_bar}"):
        pba.registers.append(Register((Segment("msix_pending", ((-(-msix.vectors // 64), 8),)),), msix.pba_offset, 8,
                                      (Field("pending", 0, 64, "ro", 0, "A bit a vector."),),
                                      "MSI-X vectors that wait behind a mask.", access_size=WORD))


def _contract(transport: Transport, spaces: dict[str, Space]) -> None:
    def get(name: str, part: str) -> int:
        register = BAR0[name]
        return register.get(transport.read(0, register.offset, register.width_bytes), part)

    if "bar0" not in spaces:
        return
    spaces["bar0"].registers += contract.bar0()
    spaces["bar0"].described = True
    # A device that does not answer as one of ours cannot say how many queues it has.
    if "bar2" in spaces and transport.read(0, BAR0["ID"].offset, WORD) == BAR0["ID"].reset:
        spaces["bar2"].described = True
        spaces["bar2"].registers += contract.bar2(get("QUEUE_CAPS", "MAX_QUEUES"), get("SEMAPHORE_WINDOW", "OFFSET"),
                                                  get("SEMAPHORE_CAPS", "COUNT"))


def _describe(device: str, spaces: dict[str, Space], description: Description) -> None:
    name = f"bar{description.bar}"
    space = spaces.get(name)
    if space is None or space.size is None:
        raise InvalidArgument(f"{device} has no BAR {description.bar}", cause="the registers lie in another one",
                              hint=f"--bar N; it has {', '.join(s for s in spaces if s.startswith('bar')) or 'none'}")
    found = rdl.load(description.path, description.top, base=description.base)
    beyond = [r for r in found if r.offset + r.size > space.size]
    if beyond:
        raise InvalidArgument(f"{beyond[0].name} at {beyond[0].offset:#x} is beyond {name}, which has {space.size:#x} "
                              "bytes", cause="the file describes another device or another BAR", hint="--bar, --base")
    # The user's names replace those that were known at the same places.
    taken = [(r.offset, r.offset + r.size) for r in found]
    space.registers = [r for r in space.registers if not any(a < r.offset + r.size and r.offset < b for a, b in taken)]
    space.registers += found
    space.described = True
