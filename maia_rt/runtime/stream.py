"""Streams: commands that run one after the other."""

from __future__ import annotations

import threading
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from maia_rt._fast.ring import QueueStopped
from maia_rt.contract.commands import CommandFlag, Opcode, PostOp, WaitOp
from maia_rt.errors import ClosedError, InvalidArgument, InvalidType, MaiaError
from maia_rt.queue import QueuePair, QueueStatistics
from maia_rt.runtime.buffer import Memory
from maia_rt.runtime.copy import CopyPath, copy
from maia_rt.runtime.event import Event
from maia_rt.runtime.program import Kernel
from maia_rt.runtime.staging import Staging

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device

_BARRIER: Final = int(CommandFlag.BARRIER)
_NOP, _FILL = int(Opcode.NOP), int(Opcode.FILL)
_GE: Final = WaitOp.GE
_WIDTHS: Final = (1, 2, 4)


class Stream:
    """Commands that run in the order of their submission, on a hardware queue of their own.

    Made by :meth:`maia_rt.Device.create_stream`. Several threads may use one stream. Every command starts when all
    before it are done.

    Attributes
    ----------
    device : Device
    """

    # A command's method, in this order (all that is public here and submits keeps to it):
    #   1. `if self._capture is not None: return self._capture.<command>(...)` with the same arguments;
    #   2. check the arguments;
    #   3. `if self.device._validator is not None:` tell it what the command reads and writes;
    #   4. `self._submit(...)`, the only way commands of a stream reach a queue.
    _capture: Any = None
    """What takes this stream's commands while it is captured into a graph."""

    def __init__(self, device: Device, queue: QueuePair) -> None:
        self.device = device
        self._queue = queue
        self._ring = queue.ring
        self._staging: Staging | None = None
        self._staging_lock = threading.RLock()

    # --- commands ----------------------------------------------------------------------------------------------------

    def copy(self, dst: Any, src: Any) -> CopyPath:
        """Copy all of `src` to `dst`: between host and device, or on the device, of any size and alignment.

        Parameters
        ----------
        dst, src : Buffer, HostBuffer, or an object with a contiguous buffer such as an array
            Of the same number of bytes; at least one of them memory of this device. Dtypes are not converted.

        Returns
        -------
        CopyPath
            How the bytes go.

        Notes
        -----
        As with CUDA, memory of the device and pinned memory is read and written while the program goes on: wait for
        the stream before it is touched. Other host memory is read before the call returns; where it is the
        destination, the call returns when the copy is done. An array over a :class:`HostBuffer` counts as pinned.

        Raises
        ------
        InvalidArgument
            The sizes differ, memory is not contiguous or belongs to another device, or `dst` is read-only.
        InvalidType
            One of them is no memory, or neither is on this device.
        ClosedError, QueueFull, DeviceFault, DeviceLost, DeviceTimeout
        """
        return copy(self, dst, src)

    def fill(self, dst: Memory, value: int, width: int = 1) -> None:
        """Fill memory with the low `width` bytes of `value`, again and again.

        Parameters
        ----------
        dst : Buffer or HostBuffer
        value : int
        width : int
            1, 2 or 4; address and size of `dst` are multiples of it.
        """
        if width not in _WIDTHS:
            raise InvalidArgument(f"a pattern has 1, 2 or 4 bytes, not {width}")
        self._require_own(dst, "dst")
        if dst.nbytes % width or dst.address % width:
            raise InvalidArgument(f"{dst.nbytes} bytes at {dst.address:#x} are not aligned to the pattern's {width}")
        if not -(1 << 8 * width - 1) <= value < 1 << 8 * width:
            raise InvalidArgument(f"{value} does not fit into {width} bytes")
        if dst.nbytes:
            if self.device._validator is not None:
                self.device._validator.command(self, "fill", writes=[(dst.address, dst.nbytes, dst)])
            pattern = value & (1 << 8 * width) - 1
            self._submit(_FILL, payload=(dst.address, dst.nbytes, pattern | width << 32))

    def launch(self, kernel: Kernel, *args: Any, clusters: int = 0) -> None:
        """Launch a kernel.

        Parameters
        ----------
        kernel : Kernel
        *args : Buffer, HostBuffer or number
            As the kernel declares them: memory of its size, and of its dtype and shape where the memory has one; a
            number for a scalar.
        clusters : int
            A mask of the clusters that may run it; 0 is all.

        Raises
        ------
        InvalidArgument, InvalidType, ClosedError
            Nothing was submitted then.
        QueueFull, DeviceFault, DeviceLost
        """
        words = kernel.encode(args)
        if kernel.program.device is not self.device:
            raise InvalidArgument(f"kernel {kernel.name!r} is loaded on another device")
        if self.device._validator is not None:
            self.device._validator.command(self, f"launch of {kernel.name}", *kernel.accesses(args))
        try:
            self._queue.note(self._ring.submit_launch(_BARRIER, kernel.handle, clusters, words))
        except QueueStopped:
            raise self._queue.fault() from None

    def record(self, event: Event | None = None, *, timing: bool = False) -> Event:
        """Mark this moment: the event is done when everything submitted so far is.

        Parameters
        ----------
        event : Event, optional
            Recorded anew; by default a new one is made.
        timing : bool
            Whether a new event takes the device's time.

        Returns
        -------
        Event
        """
        self._require_open()
        event = event or Event(self.device, timing)
        if event.device is not self.device:
            raise InvalidArgument("the event belongs to another device")
        event._record(self)
        if self.device._validator is not None:
            self.device._validator.record(self, event)
        return event

    def wait(self, event: Event) -> None:
        """Let what is submitted from here on start only when `event` is done. The program goes on at once.

        The wait runs on the device. It is for the moment that was last recorded; an event never recorded is done. So is
        one whose stream has stopped at a fault: that is told where the event or its stream is waited for.
        """
        self._require_open()
        if event.device is not self.device:
            raise InvalidArgument("the event belongs to another device")
        if self.device._validator is not None:
            self.device._validator.wait(self, event)
        queue, sequence = event._queue, event._sequence
        if queue is None or queue is self._queue or queue.quiet(sequence):
            return
        # A queue's progress is also in the semaphore of its number.
        self._submit(_NOP, pre=((queue.id, _GE, sequence & 0xFFFFFFFF),))

    # --- waiting -----------------------------------------------------------------------------------------------------

    def synchronize(self, timeout: float | None = None) -> None:
        """Wait until everything submitted so far is done.

        Parameters
        ----------
        timeout : float, optional
            In seconds; the stream's by default.

        Raises
        ------
        DeviceFault
            A command failed. The stream stands still until :meth:`reset`.
        DeviceTimeout
            The text says what the stream is at.
        DeviceLost, ClosedError, ForkedError
        """
        self._require_open()
        self._queue.wait(self._ring.head, timeout)
        if self.device._validator is not None:
            self.device._validator.synchronized(self)

    def query(self) -> bool:
        """Say whether everything submitted so far is done. Raises as :meth:`synchronize`."""
        self._require_open()
        if not self._queue.done(self._ring.head):
            return False
        if self.device._validator is not None:
            self.device._validator.synchronized(self)
        return True

    # --- life --------------------------------------------------------------------------------------------------------

    @property
    def queue(self) -> QueuePair:
        """The hardware queue, for tools and tests."""
        return self._queue

    @property
    def closed(self) -> bool:
        """Whether the stream has been closed, by itself or with its device."""
        return self._queue.closed

    def statistics(self) -> QueueStatistics:
        """Return what became of everything submitted."""
        return self._queue.statistics()

    def reset(self) -> None:
        """Let a stream that stopped at a fault run again. What it had not run is lost, and said so by its events."""
        with self._staging_lock:
            self._queue.reset()
            if self._staging is not None:
                self._staging.reset()

    def close(self) -> None:
        """Wait for what was submitted, as long as the stream's time allows, and give the queue back. Idempotent.

        Raises
        ------
        DeviceTimeout, DeviceFault
            Not everything was done. The stream is closed all the same.
        """
        if not self.closed and not self.device._forked:
            try:
                self.synchronize()
            finally:
                self._end()

    def _end(self) -> None:
        self.device._return_queue(self._queue)
        with self._staging_lock:
            if self._staging is not None and self._queue.closed:
                self._staging.close()
                self._staging = None

    def _stopped(self) -> None:
        """Close without the device, which has been stopped."""
        self._queue.release()
        with self._staging_lock:
            if self._staging is not None:
                self._staging.close()
                self._staging = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.close()
        except MaiaError:
            # What went wrong inside the block is the news; a stream that failed cannot be synchronized either.
            if kind is None:
                raise

    def __del__(self) -> None:
        if hasattr(self, "_staging_lock") and not self.closed and not self.device.closed:
            warnings.warn("a stream was not closed", ResourceWarning, stacklevel=2, source=self)
            self.device._abandon_queue(self._queue, self._staging)

    def __repr__(self) -> str:
        return f"<Stream on queue {self._queue.id} of {self.device.name}{', closed' if self.closed else ''}>"

    # --- for what is built on streams ---------------------------------------------------------------------------------

    def _submit(self, opcode: int, *, units: int = 0, payload: tuple[int, int, int] = (0, 0, 0),
                pre: tuple[tuple[int, WaitOp, int], ...] = (), post: tuple[tuple[int, PostOp, int], ...] = (),
                unbounded: bool = False) -> int:
        """Submit one command that starts when everything before it is done. All that streams can do comes down to this.

        Parameters
        ----------
        opcode, units, payload : int, int, three ints
            As in the contract.
        pre, post : up to two (semaphore, operation, value)
            What the command waits for, and what it posts.
        unbounded : bool
            Whether the command waits for something that may be submitted after it, or comes from outside: a
            semaphore, a value in memory, the host. (An event is neither: it is in the past.)

        Returns
        -------
        int
            The command's sequence number on the stream's present queue, `_queue`.

        Raises
        ------
        QueueFull, DeviceFault, DeviceLost, ClosedError, ForkedError
        """
        try:
            if pre or post:
                sequence = self._ring.submit_with(opcode, _BARRIER, units, *payload, pre, post)
            else:
                sequence = self._ring.submit(opcode, _BARRIER, units, *payload)
        except QueueStopped:
            raise self._queue.fault() from None
        self._queue.note(sequence)
        return sequence

    def _require_own(self, memory: Memory, what: str) -> None:
        if not isinstance(memory, Memory):
            raise InvalidType(f"{what} is {type(memory).__name__}, not a Buffer or HostBuffer")
        if memory.device is not self.device:
            raise InvalidArgument(f"{what} belongs to another device")

    def _require_open(self) -> None:
        if self.closed:
            raise ClosedError(f"{self._ring.name}: the stream has been closed")
        self._ring.poll()  # raises in a forked child, which does not have the stream's memory
