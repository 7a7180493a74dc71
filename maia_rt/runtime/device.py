"""Devices: what everything else is made from, and closed with."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import secrets
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from maia_rt._fast.ring import Account
from maia_rt.contract.commands import PostOp
from maia_rt.contract.injection import Injection
from maia_rt.contract.program import Image
from maia_rt.contract.registers import BAR0, BootState
from maia_rt.errors import ClosedError, ForkedError, InvalidArgument, InvalidType, MaiaError
from maia_rt.firmware import Capabilities, Firmware, Identity
from maia_rt.memory import PinnedPool, SpaceStatistics
from maia_rt.memory.space import Space
from maia_rt.observe import live
from maia_rt.queue import DEFAULT_TIMEOUT, QueuePair
from maia_rt.runtime import allocation, check
from maia_rt.runtime.addresses import AddressBook
from maia_rt.runtime.buffer import Buffer, Memory, Shape
from maia_rt.runtime.callback import Dispatcher
from maia_rt.runtime.crossing import Crossings
from maia_rt.runtime.embedded import EmbeddedEmulator
from maia_rt.runtime.event import Event
from maia_rt.runtime.graph import Graph
from maia_rt.runtime.graph_builder import GraphBuilder
from maia_rt.runtime.graph_file import load
from maia_rt.runtime.hang import HangReport, examine, go_live, on_timeout
from maia_rt.runtime.hold import Hold
from maia_rt.runtime.host_buffer import HostBuffer
from maia_rt.runtime.in_use import Reader, Use, find_use, wait_for_use
from maia_rt.runtime.message_service import MessageService
from maia_rt.runtime.peer import PEER_CHECKS, PeerPath, PeerTable
from maia_rt.runtime.pinned import PinnedRanges
from maia_rt.runtime.pool import MemoryPool
from maia_rt.runtime.program import Program
from maia_rt.runtime.queues import QueueTable
from maia_rt.runtime.reclaim import Reclaimer
from maia_rt.runtime.semaphore import Semaphore, SemaphorePool
from maia_rt.runtime.spaces import DeviceSpaces
from maia_rt.runtime.staging import Staging
from maia_rt.runtime.stream import Stream
from maia_rt.runtime.validation import Validator
from maia_rt.transport import Transport

_log = logging.getLogger(__name__)
_POOL_KEEPS = 64 << 20
_CLOSE_SECONDS = 2.0


class Device:
    """One device, booted and ready. Made by :func:`maia_rt.open`.

    Closing it closes everything made from it. Any thread may call.

    Attributes
    ----------
    name : str
        A PCI address, a socket path, or ``emulated``.
    timeout : float
        How long streams and waits have, in seconds, unless they are told otherwise.
    found : str
        What was wrong with the device when it was opened, because whoever had it last was killed; empty where it was
        in order. It was reset before use, and a warning was logged.
    """

    def __init__(self, transport: Transport, emulator: EmbeddedEmulator | None = None,
                 timeout: float = DEFAULT_TIMEOUT, *, validate: bool = False, sites: bool = True,
                 max_queues: int | None = None, hold: Hold | None = None, peer_checks: int = PEER_CHECKS) -> None:
        # What looks at each command of each stream when it is submitted; see the comment in :class:`maia_rt.Stream`.
        self._validator = Validator() if validate else None
        self._transport = transport
        self._emulator = emulator
        self._hold = hold
        self._lock = threading.RLock()
        self._closed = False
        self._running = False
        self._pid = os.getpid()
        self._live: live.Attachment | None = None
        self.name = transport.name
        self.timeout = timeout
        self._sites = sites
        self._max_queues = max_queues
        self._queues = QueueTable(self._make_queue, 0, self.name)
        self._numbers = itertools.count(1)
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._memories: weakref.WeakSet[Buffer | HostBuffer] = weakref.WeakSet()
        self._pools: weakref.WeakSet[MemoryPool] = weakref.WeakSet()
        self._default_pool: MemoryPool | None = None
        self._list_readers: list[Reader] = []
        self._message_service = MessageService(transport)
        self._programs: weakref.WeakSet[Program] = weakref.WeakSet()
        self._semaphores: weakref.WeakSet[Semaphore] = weakref.WeakSet()
        self._dispatcher: Dispatcher | None = None
        self._graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self._default_stream: Stream | None = None
        self._pinned = PinnedRanges()
        self._addresses = AddressBook(self._memories)
        self._peers = PeerTable(self, peer_checks)
        self._crossings = Crossings(self)
        self._reclaimer = Reclaimer(lambda: [*self._queues, *self._peers.queues()])
        try:
            self._firmware = Firmware(transport)
            self.found = self._look_around()
            offered = self._firmware.capabilities
            self._pool = PinnedPool(transport, address_bits=offered.host_address_bits,
                                    window=(offered.host_first, offered.host_last))
            self._firmware.boot(self._pool)
            self._identity = self._firmware.identify()
        except BaseException:
            self.close()
            raise
        self._forget_contents()
        self._running = True
        self._live = go_live(self)

    def _look_around(self) -> str:
        """Say what the last holder left behind that did not close the device; the boot that follows resets it."""
        traces = []
        if self._hold is not None and self._hold.died is not None:
            traces.append(f"its last holder ended without closing it: {self._hold.died}")
        state = BAR0["STATUS"].get(self._firmware.register("STATUS"), "BOOT")
        if state != BootState.RESET:
            name = BootState(state).name if state in set(BootState) else str(state)
            traces.append(f"its firmware was in state {name}, not RESET")
        if traces:
            _log.warning("%s: %s; it is reset before use", self.name, " and ".join(traces))
        return " and ".join(traces)

    def _forget_contents(self) -> None:
        capabilities = self._firmware.capabilities
        self._spaces = DeviceSpaces(capabilities)
        for pool in list(self._pools):
            pool._forget()
        count = min(capabilities.max_queues, len(self._firmware.vectors) - 1)
        if self._max_queues is not None:
            count = min(count, self._max_queues)
        self._free_semaphores = SemaphorePool(capabilities.max_queues, capabilities.semaphores, self.name)
        # MAIA_FIRST_INDEX lets tests pass 2^32 at once.
        self._queues = QueueTable(self._make_queue, count, self.name, int(os.environ.get("MAIA_FIRST_INDEX", "0")))

    def _make_queue(self, number: int, first_index: int, priority: int, entries: int) -> QueuePair:
        firmware = self._firmware
        queue = QueuePair(
            firmware, self._pool, replace(firmware.port(), explain=on_timeout(self), listed=self._explain_listed),
            queue=number, vector=1 + number,
            eventfd=firmware.vectors[1 + number], entries=entries, spin_ns=_SPIN_NS, initial=first_index,
            timeout=self.timeout, priority=priority, sites=self._sites, describe=self._addresses.describe)
        firmware.watch(queue)
        return queue

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What the device offers, from its registers."""
        return self._firmware.capabilities

    @property
    def identity(self) -> Identity:
        """What the device says about itself: model, firmware version, serial number."""
        return self._identity

    @property
    def transport(self) -> Transport:
        """The PCI function below, for tools that read registers."""
        return self._transport

    @property
    def emulator_pid(self) -> int | None:
        """The process id of an embedded emulator, None for any other device."""
        return self._emulator.pid if self._emulator else None

    def counters(self) -> dict[str, int]:
        """Return what the device did since it was opened or reset: commands, bytes, nanoseconds, by name."""
        self._require_open()
        return self._firmware.counters()

    def faults(self) -> npt.NDArray[np.void]:
        """Return the fault log, oldest first, as records of dtype ``maia_rt.contract.commands.FAULT``."""
        self._require_open()
        return self._firmware.faults()

    def inject(self, injection: Injection | str) -> Injection:
        """Make a fault on purpose; for tests, on the emulated device and wherever ``CAPS.INJECTION`` is set.

        Parameters
        ----------
        injection : Injection or str
            What shall happen, and to which commands; or its SPEC, as ``maia emulate --inject`` takes it. It is armed
            until it has struck as often as it says, or the device is reset.

        Returns
        -------
        Injection
            With the seed that is used: arm it again to see the same commands struck.

        Raises
        ------
        Unsupported
            The device makes no faults on purpose.
        InvalidArgument
            It names a queue that the device does not have.
        ResourceExhausted
            32 are armed.

        Examples
        --------
        >>> import maia_rt
        >>> with maia_rt.open("emulated") as device, device.create_stream() as stream, device.allocate(64) as memory:
        ...     _ = device.inject("fault:code=ECC,opcodes=FILL")
        ...     stream.fill(memory, 0)
        ...     try:
        ...         stream.synchronize()
        ...     except maia_rt.errors.DeviceFault as fault:
        ...         print(fault.code.name, len(stream.recover()))
        ECC 1
        """
        self._require_open()
        if isinstance(injection, str):
            injection = Injection.parse(injection)
        if not isinstance(injection, Injection):
            raise InvalidType(f"an injection is an Injection or a SPEC, not {type(injection).__name__}")
        if injection.seed is None:
            injection = dataclasses.replace(injection, seed=secrets.randbits(32))
        self._firmware.inject(injection)
        return injection

    def clear_injections(self) -> int:
        """Disarm every injection and let go of the commands that one holds.

        Returns
        -------
        int
            How often injections have struck since the device was opened or reset.

        Raises
        ------
        Unsupported
            The device makes no faults on purpose.
        """
        self._require_open()
        return self._firmware.clear_injections()

    def hang_report(self) -> HangReport:
        """Say who waits for whom, through streams and graphs down to the root: print the report.

        Returns
        -------
        HangReport
            Of this moment. Where firmware does not answer it says so, and what the driver knows.
        """
        self._require_open()
        return examine(self)

    def memory(self, space: Space | None = None) -> SpaceStatistics:
        """Return how full the device memory is, or the SRAM of a cluster or tile; in bytes."""
        self._require_open()
        self._reclaimer.collect()
        return self._spaces.statistics(Space.hbm() if space is None else check.instance(space, Space, "space"))

    # --- what it makes -----------------------------------------------------------------------------------------------

    def create_stream(self, *, priority: int = 0, clusters: int = 0, entries: int = 1024,
                      timeout: float | None = None, first_index: int | None = None) -> Stream:
        """Create a stream.

        Parameters
        ----------
        priority : int
            0 to ``capabilities.priorities`` - 1, larger is more urgent: its commands start first, and its launches take
            free tiles first. What runs is not interrupted.
        clusters : int
            A mask of the clusters that its launches may run on; 0 is all.
        entries : int
            Commands that may be outstanding, a power of two within the device's limits. A stream that is full makes
            the program wait. One that shares a queue shares the queue's entries.
        timeout : float, optional
            How long submissions and waits have, in seconds; the device's by default.
        first_index : int, optional
            The free-running index of the first command: lets tests pass 2^32 at once.

        Raises
        ------
        OutOfQueues
            Every hardware queue has a wait outstanding that other streams may not stand behind.
        """
        self._require_open()
        capabilities = self.capabilities
        # The report ring is twice as long as the command ring, under the same limit.
        least, most = 1 << capabilities.min_entries_log2, 1 << capabilities.max_entries_log2 - 1
        entries = check.integer(entries, "a stream's length, a power of two of entries,", least, most)
        if entries & (entries - 1):
            raise InvalidArgument(f"{self.name}: a stream has a power of two of entries from {least} to {most}, "
                                  f"not {entries}")
        priority = check.integer(priority, "a priority", 0, capabilities.priorities - 1)
        clusters = check.integer(clusters, "a mask of clusters", 0, (1 << capabilities.clusters) - 1)
        if first_index is not None:
            first_index = check.integer(first_index, "a first index", 0, (1 << 63) - 1)
        seconds = check.seconds(self.timeout if timeout is None else timeout)
        with self._lock:
            self._reclaimer.collect()
            number = next(self._numbers)
            account = Account(number, f"stream {number}", priority)
            queue = self._queues.join(account, entries, first_index)
            account.last = queue.ring.initial
            stream = Stream(self, account, queue, seconds, priority, clusters)
            self._streams.add(stream)
            return stream

    @property
    def default_stream(self) -> Stream:
        """A stream of the device's own, made at its first use; for copies that need no order of their own."""
        with self._lock:
            if self._default_stream is None or self._default_stream.closed:
                self._default_stream = self.create_stream()
            return self._default_stream

    def create_event(self, *, timing: bool = False) -> Event:
        """Create an event, to be recorded by streams again and again.

        Parameters
        ----------
        timing : bool
            Whether recording takes the device's time; ``end - start`` of two such events is in milliseconds.
        """
        self._require_open()
        return Event(self, timing)

    def create_semaphore(self, initial: int = 0) -> Semaphore:
        """Create a semaphore: a counter that streams and the program wait for and post to.

        Parameters
        ----------
        initial : int
            What it holds at first, 0 to 2^32 - 1.

        Raises
        ------
        OutOfSemaphores
        """
        self._require_open()
        initial = check.integer(initial, "a semaphore's value", 0, (1 << 32) - 1)
        self._reclaimer.collect()
        pool = self._free_semaphores
        index = pool.take()
        semaphore = Semaphore(self, index, lambda number: self._reclaimer.abandon(lambda: pool.give_back(number)))
        if self._validator is not None:
            self._validator.create_semaphore(index, semaphore.name, initial)
        self._firmware.post_semaphore(index, PostOp.SET, initial)
        self._semaphores.add(semaphore)
        return semaphore

    def allocate(self, shape: Shape, dtype: npt.DTypeLike | None = None, *, alignment: int = 256,
                 space: Space | None = None) -> Buffer:
        """Allocate memory of the device. Its contents are undefined.

        Parameters
        ----------
        shape : int or tuple of int
            In elements of `dtype`; in bytes where that is None.
        dtype : dtype-like, optional
            A launch checks it, and the shape, against what the kernel declares.
        alignment : int
            Of the device address, a power of two; in SRAM at most 4,096.
        space : Space, optional
            ``Space.cluster(i)`` or ``Space.tile(i)``: the SRAM of a cluster or tile. By default HBM. A tile's SRAM is
            given out from its end, for kernels use it from its start; a launch that would reach what is allocated is
            refused.

        Raises
        ------
        OutOfMemory
            The text says how much is free, and which buffers are the largest. Buffers that were closed but are still
            in use have been waited for.
        """
        return allocation.allocate(self, shape, dtype, alignment, space)

    def allocate_host(self, shape: Shape, dtype: npt.DTypeLike | None = None) -> HostBuffer:
        """Allocate pinned host memory, which the device reaches by itself. Its contents are undefined.

        Parameters
        ----------
        shape, dtype
            As for :meth:`allocate`.

        Raises
        ------
        OutOfMemory, MemlockLimit
        """
        return allocation.allocate_host(self, shape, dtype)

    def register(self, array: Any) -> HostBuffer:
        """Pin an array that is there already, so that the device reaches it by itself.

        Parameters
        ----------
        array : ndarray, or another object with a buffer
            Contiguous. It is kept until the buffer is closed. One that is read-only the device can only read.

        Returns
        -------
        HostBuffer
            Of its dtype and shape; close it to unpin the array.

        Notes
        -----
        The kernel's VFIO maps the array's pages themselves. Over a vfio-user socket they have no file to be shared
        by, so the device reads and writes them by messages to this process, which a thread answers: that works, and is
        many times slower than :meth:`allocate_host`.

        Raises
        ------
        MemlockLimit
            RLIMIT_MEMLOCK is too low for it, or the device has no mapping left.
        InvalidArgument
            It is not contiguous, or overlaps memory that is pinned already.
        InvalidType, TransportError
        """
        return allocation.register(self, array)

    def create_pool(self, *, max_bytes: int | None = None, release_threshold: int = 0) -> MemoryPool:
        """Create a pool for :meth:`maia_rt.Stream.allocate`.

        Parameters
        ----------
        max_bytes : int, optional
            How much device memory it takes at most. Beyond that: OutOfMemory, naming the largest buffers.
        release_threshold : int
            How much it keeps when its buffers are freed, in bytes.
        """
        self._require_open()
        pool = MemoryPool(self, None if max_bytes is None else check.integer(max_bytes, "max_bytes", 1, 1 << 62),
                          check.integer(release_threshold, "release_threshold", 0, 1 << 62))
        self._pools.add(pool)
        return pool

    @property
    def default_pool(self) -> MemoryPool:
        """The pool of :meth:`maia_rt.Stream.allocate` that is told no other: without a limit."""
        with self._lock:
            if self._default_pool is None or self._default_pool.closed:
                self._default_pool = self.create_pool(release_threshold=_POOL_KEEPS)
            return self._default_pool

    def upload(self, array: npt.ArrayLike, stream: Stream | None = None) -> Buffer:
        """Allocate device memory of an array's dtype and shape and copy the array there.

        The copy is done when this returns, unless a `stream` is given: then it is the stream's newest command.
        """
        source = np.ascontiguousarray(array)
        buffer = self.allocate(source.shape, source.dtype)
        try:
            used = self.default_stream if stream is None else self._require_stream(stream)
            used.copy(buffer, source)
            if stream is None:
                used.synchronize()
        except BaseException:
            buffer._hand_over()
            raise
        return buffer

    def load(self, image: bytes | Image) -> Program:
        """Load a program image; the device verifies it.

        Raises
        ------
        ProgramError
            It was refused; the text names the kernel, the field and what is wrong with it.
        """
        self._require_open()
        self._reclaimer.collect()
        program = Program(self, check.image(image))
        self._programs.add(program)
        return program

    def create_graph(self) -> GraphBuilder:
        """Return a graph without nodes, to be built by hand. A stream's capture makes one of a stream's commands."""
        self._require_open()
        return GraphBuilder(self)

    def load_graph(self, path: str | Path, buffers: Mapping[str, Memory] | None = None,
                   semaphores: Sequence[Semaphore] = ()) -> Graph:
        """Load a graph that :meth:`maia_rt.Graph.save` wrote, here or on another device, and bind it to buffers.

        Parameters
        ----------
        path : str or Path
        buffers : dict of str to Buffer or HostBuffer
            By the names they were saved under; all of them.
        semaphores : sequence of Semaphore
            In the order of their first use, as many as the graph uses.

        Returns
        -------
        Graph
            It owns the programs that it came with, and closes them with itself.

        Raises
        ------
        ContractMismatch, Unsupported
            The device lacks what the graph needs.
        InvalidArgument
            A buffer is missing, or does not fit; or the file is damaged, and the text says where.
        ProgramError, OutOfMemory, OSError
        """
        self._require_open()
        return load(self, path, buffers or {}, list(semaphores))

    def peer(self, other: Device) -> PeerPath:
        """Return the way from this device to another's memory and semaphores.

        The first call finds out whether there is a direct one, and proves it: patterns are written and read both ways.
        That takes milliseconds; later calls return the same path.

        Parameters
        ----------
        other : Device
            An open one of this process, not this one.

        Returns
        -------
        PeerPath
            It ends with either device.

        Raises
        ------
        InvalidArgument, InvalidType
            It is this device, or none.
        ClosedError
            One of the two has been closed.
        DeviceLost
            One of the two is gone; the text names it.

        Examples
        --------
        >>> import maia_rt
        >>> with maia_rt.open("emulated") as one, maia_rt.open("emulated") as two:
        ...     print(one.peer(two).kind)
        direct
        """
        self._require_open()
        check.instance(other, Device, "a peer")
        return self._peers.to(other)

    # --- all of it ---------------------------------------------------------------------------------------------------

    def synchronize(self, timeout: float | None = None) -> None:
        """Wait until everything submitted to any stream is done. Raises as :meth:`maia_rt.Stream.synchronize`."""
        self._require_open()
        if timeout is not None:
            check.seconds(timeout)
        for stream in self._open_streams():
            with contextlib.suppress(ClosedError):
                stream.synchronize(timeout)

    def fence(self) -> None:
        """Let what is submitted from here on, to any stream, start only when all that was submitted before is done.

        The program goes on at once. Streams that stand still after a fault are left alone.
        """
        self._require_open()
        streams = [stream for stream in self._open_streams() if not stream.failed]
        marks = [stream.record() for stream in streams]
        for stream in streams:
            for mark in marks:
                stream.wait(mark)

    def reset(self) -> None:
        """Reset the device and boot it again. Its streams, programs and buffers are closed; host buffers stay."""
        self._require_open()
        with self._lock:
            self._peers.settle(time.monotonic() + _CLOSE_SECONDS)
            self._running = False
            self._firmware.reset()
            self._close_children(keep_host=True)
            if self._validator is not None:
                self._validator.clear()
            self._firmware.boot(self._pool)
            self._forget_contents()
            self._crossings.withdraw()
            self._running = True

    @property
    def closed(self) -> bool:
        """Whether the device has been closed; in a forked child it always is."""
        return self._closed or self._forked

    @property
    def _forked(self) -> bool:
        return os.getpid() != self._pid

    def close(self) -> None:
        """Close everything made from the device, then the device; idempotent.

        Commands under way get two seconds, those that are not done then never will be. Nothing is raised for a device
        that is gone.
        """
        if self.closed:
            return
        with self._lock:
            self._closed = True
            if self._live is not None:
                self._live.close()
            firmware = getattr(self, "_firmware", None)
            pool = getattr(self, "_pool", None)
            deadline = time.monotonic() + _CLOSE_SECONDS
            for stream in self._open_streams():
                with contextlib.suppress(MaiaError):
                    stream.synchronize(max(deadline - time.monotonic(), 0))
            # Before the device stops, so that peers' commands are done with its memory.
            self._peers.close(deadline)
            self._running = False
            if self._dispatcher is not None:
                self._dispatcher.close()
            self._crossings.close()
            if firmware is not None:
                # So that nothing touches what its children give back below.
                firmware.stop()
            self._close_children(keep_host=False)
            if firmware is not None:
                firmware.close()
            if pool is not None:
                pool.close()
            self._transport.close()
            if self._emulator is not None:
                self._emulator.close()
            if self._hold is not None:
                self._hold.release()

    def _close_children(self, *, keep_host: bool) -> None:
        """Close all children of a device that no longer runs."""
        streams = list(self._open_streams())
        for stream in streams:
            stream._closed = True
        self._queues.release()
        for stream in streams:
            stream._stopped()
        for graph in list(self._graphs):
            graph._stopped()
        for program in list(self._programs):
            program._closed = True
        for semaphore in list(self._semaphores):
            semaphore._closed = True
        for memory in list(self._memories):
            if not (keep_host and isinstance(memory, HostBuffer)):
                memory._hand_over()
        self._reclaimer.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not self._forked:
            warnings.warn(f"device {self.name} was not closed", ResourceWarning, stacklevel=2, source=self)
            if self._live is not None:
                self._live.close()
            if self._dispatcher is not None:
                self._dispatcher.end()
            self._crossings.end()
            # The transport may not be called here. It goes with the device, and takes from the hardware what it had.
            self._firmware.close()

    def __repr__(self) -> str:
        return f"<Device {self.name}{', closed' if self._closed else ''}>"

    # --- for its children --------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._forked:
            raise ForkedError(f"{self.name}: the device was opened before fork", hint="open it anew in the child")
        if self._closed:
            raise ClosedError(f"{self.name}: the device has been closed")

    def _require_stream(self, stream: Any) -> Stream:
        """Return a stream that is open and this device's."""
        check.instance(stream, Stream, "a stream", "make one with device.create_stream()")
        if stream.device is not self:
            raise InvalidArgument("the stream belongs to another device")
        stream._require_open()
        return stream  # type: ignore[no-any-return]

    def _callbacks(self) -> Dispatcher:
        with self._lock:
            self._require_open()
            if self._dispatcher is None:
                self._dispatcher = Dispatcher(self.name)
            return self._dispatcher

    def _explain_listed(self, address: int, place: int) -> str:
        """Say which node of which graph a place in a list is, empty where it is none's."""
        return next(filter(None, (graph._explain(address, place) for graph in list(self._graphs))), "")

    def _open_streams(self) -> Iterator[Stream]:
        return (stream for stream in list(self._streams) if not stream.closed)

    def _return_queue(self, account: Account, queue: QueuePair, staging: Staging | None) -> None:
        try:
            self._queues.leave(account, queue)
        finally:
            if staging is not None:
                self._reclaimer.abandon(staging.close)
            self._reclaimer.collect()

    def _abandon_queue(self, account: Account, queue: QueuePair, staging: Staging | None) -> None:
        def end() -> None:
            with contextlib.suppress(MaiaError):
                self._queues.leave(account, queue)
            if staging is not None:
                self._reclaimer.abandon(staging.close)

        self._reclaimer.abandon(end)

    def _find_use(self, start: int, end: int, seconds: float = 0) -> Use | None:
        return wait_for_use(lambda: self._look_for_use(start, end) or self._peers.find_use(start, end), seconds)

    def _look_for_use(self, start: int, end: int) -> Use | None:
        """Find a command of this device that uses one of its addresses."""
        return find_use(list(self._queues), start, end, self._pool.find, self._list_readers)

    def _settle(self, space: Space) -> None:
        allocation.settle(self, space)

    def _find_root(self, address: int) -> Memory | None:
        return allocation.find_root(self, address)

    def _map_hbm(self, address: int, nbytes: int) -> npt.NDArray[np.uint8]:
        return allocation.map_hbm(self, address, nbytes)

    def _unload(self, first: int) -> None:
        if not self._forked:
            self._reclaimer.give_up(self._unloader(first))

    def _abandon_program(self, first: int) -> None:
        self._reclaimer.abandon(self._unloader(first))

    def _unloader(self, first: int) -> Callable[[], None]:
        spaces = self._spaces

        def unload() -> None:
            # After a close or reset of the device there is nothing to unload.
            if self._running and self._spaces is spaces:
                with contextlib.suppress(MaiaError):
                    self._firmware.unload_program(first)

        return unload


# On a single processor the device cannot answer while a wait spins.
_SPIN_NS = 100_000 if len(os.sched_getaffinity(0)) > 1 else 0
