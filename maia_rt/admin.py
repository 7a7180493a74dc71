"""The admin queue: the two rings through which the driver asks firmware for everything that is not a command."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from maia_rt.contract.commands import ADMIN_COMMAND, ADMIN_COMPLETION, AdminOpcode, AdminStatus
from maia_rt.contract.registers import BAR0, Bar0, BootState
from maia_rt.errors import (
    ClosedError,
    DeviceBusy,
    DeviceLost,
    DeviceTimeout,
    FirmwareError,
    ForkedError,
    InvalidArgument,
    MaiaError,
    OutOfQueues,
    ProgramError,
    ResourceExhausted,
    Unsupported,
)
from maia_rt.memory import PinnedPool
from maia_rt.transport import Transport
from maia_rt.transport.uapi import PciRegion

ENTRIES_LOG2: Final = 4
PAGE_BYTES: Final = 16 * 1024
MESSAGE_BYTES: Final = 1024
HEARTBEAT_SECONDS: Final = 0.5
"""A heartbeat that stands still for so long is dead firmware."""
LOOK_SECONDS: Final = 0.1
"""How often who waits looks at it."""
INTERRUPT_SECONDS: Final = 1.0
"""How long a command that was interrupted may still take."""
SETTLE_MS: Final = 2
"""How long the interrupt of a completion may follow it."""
_SPIN_SECONDS: Final = 0.0002
_U32: Final = 0xFFFFFFFF


class AdminLock:
    """A re-entrant lock that runs what had to wait for it when its holder lets go of it altogether.

    An interrupt that arrives during an admin command may call for more of them, but neither the command nor what it
    left in the data page may be disturbed.
    """

    def __init__(self, afterwards: Callable[[], object]) -> None:
        self._lock = threading.RLock()
        self._afterwards = afterwards
        self._depth = 0
        self._owner = 0
        self._due = False

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        due = False
        if not self._depth:
            due, self._due, self._owner = self._due, False, 0
        self._lock.release()
        if due:
            self._afterwards()

    def postpone(self) -> bool:
        """Say whether this thread holds the lock; if so `afterwards` is called when it has let go."""
        if self._owner != threading.get_ident():
            return False
        self._due = True
        return True


class AdminQueue:
    """One admin command at a time, each with a deadline.

    Parameters
    ----------
    transport : Transport
    pool : PinnedPool
        Where the rings and the data page come from.
    event_fd : int
        The device's event vector, which also tells completions.
    on_event : callable
        Serves that vector; it must call :meth:`ring_bell`, for another thread may serve it on this one's behalf.
    afterwards : callable
        Called once the lock is free again, where ``lock.postpone()`` has asked for it.
    timeout : float
        How long one command may take, in seconds.

    Attributes
    ----------
    lock : AdminLock
        Held around a command that uses the data page, and what it left there.
    page : memoryview
        16 KiB that commands read from and write to, at the device address `page_iova`.
    """

    def __init__(self, transport: Transport, pool: PinnedPool, event_fd: int, on_event: Callable[[], object],
                 timeout: float, afterwards: Callable[[], object] = lambda: None) -> None:
        self._transport = transport
        self._timeout = timeout
        self._event_fd = event_fd
        self._on_event = on_event
        self._broken = ""
        self._boots = 0
        self._tail = 0
        self.lock = AdminLock(afterwards)
        sizes = (ADMIN_COMMAND.itemsize << ENTRIES_LOG2, ADMIN_COMPLETION.itemsize << ENTRIES_LOG2, PAGE_BYTES)
        self._blocks = [pool.allocate(size) for size in sizes]
        sq, cq, page = self._blocks
        self._sq = np.frombuffer(sq.view(), ADMIN_COMMAND)
        self._cq = np.frombuffer(cq.view(), ADMIN_COMPLETION)
        self.page = page.view()
        self.page_iova = page.iova
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pid = os.getpid()
        self._closed = False

    def announce(self) -> None:
        """Tell the device where the rings are. It takes this over when it is enabled, and starts at index 0."""
        # Whoever still waits for what the device was asked before gives up.
        self._boots += 1
        self.ring_bell()
        self._sq[:] = np.zeros((), ADMIN_COMMAND)
        self._tail = 0
        self._broken = ""
        write = self._transport.write
        write(PciRegion.BAR0, Bar0.ADMIN_SQ, 8, self._blocks[0].iova)
        write(PciRegion.BAR0, Bar0.ADMIN_CQ, 8, self._blocks[1].iova)
        write(PciRegion.BAR0, Bar0.ADMIN_SIZE, 4, ENTRIES_LOG2)

    def execute(self, opcode: AdminOpcode, *p: int, params: npt.NDArray[Any] | None = None) -> tuple[int, int]:
        """Run one admin command and return its two results.

        Parameters
        ----------
        opcode : AdminOpcode
        *p : int
            Its parameters; the others are zero.
        params : ndarray, optional
            A structure in place of `p`.

        Raises
        ------
        MaiaError
            By the completion's status: Unsupported, InvalidArgument, ResourceExhausted, DeviceBusy, ProgramError,
            FirmwareError.
        DeviceTimeout
            No completion in time. Firmware counts as dead from then on.
        """
        self._require_ours()
        with self.lock:
            status, *results = self.run(opcode, *p, params=params)
            if status != AdminStatus.OK:
                raise self._refusal(opcode, status)
            return results[0], results[1]

    def run(self, opcode: int, *p: int, params: npt.NDArray[Any] | None = None) -> tuple[int, int, int]:
        """As :meth:`execute`, for any opcode; return status and results instead of raising what the status says."""
        self._require_ours()
        with self.lock:
            self._require_open()
            if self._broken:
                raise FirmwareError(f"{self._transport.name}: firmware no longer answers",
                                    cause=self._broken, hint="reset the device")
            slot, boots = self._tail % len(self._sq), self._boots
            command = np.zeros((), ADMIN_COMMAND)
            command["opcode"], command["id"] = opcode, self._tail & _U32
            if params is None:
                command["p"][: len(p)] = p
            else:
                command["p"] = np.frombuffer(params.tobytes(), "<u8")
            self._sq[slot] = command
            self._tail += 1
            self._hush()
            try:
                self._transport.write(PciRegion.BAR0, Bar0.ADMIN_TAIL, 4, self._tail & _U32)
                return self._await(slot, opcode, boots)
            except (DeviceTimeout, FirmwareError) as error:
                # Its text only: an exception would keep the frames it came through.
                if boots == self._boots:
                    self._broken = error.what
                raise

    def ring_bell(self) -> None:
        """Wake the thread that waits for a completion: vector 0, which may have told it, has been served."""
        if self._bell >= 0:
            os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """Give the memory back; the device must no longer use it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._bell, 1)
        # A thread that waits for a completion sees this and leaves.
        with self.lock:
            bell, self._bell = self._bell, -1
            os.close(bell)
            self._sq, self._cq, self.page = self._sq[:0].copy(), self._cq[:0].copy(), memoryview(b"")
            for block in self._blocks:
                block.free()

    def _require_ours(self) -> None:
        if os.getpid() != self._pid:
            # The rings are not mapped in this process, and the lock may be held by a thread that is not in it.
            raise ForkedError(f"{self._transport.name}: the device was opened before fork",
                              hint="open it anew in the child")

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self._transport.name}: the device has been closed")

    # --- waiting -----------------------------------------------------------------------------------------------------

    def _await(self, slot: int, opcode: int, boots: int) -> tuple[int, int, int]:
        """Wait for the newest command's completion: status and results.

        An interrupt is held back until then: the device may be writing to memory that the caller is about to free.
        """
        expected = self._tail & _U32
        start = time.monotonic()
        deadline, next_look, beat = start + self._timeout, start + LOOK_SECONDS, (-1, start)
        interrupt: KeyboardInterrupt | None = None
        while int(self._cq["sequence"][slot]) != expected or boots != self._boots:
            now = time.monotonic()
            self._require_open()
            if boots != self._boots:
                raise FirmwareError(f"{self._transport.name}: the device was reset before {_name(opcode)} was done",
                                    hint="try again")
            try:
                if now > deadline:
                    raise DeviceTimeout(f"{self._transport.name}: firmware did not complete {_name(opcode)} within "
                                        f"{now - start:.1f} s", cause="firmware hangs", hint="reset the device")
                if now > next_look:
                    next_look, beat = now + LOOK_SECONDS, self._listen(beat, now)
                if now > start + _SPIN_SECONDS:
                    self._sleep()
            except DeviceLost:
                # What it completed before it went is done.
                if int(self._cq["sequence"][slot]) != expected:
                    raise
            except KeyboardInterrupt as error:
                interrupt = error
                deadline = min(deadline, now + INTERRUPT_SECONDS)
        # The interrupt that told it is served here, or the next thread that waits for a queue would have to.
        # A device that has gone since is news for the next one: this command is done.
        with contextlib.suppress(DeviceLost):
            self._sleep(SETTLE_MS)
        record = self._cq[slot]
        if interrupt is not None:
            raise interrupt
        return int(record["status"]), int(record["result"][0]), int(record["result"][1])

    def _hush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)

    def _sleep(self, milliseconds: int = 50) -> None:
        """Block until vector 0 fires, another thread has served it, or the transport wants attention."""
        poll = select.poll()
        liveness = self._transport.liveness_fd
        poll.register(self._event_fd, select.POLLIN)
        poll.register(self._bell, select.POLLIN)
        if liveness is not None:
            poll.register(liveness, select.POLLIN | select.POLLRDHUP)
        for fd, _ in poll.poll(milliseconds):
            if fd == self._event_fd:
                self._on_event()
            elif fd == self._bell:
                self._hush()
            else:
                self._transport.service()

    def _listen(self, before: tuple[int, float], now: float) -> tuple[int, float]:
        """Return the heartbeat and since when it is that; raise where it stands still or firmware says it is dead."""
        status, beat = (self._transport.read(PciRegion.BAR0, offset, 4) for offset in (Bar0.STATUS, Bar0.HEARTBEAT))
        name = self._transport.name
        if status == beat == _U32:
            raise DeviceLost(f"{name}: registers read as all ones", cause="the link is down or the device was removed")
        if BAR0["STATUS"].get(status, "BOOT") != BootState.READY:
            raise FirmwareError(f"{name}: firmware died", hint="reset the device")
        if beat == before[0] and now - before[1] > HEARTBEAT_SECONDS:
            raise FirmwareError(f"{name}: the heartbeat stands still at {beat}", cause="firmware hangs",
                                hint="reset the device")
        return before if beat == before[0] else (beat, now)

    # --- refusals ----------------------------------------------------------------------------------------------------

    def _refusal(self, opcode: AdminOpcode, status: int) -> MaiaError:
        name = AdminStatus(status).name if status in set(AdminStatus) else str(status)
        text = f"{self._transport.name}: {opcode.name} was refused: {name}"
        if status == AdminStatus.INVALID_OPCODE:
            return Unsupported(text, cause="the firmware is older than this driver")
        if status in (AdminStatus.INVALID_FIELD, AdminStatus.NOT_FOUND, AdminStatus.BAD_ADDRESS):
            return InvalidArgument(text)
        if status == AdminStatus.NO_RESOURCE:
            kind = OutOfQueues if opcode == AdminOpcode.CREATE_QUEUE else ResourceExhausted
            return kind(text, cause="all are in use", hint="close some")
        if status == AdminStatus.IN_USE:
            return DeviceBusy(text, cause="something still uses it", hint="synchronize and close its users first")
        if status == AdminStatus.PROGRAM_REFUSED:
            reason = bytes(self.page[:MESSAGE_BYTES]).split(b"\0", 1)[0].decode(errors="replace")
            return ProgramError(reason or text)
        return FirmwareError(text, hint="reset the device")


def _name(opcode: int) -> str:
    return AdminOpcode(opcode).name if opcode in set(AdminOpcode) else f"admin command {opcode:#x}"
