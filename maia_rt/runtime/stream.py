"""Streams: commands that run one after the other."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy.typing as npt

from maia_rt._fast.lane import Lane
from maia_rt._fast.ring import Account
from maia_rt.contract.commands import Condition, Opcode, PostOp, WaitOp
from maia_rt.errors import (
    ClosedError,
    DeviceFault,
    FaultCode,
    InvalidArgument,
    InvalidType,
    MaiaError,
    Unsupported,
    device_fault,
)
from maia_rt.loss import LostCommand
from maia_rt.queue import CLOSED, FAILED, QueuePair
from maia_rt.runtime import check
from maia_rt.runtime.awaiting import reach
from maia_rt.runtime.buffer import Buffer, Memory, Shape
from maia_rt.runtime.callback import StreamCalls
from maia_rt.runtime.capture import Capture, fork
from maia_rt.runtime.copy import CopyPath, copy, multicast, require_plain
from maia_rt.runtime.crossing import Crossings
from maia_rt.runtime.event import Event
from maia_rt.runtime.pool import MemoryPool, allocate, free
from maia_rt.runtime.program import Kernel
from maia_rt.runtime.queues import Claim
from maia_rt.runtime.semaphore import MOST_ADDED, POSTS, WAITS, WORD, PostName, Semaphore, WaitName
from maia_rt.runtime.staging import Staging

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device

_NOP, _FILL = int(Opcode.NOP), int(Opcode.FILL)
_WAIT_VALUE, _WRITE_IMM = int(Opcode.WAIT_VALUE), int(Opcode.WRITE_IMM)
_SIGNAL_REMOTE = int(Opcode.SIGNAL_REMOTE)
_DIRECT: Final = CopyPath.DIRECT
ConditionName = Literal["ge", "eq", "ne", "and"]
CONDITIONS: Final[dict[str, Condition]] = {name.lower(): Condition[name] for name in ("GE", "EQ", "NE", "AND")}
_GE: Final = WaitOp.GE
_WIDTHS: Final = (1, 2, 4)


@dataclass(frozen=True)
class StreamStatistics:
    """What became of a stream's commands: ``submitted == completed + failed + aborted + in_flight``.

    Attributes
    ----------
    submitted, completed, failed, aborted, in_flight : int
        Commands, those among them that wait for events or bring the stream to another queue. Aborted ones never ran,
        because one before them failed or the stream was closed.
    """

    submitted: int
    completed: int
    failed: int
    aborted: int
    in_flight: int


class Stream(Lane):
    """Commands that run in the order of their submission.

    Made by :meth:`maia_rt.Device.create_stream`. Several threads may use one stream. Every command starts when all
    before it are done. There may be more streams than hardware queues: then some share one, and their commands run in
    turn; all that is said of a stream, its failures and its waits included, stays true.

    Attributes
    ----------
    device : Device
    number : int
        Counts the device's streams, from 1.
    name : str
        For texts, ``stream 7``.
    timeout : float
        How long submissions and waits have, in seconds, unless they are told otherwise.
    priority : int
        Larger is more urgent.
    clusters : int
        A mask of the clusters that launches may run on; 0 is all.
    """

    # A command's method, in this order (all that is public here and submits keeps to it):
    #   1. `if self._capture is not None: return self._capture.<command>(...)` with the same arguments;
    #   2. check the arguments;
    #   3. `if self.device._validator is not None:` tell it what the command reads and writes;
    #   4. `self._submit(...)`, the only way commands of a stream reach a queue.
    device: Device

    def __init__(self, device: Device, account: Account, queue: QueuePair, timeout: float, priority: int = 0,
                 clusters: int = 0) -> None:
        super().__init__(account, queue, int(timeout * 1e9))
        self.device = device
        self._watched = device._validator is not None
        self._ways = device._peers.ways
        self.timeout = timeout
        self.priority = priority
        self.clusters = clusters
        self._closed = False
        self._staging: Staging | None = None
        self._calls: StreamCalls | None = None
        # Who on other devices waits for this stream by what it pushes there.
        self._pushes: weakref.WeakSet[Crossings] = weakref.WeakSet()
        self._staging_lock = threading.RLock()

    # --- commands ----------------------------------------------------------------------------------------------------

    def copy(self, dst: Any, src: Any, *, checksum: bool = False) -> CopyPath:
        """Copy all of `src` to `dst`: between host and device, or on the device, of any size and alignment.

        Parameters
        ----------
        dst, src : Buffer, HostBuffer, array, or another object with a buffer or with DLPack on the CPU
            Of the same number of bytes; at least one of them memory of this device. Where one is strided, of the same
            shape and element size. Dtypes are not converted. The other one may be a buffer of another device.
        checksum : bool
            Compare the CRC-32 of what arrived with that of the source. A difference is a fault: CHECKSUM. Both ends are
            contiguous.

        Returns
        -------
        CopyPath
            How the bytes go.

        Notes
        -----
        As with CUDA, memory of the device and pinned memory is read and written while the program goes on: wait for
        the stream before it is touched. Other host memory is read before the call returns; where it is the
        destination, the call returns when the copy is done. An array over a :class:`HostBuffer` counts as pinned.
        Between two devices the copy runs while the program goes on where :meth:`maia_rt.Device.peer` says ``direct``;
        where it says ``staged``, and from or to SRAM of the other one, the call waits for the stream and does the copy.

        Raises
        ------
        InvalidArgument
            The sizes or shapes differ, memory belongs to another device, or `dst` is read-only.
        InvalidType
            One of them is no memory, or neither is on this device.
        ClosedError, QueueFull, DeviceFault, DeviceLost, DeviceTimeout
        """
        if not checksum and self._copy_whole(dst, src):
            return _DIRECT
        if self._capture is not None:
            captured: CopyPath = self._capture.copy(dst, src, checksum=checksum)
            return captured
        return copy(self, dst, src, checksum)

    def fill(self, dst: Memory, value: int, width: int = 1) -> None:
        """Fill memory with the low `width` bytes of `value`, again and again.

        Parameters
        ----------
        dst : Buffer or HostBuffer
        value : int
        width : int
            1, 2 or 4; address and size of `dst` are multiples of it.
        """
        if self._capture is not None:
            self._capture.fill(dst, value, width)
            return
        if width not in _WIDTHS:
            raise InvalidArgument(f"a pattern has 1, 2 or 4 bytes, not {width}")
        self._require_own(dst, "dst")
        require_plain(dst, "dst", writes=True)
        if dst.nbytes % width or dst.address % width:
            raise InvalidArgument(f"{dst.nbytes} bytes at {dst.address:#x} are not aligned to the pattern's {width}")
        if type(value) is not int:
            value = check.integer(value, "a pattern", -(1 << 31), (1 << 32) - 1)
        if not -(1 << 8 * width - 1) <= value < 1 << 8 * width:
            raise InvalidArgument(f"{value} does not fit into {width} bytes")
        if dst.nbytes:
            if self.device._validator is not None:
                self.device._validator.command(self, "fill", writes=[(dst.address, dst.nbytes, dst)])
            pattern = value & (1 << 8 * width) - 1
            self._submit(_FILL, payload=(dst.address, dst.nbytes, pattern | width << 32))

    def multicast(self, dsts: Sequence[Memory], src: Memory) -> int:
        """Copy `src` to each of several destinations, in as few commands as can be.

        Made for the SRAM of tiles and clusters: equal buffers of evenly spaced tiles take one command,
        which reads the source once for each.

        Parameters
        ----------
        dsts : sequence of Buffer or HostBuffer
            Each of as many bytes as `src`, contiguous.
        src : Buffer or HostBuffer
            Contiguous.

        Returns
        -------
        int
            How many commands it took.

        Raises
        ------
        InvalidArgument, InvalidType, ClosedError, QueueFull, DeviceFault, DeviceLost
        """
        if self._capture is not None:
            return int(self._capture.multicast(dsts, src))
        return multicast(self, dsts, src)

    def allocate(self, shape: Shape, dtype: npt.DTypeLike | None = None, *, pool: MemoryPool | None = None) -> Buffer:
        """Allocate device memory in the stream's order: nothing waits, and memory the stream freed is there at once.

        The commands submitted to this stream from here on may use it; other streams wait for an event first.

        Parameters
        ----------
        shape, dtype
            As for :meth:`maia_rt.Device.allocate`.
        pool : MemoryPool, optional
            Where from; the device's default pool otherwise.

        Returns
        -------
        Buffer
            Free it with :meth:`free`, or close it.

        Raises
        ------
        OutOfMemory
            The text names the pool's largest buffers, and where they were allocated.
        """
        if self._capture is not None:
            made: Buffer = self._capture.allocate(shape, dtype, pool=pool)
            return made
        return allocate(self, shape, dtype, pool)

    def free(self, memory: Memory) -> None:
        """Give memory back in the stream's order: after the commands submitted so far, without waiting for them.

        From here on the buffer is closed: a use of it raises ClosedError, which says where it was freed.

        Parameters
        ----------
        memory : Buffer or HostBuffer
            From :meth:`allocate` or from the device. Other streams are done with it, or this one waits for them.

        Raises
        ------
        ClosedError
            It was freed before; the text says where.
        InvalidArgument, InvalidType
        """
        if self._capture is not None:
            self._capture.free(memory)
            return
        free(self, memory)

    def launch(self, kernel: Kernel, *args: Any, clusters: int = 0) -> None:
        """Launch a kernel.

        Parameters
        ----------
        kernel : Kernel
        *args : Buffer, HostBuffer or number
            As the kernel declares them: memory of its size, and of its dtype and shape where the memory has one; a
            number for a scalar.
        clusters : int
            A mask of the clusters that may run it; 0 is those of the stream, and others must lie among these.

        Raises
        ------
        InvalidArgument, InvalidType, ClosedError
            Nothing was submitted then.
        QueueFull, DeviceFault, DeviceLost
        """
        if self._capture is not None:
            self._capture.launch(kernel, *args, clusters=clusters)
            return
        if type(kernel) is not Kernel:
            check.instance(kernel, Kernel, "what is launched", "take it from a loaded program")
        words, device = kernel.encode(args), self.device
        if kernel.program.device is not device:
            raise InvalidArgument(f"kernel {kernel.name!r} is loaded on another device")
        if clusters or type(clusters) is not int:
            clusters = check.integer(clusters, "a mask of clusters", 0, (1 << device.capabilities.clusters) - 1)
            if self.clusters and clusters & ~self.clusters:
                raise InvalidArgument(f"clusters {clusters:#x} are not all among the stream's, {self.clusters:#x}")
        clusters = clusters or self.clusters
        if device._spaces.tiles:
            device._spaces.check_launch(kernel, clusters, device._settle)
        if device._validator is not None:
            device._validator.command(self, f"launch of {kernel.name}", *kernel.accesses(args))
        self._launch(kernel._handle, clusters, words)

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
        if self._capture is not None:
            captured: Event = self._capture.record(event, timing)
            return captured
        self._require_open()
        event = Event(self.device, timing) if event is None else check.instance(event, Event, "what is recorded")
        if event.device is not self.device:
            raise InvalidArgument("the event belongs to another device")
        event._record(self)
        if self.device._validator is not None:
            self.device._validator.record(self, event)
        return event

    def wait(self, what: Event | Semaphore | Stream, value: int | None = None, *, op: WaitName = "ge") -> None:
        """Let what is submitted from here on start only when something has happened. The program goes on at once.

        The wait runs on the device.

        Parameters
        ----------
        what : Event, Stream or Semaphore
            An event: the moment that was last recorded; one never recorded is done. So is one whose stream has stopped
            at a fault: that is told where the event or its stream is waited for. A stream: all that was submitted to it
            so far. Both may be another device's; then their failure is this stream's too, within a second. A
            semaphore: until it meets `value`, by whomever it is signalled, now or later.
        value : int, optional
            Of a semaphore, 0 to 2^32 - 1.
        op : {'ge', 'eq', 'acquire'}
            For a semaphore: until it is at least `value`, serially; equal to it; or at least `value`, which is then
            subtracted, in one step.

        Raises
        ------
        OutOfQueues
            For a semaphore: nobody would be left to signal it, see :meth:`maia_rt.Device.create_stream`.
        PeerFault
            An event of another device is lost already.
        OutOfSemaphores
            A wait for another device takes one of this device's.
        InvalidArgument, InvalidType, ClosedError, QueueFull, DeviceFault, DeviceLost
        """
        if self._capture is not None:
            self._capture.wait(what, value, op=op)
            return
        self._require_open()
        if isinstance(what, Semaphore):
            self._wait_for_semaphore(what, value, op)
            return
        if value is not None or op != "ge":
            raise InvalidArgument("a value to wait for is a semaphore's; events and streams have none")
        if isinstance(what, Stream):
            what = what.record()
        event = check.instance(what, Event, "what a stream waits for", "pass an event, a stream or a semaphore")
        if event._captured is not None:
            fork(self, event)
            return
        if event.device is not self.device:
            self._wait_for_peer(event)
            return
        if self.device._validator is not None:
            self.device._validator.wait(self, event)
        queue, sequence = event._queue, event._sequence
        if self._account.stopped:
            self._resume()
        if queue is None or self._passes(queue, sequence) or queue.quiet(sequence):
            return
        # A queue's progress is also in the semaphore of its number.
        self._submit(_NOP, pre=((queue.id, _GE, sequence & WORD),),
                     unbounded=self.device._queues.waits_behind(queue, sequence))

    def _wait_for_peer(self, event: Event) -> None:
        if self.device._validator is not None:
            self.device._validator.arrive(self)
        if self._account.stopped:
            self._resume()
        self.device._crossings.wait(self, event)

    def _wait_for_semaphore(self, semaphore: Semaphore, value: int | None, op: str) -> None:
        self._require_semaphore(semaphore)
        if op not in WAITS:
            raise InvalidArgument(f"a stream waits for a semaphore with {', '.join(map(repr, WAITS))}, not {op!r:.40}")
        if value is None:
            raise InvalidArgument("a wait for a semaphore needs a value", hint="stream.wait(semaphore, 1)")
        value = check.integer(value, "a semaphore's value", 0, WORD)
        if self.device._validator is not None:
            self.device._validator.block(self, semaphore.index, semaphore.name, WAITS[op], value)
        self._submit(_NOP, pre=((semaphore.index, WAITS[op], value),), unbounded=True)

    def signal(self, semaphore: Semaphore, value: int = 1, *, op: PostName = "add") -> None:
        """Post to a semaphore when everything submitted so far is done.

        Parameters
        ----------
        semaphore : Semaphore
            Also of another device.
        value : int
            What is added, 0 to 2^31 - 1, or with ``op='set'`` what it then holds, 0 to 2^32 - 1.
        op : {'add', 'set'}

        Raises
        ------
        InvalidArgument, InvalidType, ClosedError, QueueFull, DeviceFault, DeviceLost
        """
        if self._capture is not None:
            self._capture.signal(semaphore, value, op=op)
            return
        self._require_open()
        check.instance(semaphore, Semaphore, "a semaphore", "make one with device.create_semaphore()")
        semaphore._require_open()
        if op not in POSTS:
            raise InvalidArgument(f"a stream posts to a semaphore with 'add' or 'set', not {op!r:.40}")
        value = check.integer(value, "a semaphore's value", 0, MOST_ADDED if op == "add" else WORD)
        if semaphore.device is not self.device:
            self._signal_peer(semaphore, POSTS[op], value)
            return
        if self.device._validator is not None:
            self.device._validator.signal(self, semaphore.index, semaphore.name, POSTS[op], value)
        self._submit(_NOP, post=((semaphore.index, POSTS[op], value),))

    def _signal_peer(self, semaphore: Semaphore, op: PostOp, value: int) -> None:
        peer = semaphore.device
        if peer._validator is not None:
            peer._validator.signal_from_afar(semaphore.index, semaphore.name, op, value,
                                             f"{self.device.name}: {self.name}")
        try:
            address = self.device.peer(peer).semaphore(semaphore)
        except Unsupported:  # no direct path
            if self._account.stopped:
                self._resume()
            self.device._crossings.relay(self, peer, semaphore.index, op, value)
        else:
            self._submit(_SIGNAL_REMOTE, payload=(address, op | value << 32, 0))

    def wait_value(self, memory: Memory, value: int, *, condition: ConditionName = "ge", mask: int = WORD) -> None:
        """Let what is submitted from here on start only when a word of memory meets a condition.

        Whoever writes it: another stream, the program through pinned memory, a peer. The device looks again and again,
        every 5 ms while it has nothing else to do.

        Parameters
        ----------
        memory : Buffer or HostBuffer
            Of which the first 4 bytes are looked at, a little-endian word at an address that is a multiple of 4.
        value : int
            0 to 2^32 - 1.
        condition : {'ge', 'eq', 'ne', 'and'}
            ``word & mask`` is at least `value`, serially; equal; not equal; or has a bit of `value` set.
        mask : int
            0 to 2^32 - 1.

        Raises
        ------
        OutOfQueues
            Nobody would be left to write it, see :meth:`maia_rt.Device.create_stream`.
        Unsupported
            The device's contract is older than 1.1.
        InvalidArgument, InvalidType, ClosedError, QueueFull, DeviceFault, DeviceLost
        """
        if self._capture is not None:
            self._capture.wait_value(memory, value, condition=condition, mask=mask)
            return
        self._require_open()
        address = self._word(memory)
        if condition not in CONDITIONS:
            raise InvalidArgument(f"a condition is one of {', '.join(map(repr, CONDITIONS))}, not {condition!r:.40}")
        value = check.integer(value, "a word", 0, WORD)
        mask = check.integer(mask, "a mask", 0, WORD)
        if not self.device.capabilities.wait_value:
            raise Unsupported(f"{self.device.name}: the device cannot wait for values in memory",
                              hint="wait for a semaphore")
        if self.device._validator is not None:
            self.device._validator.await_word(self, address, value, CONDITIONS[condition], mask)
        self._submit(_WAIT_VALUE, payload=(address, value | mask << 32, CONDITIONS[condition]), unbounded=True)

    def write_value(self, memory: Memory, value: int) -> None:
        """Write a 32-bit word, little-endian, when everything submitted so far is done.

        Parameters
        ----------
        memory : Buffer or HostBuffer
            Of which the first 4 bytes are written, at an address that is a multiple of 4.
        value : int
            0 to 2^32 - 1.

        Raises
        ------
        InvalidArgument, InvalidType, ClosedError, QueueFull, DeviceFault, DeviceLost
        """
        if self._capture is not None:
            self._capture.write_value(memory, value)
            return
        self._require_open()
        address = self._word(memory)
        value = check.integer(value, "a word", 0, WORD)
        if self.device._validator is not None:
            self.device._validator.write_word(self, address, memory, value)
        self._submit(_WRITE_IMM, units=4, payload=(address, value, 0))

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function of the program when everything submitted so far is done; what comes after waits for it.

        The program goes on at once. A thread of the device's own calls, one function after the other for all of its
        streams. So a function may submit to any stream, but should be short, and must not wait for a stream that waits
        for a call: where that is seen it raises DeadlockError.

        Parameters
        ----------
        function : callable
        *args
            What it is called with. What it returns is ignored. If it raises, the stream fails with CallbackError, and
            what was submitted after it does not run. Where a command before it failed it is never called.

        Raises
        ------
        OutOfQueues
            A call needs a queue for its stream alone while it is outstanding, and none would be left for others.
        OutOfSemaphores, InvalidType, ClosedError, QueueFull, DeviceFault, DeviceLost
        """
        if self._capture is not None:
            self._capture.call(function, *args)
            return
        self._require_open()
        with self._staging_lock:
            if self._calls is None:
                self._calls = StreamCalls(self.device.create_semaphore())
            calls = self._calls
        self.device._callbacks().call(self, calls, function, args)

    def capture(self) -> Capture:
        """Capture commands into a graph: ``with stream.capture() as capture: ...``, then ``capture.instantiate()``.

        Inside the block commands of this stream do not run; they become nodes. So do those of another stream from where
        it waits for an event that this one records there, until this one waits for an event of that one; it has to.
        Where one is another device's, reached directly, the graph is a :class:`maia_rt.SpanningGraph`.

        Raises
        ------
        CaptureError
            In the block, by what cannot be captured: waits of the program, events from outside, allocations. The
            call has no effect then. At the end of the block: a stream has not come back. The streams go on as before.
        """
        self._require_open()
        return Capture(self)

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
            A command failed. The stream stands still until :meth:`recover`.
        DeviceTimeout
            The text says what the stream is at.
        DeviceLost, ClosedError, ForkedError
        """
        if self._capture is not None:
            raise self._capture.refuse("synchronize", "nothing has been submitted; launch the graph, then wait")
        self._require_open()
        queue, sequence = self._mark()
        if self.device._dispatcher is not None:
            self.device._dispatcher.refuse_wait(self)
        try:
            queue.wait(sequence, self.timeout if timeout is None else check.seconds(timeout))
        except DeviceFault:
            self._require_open()  # what never ran as another thread closed the stream is not a fault
            raise
        if self._account.stopped & FAILED:
            raise self._fault()
        if self.device._validator is not None:
            self.device._validator.synchronized(self)

    async def synchronize_async(self, timeout: float | None = None) -> None:
        """Wait in asyncio until everything submitted so far is done.

        The event loop's selector waits, beside everything else that the loop does: no thread.

        Parameters
        ----------
        timeout : float, optional
            In seconds; the stream's by default.

        Raises
        ------
        DeviceFault, DeviceTimeout, DeviceLost, ClosedError, ForkedError
            As :meth:`synchronize`.
        """
        if self._capture is not None:
            raise self._capture.refuse("synchronize_async", "nothing has been submitted; launch the graph, then wait")
        self._require_open()
        queue, sequence = self._mark()
        await reach(queue, sequence, self.timeout if timeout is None else check.seconds(timeout))
        if self._account.stopped & FAILED:
            raise self._fault()
        if self.device._validator is not None:
            self.device._validator.synchronized(self)

    def query(self) -> bool:
        """Say whether everything submitted so far is done. Raises as :meth:`synchronize`."""
        if self._capture is not None:
            raise self._capture.refuse("query", "nothing has been submitted; launch the graph, then ask")
        self._require_open()
        queue, sequence = self._mark()
        if not queue.done(sequence, waiting=True):
            return False
        if self._account.stopped & FAILED:
            raise self._fault()
        if self.device._validator is not None:
            self.device._validator.synchronized(self)
        return True

    # --- failures ----------------------------------------------------------------------------------------------------

    @property
    def failed(self) -> bool:
        """Whether a command has failed and the stream stands still until :meth:`recover`."""
        return bool(self._account.stopped & FAILED)

    def abort(self, event: Event | None = None) -> bool:
        """Have the device give up one command: the newest one before `event`, or what the stream is at.

        It fails with ABORTED, at once if it waits, after its current operation if it runs, or else when its turn comes;
        what was submitted after it is lost. Then the stream stands still until :meth:`recover`.

        Parameters
        ----------
        event : Event, optional
            Of this stream.

        Returns
        -------
        bool
            Whether there was something to abort; not where the command was done already.
        """
        self._require_open()
        if event is None:
            # Of several queues the stream was on it is at the one it was on first.
            at = [(queue, queue.ring.outstanding(self.number)[:1]) for queue in list(self._account.queues)]
            queue, first = next(((queue, found) for queue, found in at if found), (self._queue, [0]))
            return bool(first[0]) and queue.abort(first[0], self.number)
        if not isinstance(event, Event):
            raise InvalidType(f"abort takes an Event, not {type(event).__name__}",
                              hint="pass one that this stream recorded, or nothing")
        if event.stream is not self or event._queue is None:
            raise InvalidArgument("the event was not recorded by this stream")
        return event._queue.abort(event._sequence, self.number)

    def recover(self) -> list[LostCommand]:
        """Let a stream that stands still after a fault go on, and say what it lost. Other streams never stood still.

        Returns
        -------
        list of LostCommand
            The command that failed and all that were submitted after it, in order; empty where nothing had failed.
            Events that were recorded among them go on raising the fault.

        Raises
        ------
        ClosedError, DeviceLost, FirmwareError
        """
        self._require_open()
        with self._staging_lock:
            account = self._account
            self._queue.repair()
            if not account.stopped & FAILED:
                return []
            # Who repairs a queue takes out what the stream has submitted to others; nothing new may get in between.
            for queue in list(account.queues):
                queue.settle()
            for queue, sequence in list(account.queues.items()) if len(account.queues) > 1 else ():
                with contextlib.suppress(DeviceFault):
                    queue.wait(account.last if queue is self._queue else sequence, self.timeout)
                queue.settle()
            for crossings in list(self._pushes):
                crossings.forsake(self)
            lost, account.lost, account.failure = account.lost, [], None
            account.last = self._ring.initial
            if self._staging is not None:
                self._staging.reset()
            account.go(FAILED)
            return lost

    def statistics(self) -> StreamStatistics:
        """Return what became of everything submitted."""
        account = self._account
        if not self.closed:
            with contextlib.suppress(MaiaError):
                self._queue.repair()
        in_flight = sum(len(queue.ring.outstanding(self.number)) for queue in list(account.queues))
        submitted, failed, aborted = account.submitted, account.failed, account.aborted
        return StreamStatistics(submitted, submitted - failed - aborted - in_flight, failed, aborted, in_flight)

    def _fault(self) -> DeviceFault:
        self._require_open()
        facts = self._account.failure
        if facts is None:  # another thread has just recovered the stream
            return DeviceFault(FaultCode.RESET, device=self.device.name, queue=self._queue.id,
                               sequence=self._account.last, stream=self.name)
        return device_fault(facts)

    # --- life --------------------------------------------------------------------------------------------------------

    @property
    def queue(self) -> QueuePair:
        """The hardware queue that the stream is on at present, for tools and tests."""
        queue: QueuePair = self._queue
        return queue

    @property
    def number(self) -> int:
        """Counts the device's streams, from 1."""
        return self._account.number

    @property
    def name(self) -> str:
        """For texts."""
        return self._account.name

    @property
    def closed(self) -> bool:
        """Whether the stream has been closed, by itself or with its device."""
        return self._closed

    def close(self) -> None:
        """Wait for what was submitted, as long as the stream's time allows, and give the queue back. Idempotent.

        Raises
        ------
        DeviceTimeout, DeviceFault
            Not everything was done. The stream is closed all the same; what it had outstanding is aborted.
        """
        if not self.closed and not self.device._forked:
            if self._capture is not None:
                self._capture.capture._end("ended by the close of a stream")
            try:
                self.synchronize()
            finally:
                self._end()

    def _end(self) -> None:
        self._closed = True
        self._account.stop(CLOSED)
        with self._staging_lock:
            staging, self._staging = self._staging, None
        if self._calls is not None:
            self._calls.semaphore.close()
        self.device._return_queue(self._account, self._queue, staging)

    def _stopped(self) -> None:
        """Close without the device, which has been stopped."""
        self._closed = True
        self._account.stop(CLOSED)
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
            self._abandon()

    def _abandon(self) -> None:
        """Give everything back when what has been submitted is done, without waiting for it."""
        self._closed = True
        if self._calls is not None:
            self._calls.semaphore.close()
        self.device._abandon_queue(self._account, self._queue, self._staging)

    def __repr__(self) -> str:
        at = "closed" if self.closed else f"on queue {self._queue.id}"
        return f"<Stream {self.number} of {self.device.name}, {at}>"

    # --- for what is built on streams ---------------------------------------------------------------------------------

    # Commands go through `self._submit(opcode, *, units=0, payload=(a, b, c), pre=((semaphore, WaitOp, value), ...),
    # post=((semaphore, PostOp, value), ...), unbounded=False) -> sequence`; see maia_rt/_fast/lane.pyx. What follows is
    # called from there.

    def _resume(self) -> None:
        """Answer a command that found `Account.stopped`: raise, or go to another queue."""
        stopped = self._account.stopped
        if stopped & CLOSED:
            raise ClosedError(f"{self.device.name}: {self.name} has been closed")
        if stopped & FAILED:
            raise self._fault()
        self.device._queues.move(self)

    def _begin_unbounded(self) -> Claim | None:
        """Have the queue for this stream alone, as its next command may wait for ever."""
        return self.device._queues.claim(self._account, self._queue)

    def _require_own(self, memory: Memory, what: str) -> None:
        if not isinstance(memory, Memory):
            raise InvalidType(f"{what} is {type(memory).__name__}, not a Buffer or HostBuffer")
        if memory.device is not self.device:
            raise InvalidArgument(f"{what} belongs to another device")

    def _require_semaphore(self, semaphore: Semaphore) -> None:
        check.instance(semaphore, Semaphore, "a semaphore", "make one with device.create_semaphore()")
        if semaphore.device is not self.device:
            raise InvalidArgument(f"{semaphore.name} belongs to another device")
        semaphore._require_open()

    def _word(self, memory: Memory) -> int:
        self._require_own(memory, "the word's memory")
        if memory.nbytes < 4 or memory.address % 4:
            raise InvalidArgument(f"a word has 4 bytes at a multiple of 4, not {memory.nbytes} at {memory.address:#x}")
        return memory.address

    def _require_open(self) -> None:
        if self.closed:
            raise ClosedError(f"{self.device.name}: {self.name} has been closed")
        self._ring.poll()  # raises in a forked child, which does not have the stream's memory
