"""The device's firmware: boot, the admin queue's rings, the heartbeat.

Admin queue
-----------
The driver writes ADMIN_SQ, ADMIN_CQ and ADMIN_SIZE, then CONTROL.ENABLE; both rings have 2^ADMIN_SIZE entries. While
booting, firmware reads the submission ring once and fills the completion ring with zeros; where it cannot, BOOT becomes
FAILED with ERROR 2. Command n lies in slot n modulo the length; the driver stores it, then ADMIN_TAIL = n + 1. Firmware
writes the 32-byte completion record to the same slot of the completion ring, its last 8 bytes (with ``sequence``) after
the others, then ADMIN_HEAD = n + 1, then fires vector 0. Commands run one after the other. A tail further from the head
than the ring is long, or a ring that can no longer be reached, sets ERRORS.ADMIN and BOOT = FAILED.

The commands and their parameters are in `admin`.

Threads: the session's thread calls `boot`, `ring_doorbell` and `halt`; commands run on the firmware's own thread,
which may wait for the client.
"""

from __future__ import annotations

import sys
import threading
import traceback
from typing import TYPE_CHECKING, Final

import numpy as np

from maia_emulator.admin import AdminCommands
from maia_emulator.register_file import RegisterFile
from maia_rt.contract.commands import ADMIN_COMMAND, ADMIN_COMPLETION, AdminStatus
from maia_rt.contract.registers import BAR0, BootState

if TYPE_CHECKING:
    from maia_emulator.engine import Engine

HEARTBEAT_NS: Final = 50_000_000
JOIN_SECONDS: Final = 0.4

BAD_REGISTERS: Final = 1
BAD_MEMORY: Final = 2
DIED: Final = 3

_ERROR_ADMIN: Final = BAR0["ERRORS"].field("ADMIN").mask
_U32: Final = 0xFFFFFFFF


class _Dead(Exception):
    """Firmware cannot go on; the argument is the reason in STATUS.ERROR."""


class Firmware:
    """Boots, serves the admin queue, beats.

    Parameters
    ----------
    engine : Engine
    registers : RegisterFile
        STATUS, HEARTBEAT, CONTROL and the ADMIN registers are used.
    commands : AdminCommands
    """

    def __init__(self, engine: Engine, registers: RegisterFile, commands: AdminCommands) -> None:
        self._engine = engine
        self._registers = registers
        self._commands = commands
        self._bell = threading.Condition()
        # Held while a command changes the device and is completed, and by `halt`. Whoever holds it may wait for
        # the client, so the session's thread takes it only where message DMA is barred.
        self._commit = threading.Lock()
        self._generation = 0
        self._boot_wanted = False
        self._tail = 0
        self._stopping = False
        self._beat_since: int | None = None
        self._beats = 0
        self._head = self._entries = self._sq = self._cq = 0
        self._ready = False
        self._silent = False
        registers.on_read("HEARTBEAT", self._heartbeat)
        self._thread = threading.Thread(target=self._run, name="firmware", daemon=True)
        self._thread.start()

    # Called by the session's thread -----------------------------------------------------------------------------

    def boot(self) -> None:
        """Start with the rings that the registers describe at this moment (CONTROL.ENABLE 0 -> 1)."""
        self._registers.store("ADMIN_TAIL", 0)
        self._registers.store("ADMIN_HEAD", 0)
        with self._bell:
            self._sq = self._registers.load("ADMIN_SQ")
            self._cq = self._registers.load("ADMIN_CQ")
            self._entries = self._registers.load("ADMIN_SIZE")
            self._tail = 0
            self._beat_since, self._beats = self._engine.clock_ns(), 0
            self._silent = False
            self._status(BootState.BOOTING)
            self._boot_wanted = True
            self._bell.notify()

    def ring_doorbell(self, tail: int) -> None:
        """Take a new ADMIN_TAIL."""
        with self._bell:
            self._tail = tail
            self._bell.notify()

    def halt(self) -> None:
        """Stop, and delete every queue, context and program; memory stays. The caller has barred message DMA."""
        with self._commit:
            with self._bell:
                self._generation += 1
                self._boot_wanted = self._ready = False
                self._tail = self._head = 0
                self._beat_since, self._beats = None, 0
                self._registers.store("ADMIN_TAIL", 0)
                self._registers.store("ADMIN_HEAD", 0)
                self._status(BootState.RESET)
            self._engine.clear()

    def fail(self, *, silent: bool) -> None:
        """Die as an injection asks: without a word, or with BOOT = FAILED. Called by the command processor's thread."""
        if not silent:
            self._fail(self._generation, DIED)
            return
        with self._bell:
            self._silent = True
            self._beats, self._beat_since = self._heartbeat(), None

    def stop(self) -> None:
        """End the thread. One that is deep in a command is left to end by itself: it can change nothing any more."""
        with self._bell:
            self._stopping = True
            self._generation += 1
            self._bell.notify()
        self._thread.join(JOIN_SECONDS)

    # The firmware's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._bell:
                self._bell.wait_for(self._has_work)
                if self._stopping:
                    return
                generation, tail = self._generation, self._tail
                booting, self._boot_wanted = self._boot_wanted, False
            try:
                if booting:
                    self._start(generation)
                else:
                    self._serve(generation, tail)
            except _Dead as reason:
                self._fail(generation, reason.args[0])
            except Exception:
                # A bug of ours: the device shows what real firmware would, and stays up for a reset.
                traceback.print_exc(file=sys.stderr)
                self._fail(generation, DIED)

    def _has_work(self) -> bool:
        return (self._stopping or self._boot_wanted
                or (self._ready and not self._silent and self._tail != self._head))

    def _start(self, generation: int) -> None:
        log2 = self._entries
        if not 1 <= log2 <= 12 or self._sq % 64 or self._cq % 64:
            raise _Dead(BAD_REGISTERS)
        entries = 1 << log2
        try:
            self._engine.dma_read(self._sq, entries * ADMIN_COMMAND.itemsize)
            self._engine.dma_write(self._cq, bytes(entries * ADMIN_COMPLETION.itemsize))
        except OSError:
            raise _Dead(BAD_MEMORY) from None
        with self._commit, self._bell:
            if generation == self._generation:
                self._entries, self._head, self._ready = entries, 0, True
                self._status(BootState.READY)

    def _serve(self, generation: int, tail: int) -> None:
        if (tail - self._head) & _U32 > self._entries:
            raise _Dead(BAD_REGISTERS)
        slot = self._head % self._entries
        try:
            raw = self._engine.dma_read(self._sq + slot * ADMIN_COMMAND.itemsize, ADMIN_COMMAND.itemsize)
        except OSError:
            raise _Dead(BAD_MEMORY) from None
        command = np.frombuffer(raw, ADMIN_COMMAND)[0]
        act = self._commands.prepare(command)
        with self._commit:
            if generation != self._generation or self._silent:
                return
            status, results = self._commands.run(act)
            self._complete(int(command["id"]), status, results, slot)
            self._engine.strike_due()

    def _complete(self, command_id: int, status: AdminStatus, results: tuple[int, int], slot: int) -> None:
        head = (self._head + 1) & _U32
        record = np.zeros(1, ADMIN_COMPLETION)
        record["id"], record["status"], record["result"], record["sequence"] = command_id, status, results, head
        raw = record.tobytes()
        at = self._cq + slot * ADMIN_COMPLETION.itemsize
        split = ADMIN_COMPLETION.fields["sequence"][1]  # type: ignore[index]
        try:
            self._engine.dma_write(at, raw[:split])
            self._engine.dma_write(at + split, raw[split:])
        except OSError:
            raise _Dead(BAD_MEMORY) from None
        self._head = head
        self._engine.add_counter("admin_commands", 1)
        self._registers.store("ADMIN_HEAD", head)
        self._engine.trigger(0)

    def _fail(self, generation: int, reason: int) -> None:
        with self._bell:
            if generation != self._generation:
                return
            self._ready = False
            self._beats, self._beat_since = self._heartbeat(), None
            self._status(BootState.FAILED, reason)
            self._engine.raise_error(_ERROR_ADMIN)

    # Registers --------------------------------------------------------------------------------------------------

    def _status(self, state: BootState, reason: int = 0) -> None:
        status = BAR0["STATUS"]
        self._registers.store("STATUS", status.set(status.set(0, "BOOT", state), "ERROR", reason))

    def _heartbeat(self) -> int:
        since = self._beat_since
        if since is None:
            return self._beats
        return int(1 + (self._engine.clock_ns() - since) // HEARTBEAT_NS) & _U32
