"""Which commands that are not done use a piece of memory: found in the rings, at the moment somebody asks.

Nothing is recorded when commands are submitted. The rings, and the arguments, descriptors and lists that their commands
point at in pinned memory, say all that the device will touch. A list that lies elsewhere is asked of its owner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np

from maia_rt._fast.ring import WAIT_LOST
from maia_rt.contract.commands import COMMAND, COMMAND_BYTES, COPY_DESCRIPTOR, CRC, LAUNCH, Opcode, decode
from maia_rt.errors import MaiaError
from maia_rt.queue import QueuePair
from maia_rt.runtime.outstanding import Outstanding, look

Range = tuple[int, int]
Reader = Callable[[int, int], Iterable[Range] | None]
"""Told where a list of commands lies and how many there are: the (address, bytes) that it uses, None if not his."""
Find = Callable[[int, int], memoryview | None]
"""Returns pinned memory by device address and size, None where it is something else."""

_MOST_PLANES: Final = 4096


class Use:
    """A command that is not done, and the queue it is on.

    Attributes
    ----------
    queue : QueuePair
    sequence : int
    command, where : str
        Decoded, and the line that submitted it.
    device : str
        The name of the device that it is submitted to, where that is another than the memory's; empty otherwise.
    """

    device = ""

    def __init__(self, found: Outstanding, sequence: int) -> None:
        self.queue = found.queue
        self.sequence = sequence
        self.command = decode(found.raw(sequence))
        self.where = found.where(sequence)

    def __str__(self) -> str:
        where = f", submitted at {self.where}" if self.where else ""
        device = f" of {self.device}" if self.device else ""
        return f"command {self.sequence} of queue {self.queue.id}{device} ({self.command}{where})"


def find_use(queues: Iterable[QueuePair], start: int, end: int, find: Find, lists: Iterable[Reader]) -> Use | None:
    """Return the oldest outstanding command of a queue that uses an address from `start` to before `end`.

    Parameters
    ----------
    queues : iterable of QueuePair
    start, end : int
    find : callable
        See :data:`Find`.
    lists : iterable of callable
        See :data:`Reader`.
    """
    readers = list(lists)
    for queue in queues:
        if queue.closed:
            continue
        try:
            ring = queue.ring
            if ring.poll() == ring.head and not ring.stopped:
                continue  # most queues have nothing outstanding
            # Where one stream's fault stopped it, the others' commands go on.
            queue.repair()
            found = look(queue)
        except MaiaError:
            continue  # closed or lost meanwhile: nothing of it runs
        for number, command in enumerate(found.commands):
            for address, size in _ranges(command, find, readers):
                if address < end and address + size > start:
                    sequence = found.progress + 1 + number
                    # It may have ended while we looked.
                    if queue.quiet(sequence):
                        break
                    return Use(found, sequence)
    return None


def wait_for_use(look_again: Callable[[], Use | None], seconds: float) -> Use | None:
    """Wait until nothing is in use, `seconds` at most; return what still is."""
    deadline = time.monotonic() + seconds
    while True:
        use = look_again()
        left = deadline - time.monotonic()
        if use is None or left <= 0:
            return use
        try:
            if use.queue.ring.wait(use.sequence, int(left * 1e9)) == WAIT_LOST:
                return None  # the device is gone, and uses nothing any more
        except MaiaError:
            continue


def _ranges(command: Any, find: Find, readers: list[Reader]) -> Iterator[Range]:
    opcode = int(command["opcode"])
    a, b, c = (int(word) for word in command["payload"])
    if opcode == Opcode.COPY:
        yield a, c
        yield b, c
    elif opcode == Opcode.FILL:
        yield a, b
    elif opcode == Opcode.WRITE_IMM:
        yield a, int(command["units"])
    elif opcode == Opcode.CRC:
        row: Any = np.frombuffer(command.tobytes(), CRC)[0]
        yield int(row["src"]), int(row["size"])
        yield int(row["result"]), 4
    elif opcode == Opcode.LAUNCH:
        launch: Any = np.frombuffer(command.tobytes(), LAUNCH)[0]
        count = int(launch["arg_count"])
        args = find(int(launch["args"]), 8 * count) if count else None
        if args is not None:
            # Scalars among them are FP32 in the low half, where no memory lies that could be closed.
            yield from ((int(word), 1) for word in np.frombuffer(bytes(args), np.uint64))
    elif opcode == Opcode.COPY_ND:
        descriptor = find(a, COPY_DESCRIPTOR.itemsize)
        if descriptor is not None:
            yield from _rows(bytes(descriptor))
    elif opcode == Opcode.INDIRECT:
        yield from _listed(a, b & 0xFFFFFFFF, find, readers)
    elif opcode not in (Opcode.NOP, Opcode.TRAP):
        yield a, 4  # SIGNAL_REMOTE, WAIT_VALUE and BRANCH: a word


def _listed(address: int, count: int, find: Find, readers: list[Reader]) -> Iterator[Range]:
    for reader in readers:
        found = reader(address, count)
        if found is not None:
            yield from found
            return
    view = find(address, count * COMMAND_BYTES)
    if view is not None:
        yield address, count * COMMAND_BYTES
        for command in np.frombuffer(bytes(view), COMMAND):
            if int(command["opcode"]) != Opcode.INDIRECT:
                yield from _ranges(command, find, readers)


def _rows(raw: bytes) -> Iterator[Range]:
    row: Any = np.frombuffer(raw, COPY_DESCRIPTOR)[0]
    size, rows, planes = int(row["row_bytes"]), int(row["rows"]), int(row["planes"])
    for end in ("src", "dst"):
        first, down, across = int(row[end]), int(row[f"{end}_row_stride"]), int(row[f"{end}_plane_stride"])
        # A multicast goes from SRAM to SRAM, 2^32 bytes each; all else stays inside of one buffer.
        if abs(down) >> 32:
            steps = [first + at * down + plane * across for plane in range(min(planes, _MOST_PLANES))
                     for at in range(min(rows, _MOST_PLANES))]
            yield from ((at, size) for at in steps)
            continue
        reach = (rows - 1) * down
        for plane in range(min(planes, _MOST_PLANES)):
            base = first + plane * across
            yield min(base, base + reach), abs(reach) + size
