"""The device's firmware as the driver meets it: boot, events, and the admin commands by name."""

from __future__ import annotations

import contextlib
import os
import select
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from maia_rt.admin import HEARTBEAT_SECONDS, MESSAGE_BYTES, AdminQueue
from maia_rt.capabilities import Capabilities, read_capabilities
from maia_rt.contract.commands import (
    COUNTER_NAMES,
    COUNTERS,
    FAULT,
    IDENTIFY,
    INJECTION,
    PEER_COUNTER_NAMES,
    QUEUE_LOG,
    RANGE,
    SCRUB,
    SEMAPHORE_LOG,
    AdminOpcode,
    Feature,
    Log,
    Opcode,
    PostOp,
)
from maia_rt.contract.injection import Injection
from maia_rt.contract.registers import BAR0, Bar0, BootState
from maia_rt.errors import (
    ClosedError,
    ContractMismatch,
    DeviceLost,
    DeviceTimeout,
    FirmwareError,
    InvalidArgument,
    MaiaError,
    ProgramError,
    Unsupported,
)
from maia_rt.memory import PinnedPool
from maia_rt.pci.config import set_bus_master, set_memory_space
from maia_rt.queue import QueuePair
from maia_rt.queue_port import QueuePort
from maia_rt.transport import Transport
from maia_rt.transport.uapi import PciIrq, PciRegion

__all__ = ["Capabilities", "Firmware", "Identity"]

BOOT_SECONDS: Final = 10.0
"""The contract's limit for leaving BOOTING."""


@dataclass(frozen=True)
class Identity:
    """What the device says about itself, for people."""

    model: str
    firmware: str
    serial: str


class Firmware:
    """Boots a device and talks to it over the admin queue.

    Any thread may call; one lock orders the admin commands, which raise as
    :meth:`maia_rt.admin.AdminQueue.execute` says.

    Parameters
    ----------
    transport : Transport
    timeout : float
        How long one admin command may take, in seconds.

    Raises
    ------
    ContractMismatch
        The device is none of ours, or speaks another major version.
    DeviceLost
        It reads as all ones.
    """

    def __init__(self, transport: Transport, *, timeout: float = 10.0) -> None:
        self._transport = transport
        self._timeout = timeout
        self._queues: weakref.WeakSet[QueuePair] = weakref.WeakSet()
        self._fds: list[int] = []
        self._admin_queue: AdminQueue | None = None
        self._enabled = False
        self._beat = -1, 0.0
        self._semaphores: npt.NDArray[np.uint32] | None = None
        config = PciRegion.CONFIG
        self._config = (partial(transport.read, config), partial(transport.write, config))
        if not transport.info.is_pci:
            raise ContractMismatch(f"{transport.name} is no PCI device", hint="select another device")
        set_memory_space(*self._config, True)
        self.capabilities = read_capabilities(transport)

    # --- registers ---------------------------------------------------------------------------------------------------

    def register(self, name: str) -> int:
        """Read a register of BAR 0 by name.

        Raises
        ------
        DeviceLost
            It reads as all ones, and so does the identity.
        """
        register = BAR0[name]
        value = self._transport.read(PciRegion.BAR0, register.offset, register.width_bytes)
        if value == (1 << register.width_bits) - 1:
            self.check_alive()
        return value

    def check_alive(self) -> None:
        """Raise DeviceLost where the identity register no longer reads as it should."""
        value = self._transport.read(PciRegion.BAR0, Bar0.ID, 4)
        if value != BAR0["ID"].reset:
            raise DeviceLost(f"{self._transport.name}: the identity register reads {value:#010x}",
                             cause="the link is down or the device was removed",
                             hint="look at the slot, then open the device anew")

    def check_beating(self) -> None:
        """Raise DeviceLost where the device is gone, FirmwareError where its firmware is dead. For whoever waits."""
        self.check_alive()
        state = BAR0["STATUS"].get(self.register("STATUS"), "BOOT")
        if not self._enabled or state not in (BootState.READY, BootState.FAILED):
            return
        beat, now = self.register("HEARTBEAT"), time.monotonic()
        if beat != self._beat[0]:
            self._beat = beat, now
        if state == BootState.FAILED:
            raise FirmwareError(f"{self._transport.name}: firmware died", hint="reset the device")
        if now - self._beat[1] > HEARTBEAT_SECONDS:
            raise FirmwareError(f"{self._transport.name}: the heartbeat stands still at {beat}",
                                cause="firmware hangs", hint="reset the device")

    # --- boot --------------------------------------------------------------------------------------------------------

    def boot(self, pool: PinnedPool) -> None:
        """Reset the device and start its firmware.

        Raises
        ------
        FirmwareError
            It says that it failed, and why.
        DeviceTimeout
            It did not get ready in time.
        Unsupported
            It has no MSI-X vectors.
        """
        self.reset()
        set_memory_space(*self._config, True)
        set_bus_master(*self._config, True)
        if self._admin_queue is None:
            self._enable_vectors()
            self._pool = pool
            self._admin_queue = AdminQueue(self._transport, pool, self._fds[0], self.on_event, self._timeout,
                                           self._repair_queues)
        self._admin.announce()
        self._transport.write(PciRegion.BAR0, Bar0.CONTROL, 4, BAR0["CONTROL"].field("ENABLE").mask)
        self._beat = -1, time.monotonic()
        self._enabled = True
        self._await_state(BootState.READY, BOOT_SECONDS)
        with contextlib.suppress(Unsupported):      # of a share: they are read one by one
            window = self._transport.map(PciRegion.BAR2, self.capabilities.semaphore_window,
                                         4 * self.capabilities.semaphores)
            self._semaphores = np.frombuffer(window, "<u4")

    def reset(self) -> None:
        """Reset the function; every queue, context and program is gone."""
        self._enabled = False
        if self._transport.info.can_reset:
            self._transport.reset()
        else:
            self._transport.write(PciRegion.BAR0, Bar0.CONTROL, 4, BAR0["CONTROL"].field("RESET").mask)
            self._await_state(BootState.RESET, 1.0)

    def _enable_vectors(self) -> None:
        irqs = self._transport.irqs
        available = irqs[PciIrq.MSIX].count if len(irqs) > PciIrq.MSIX else 0
        if available < 2:
            raise Unsupported(f"{self._transport.name}: {available} MSI-X vectors; the device and each queue need one",
                              hint="give the device its MSI-X table")
        # All at once: kernels before 6.5 cannot add a vector to those that are enabled.
        for _ in range(min(available, self.capabilities.max_queues + 1)):
            self._fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._transport.irq_enable(PciIrq.MSIX, 0, self._fds)

    def _await_state(self, wanted: BootState, seconds: float) -> None:
        name = self._transport.name
        deadline = time.monotonic() + seconds
        pause = 0.0005
        while True:
            status = BAR0["STATUS"].decode(self.register("STATUS"))
            if status["BOOT"] == wanted:
                return
            if status["BOOT"] == BootState.FAILED:
                raise FirmwareError(f"{name}: firmware failed with error {status['ERROR']}",
                                    cause=_BOOT_ERRORS.get(status["ERROR"], "unknown"), hint="reset the device")
            if time.monotonic() > deadline:
                raise DeviceTimeout(f"{name}: firmware is in state {status['BOOT']}, not {wanted.name}, after "
                                    f"{seconds:g} s", cause="firmware hangs", hint="reset the device")
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    # --- events ------------------------------------------------------------------------------------------------------

    @property
    def vectors(self) -> Sequence[int]:
        """The eventfds of the MSI-X vectors: 0 is the device's, the others are for queues."""
        return self._fds

    def port(self) -> QueuePort:
        """What queue pairs need to know of the device."""
        transport = self._transport
        liveness = transport.liveness_fd
        wake = partial(transport.write, PciRegion.BAR0, Bar0.WAKE, 4, 1, posted=True)
        return QueuePort(
            device=transport.name, event_fd=self._fds[0], liveness_fd=-1 if liveness is None else liveness,
            wake=wake if self.capabilities.needs_wake else None, service=transport.service, on_event=self.on_event,
            check_alive=self.check_beating, doorbell_page=partial(transport.map, PciRegion.BAR2), faults=self.faults,
            look=self.look)

    def watch(self, queue: QueuePair) -> None:
        """Make the threads that wait for `queue` look again whenever the device reports an error."""
        self._queues.add(queue)

    def on_event(self) -> None:
        """Serve vector 0. Whoever finds its eventfd readable calls this, on behalf of everybody who waits."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fds[0])
        if self._admin_queue is not None:
            self._admin_queue.ring_bell()
        errors = self.register("ERRORS")
        if errors:
            self._transport.write(PciRegion.BAR0, Bar0.ERRORS, 4, errors)
            for queue in list(self._queues):
                queue.kick()
            if self._admin_queue is None or not self._admin_queue.lock.postpone():
                self._repair_queues()

    def look(self) -> None:
        """Serve vector 0 if it has fired. For threads that ask how far the device is, and do not wait."""
        poll = select.poll()
        poll.register(self._fds[0], select.POLLIN)
        if poll.poll(0):
            self.on_event()

    def _repair_queues(self) -> None:
        """Let queues that stopped run again. Nobody need wait for a queue that others depend on."""
        for queue in list(self._queues):
            # One that cannot be repaired says so to who waits for it.
            with contextlib.suppress(MaiaError):
                queue.repair(blocking=False)

    # --- admin commands ----------------------------------------------------------------------------------------------

    @property
    def _admin(self) -> AdminQueue:
        if self._admin_queue is None:
            raise ClosedError(f"{self._transport.name}: the device has been closed")
        return self._admin_queue

    def identify(self) -> Identity:
        """Ask the device who it is."""
        admin = self._admin
        with admin.lock:
            admin.execute(AdminOpcode.IDENTIFY, admin.page_iova)
            row = np.frombuffer(admin.page, IDENTIFY, 1)[0]
            return Identity(*(bytes(row[field]).decode(errors="replace") for field in ("model", "firmware", "serial")))

    def run(self, opcode: int, *p: int, params: npt.NDArray[Any] | None = None) -> tuple[int, int, int]:
        """Run any admin command; return its status and results. For who passes on the commands of others."""
        return self._admin.run(opcode, *p, params=params)

    def page(self, opcode: AdminOpcode, size: int) -> bytes:
        """Return the first `size` bytes that IDENTIFY, or GET_LOG of the counters, writes."""
        admin = self._admin
        with admin.lock:
            if opcode == AdminOpcode.IDENTIFY:
                admin.execute(opcode, admin.page_iova)
            else:
                admin.execute(opcode, Log.COUNTERS, admin.page_iova, size)
            return bytes(admin.page[:size])

    def create_queue(self, params: npt.NDArray[Any]) -> int:
        """Create a queue from a CREATE_QUEUE structure; return its id."""
        return self._admin.execute(AdminOpcode.CREATE_QUEUE, params=params)[0]

    def delete_queue(self, queue: int) -> None:
        """Delete a queue. The device no longer touches its memory when this returns."""
        self._admin.execute(AdminOpcode.DELETE_QUEUE, queue)

    def reset_queue(self, queue: int, initial: int) -> None:
        """Empty a queue and let it run from index `initial`."""
        self._admin.execute(AdminOpcode.RESET_QUEUE, queue, initial)

    def abort(self, queue: int, sequence: int) -> None:
        """Fail one command with ABORTED. InvalidArgument where it is done already."""
        self._admin.execute(AdminOpcode.ABORT, queue, sequence)

    def load_program(self, image: bytes) -> tuple[int, int]:
        """Load a program image.

        Returns
        -------
        (first handle, count)
            Kernels have consecutive handles, in the image's order.

        Raises
        ------
        ProgramError
            The device refused it; the text is the device's.
        """
        if not image:
            raise ProgramError("program refused: the image is empty")
        admin = self._admin
        with admin.lock, self._pool.allocate(len(image)) as block:
            np.frombuffer(block.view(), np.uint8)[:] = np.frombuffer(image, np.uint8)
            admin.page[:MESSAGE_BYTES] = bytes(MESSAGE_BYTES)
            return admin.execute(AdminOpcode.LOAD_PROGRAM, block.iova, len(image), admin.page_iova, MESSAGE_BYTES)

    def unload_program(self, first: int) -> None:
        """Unload the program whose first kernel has the handle `first`. DeviceBusy while one of them runs."""
        self._admin.execute(AdminOpcode.UNLOAD_PROGRAM, first)

    def create_context(self, ranges: Iterable[tuple[int, int]], bounds: npt.NDArray[Any] | None = None) -> int:
        """Create a context confined to `ranges`, pairs of device address and bytes; return its id.

        Parameters
        ----------
        ranges : iterable of (int, int)
            Of HBM; with `bounds` of host addresses too.
        bounds : ndarray, optional
            A CONTEXT_BOUNDS structure.

        Raises
        ------
        Unsupported
            The device has no bounded contexts.
        """
        admin = self._admin
        table = np.array(list(ranges), RANGE)
        if table.nbytes > len(admin.page):
            raise InvalidArgument(f"{self._transport.name}: {len(table)} ranges; a context has at most "
                                  f"{self.capabilities.ranges_per_context}")
        if bounds is not None and not self.capabilities.bounded_contexts:
            raise Unsupported(f"{self._transport.name}: no bounded contexts", hint="update its firmware",
                              cause="CAPS.BOUNDED_CONTEXTS is clear: the device speaks a contract before 1.2")
        raw = table.tobytes()
        with admin.lock:
            at = 0 if bounds is None else admin.page_iova + len(raw)
            raw += b"" if bounds is None else bounds.tobytes()
            admin.page[: len(raw)] = raw
            return admin.execute(AdminOpcode.CREATE_CONTEXT, admin.page_iova, len(table), at)[0]

    def delete_context(self, context: int, *, scrub: bool = False) -> None:
        """Delete a context that no queue uses; with `scrub` what it had for itself reads as zero."""
        self._admin.execute(AdminOpcode.DELETE_CONTEXT, context, SCRUB if scrub else 0)

    def set_feature(self, feature: Feature, value: int) -> None:
        """Set a feature until the next boot."""
        self._admin.execute(AdminOpcode.SET_FEATURE, feature, value)

    def get_feature(self, feature: Feature) -> int:
        """Return a feature's value."""
        return self._admin.execute(AdminOpcode.GET_FEATURE, feature)[0]

    def inject(self, injection: Injection) -> int:
        """Arm an injection; return its number.

        Raises
        ------
        Unsupported
            The device makes no faults on purpose.
        ResourceExhausted
            As many are armed as there is room for.
        """
        self._require_injection()
        params = np.frombuffer(injection.pack(), INJECTION)
        return self._admin.execute(AdminOpcode.INJECT, params=params)[0]

    def clear_injections(self) -> int:
        """Disarm every injection, and let go of what they hold; return how often they struck since boot."""
        self._require_injection()
        return self._admin.execute(AdminOpcode.CLEAR_INJECTIONS)[0]

    def _require_injection(self) -> None:
        if not self.capabilities.injection:
            raise Unsupported(f"{self._transport.name}: the device makes no faults on purpose",
                              cause="CAPS.INJECTION is clear: it is for emulators and bring-up",
                              hint="use the emulated device")

    def counters(self) -> dict[str, int]:
        """Return what the device did since boot; commands by opcode as ``by_opcode_NAME``."""
        admin = self._admin
        with admin.lock:
            written = admin.execute(AdminOpcode.GET_LOG, Log.COUNTERS, admin.page_iova, COUNTERS.itemsize)[0]
            # A device of an older contract has fewer counters.
            row = np.frombuffer(bytes(admin.page[:written]).ljust(COUNTERS.itemsize, b"\0"), COUNTERS, 1)[0]
            found = {name: int(row[name]) for name in COUNTER_NAMES + PEER_COUNTER_NAMES}
            return found | {f"by_opcode_{op.name.lower()}": int(row["by_opcode"][op]) for op in Opcode}

    def faults(self) -> npt.NDArray[Any]:
        """Return the fault log, oldest first, as FAULT records."""
        return self._log(Log.FAULTS, FAULT)

    def queue_log(self) -> npt.NDArray[Any]:
        """Return what each queue is at, by id, as QUEUE_LOG records. Unsupported where the device speaks 1.0."""
        return self._log(Log.QUEUES, QUEUE_LOG)

    def semaphore_log(self) -> npt.NDArray[Any]:
        """Return each semaphore that was ever written or waited for, as SEMAPHORE_LOG records. Likewise."""
        return self._log(Log.SEMAPHORES, SEMAPHORE_LOG)

    def _log(self, log: Log, record: np.dtype[np.void]) -> npt.NDArray[Any]:
        """Read a log of records whole."""
        if log in (Log.QUEUES, Log.SEMAPHORES) and self.capabilities.contract < (1, 1):
            raise Unsupported(f"{self._transport.name}: no log {log.name}", cause="the device speaks contract 1.0",
                              hint="update its firmware")
        admin = self._admin
        with admin.lock:
            room = len(admin.page) - len(admin.page) % record.itemsize
            size, whole = admin.execute(AdminOpcode.GET_LOG, log, admin.page_iova, room)
            if whole <= room:
                return np.frombuffer(bytes(admin.page[:min(size, room)]), record)
            # What came meanwhile is left out.
            with self._pool.allocate(whole) as block:
                size, _ = admin.execute(AdminOpcode.GET_LOG, log, block.iova, whole)
                return np.frombuffer(bytes(block.view()[:min(size, whole)]), record)

    def semaphore(self, index: int) -> int:
        """Read a semaphore from the window in BAR 2."""
        if index >= self.capabilities.semaphores:
            raise InvalidArgument(f"{self._transport.name}: there is no semaphore {index}")
        if self._semaphores is None:
            return self._transport.read(PciRegion.BAR2, self.capabilities.semaphore_window + 4 * index, 4)
        return int(self._semaphores[index])

    def post_semaphore(self, index: int, op: PostOp, value: int) -> None:
        """Set a semaphore or add to it, with effect at once: whoever waits for it goes on."""
        self._transport.write(PciRegion.BAR0, Bar0.SEMAPHORE_OP, 8, index | op << 16 | value << 32)

    # --- end ---------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop the device, as far as it still answers: it touches no memory of ours any more. Idempotent, bounded."""
        if self._enabled:
            self._enabled = False
            with contextlib.suppress(MaiaError):
                self._transport.write(PciRegion.BAR0, Bar0.CONTROL, 4, 0)
                self._await_state(BootState.RESET, 1.0)
        if self._fds:
            with contextlib.suppress(MaiaError):
                self._transport.irq_disable(PciIrq.MSIX)

    def close(self) -> None:
        """Give back what this process holds, without a word to the device; finalizers may call this.

        The threads that wait for queues, and so poll the vectors, must have left. Idempotent.
        """
        self._semaphores = None
        if self._admin_queue is not None:
            self._admin_queue.close()
            self._admin_queue = None
        while self._fds:
            os.close(self._fds.pop())


_BOOT_ERRORS: Final = {
    1: "the admin queue's registers were refused", 2: "the admin queue's memory could not be reached", 3: "it died",
}
