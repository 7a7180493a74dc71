"""Events: moments in a stream's order."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

from maia_rt.contract.commands import Opcode
from maia_rt.errors import CaptureError, InvalidArgument, InvalidType
from maia_rt.queue import QueuePair, Timing
from maia_rt.runtime import check
from maia_rt.runtime.awaiting import reach

_NOP: Final = int(Opcode.NOP)

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.stream import Stream


class Event:
    """A moment in the order of a stream's commands; see :meth:`maia_rt.Stream.record`.

    An event that is not timed costs nothing: it remembers the newest command's sequence number.

    Attributes
    ----------
    device : Device
    timing : bool
        Whether recording it also takes the device's time.
    """

    def __init__(self, device: Device, timing: bool = False) -> None:
        self.device = device
        self.timing = timing
        # The moment: a sequence number on a queue. None: never recorded.
        self._queue: QueuePair | None = None
        self._sequence = 0
        self._stream: weakref.ref[Stream] | None = None
        self._time: Timing | None = None
        # In a capture: which stream's, and the nodes it comes after.
        self._captured: tuple[Any, list[Any]] | None = None

    @property
    def stream(self) -> Stream | None:
        """The stream that recorded it last; None where none did, or that is gone."""
        return None if self._stream is None else self._stream()

    def _record(self, stream: Stream) -> None:
        self._captured = None
        if not self.timing:
            self._queue, self._sequence = stream._mark()
        else:
            queue = None
            while queue is not stream._queue:  # where the command itself brought the stream to another one
                queue = stream._queue
                self._sequence, self._time = queue.time(lambda: stream._submit(_NOP, report=True))
            self._queue = queue
        self._stream = weakref.ref(stream)

    def query(self) -> bool:
        """Say whether everything before the event is done. An event that was never recorded is.

        Raises
        ------
        DeviceFault
            Something before it failed.
        DeviceLost, ForkedError
        """
        self._require_moment()
        if self._queue is None:
            return True
        if not self._queue.done(self._sequence):
            return False
        if self.device._validator is not None:
            self.device._validator.reached(self)
        return True

    def synchronize(self, timeout: float | None = None) -> None:
        """Wait until everything before the event is done.

        Parameters
        ----------
        timeout : float, optional
            In seconds; the stream's by default.

        Raises
        ------
        DeviceFault
            Something before it failed, or never ran because the stream was closed before.
        DeviceTimeout
            The text says what the stream is at.
        ClosedError
            The stream was closed during the wait.
        DeviceLost, ForkedError
        """
        if timeout is not None:
            check.seconds(timeout)
        self._require_moment()
        if self._queue is not None and not self._queue.done(self._sequence):
            if self.device._dispatcher is not None:
                self.device._dispatcher.refuse_wait(self.stream)
            self._queue.wait(self._sequence, timeout)
        if self.device._validator is not None:
            self.device._validator.reached(self)

    async def synchronize_async(self, timeout: float | None = None) -> None:
        """Wait in asyncio until everything before the event is done; ``await event`` is the same without a time-out.

        The event loop's selector waits, beside everything else that the loop does: no thread.

        Parameters
        ----------
        timeout : float, optional
            In seconds; the device's by default.

        Raises
        ------
        DeviceFault
            Something before it failed.
        DeviceTimeout
            The text says what the stream is at.
        DeviceLost, ClosedError, ForkedError
        """
        self._require_moment()
        queue, sequence = self._queue, self._sequence
        seconds = self.device.timeout if timeout is None else check.seconds(timeout)
        if queue is not None:
            await reach(queue, sequence, seconds)
        if self.device._validator is not None:
            self.device._validator.reached(self)

    def __await__(self) -> Generator[Any, None, None]:
        """Wait in asyncio; see :meth:`synchronize_async`."""
        return self.synchronize_async().__await__()
    def _require_moment(self) -> None:
        if self._captured is not None:
            raise CaptureError("the event was recorded in a capture", cause="it stands for a place in a graph, not for "
                               "a moment", hint="record it again after the launch of the graph")

    @property
    def time_ns(self) -> int:
        """Device time of the event in nanoseconds; waits for it.

        Raises
        ------
        InvalidArgument
            The event is not timed, or was never recorded, or its stream was closed before the time was read.
        """
        if self._queue is None or self._time is None:
            raise InvalidArgument("the event has no time", cause="it was not recorded, or made without timing=True",
                                  hint="record it with stream.record(timing=True)")
        if not self._time.end_ns:
            if self._queue.closed:
                raise InvalidArgument("the event's stream was closed before its time was read")
            self.synchronize()
            self._queue.take_timings()
        return self._time.end_ns

    def __sub__(self, start: Event) -> float:
        """Milliseconds of device time from `start` to this event; waits for both. Both must be timed."""
        if not isinstance(start, Event):
            raise InvalidType(f"from an event an event is subtracted, not {type(start).__name__}")
        if start.device is not self.device:
            raise InvalidArgument("events of two devices have no common time")
        return (self.time_ns - start.time_ns) / 1e6

    def __repr__(self) -> str:
        if self._captured is not None:
            return "<Event of a capture>"
        if self._queue is None:
            return "<Event, not recorded>"
        return f"<Event at command {self._sequence} of queue {self._queue.id}{', timed' if self.timing else ''}>"
