"""What one rank asks for, checked by itself and against what the others ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from maia_rt.contract.program import NUMPY_DTYPES, Dtype
from maia_rt.errors import ClosedError, InvalidArgument, InvalidType, MismatchedRanks
from maia_rt.kernels.reduction import OPERATIONS, REDUCIBLE
from maia_rt.memory.space import Space
from maia_rt.runtime.buffer import Buffer
from maia_rt.runtime.device import Device
from maia_rt.runtime.stream import Stream

DTYPES: Final[dict[np.dtype[Any], Dtype]] = {NUMPY_DTYPES[kind]: kind for kind in sorted(REDUCIBLE)}
_BYTES: Final = np.dtype(np.uint8)


@dataclass(frozen=True)
class Call:
    """One rank's part of a collective.

    Attributes
    ----------
    name : str
        ``all_reduce``, ...
    rank : int
    stream : Stream
    send, recv : Buffer or None
    count : int
        Elements that every rank must have said alike.
    dtype : dtype
    operation : str
        Empty where nothing is reduced.
    root : int
        -1 where there is none.
    """

    name: str
    rank: int
    stream: Stream
    send: Buffer | None
    recv: Buffer | None
    count: int
    dtype: np.dtype[Any]
    operation: str = ""
    root: int = -1

    @property
    def said(self) -> str:
        """What the other ranks must have said as well."""
        text = f"{self.name} of {self.count} {'bytes' if self.dtype == _BYTES else f'x {self.dtype}'}"
        if self.operation:
            text += f", {self.operation}"
        return text + (f", root {self.root}" if self.root >= 0 else "")

    @property
    def nbytes(self) -> int:
        """Bytes of `count` elements."""
        return self.count * self.dtype.itemsize

    def check(self, device: Device, parts: tuple[int, int]) -> None:
        """Raise where a buffer is none of the rank's, or does not have `parts` times `count` elements: send, recv."""
        for what, memory, times in (("send", self.send, parts[0]), ("recv", self.recv, parts[1])):
            if memory is not None:
                self._check_buffer(memory, what, device, times)
        if self.operation and self.operation not in OPERATIONS:
            raise InvalidArgument(f"a reduction is one of {', '.join(map(repr, OPERATIONS))}, not "
                                  f"{self.operation!r:.40}")
        if self.operation and self.dtype not in DTYPES:
            raise InvalidType(f"rank {self.rank}: {self.dtype} is not reduced",
                              hint=f"one of {', '.join(map(str, DTYPES))} is; give buffers a dtype: buffer.view(dtype)")

    def _check_buffer(self, memory: Buffer, what: str, device: Device, times: int) -> None:
        at = f"rank {self.rank}: {what}"
        if memory.device is not device:
            raise InvalidArgument(f"{at} belongs to {memory.device.name}, not to {device.name}",
                                  hint="pass the buffers in the order of the communicator's devices")
        if memory.closed:
            raise ClosedError(f"{at} has been closed")
        if memory.space != Space.hbm():
            raise InvalidArgument(f"{at} lies in {memory.space}, which peers do not reach", hint="use device memory")
        if not memory.contiguous:
            raise InvalidArgument(f"{at} is a strided view", hint="copy it to memory that is contiguous first")
        kind = memory.dtype or _BYTES
        if kind != self.dtype or memory.nbytes != times * self.nbytes:
            raise InvalidArgument(f"{at} has {memory.nbytes // max(kind.itemsize, 1)} x {kind}; "
                                  f"{self.said} needs {times * self.count} x {self.dtype}")

    def check_overlap(self, apart: int | None) -> None:
        """Raise where send and recv overlap, but for a send that starts `apart` bytes into recv; None: at all."""
        if self.send is None or self.recv is None or not self.send.nbytes or not self.recv.nbytes:
            return
        send, recv = self.send.address, self.recv.address
        if send < recv + self.recv.nbytes and recv < send + self.send.nbytes and send - recv != apart:
            raise InvalidArgument(f"rank {self.rank}: send and recv overlap",
                                  hint="in place, they are the same memory as the documentation says; else apart")


def require_buffer(memory: Any, what: str) -> Buffer:
    """Return memory that can take part; InvalidType for others."""
    if not isinstance(memory, Buffer):
        raise InvalidType(f"{what} is {type(memory).__name__}, not a Buffer",
                          hint="collectives take device memory: device.allocate(shape, dtype)")
    return memory


def require_agreement(calls: Sequence[Call]) -> None:
    """Raise MismatchedRanks unless all ranks said the same."""
    said = {call.rank: call.said for call in calls}
    if len(set(said.values())) > 1:
        raise MismatchedRanks.between(said)
