"""Semaphores: 32-bit counters of the device that streams and the program wait for and post to."""

from __future__ import annotations

import heapq
import threading
import time
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal

from maia_rt.contract.commands import PostOp, WaitOp
from maia_rt.errors import ClosedError, DeviceTimeout, InvalidArgument, OutOfSemaphores
from maia_rt.runtime import check
from maia_rt.runtime.hang import examine_semaphore

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device

WaitName = Literal["ge", "eq", "acquire"]
PostName = Literal["add", "set"]
WAITS: Final[dict[str, WaitOp]] = {"ge": WaitOp.GE, "eq": WaitOp.EQ, "acquire": WaitOp.ACQUIRE}
POSTS: Final[dict[str, PostOp]] = {"add": PostOp.ADD, "set": PostOp.SET}
WORD: Final = (1 << 32) - 1
MOST_ADDED: Final = (1 << 31) - 1
_LONGEST_PAUSE: Final = 0.001
_ALIVE_SECONDS: Final = 0.5


class Semaphore:
    """A 32-bit counter of the device; made by :meth:`maia_rt.Device.create_semaphore`.

    Streams post to it with :meth:`maia_rt.Stream.signal` and wait for it with :meth:`maia_rt.Stream.wait`; the program
    does with the methods here. Values are compared serially: a counter may pass 2^32 and go on at 0, as long as no two
    values that are compared lie 2^31 or more apart.

    Attributes
    ----------
    device : Device
    index : int
        The number that it has in the contract, in error texts and in the register tool.
    """

    def __init__(self, device: Device, index: int, give_back: Callable[[int], None]) -> None:
        self.device = device
        self.index = index
        self._give_back = give_back
        self._closed = False

    @property
    def name(self) -> str:
        """For texts."""
        return f"semaphore {self.index}"

    @property
    def value(self) -> int:
        """What it holds now, 0 to 2^32 - 1. It may have moved on when you look at it.

        Raises
        ------
        ClosedError, ForkedError
        """
        self._require_open()
        return self.device._firmware.semaphore(self.index)

    def set(self, value: int) -> None:
        """Set it, at once.

        Parameters
        ----------
        value : int
            0 to 2^32 - 1.

        Raises
        ------
        InvalidArgument, InvalidType, ClosedError, DeviceLost
        """
        self._post(PostOp.SET, check.integer(value, "a semaphore's value", 0, WORD))

    def add(self, value: int = 1) -> None:
        """Add to it, at once; modulo 2^32.

        Parameters
        ----------
        value : int
            0 to 2^31 - 1.

        Raises
        ------
        InvalidArgument, InvalidType, ClosedError, DeviceLost
        """
        self._post(PostOp.ADD, check.integer(value, "what is added to a semaphore", 0, MOST_ADDED))

    def wait(self, value: int, timeout: float | None = None, *, op: Literal["ge", "eq"] = "ge") -> None:
        """Have the program wait for it. Semaphores have no interrupt: this looks again, at most 1 ms apart.

        Parameters
        ----------
        value : int
            0 to 2^32 - 1.
        timeout : float, optional
            In seconds; the device's by default.
        op : {'ge', 'eq'}
            Until it is at least, or equal to, `value`.

        Raises
        ------
        DeviceTimeout
            The text says what it holds.
        InvalidArgument, InvalidType, ClosedError, DeviceLost
        """
        value = check.integer(value, "a semaphore's value", 0, WORD)
        seconds = self.device.timeout if timeout is None else check.seconds(timeout)
        if op not in ("ge", "eq"):
            raise InvalidArgument(f"the program waits for a semaphore with 'ge' or 'eq', not {op!r:.40}")
        now = time.monotonic()
        deadline, next_look, pause = now + seconds, now + _ALIVE_SECONDS, 10e-6
        while not self._reached(value, op):
            now = time.monotonic()
            if now >= deadline:
                raise self._timeout(op, value, seconds)
            if now >= next_look:
                self.device._firmware.check_alive()
                next_look = now + _ALIVE_SECONDS
            time.sleep(min(pause, max(deadline - now, 0)))
            pause = min(2 * pause, _LONGEST_PAUSE)
        if self.device._validator is not None:
            self.device._validator.host_wait(self.index, WAITS[op], value)

    @property
    def closed(self) -> bool:
        """Whether it has been given back, by itself or with its device."""
        return self._closed or self.device.closed

    def close(self) -> None:
        """Give it back; idempotent. It is dealt out again when the commands submitted so far are done."""
        if not self._closed:
            self._closed = True
            self.device._addresses.closings += 1  # graphs look at theirs again
            self._give_back(self.index)

    def _reached(self, value: int, op: str) -> bool:
        now = self.value
        return now == value if op == "eq" else (now - value) & WORD < 1 << 31

    def _timeout(self, op: str, wanted: int, seconds: float) -> DeviceTimeout:
        value = self.value
        report = examine_semaphore(self.device, self.index, WAITS[op], value, wanted)
        error = DeviceTimeout(f"{self.device.name}: {self.name} was not {'>=' if op == 'ge' else '=='} {wanted} within "
                              f"{seconds:g} s; it holds {value}", cause=report.sentence,
                              hint="print the error's report, signal it, or wait longer")
        error.report = report
        return error

    def _post(self, op: PostOp, value: int) -> None:
        self._require_open()
        if self.device._validator is not None:
            self.device._validator.host_signal(self.index, self.name, op, value)
        self.device._firmware.post_semaphore(self.index, op, value)

    def _require_open(self) -> None:
        self.device._require_open()
        if self._closed:
            raise ClosedError(f"{self.device.name}: {self.name} has been closed")

    def __enter__(self) -> Semaphore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not self.device.closed:
            self._closed = True
            warnings.warn(f"{self.name} was not closed", ResourceWarning, stacklevel=2, source=self)
            self._give_back(self.index)

    def __repr__(self) -> str:
        return f"<Semaphore {self.index} of {self.device.name}{', closed' if self.closed else ''}>"


class SemaphorePool:
    """The semaphores of a device that nobody has. Any thread may call.

    Parameters
    ----------
    first, count : int
        They are `first` to `count` - 1; those below mirror the queues' progress.
    name : str
        The device's, for error texts.
    """

    def __init__(self, first: int, count: int, name: str) -> None:
        self._free = list(range(first, count))
        self._count = len(self._free)
        self._name = name
        self._lock = threading.Lock()

    def take(self) -> int:
        """Return the lowest free one.

        Raises
        ------
        OutOfSemaphores
        """
        with self._lock:
            if not self._free:
                raise OutOfSemaphores(f"{self._name}: all {self._count} semaphores are in use",
                                      cause="semaphores, and streams with host callbacks, are open",
                                      hint="close those that are no longer needed")
            return heapq.heappop(self._free)

    def withhold(self, index: int) -> None:
        """Take a certain one out."""
        with self._lock:
            self._free.remove(index)
            heapq.heapify(self._free)

    def give_back(self, index: int) -> None:
        """Take one back that no command uses any more."""
        with self._lock:
            heapq.heappush(self._free, index)
