"""The replays in flight of a graph that spans devices: where one part fails, the others are told, not left waiting."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from maia_rt.errors import DeviceTimeout, MaiaError, PeerFault
from maia_rt.runtime.outstanding import label

if TYPE_CHECKING:
    from maia_rt.queue import QueuePair
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.stream import Stream

_PAUSE_SECONDS: Final = 0.001


class Part:
    """One device's command of one replay.

    Parameters
    ----------
    stream : Stream
        Whose newest command it is.
    """

    def __init__(self, stream: Stream) -> None:
        self.device: Device = stream.device
        self._number = stream.number
        self._queue: QueuePair
        self._queue, self._sequence = stream._mark()

    def done(self) -> bool:
        """Say whether it is; raise why it will never be."""
        return self._queue.done(self._sequence, waiting=True)

    @property
    def quiet(self) -> bool:
        """Whether nothing of it runs any more, whatever became of it."""
        return self._queue.quiet(self._sequence)

    def fail(self, error: MaiaError, culprit: Device) -> None:
        """Have it fail with PeerFault, unless it is done."""
        with contextlib.suppress(MaiaError):
            self._queue.abort(self._sequence, self._number, error, peer=label(culprit))


class Replays:
    """What has been launched of a graph and is not done. Any thread may call.

    Attributes
    ----------
    broken : bool
        Whether a replay has failed since the graph was last put in order.
    """

    def __init__(self) -> None:
        self.broken = False
        self._lock = threading.RLock()
        self._pending: deque[Sequence[Part]] = deque()
        self._last: Sequence[Part] = ()

    def add(self, parts: Sequence[Part]) -> None:
        """Look after a replay from here on."""
        with self._lock:
            self._pending.append(parts)
            self._last = parts

    @property
    def over(self) -> bool:
        """Whether all that has been launched is done, or has been given up."""
        return not self._pending

    def look(self, *, alive: bool = True) -> None:
        """Forget what is done; fail the rest where a part has failed or, if `alive` is to be seen, a device is gone."""
        with self._lock:
            while self._pending:
                # What fails takes all behind it with it: so the newest replay tells of those in between.
                found = self._failure(self._pending[-1]) or self._failure(self._pending[0])
                if found is None and alive:
                    found = _gone(self._pending[0])
                if found is not None:
                    self._give_up(*found)
                elif all(part.done() for part in self._pending[0]):
                    self._pending.popleft()
                    continue
                return

    def give_up(self, parts: Sequence[Part], error: MaiaError, culprit: Device) -> None:
        """Fail a replay of which only some parts could be launched; those before it go on."""
        with self._lock:
            self.broken = True
            self._last = parts
            for part in parts:
                part.fail(error, culprit)

    def settle(self, seconds: float) -> None:
        """Wait until nothing runs any more.

        Raises
        ------
        DeviceTimeout, DeviceLost
        """
        deadline = time.monotonic() + seconds
        while left := [part for parts in (*self._pending, self._last) for part in parts if not part.quiet]:
            left[0].device._firmware.check_alive()
            if time.monotonic() > deadline:
                raise DeviceTimeout("what is left of a replay that failed does not end", cause="a part of it hangs",
                                    hint="print device.hang_report(), or reset the device")
            time.sleep(_PAUSE_SECONDS)

    def _give_up(self, culprit: Device, error: MaiaError) -> None:
        pending, self._pending = list(self._pending), deque()
        self.broken = True
        for parts in pending:
            for part in parts:
                if part.device is not culprit:
                    part.fail(error, culprit)

    @staticmethod
    def _failure(parts: Sequence[Part]) -> tuple[Device, MaiaError] | None:
        found = None
        for part in parts:
            try:
                part.done()
            except MaiaError as error:
                # One that was told of a peer's failure is not where it began.
                if found is None or not isinstance(error, PeerFault):
                    found = part.device, error.with_traceback(None)
        return found


def _gone(parts: Sequence[Part]) -> tuple[Device, MaiaError] | None:
    for part in parts:
        try:
            if not part.done():
                part.device._firmware.check_alive()
        except MaiaError as error:
            return part.device, error.with_traceback(None)
    return None
