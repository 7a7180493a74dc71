"""A queue pair: the memory of one hardware queue, its ring, and what becomes of what was submitted."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from maia_rt._fast.ring import (
    ARG_SLOT_BYTES,
    WAIT_CLOSED,
    WAIT_DONE,
    WAIT_LOST,
    WAIT_STOPPED,
    WAIT_TIMED_OUT,
    QueueStopped,
    Ring,
)
from maia_rt.contract.commands import (
    COMMAND_BYTES,
    CREATE_QUEUE,
    DOORBELL_STRIDE,
    PROGRESS_BYTES,
    REPORT_BYTES,
    CommandFlag,
    Opcode,
    WaitOp,
    decode,
)
from maia_rt.errors import (
    ClosedError,
    DeviceFault,
    DeviceLost,
    DeviceTimeout,
    FaultCode,
    ForkedError,
    InvalidArgument,
    MaiaError,
)
from maia_rt.memory import PinnedBlock, PinnedPool
from maia_rt.observe.sites import SubmissionSites

DEFAULT_TIMEOUT: Final = 30.0
"""Seconds after which a wait gives up, unless it is told otherwise."""

LONGEST_SECONDS: Final = 1e9
"""No wait is without a deadline."""

SLICE_SECONDS: Final = 0.5
"""How often a wait looks whether the device is still there: the kernel's VFIO is silent where one just vanishes."""


@dataclass(frozen=True)
class QueuePort:
    """What a queue pair needs to know of its device.

    Attributes
    ----------
    device : str
        For error texts.
    event_fd, liveness_fd : int
        The device's event vector and the transport, -1 for none.
    wake : callable or None
        Wakes a device that sleeps; None where it never does.
    service, on_event : callable
        Called when the transport, or the device's event vector, wants attention.
    check_alive : callable
        Raises DeviceLost where the device is gone.
    doorbell_page : callable
        Maps ``(offset, size)`` of BAR 2.
    faults : callable
        Reads the fault log, as an array of FAULT records.
    explain : callable or None
        Given a queue's number: what it hangs at, as an object with a ``sentence``, or None.
    """

    device: str
    event_fd: int
    liveness_fd: int
    wake: Callable[[], object] | None
    service: Callable[[], object]
    on_event: Callable[[], object]
    check_alive: Callable[[], object]
    doorbell_page: Callable[[int, int], memoryview]
    faults: Callable[[], npt.NDArray[Any]]
    explain: Callable[[int], Any] | None = None


class QueueAdmin(Protocol):
    """The admin commands a queue pair lives by."""

    def create_queue(self, params: npt.NDArray[Any]) -> int:
        """Create a queue from a CREATE_QUEUE structure; return its id."""

    def reset_queue(self, queue: int, initial: int) -> None:
        """Empty a queue and let it run from index `initial`."""

    def delete_queue(self, queue: int) -> None:
        """Delete a queue. The device no longer touches its memory when this returns."""


@dataclass(frozen=True)
class QueueStatistics:
    """What became of the commands of one queue: ``submitted == completed + failed + aborted + in_flight``.

    Attributes
    ----------
    submitted, completed, failed, aborted, in_flight : int
        Commands. Aborted ones never ran, because one before them failed or the queue was closed.
    doorbells, sleeps : int
        Stores of the tail, and waits that had to sleep.
    """

    submitted: int
    completed: int
    failed: int
    aborted: int
    in_flight: int
    doorbells: int
    sleeps: int


class Timing:
    """When one command ran, in nanoseconds of device time; zeros until it is known."""

    __slots__ = ("__weakref__", "end_ns", "start_ns")

    def __init__(self) -> None:
        self.start_ns = 0
        self.end_ns = 0


class QueuePair:
    """One hardware queue. Streams are made of it.

    Parameters
    ----------
    admin : QueueAdmin
    pool : PinnedPool
        Where its memory comes from.
    port : QueuePort
    queue : int
        The id.
    vector, eventfd : int
        Its MSI-X vector and the eventfd that the vector writes to.
    entries : int
        Commands that the ring holds, a power of two.
    initial : int
        The free-running index of the first command.
    timeout : float
        How long submissions, and waits that are not told otherwise, wait, in seconds.
    spin_ns : int
        How long a wait spins before it sleeps.

    Raises
    ------
    OutOfMemory, MemlockLimit
        No pinned memory for it. Nothing was created then.
    """

    def __init__(self, admin: QueueAdmin, pool: PinnedPool, port: QueuePort, *, queue: int, vector: int, eventfd: int,
                 entries: int, initial: int = 0, timeout: float = DEFAULT_TIMEOUT, spin_ns: int = 20_000) -> None:
        if entries < 2 or entries & (entries - 1):
            raise InvalidArgument(f"{port.device}: a queue has a power of two of entries, not {entries}")
        if not 0 <= timeout <= LONGEST_SECONDS:
            raise InvalidArgument(f"a time-out is 0 to {LONGEST_SECONDS:g} seconds, not {timeout}")
        self.id = queue
        self.timeout = timeout
        self._admin = admin
        self._port = port
        self._blocks: list[PinnedBlock] = []
        self._sites = SubmissionSites(entries)
        self._timings: weakref.WeakValueDictionary[int, Timing] = weakref.WeakValueDictionary()
        self._reports = threading.Lock()
        self._lost: list[tuple[int, int, dict[str, Any]]] = []
        self._past = [0, 0, 0, 0]
        self._final: QueueStatistics | None = None
        created = False
        try:
            sizes = (entries * COMMAND_BYTES, PROGRESS_BYTES, 2 * entries * REPORT_BYTES, entries * ARG_SLOT_BYTES)
            for size in sizes:
                self._blocks.append(pool.allocate(size))
            ring, progress, reports, args = self._blocks
            for block in self._blocks[:2]:
                np.frombuffer(block.view(), np.uint8)[:] = 0
            params = np.zeros((), CREATE_QUEUE)
            params["ring"], params["progress"], params["reports"] = ring.iova, progress.iova, reports.iova
            params["initial"], params["entries_log2"] = initial, entries.bit_length() - 1
            params["reports_log2"], params["vector"], params["queue"] = entries.bit_length(), vector, queue
            admin.create_queue(params)
            created = True
            doorbell = port.doorbell_page(queue * DOORBELL_STRIDE, DOORBELL_STRIDE)
            self.ring = Ring(
                ring.view(), progress.view(), reports.view(), doorbell, args.view(), args.iova, initial=initial,
                name=f"{port.device}: queue {queue}",
                timeout_ns=int(timeout * 1e9), spin_ns=spin_ns, wake=port.wake, queue_fd=eventfd,
                event_fd=port.event_fd, liveness_fd=port.liveness_fd, service=port.service, on_event=port.on_event)
        except BaseException:
            if created:
                admin.delete_queue(queue)
            self._free()
            raise

    # --- submitting --------------------------------------------------------------------------------------------------

    def note(self, sequence: int) -> None:
        """Remember which line outside of this package submitted the command `sequence`."""
        self._sites.note(sequence)

    def submit_timed(self) -> tuple[int, Timing]:
        """Submit a NOP that all before it precede, and that reports when; its timing is filled in when it is taken."""
        with self._reports:
            sequence = self.submit(Opcode.NOP, CommandFlag.BARRIER | CommandFlag.REPORT, 0, 0, 0, 0)
            timing = self._timings[sequence] = Timing()
        return sequence, timing

    def submit(self, opcode: int, flags: int, units: int, a: int, b: int, c: int) -> int:
        """Submit one command; see `maia_rt._fast.ring.Ring.submit`. A stopped queue raises its DeviceFault."""
        try:
            return self.ring.submit(opcode, flags, units, a, b, c)
        except QueueStopped:
            raise self.fault() from None

    def submit_wait(self, queue: int, sequence: int) -> int:
        """Submit a NOP that waits until another queue's progress reaches `sequence`."""
        try:
            return self.ring.submit_wait(CommandFlag.BARRIER, queue, WaitOp.GE, sequence & 0xFFFFFFFF)
        except QueueStopped:
            raise self.fault() from None

    def take_timings(self) -> None:
        """Read the report records that have come and fill in the timings that are still wanted."""
        with self._reports:
            for sequence, start_ns, end_ns, _, _ in self.ring.take_reports():
                timing = self._timings.pop(sequence, None)
                if timing is not None:
                    timing.start_ns, timing.end_ns = start_ns, end_ns

    # --- waiting -----------------------------------------------------------------------------------------------------

    def done(self, sequence: int) -> bool:
        """Say whether the command `sequence` is done.

        Raises
        ------
        DeviceFault
            It failed, or never ran because one before it failed.
        """
        if self._lost:
            self._check_lost(sequence)
        if self.ring.closed:
            return True
        if self.ring.done(sequence):
            return True
        if self.ring.wait(sequence, 0) == WAIT_STOPPED:
            raise self.fault()
        return False

    def wait(self, sequence: int, timeout: float | None = None) -> None:
        """Wait until the command `sequence` is done.

        Parameters
        ----------
        sequence : int
        timeout : float, optional
            In seconds, the queue's by default.

        Raises
        ------
        DeviceFault
            It failed, or never ran because one before it failed.
        DeviceTimeout
            The text says what the queue is at.
        DeviceLost, ClosedError, ForkedError
        """
        seconds = self.timeout if timeout is None else timeout
        if self._lost:
            self._check_lost(sequence)
        if not 0 <= seconds <= LONGEST_SECONDS:
            raise InvalidArgument(f"a time-out is 0 to {LONGEST_SECONDS:g} seconds, not {seconds}")
        status = self.ring.wait(sequence, int(min(seconds, SLICE_SECONDS) * 1e9))
        if status == WAIT_TIMED_OUT and seconds > SLICE_SECONDS:
            status = self._wait_on(sequence, seconds - SLICE_SECONDS)
        if status == WAIT_DONE:
            return
        if status == WAIT_STOPPED:
            raise self.fault()
        if status == WAIT_LOST:
            raise DeviceLost(f"{self._port.device}: the device is gone, queue {self.id} waited for command {sequence}",
                             cause="its server ended or its link is down", hint="open the device anew")
        if status == WAIT_CLOSED:
            raise ClosedError(f"{self.ring.name} was closed during a wait")
        raise self._timeout(sequence, seconds)

    def _wait_on(self, sequence: int, left: float) -> int:
        status = WAIT_TIMED_OUT
        while status == WAIT_TIMED_OUT and left > 0:
            self._port.check_alive()
            status = self.ring.wait(sequence, int(min(left, SLICE_SECONDS) * 1e9))
            left -= SLICE_SECONDS
        return status

    def kick(self) -> None:
        """Make waiting threads look again."""
        self.ring.kick()

    def quiet(self, sequence: int) -> bool:
        """Say whether the device is done with everything up to `sequence`, whatever became of it."""
        return self.ring.closed or self.ring.wait(sequence, 0) in (WAIT_DONE, WAIT_STOPPED)

    # --- faults ------------------------------------------------------------------------------------------------------

    def fault(self) -> DeviceFault:
        """Return the error for the fault that stopped the queue."""
        return DeviceFault(**self._fault_facts())

    def _fault_facts(self) -> dict[str, Any]:
        _, code, sequence = self.ring.state
        facts: dict[str, Any] = {"code": code, "device": self._port.device, "queue": self.id, "sequence": sequence}
        raw: bytes | npt.NDArray[Any] | None = self.ring.command_at(sequence)
        details = []
        try:
            log = self._port.faults()
        except MaiaError as error:
            details.append(f"the fault log could not be read: {error.what}")
        else:
            found = log[(log["queue"] == self.id) & (log["sequence"] == sequence)]
            if len(found):
                entry = found[-1]
                facts["address"], raw = int(entry["address"]), bytes(entry["command"])
                if entry["detail"]:
                    details.append(f"detail {entry['detail']}")
        if raw is not None:
            facts["command"] = decode(raw)
        where = self._sites.find(sequence)
        if where:
            details.append(f"submitted at {where}")
        facts["detail"] = ", ".join(details)
        return facts

    def _check_lost(self, sequence: int) -> None:
        for first, last, facts in self._lost:
            if first <= sequence <= last:
                raise DeviceFault(**facts)

    def _timeout(self, sequence: int, seconds: float) -> DeviceTimeout:
        at = self.ring.poll() + 1
        raw, where = self.ring.command_at(at), self._sites.find(at)
        what = f"{self.ring.name}: command {sequence} was not done within {seconds:g} s"
        if raw is None:
            return DeviceTimeout(what, cause="it was never submitted", hint="wait for what was submitted")
        what += f"; the device is at command {at}: {decode(raw)}" + (f", submitted at {where}" if where else "")
        report = self._port.explain(self.id) if self._port.explain else None
        error = DeviceTimeout(what, cause=report.sentence if report else "the device hangs, or has more to do",
                              hint="print the error's report, or wait longer")
        error.report = report
        return error

    # --- life --------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the queue pair has been closed."""
        return self.ring.closed

    def statistics(self) -> QueueStatistics:
        """Return the figures of this moment."""
        return self._final or self._figures(closing=False)

    def _figures(self, *, closing: bool) -> QueueStatistics:
        ring = self.ring
        state, _, failed_at = ring.state
        submitted = ring.head - ring.initial
        if state:
            completed, failed = failed_at - 1 - ring.initial, 1
            aborted, in_flight = submitted - completed - failed, 0
        else:
            completed, failed = min(ring.poll() - ring.initial, submitted), 0
            aborted, in_flight = (submitted - completed, 0) if closing else (0, submitted - completed)
        past = self._past
        return QueueStatistics(past[0] + submitted, past[1] + completed, past[2] + failed, past[3] + aborted, in_flight,
                               ring.doorbells, ring.waiters.sleeps)

    def reset(self) -> None:
        """Let a stopped queue run again; what it had not run counts as aborted.

        Sequence numbers go on from where they were; waits for aborted ones raise the fault that aborted them.
        """
        state, _, failed_at = self.ring.state
        figures = self._figures(closing=True)
        head = self.ring.head
        lost = (failed_at, head, self._fault_facts()) if state else (self.ring.poll() + 1, head, self._never_ran())
        # One number is left out, so that what is recorded from here on is not taken for the newest of the lost.
        self._admin.reset_queue(self.id, head + 1)
        self._past = [figures.submitted, figures.completed, figures.failed, figures.aborted]
        if lost[0] <= head:
            self._lost.append(lost)
        self.ring.reset(head + 1)

    def _never_ran(self) -> dict[str, Any]:
        return {"code": int(FaultCode.RESET), "device": self._port.device, "queue": self.id,
                "sequence": self.ring.poll() + 1}

    def close(self) -> None:
        """Delete the queue and give its memory back; waits end with ClosedError. Idempotent; does not synchronize.

        Raises
        ------
        MaiaError
            The device did not confirm. The memory is kept until :meth:`release`, for it may still be written to.
        """
        if self.ring.closed:
            return
        self._settle()
        try:
            self._admin.delete_queue(self.id)
        except (DeviceLost, ClosedError):
            pass  # nobody is left who could touch the memory
        except ForkedError:
            return
        except MaiaError:
            self.ring.close()
            raise
        self.release()

    def release(self) -> None:
        """Give the memory back; for owners that know the device no longer touches it. Idempotent."""
        self._settle()
        if self.ring.close():
            self._free()

    def _settle(self) -> None:
        """Take the last figures, and remember what will never run."""
        if self._final is not None or self.ring.closed:
            return
        try:
            self._final = self._figures(closing=True)
        except ForkedError:
            return
        if self._final.aborted > self._past[3] and not self.ring.state[0]:
            self._lost.append((self.ring.poll() + 1, self.ring.head, self._never_ran()))

    def _free(self) -> None:
        while self._blocks:
            self._blocks.pop().free()
