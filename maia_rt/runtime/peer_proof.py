"""The proof of a path between devices: data goes both ways before anybody relies on it."""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from maia_rt.contract.commands import Opcode, PostOp
from maia_rt.errors import MaiaError, OutOfMemory

if TYPE_CHECKING:
    from maia_rt.runtime.buffer import Buffer
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.peer import PeerPath
    from maia_rt.runtime.stream import Stream

PAGE: Final = 4096
_SIZES: Final = (4 << 20, 256 << 10, PAGE)
"""Bytes of the memory that is tried: the largest that there is room for."""
_LONGEST_SECONDS: Final = 10.0
_PLACES: Final = 5
"""Pages of the HBM that are read besides, from the first to the last."""
_LOOKS: Final = 4
_COPY: Final = int(Opcode.COPY)


class Mismatch(Exception):
    """What arrived is not what left. Internal: a path that it is raised for becomes a staged one."""


class _Ends:
    """Streams and memory of both devices for a moment.

    Attributes
    ----------
    near, far : Stream
        Of the device that reaches, and of its peer.
    scratch, target : Buffer
        Of the peer and of the device.
    here, there : HostBuffer
        Pinned for the device and for the peer.
    """

    def __init__(self, device: Device, other: Device, stack: contextlib.ExitStack) -> None:
        seconds = min(device.timeout, other.timeout, _LONGEST_SECONDS)
        self.near: Stream = stack.enter_context(device.create_stream(timeout=seconds))
        self.far: Stream = stack.enter_context(other.create_stream(timeout=seconds))
        self.scratch = _largest(other, stack)
        self.size = self.scratch.nbytes
        self.target = _largest(device, stack)
        self.size = min(self.size, self.target.nbytes)
        self.here = stack.enter_context(device.allocate_host(self.size))
        self.there = stack.enter_context(other.allocate_host(self.size))


def _largest(device: Device, stack: contextlib.ExitStack) -> Buffer:
    for size in _SIZES[:-1]:
        with contextlib.suppress(OutOfMemory):
            return stack.enter_context(device.allocate(size))
    return stack.enter_context(device.allocate(_SIZES[-1]))


def prove(path: PeerPath) -> float:
    """Write and read patterns both ways, in memory and in the semaphore window.

    Returns
    -------
    float
        Bytes a second that the device reads from the peer.

    Raises
    ------
    Mismatch
        What arrived is not what left.
    DeviceFault, DeviceTimeout
        It did not arrive at all.
    OutOfMemory, ClosedError, DeviceLost
    """
    with contextlib.ExitStack() as stack:
        ends = _Ends(path.device, path.other, stack)
        at = path._hbm + ends.scratch.address
        pattern = np.frombuffer(secrets.token_bytes(PAGE), np.uint8)
        _prove_memory(ends, at, np.resize(pattern, ends.size))
        _prove_places(path, ends)
        _prove_semaphores(path, ends)

        def pull() -> None:
            _run(ends.near, at, ends.target.address, ends.size)

        return _best(pull, ends.size)


def measure(path: PeerPath) -> float:
    """Return the bytes a second of a copy through the host, 0 where it cannot be tried."""
    try:
        with contextlib.ExitStack() as stack:
            ends = _Ends(path.device, path.other, stack)

            def pull() -> None:
                path._link.copy(ends.near, ends.target.address, ends.scratch.address, ends.size, pull=True)

            return _best(pull, ends.size)
    except MaiaError:
        return 0.0


def _run(stream: Stream, source: int, target: int, size: int) -> None:
    stream._submit(_COPY, payload=(source, target, size))
    stream.synchronize()


def _best(copy: Any, size: int) -> float:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - start)
    return float(size / min(seconds))


def _prove_memory(ends: _Ends, at: int, pattern: npt.NDArray[np.uint8]) -> None:
    """The peer writes and the device reads; then the other way round, with every bit the other way."""
    here, there, size = ends.here.array, ends.there.array, ends.size
    there[:], here[:] = pattern, 0
    _run(ends.far, ends.there.address, ends.scratch.address, size)
    _run(ends.near, at, ends.here.address, size)
    _compare(here, pattern, "read from the peer's memory")
    here[:], there[:] = ~pattern, 0
    _run(ends.near, ends.here.address, at, size)
    _run(ends.far, ends.scratch.address, ends.there.address, size)
    _compare(there, ~pattern, "written to the peer's memory")


def _prove_places(path: PeerPath, ends: _Ends) -> None:
    """Read pages all over the peer's memory, which belong to others; those that change meanwhile say nothing."""
    capabilities = path.other.capabilities
    last = capabilities.hbm_bytes // PAGE - 1
    here, there = ends.here.array[:PAGE], ends.there.array[:PAGE]
    for place in range(_PLACES):
        address = capabilities.hbm_base + last * place // (_PLACES - 1) * PAGE
        for look in range(_LOOKS):
            _run(ends.far, address, ends.there.address, PAGE)
            before = there.copy()
            _run(ends.near, path._hbm + address, ends.here.address, PAGE)
            if np.array_equal(here, before):
                break
            _run(ends.far, address, ends.there.address, PAGE)
            if look == _LOOKS - 1 and np.array_equal(there, before):
                _compare(here, before, f"read from page {last * place // (_PLACES - 1)} of the peer's memory")


def _prove_semaphores(path: PeerPath, ends: _Ends) -> None:
    """Set, add to and read a semaphore of the peer; a stream of the peer waits for it."""
    if not path.device.capabilities.signal_remote:
        return
    first, step = secrets.randbits(30), 1 + secrets.randbits(20)
    with path.other.create_semaphore() as semaphore:
        at = path._window + 4 * semaphore.index
        ends.far.wait(semaphore, first + step, op="eq")
        try:
            for op, value in ((PostOp.SET, first), (PostOp.ADD, step)):
                ends.near._submit(int(Opcode.SIGNAL_REMOTE), payload=(at, int(op) | value << 32, 0))
            ends.near.synchronize()
        except MaiaError:
            semaphore.set(first + step)  # nobody waits for what will not come
            raise
        ends.far.synchronize()
        _run(ends.near, at, ends.here.address, 4)
        _compare(ends.here.array[:4], np.frombuffer((first + step).to_bytes(4, "little"), np.uint8),
                 "read from the peer's semaphores")


def _compare(found: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8], what: str) -> None:
    wrong = np.flatnonzero(found != expected)
    if wrong.size:
        first = int(wrong[0])
        raise Mismatch(f"{wrong.size} of {expected.size} bytes {what} are wrong, the first at {first}: "
                       f"{found[first]:#04x}, not {expected[first]:#04x}")
