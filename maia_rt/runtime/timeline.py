"""What one stream pushes to another device: a semaphore there that only this stream sets, ever higher."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Final

from maia_rt.contract.commands import Opcode, PostOp
from maia_rt.queue import QueuePair

if TYPE_CHECKING:
    from maia_rt.runtime.stream import Stream

_SIGNAL: Final = int(Opcode.SIGNAL_REMOTE)
_WORD: Final = (1 << 32) - 1


class Timeline:
    """A stream's semaphore on another device. Any thread may call.

    The stream counts it up, in its own order, and whoever waits compares serially: so one semaphore serves all
    waits, and it may pass 2^32. After a failure of the stream it is not used again, for what was lost leaves a gap.

    Parameters
    ----------
    stream : Stream
    index : int
        The semaphore's, on the device that waits.
    address : int
        Where the stream's device reaches it.
    value : int
        What it holds.

    Attributes
    ----------
    users : int
        Waits that compare with it and are not over; counted by its owner.
    """

    def __init__(self, stream: Stream, index: int, address: int, value: int) -> None:
        self.index = index
        self.users = 0
        self._stream = weakref.ref(stream)
        self._address = address
        self._lock = threading.Lock()
        self._value = value
        self._mark: tuple[QueuePair, int] | None = None
        self._covered: tuple[QueuePair, int] | None = None

    def push(self, stream: Stream, queue: QueuePair, sequence: int) -> tuple[int, QueuePair, int]:
        """Have the stream signal behind all that it has, unless it has done so since a command of its own.

        Parameters
        ----------
        stream : Stream
            Its own.
        queue, sequence : QueuePair, int
            The command.

        Returns
        -------
        (int, QueuePair, int)
            The value to wait for, and the command that sets it.

        Raises
        ------
        QueueFull, DeviceFault, DeviceLost, ClosedError
            Of the stream.
        """
        with self._lock:
            if self._mark is None or self._covered is None or self._covered[0] is not queue or (
                    self._covered[1] < sequence):
                value = (self._value + 1) & _WORD
                pushed = stream._submit(_SIGNAL, payload=(self._address, PostOp.SET | value << 32, 0))
                self._value, self._mark, self._covered = value, (stream._queue, pushed), (queue, sequence)
            return self._value, *self._mark

    @property
    def ended(self) -> bool:
        """Whether its stream pushes no more, and nobody waits."""
        stream = self._stream()
        return not self.users and (stream is None or stream.closed) and self.quiet

    @property
    def quiet(self) -> bool:
        """Whether all that was pushed has arrived, or never will."""
        return self._mark is None or self._mark[0].quiet(self._mark[1])
