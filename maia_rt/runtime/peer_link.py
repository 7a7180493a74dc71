"""The way between two devices through host memory that both of them reach, and the look at what a direct copy did."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Final

from maia_rt.contract.commands import Opcode
from maia_rt.errors import MaiaError
from maia_rt.memory import DmaRegion
from maia_rt.queue import QueuePair

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.stream import Stream

_PIECE_BYTES: Final = 512 << 10
_PIECES: Final = 4
_WORD_BYTES: Final = 4
_COPY: Final = int(Opcode.COPY)
_CRC: Final = int(Opcode.CRC)
Mark = tuple[QueuePair, int]


class PeerLink:
    """Pinned memory that two devices share, and a stream of the peer's for the peer's part.

    Parameters
    ----------
    device, other : Device
    """

    def __init__(self, device: Device, other: Device) -> None:
        self._device = device
        self._other = other
        self._lock = threading.RLock()
        self._streams: dict[Device, Stream] = {}
        self._region: DmaRegion | None = None
        self._iovas: dict[Device, int] = {}

    def copy(self, stream: Stream, near: int, far: int, size: int, *, pull: bool) -> None:
        """Copy through the host, behind all that `stream` has; done when this returns.

        Parameters
        ----------
        stream : Stream
            Of the device.
        near, far : int
            Addresses, the device's and the peer's.
        size : int
        pull : bool
            From the peer to the device.

        Raises
        ------
        DeviceFault, DeviceTimeout, DeviceLost, ClosedError
            Of either device, which the text names.
        """
        with self._lock:
            stream.synchronize()
            behind = self._stream(self._other, stream.timeout)
            first, second = (behind, stream) if pull else (stream, behind)
            source, target = (far, near) if pull else (near, far)
            start, end = self._memory(first.device), self._memory(second.device)
            count = -(-size // _PIECE_BYTES)
            drained: list[Mark] = []
            filled: list[Mark] = []
            for number in range(count + 1):
                if number < count:
                    if number >= _PIECES:
                        _wait(second, drained[number - _PIECES])
                    at, length = _piece(number, size)
                    slot = number % _PIECES * _PIECE_BYTES
                    first._submit(_COPY, payload=(source + at, start + slot, length))
                    filled.append(first._mark())
                if number:
                    at, length = _piece(number - 1, size)
                    slot = (number - 1) % _PIECES * _PIECE_BYTES
                    _wait(first, filled[number - 1])
                    second._submit(_COPY, payload=(end + slot, target + at, length))
                    drained.append(second._mark())
            second.synchronize()

    def same(self, near: int, far: int, size: int, timeout: float) -> bool:
        """Say whether both ends of a copy that is done hold the same, each told by the device whose memory it is."""
        with self._lock, contextlib.ExitStack() as stack:
            found = []
            for device, at in ((self._device, near), (self._other, far)):
                stream = self._stream(device, timeout)
                block = stack.enter_context(device._pool.allocate(_WORD_BYTES))
                stream._submit(_CRC, payload=(at, size, block.iova))
                found.append((stream, block))
            sums = []
            for stream, block in found:
                stream.synchronize()
                sums.append(bytes(block.view()[:_WORD_BYTES]))
            return sums[0] == sums[1]

    def stream(self) -> Stream:
        """Return the peer's stream, for copies that it takes part in; under the caller's order."""
        return self._stream(self._other, self._other.timeout)

    def forget(self) -> None:
        """Begin anew: one of the devices is about to be reset, which closes its streams."""
        self._streams = {}

    def close(self) -> None:
        """End with one of the devices, whose streams have been waited for."""
        # The device that is being closed still runs.
        for stream in self._streams.values():
            with contextlib.suppress(MaiaError):
                stream.close()
        self._streams = {}
        for device, iova in self._iovas.items():
            with contextlib.suppress(MaiaError):
                device._pool.unmap(iova)
        self._iovas = {}
        if self._region is not None:
            self._region.release()
            self._region = None

    def _stream(self, device: Device, timeout: float) -> Stream:
        stream = self._streams.get(device)
        if stream is not None and not stream.closed and stream.failed:
            stream.recover()
        if stream is None or stream.closed or stream.timeout != timeout:
            if stream is not None and not stream.closed:
                stream.close()
            stream = self._streams[device] = device.create_stream(timeout=timeout)
        return stream

    def _memory(self, device: Device) -> int:
        """Return the address of the shared memory for a device."""
        if self._region is None:
            self._region = DmaRegion(_PIECES * _PIECE_BYTES)
        iova = self._iovas.get(device)
        if iova is None:
            iova = self._iovas[device] = device._pool.map(self._region)
        return iova


def _piece(number: int, size: int) -> tuple[int, int]:
    start = number * _PIECE_BYTES
    return start, min(_PIECE_BYTES, size - start)


def _wait(stream: Stream, mark: Mark) -> None:
    """Wait for a command of a stream; raise what became of it."""
    queue, sequence = mark
    queue.wait(sequence, stream.timeout)
    if stream.failed:
        raise stream._fault()
