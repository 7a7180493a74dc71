"""Streams: commands that run one after the other."""

from __future__ import annotations

import enum
import threading
import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from maia_rt._fast.command import Command
from maia_rt._fast.host_memory import HostMemory
from maia_rt._fast.ring import QueueStopped
from maia_rt.contract.commands import MAX_INLINE_BYTES, CommandFlag, Opcode
from maia_rt.errors import ClosedError, InvalidArgument, InvalidType, MaiaError
from maia_rt.queue import QueuePair, QueueStatistics
from maia_rt.runtime.buffer import Memory
from maia_rt.runtime.event import Event
from maia_rt.runtime.program import Kernel
from maia_rt.runtime.staging import CHUNK_BYTES, STAGING_BYTES, Staging

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device

_BARRIER = int(CommandFlag.BARRIER)
_COPY, _FILL, _WIDTHS = int(Opcode.COPY), int(Opcode.FILL), (1, 2, 4)


class CopyPath(enum.Enum):
    """How :meth:`Stream.copy` moved the bytes."""

    INLINE = "inline"
    """Inside the command: up to 16 bytes from memory the device does not reach."""
    STAGED = "staged"
    """In chunks through pinned memory of the stream."""
    DIRECT = "direct"
    """By one command: the device reaches both ends."""


class Stream:
    """Commands that run in the order of their submission, on a hardware queue of their own.

    Made by :meth:`maia_rt.Device.create_stream`. Several threads may use one stream. Every command starts when all
    before it are done.

    Attributes
    ----------
    device : Device
    """

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
        to, target, size = self._locate(dst, "dst")
        at, source, available = self._locate(src, "src")
        if size != available:
            raise InvalidArgument(f"dst has {size} bytes, src {available}", hint="copy a slice")
        if size == 0:
            return CopyPath.DIRECT
        if to is not None and at is not None:
            self._note(self._submit(_COPY, 0, at, to, size))
            return CopyPath.DIRECT
        if to is not None and source is not None:
            return self._from_host(to, source)
        if at is not None and target is not None:
            self._to_host(target, at)
            return CopyPath.STAGED
        raise InvalidType("neither end of the copy is memory of the device", hint="use numpy.copyto")

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
            pattern = value & (1 << 8 * width) - 1
            self._note(self._submit(_FILL, 0, dst.address, dst.nbytes, pattern | width << 32))

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
        try:
            self._note(self._ring.submit_launch(_BARRIER, kernel.handle, clusters, words))
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
        event._record(self._queue)
        return event

    def wait(self, event: Event) -> None:
        """Let what is submitted from here on start only when `event` is done. The program goes on at once.

        The wait runs on the device. It is for the moment that was last recorded; an event never recorded is done. So is
        one whose stream has stopped at a fault: that is told where the event or its stream is waited for.
        """
        self._require_open()
        if event.device is not self.device:
            raise InvalidArgument("the event belongs to another device")
        queue = event._queue
        if queue is None or queue is self._queue or queue.quiet(event._sequence):
            return
        self._note(self._queue.submit_wait(queue.id, event._sequence))

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

    def query(self) -> bool:
        """Say whether everything submitted so far is done. Raises as :meth:`synchronize`."""
        self._require_open()
        return self._queue.done(self._ring.head)

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

    # --- how copies go -----------------------------------------------------------------------------------------------

    def _locate(self, memory: Any, what: str) -> tuple[int | None, HostMemory | None, int]:
        """Find an end of a copy: its device address if the device reaches it, the host memory if it is some, bytes."""
        if isinstance(memory, Memory):
            self._require_own(memory, what)
            return memory.address, None, memory.nbytes
        host = _host_memory(memory, what)
        size = host.nbytes
        return self.device._pinned.find(host.address, size), host, size

    def _from_host(self, to: int, source: HostMemory) -> CopyPath:
        size = source.nbytes
        if size <= MAX_INLINE_BYTES:
            try:
                self._note(self._ring.submit_encoded(Command.write_imm(to, source.tobytes(), _BARRIER)))
            except QueueStopped:
                raise self._queue.fault() from None
            return CopyPath.INLINE
        with self._staging_lock:
            staging = self._stage()
            for start in range(0, size, CHUNK_BYTES):
                count = min(CHUNK_BYTES, size - start)
                address, piece = staging.take(count)
                source.copy_to(piece, start, count)
                sequence = self._submit(_COPY, 0, address, to + start, count)
                staging.use(sequence)
        self._note(sequence)
        return CopyPath.STAGED

    def _to_host(self, target: HostMemory, at: int) -> None:
        size = target.nbytes
        with self._staging_lock:
            staging = self._stage()
            try:
                for start in range(0, size, CHUNK_BYTES):
                    count = min(CHUNK_BYTES, size - start)
                    address, _ = staging.take(count)
                    sequence = self._submit(_COPY, 0, at + start, address, count)
                    staging.use(sequence, target, start)
                self._note(sequence)
                staging.finish()
            except BaseException:
                staging.forget_targets()
                raise

    def _stage(self) -> Staging:
        self._require_open()
        if self._staging is None:
            self._staging = Staging(self._queue, self.device._pool.allocate(STAGING_BYTES))
        return self._staging

    def _submit(self, opcode: int, units: int, a: int, b: int, c: int) -> int:
        try:
            return self._ring.submit(opcode, _BARRIER, units, a, b, c)
        except QueueStopped:
            raise self._queue.fault() from None

    def _note(self, sequence: int) -> None:
        self._queue.note(sequence)

    def _require_own(self, memory: Memory, what: str) -> None:
        if not isinstance(memory, Memory):
            raise InvalidType(f"{what} is {type(memory).__name__}, not a Buffer or HostBuffer")
        if memory.device is not self.device:
            raise InvalidArgument(f"{what} belongs to another device")

    def _require_open(self) -> None:
        if self.closed:
            raise ClosedError(f"{self._ring.name}: the stream has been closed")
        self._ring.poll()  # raises in a forked child, which does not have the stream's memory


def _host_memory(memory: Any, what: str) -> HostMemory:
    """The bytes of a host object, without a copy but for a source that is not contiguous."""
    writable = what == "dst"
    if isinstance(memory, np.ndarray):
        if memory.dtype.hasobject:
            raise InvalidType(f"{what} is an array of Python objects, which is no memory")
        if not memory.flags.c_contiguous:
            if writable:
                raise InvalidArgument("dst is not contiguous", hint="copy to a contiguous array and assign from it")
            memory = np.ascontiguousarray(memory)
    try:
        return HostMemory(memory, writable)
    except TypeError:
        raise InvalidType(f"{what} is {type(memory).__name__}, which is no memory",
                          hint="pass a Buffer, a HostBuffer, an array or another object with a buffer") from None
    except (ValueError, BufferError) as error:
        raise InvalidArgument(f"{what} cannot be used: {error}",
                              cause="it is read-only, or not contiguous") from None
