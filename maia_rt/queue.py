"""A queue pair: the memory of one hardware queue, its ring, and what becomes of what was submitted."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from maia_rt._fast.ring import (
    ARG_SLOT_BYTES,
    WAIT_CLOSED,
    WAIT_DONE,
    WAIT_LOST,
    WAIT_STOPPED,
    WAIT_TIMED_OUT,
    Account,
    Ring,
)
from maia_rt.contract.commands import COMMAND_BYTES, CREATE_QUEUE, DOORBELL_STRIDE, PROGRESS_BYTES, REPORT_BYTES
from maia_rt.diagnosis import fault_facts, timeout_error
from maia_rt.errors import (
    ClosedError,
    DeviceLost,
    FaultCode,
    ForkedError,
    InvalidArgument,
    MaiaError,
    device_fault,
)
from maia_rt.loss import Loss, LostCommand, charge
from maia_rt.memory import PinnedBlock, PinnedPool
from maia_rt.observe.sites import describe
from maia_rt.queue_port import QueueAdmin, QueuePort

DEFAULT_TIMEOUT: Final = 30.0
"""Seconds after which a wait gives up, unless it is told otherwise."""

LONGEST_SECONDS: Final = 1e9
"""No wait is without a deadline."""

SLICE_SECONDS: Final = 0.3
"""How often a wait looks whether the device is still there: the kernel's VFIO is silent where one just vanishes."""

FAILED: Final = 1
"""In `Account.stopped`: a command of the stream failed; it stands still until it is recovered."""

CLOSED: Final = 4
"""Likewise: the stream has been closed. (2 belongs to the runtime.)"""

# How far a repair is: before _SETTLED it still takes out what streams lose that fail elsewhere.
_NONE, _STARTED, _SETTLED = range(3)

_LOSSES: Final = 256
_MOST_UNTAKEN: Final = 256
"""How many timings are asked for before the reports that have come are looked at, whether anybody wants them or not."""
_LONGEST_REPAIR: Final = 2.0


@dataclass(frozen=True)
class QueueStatistics:
    """What became of the commands of one queue: ``submitted == completed + failed + aborted + in_flight``.

    Attributes
    ----------
    submitted, completed, failed, aborted, in_flight : int
        Commands. Aborted ones never ran, because one before them on their stream failed or the queue was closed.
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
    """One hardware queue. One stream has it for itself, or several share it.

    A fault stops the whole queue. :meth:`repair` lets it run again, without the commands of the stream that failed:
    these become NOPs, so that all keep their sequence numbers. Whoever notices calls it: a thread that waits or
    submits, or the device's event vector.

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
    priority : int
        Larger is served first.
    sites : bool
        Whether it is remembered which line submitted a command.
    describe : callable
        Says what lies at a device address, or once did.

    Attributes
    ----------
    accounts : dict
        By number, of the streams that have commands here.

    Raises
    ------
    OutOfMemory, MemlockLimit
        No pinned memory for it. Nothing was created then.
    """

    def __init__(self, admin: QueueAdmin, pool: PinnedPool, port: QueuePort, *, queue: int, vector: int, eventfd: int,
                 entries: int, initial: int = 0, timeout: float = DEFAULT_TIMEOUT, spin_ns: int = 20_000,
                 priority: int = 0, sites: bool = True, describe: Callable[[int], str] = lambda address: "") -> None:
        if entries < 2 or entries & (entries - 1):
            raise InvalidArgument(f"{port.device}: a queue has a power of two of entries, not {entries}")
        if not 0 <= timeout <= LONGEST_SECONDS:
            raise InvalidArgument(f"a time-out is 0 to {LONGEST_SECONDS:g} seconds, not {timeout}")
        self.id = queue
        self.timeout = timeout
        self._admin = admin
        self._port = port
        self._blocks: list[PinnedBlock] = []
        self.accounts: dict[int, Account] = {}
        self._describe = describe
        self._untaken = 0       # timings since reports were looked at
        self._timings: weakref.WeakValueDictionary[int, Timing] = weakref.WeakValueDictionary()
        self._reports = threading.Lock()
        self._repairing = threading.Lock()
        self._closing = False
        self._raised: dict[int, dict[str, Any]] = {}
        self._losses: deque[Loss] = deque(maxlen=_LOSSES)
        self._phase = _NONE
        self._aborts: set[int] = set()
        self._failed = 0
        self._aborted = 0
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
            params["priority"] = priority
            admin.create_queue(params)
            created = True
            doorbell = port.doorbell_page(queue * DOORBELL_STRIDE, DOORBELL_STRIDE)
            self.ring = Ring(
                ring.view(), progress.view(), reports.view(), doorbell, args.view(), args.iova, initial=initial,
                name=f"{port.device}: queue {queue}",
                timeout_ns=int(timeout * 1e9), spin_ns=spin_ns, wake=port.wake, sites=sites,
                queue_fd=eventfd,
                event_fd=port.event_fd, liveness_fd=port.liveness_fd, service=port.service, on_event=port.on_event)
        except BaseException:
            if created:
                admin.delete_queue(queue)
            self._free()
            raise

    # --- times -------------------------------------------------------------------------------------------------------

    def time(self, submit: Callable[[], int]) -> tuple[int, Timing]:
        """Call what submits a command that reports; its timing is filled in when it is taken."""
        with self._reports:
            sequence = submit()
            timing = self._timings[sequence] = Timing()
            self._untaken += 1
            many = self._untaken >= _MOST_UNTAKEN
        if many:  # a program may time events and never ask
            self.take_timings()
        return sequence, timing

    def take_timings(self) -> None:
        """Read the report records that have come and fill in the timings that are still wanted."""
        with self._reports:
            self._untaken = 0
            for sequence, start_ns, end_ns, status, _ in self.ring.take_reports():
                timing = self._timings.pop(sequence, None)
                if timing is not None and not status:
                    timing.start_ns, timing.end_ns = start_ns, end_ns

    # --- waiting -----------------------------------------------------------------------------------------------------

    def done(self, sequence: int, *, waiting: bool = False) -> bool:
        """Say whether the command `sequence` is done.

        Parameters
        ----------
        sequence : int
        waiting : bool
            Whether somebody is in a wait for it, that the close of the queue ends.

        Raises
        ------
        DeviceFault
            It failed, or never ran because one before it failed or the queue was closed.
        ClosedError
            The same of the close, where somebody is waiting.
        """
        ring = self.ring
        if not ring.closed and not ring.done(sequence):
            if ring.stopped:
                self.repair()
            else:
                self._port.look()
            if self._losses:
                self.check(sequence, waiting=waiting)
            return ring.closed or ring.done(sequence)
        if self._losses:
            self.check(sequence, waiting=waiting)
        return True

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
        if self._losses:
            self.check(sequence)
        if not 0 <= seconds <= LONGEST_SECONDS:
            raise InvalidArgument(f"a time-out is 0 to {LONGEST_SECONDS:g} seconds, not {seconds}")
        deadline = time.monotonic() + seconds
        left, ring = seconds, self.ring
        while True:
            status = ring.wait(sequence, int(min(left, SLICE_SECONDS) * 1e9))
            if status == WAIT_CLOSED:
                raise self._ended()
            if status == WAIT_STOPPED:
                self.repair()
            if self._losses:
                self.check(sequence, waiting=True)
            if status == WAIT_DONE:
                return
            if status == WAIT_LOST:
                raise DeviceLost(f"{self._port.device}: the device is gone, queue {self.id} waited for command "
                                 f"{sequence}", cause="its server ended or its link is down",
                                 hint="open the device anew")
            if status == WAIT_TIMED_OUT:
                if left <= SLICE_SECONDS:
                    raise timeout_error(ring, self._port, self.id, sequence, seconds)
                self._port.check_alive()
            left = max(deadline - time.monotonic(), 0)

    def kick(self) -> None:
        """Make waiting threads look again."""
        self.ring.kick()

    def quiet(self, sequence: int) -> bool:
        """Say whether the device is done with everything up to `sequence`, whatever became of it."""
        try:
            status = self.ring.wait(sequence, 0)
            if status == WAIT_STOPPED:
                with contextlib.suppress(MaiaError):
                    self.repair()
                status = self.ring.wait(sequence, 0)
        except ClosedError:  # by another thread, or long ago
            return True
        return status == WAIT_DONE

    # --- faults ------------------------------------------------------------------------------------------------------

    def repair(self, *, blocking: bool = True) -> None:
        """Let a queue that stopped at a fault run again; does nothing where it runs.

        Parameters
        ----------
        blocking : bool
            Whether to wait for another thread that is at it, or that is submitting a batch.

        Raises
        ------
        MaiaError
            The device did not reset the queue.
        """
        # Once more after the lock is free: a fault in between would have found it taken.
        while self.ring.stopped and not self._closing:
            if not self._repairing.acquire(blocking):
                return
            try:
                if self.ring.stopped and not self._closing and not self._repair(blocking):
                    return
            finally:
                self._repairing.release()

    def settle(self) -> None:
        """Repair the queue if it stands still, and wait for another thread's repair that is under way."""
        self.repair()
        with self._repairing:
            pass

    def _repair(self, blocking: bool) -> bool:
        ring = self.ring
        if not ring.hold(blocking):
            return False
        try:
            _, _, failed = ring.state
            facts = fault_facts(ring, self._port, self.id, failed, self._describe)
            if failed in self._raised:
                facts |= self._raised.pop(failed)
            lost = ring.void(failed, ring.owner(failed) or None)
            if not lost or lost[0][0] != failed:
                # Nobody's command: then it is everybody's fault.
                lost += ring.void(0, None)
            self._phase = _STARTED
            self._charge(lost, facts, failed)
            for account in {account for account in (self.accounts.get(item[3]) for item in lost) if account}:
                for queue in list(account.queues):
                    if queue is not self:
                        # What the stream has submitted there since waits for this queue.
                        queue.doom(account.number)
            # Who failed on other queues meanwhile has counted on this one until here.
            self._phase = _SETTLED
            for account in list(self.accounts.values()):
                if account.stopped & (FAILED | CLOSED):
                    self._charge(ring.void(0, account.number), account.failure or facts, None)
            # Nobody may take the NOPs for success: their loss is known before they run.
            self._admin.reset_queue(self.id, ring.poll())
            ring.resume(ring.poll())
        finally:
            self._phase = _NONE
            ring.let_go()
        self._ask_for_aborts()
        return bool(lost)

    def _charge(self, lost: list[tuple[int, bytes, Any, int]], facts: dict[str, Any], failed: int | None,
                *, at_close: bool = False) -> None:
        """Note what was lost: here, by sequence number, and on the accounts of the streams, which stand still then."""
        by_owner: dict[int, list[LostCommand]] = {}
        for sequence, raw, site, owner in lost:
            by_owner.setdefault(owner, []).append(LostCommand(sequence, raw, site))
        failures = sum(item[0] == failed for item in lost)
        self._failed += failures
        self._aborted += len(lost) - failures
        for owner, commands in by_owner.items():
            account, found = self.accounts.get(owner), facts
            if account is not None:
                found = charge(account, facts, commands, failed)
                account.stop(FAILED)
            self._losses.append(Loss((command.sequence for command in commands), found, at_close=at_close))

    # --- aborts ------------------------------------------------------------------------------------------------------

    def abort(self, sequence: int, number: int, raised: BaseException | None = None, *, peer: str = "") -> bool:
        """Have the device fail a command of the stream `number`; say whether it was not done yet.

        Where it waits for a function, `raised` is what that raised: then the fault is a CallbackError. Where it waits
        for another device, `peer` is its name, and `raised` why that is in vain: then it is a PeerFault.
        """
        if sequence not in self.ring.outstanding(number):
            return False
        if raised is not None:
            self._raised[sequence] = {"raised": raised, "peer": peer} if peer else {"raised": raised}
        self._aborts.add(sequence)
        self._ask_for_aborts()
        return True

    def doom(self, number: int) -> None:
        """See to it that what a stream has outstanding here is lost; its account says already that it stands still."""
        deadline = time.monotonic() + _LONGEST_REPAIR
        while time.monotonic() < deadline and self._phase != _STARTED:
            left = self.ring.outstanding(number)
            if not left:
                return
            if self._phase == _NONE:
                with contextlib.suppress(MaiaError):
                    self.repair(blocking=False)
                    if self.abort(left[0], number) and not self.ring.stopped:
                        return
            time.sleep(0.0005)

    def _ask_for_aborts(self) -> None:
        """Ask the device for the first of the aborts that are due: it remembers one, and none over a reset."""
        deadline = time.monotonic() + _LONGEST_REPAIR
        while self._aborts and not self.ring.stopped and time.monotonic() < deadline:
            due = [sequence for sequence in self.ring.outstanding() if sequence in self._aborts]
            if not due:
                self._aborts.difference_update([s for s in list(self._aborts) if s <= self.ring.poll()])
                return
            try:
                self._admin.abort(self.id, due[0])
                return
            except InvalidArgument:  # it is done by now; or the queue has just stopped: then this comes again
                time.sleep(0.0002)

    def where(self, sequence: int) -> str:
        """Return ``file:line`` that submitted a command, empty where it is not known."""
        return describe(self.ring.site(sequence))

    def check(self, sequence: int, *, waiting: bool = False) -> None:
        """Raise what the command `sequence` was lost to, if it was; see :meth:`done`."""
        for loss in list(self._losses):
            if sequence in loss:
                raise self._ended() if waiting and loss.at_close else device_fault(loss.facts)

    def _ended(self) -> ClosedError:
        return ClosedError(f"{self.ring.name} was closed during a wait")

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
        submitted, left = ring.head - ring.initial, len(ring.outstanding())
        aborted, in_flight = (self._aborted + left, 0) if closing else (self._aborted, left)
        return QueueStatistics(submitted, submitted - self._failed - self._aborted - left, self._failed, aborted,
                               in_flight, ring.doorbells, ring.waiters.sleeps)

    def close(self) -> None:
        """Delete the queue and give its memory back; waits end with ClosedError. Idempotent; does not synchronize.

        Raises
        ------
        MaiaError
            The device did not confirm. The memory is kept until :meth:`release`, for it may still be written to.
        """
        if self.ring.closed:
            return
        self._end_repairs()
        self._conclude()
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
        self._end_repairs()
        self._conclude()
        if self.ring.close():
            self._free()

    def _end_repairs(self) -> None:
        self._closing = True
        if not self._repairing.acquire(timeout=_LONGEST_REPAIR):
            return
        self._repairing.release()

    def _conclude(self) -> None:
        """Take the last figures, and remember what will never run."""
        if self._final is not None or self.ring.closed:
            return
        ring = self.ring
        try:
            self._final = self._figures(closing=True)
            left = ring.outstanding()
        except ForkedError:
            return
        if left:
            facts = {"code": int(FaultCode.RESET), "device": self._port.device, "queue": self.id, "sequence": left[0]}
            lost = [(s, ring.command_at(s) or b"", ring.site(s), ring.owner(s)) for s in left]
            self._charge(lost, facts, None, at_close=True)

    def _free(self) -> None:
        while self._blocks:
            self._blocks.pop().free()
