"""The admin commands.

    command         p0        p1       p2        p3       result 0        result 1   refused with, besides INVALID_FIELD
    IDENTIFY        address                                                          BAD_ADDRESS
    CREATE_QUEUE    (the CREATE_QUEUE structure)          queue id                   NO_RESOURCE, IN_USE, BAD_ADDRESS
    DELETE_QUEUE    queue                                                            NOT_FOUND
    RESET_QUEUE     queue     initial                                                NOT_FOUND
    LOAD_PROGRAM    address   bytes    message   bytes    first handle    kernels    PROGRAM_REFUSED, BAD_ADDRESS,
                                                                                     NO_RESOURCE
    UNLOAD_PROGRAM  handle                                                           NOT_FOUND, IN_USE
    CREATE_CONTEXT  ranges    count    bounds             context id                 BAD_ADDRESS, NO_RESOURCE
    DELETE_CONTEXT  context   SCRUB                                                  NOT_FOUND, IN_USE
    SET_FEATURE     feature   value                                                  NOT_FOUND
    GET_FEATURE     feature                               value                      NOT_FOUND
    ABORT           queue     sequence                                               NOT_FOUND
    GET_LOG         log       address  bytes              bytes written   there are  NOT_FOUND, BAD_ADDRESS
    INJECT          (the INJECTION structure)             number                     NO_RESOURCE
    CLEAR_INJECTIONS                                      how often they struck

An unknown opcode is INVALID_OPCODE. ``flags`` and every p not named are zero, else INVALID_FIELD. Addresses are device
addresses: host memory, HBM or SRAM.

IDENTIFY writes the 512-byte page. LOAD_PROGRAM gives the image's kernels consecutive handles, in the image's order;
UNLOAD_PROGRAM takes the first of them. Where an image is refused, the reason is written to p2 as UTF-8, cut to p3 bytes
and always ended by NUL; p2 = 0 asks for no message; p4 is the context whose queues may launch them, 0 for any.
CREATE_CONTEXT reads p1 RANGE records at p0 and, where p2 is not 0, a CONTEXT_BOUNDS record there. GET_LOG writes the
COUNTERS record, or whole records of the other logs, as far as p2 bytes hold them.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from maia_emulator.engine import AdminError
from maia_emulator.profiles import Profile
from maia_rt.contract import program, verifier
from maia_rt.contract.commands import (
    CONTEXT_BOUNDS,
    CONTRACT_MAJOR,
    CONTRACT_MINOR,
    FAULT,
    IDENTIFY,
    QUEUE_LOG,
    RANGE,
    SCRUB,
    SEMAPHORE_LOG,
    AdminOpcode,
    AdminStatus,
    Log,
)
from maia_rt.contract.injection import Injection
from maia_rt.errors import MaiaError, ProgramError

if TYPE_CHECKING:
    from maia_emulator.engine import Engine

Results = tuple[int, int]
Act = Callable[[], Results]
"""Changes the device. Runs where no reset can come between it and its completion; does not touch client memory."""

FIRMWARE_VERSION: Final = "0.1.0"
LOG_BYTES_MAX: Final = 1 << 20


class AdminCommands:
    """Checks an admin command and reads what it points at (`prepare`), then does it (`run`).

    Preparing may take long and wait for the client; a reset in between simply forgets the act.
    """

    def __init__(self, engine: Engine, profile: Profile, serial: int) -> None:
        self._engine = engine
        self._profile = profile
        self._serial = serial
        # Opcode -> (method, how many p it takes); two take all seven as a structure.
        self._structured: dict[int, Callable[[bytes], Act]] = {
            AdminOpcode.CREATE_QUEUE: self._create_queue,
            AdminOpcode.INJECT: self._inject,
        }
        self._methods: dict[int, tuple[Callable[..., Act], int]] = {
            AdminOpcode.IDENTIFY: (self._identify, 1),
            AdminOpcode.DELETE_QUEUE: (self._delete_queue, 1),
            AdminOpcode.RESET_QUEUE: (self._reset_queue, 2),
            AdminOpcode.LOAD_PROGRAM: (self._load_program, 5),
            AdminOpcode.UNLOAD_PROGRAM: (self._unload_program, 1),
            AdminOpcode.CREATE_CONTEXT: (self._create_context, 3),
            AdminOpcode.DELETE_CONTEXT: (self._delete_context, 2),
            AdminOpcode.SET_FEATURE: (self._set_feature, 2),
            AdminOpcode.GET_FEATURE: (self._get_feature, 1),
            AdminOpcode.ABORT: (self._abort, 2),
            AdminOpcode.GET_LOG: (self._get_log, 3),
            AdminOpcode.CLEAR_INJECTIONS: (self._clear_injections, 0),
        }

        # Log -> (what reads it, the bytes that are written together or not at all).
        self._logs: dict[int, tuple[Callable[[], bytes], int]] = {
            Log.COUNTERS: (engine.counters, 1),
            Log.FAULTS: (engine.faults, FAULT.itemsize),
            Log.QUEUES: (engine.queue_log, QUEUE_LOG.itemsize),
            Log.SEMAPHORES: (engine.semaphore_log, SEMAPHORE_LOG.itemsize),
        }

    def prepare(self, command: np.void) -> Act:
        """Return the act of one ADMIN_COMMAND; one that is refused returns an act that says so."""
        try:
            return self._prepare(command)
        except Exception as error:
            # What it was is told by `run`, once the command is known to be wanted still.
            return _refuse(error)

    def run(self, act: Act) -> tuple[AdminStatus, Results]:
        """Do it: status and results of the completion."""
        try:
            return AdminStatus.OK, act()
        except AdminError as refusal:
            return AdminStatus(refusal.status), (refusal.result0, 0)
        except Exception:
            # A bug of ours in one command is this command's failure.
            traceback.print_exc(file=sys.stderr)
            return AdminStatus.INTERNAL, (0, 0)

    def _prepare(self, command: np.void) -> Act:
        p = [int(v) for v in command["p"]]
        structured = self._structured.get(int(command["opcode"]))
        if structured is not None:
            _require(int(command["flags"]) == 0)
            return structured(command["p"].tobytes())
        try:
            method, count = self._methods[int(command["opcode"])]
        except KeyError:
            raise AdminError(AdminStatus.INVALID_OPCODE, "unknown opcode") from None
        _require(int(command["flags"]) == 0 and not any(p[count:]))
        return method(*p[:count])

    def _identify(self, address: int) -> Act:
        page = np.zeros(1, IDENTIFY)
        page["contract_major"], page["contract_minor"] = CONTRACT_MAJOR, CONTRACT_MINOR
        page["profile"] = self._profile.id
        page["model"] = self._profile.model.encode()
        page["firmware"] = FIRMWARE_VERSION.encode()
        page["serial"] = f"{self._serial:016x}".encode()
        self._write(address, page.tobytes())
        return _nothing

    def _create_queue(self, raw: bytes) -> Act:
        return lambda: (self._engine.create_queue(raw), 0)

    def _inject(self, raw: bytes) -> Act:
        try:
            Injection.unpack(raw)
        except MaiaError as error:
            raise AdminError(AdminStatus.INVALID_FIELD, error.what) from None
        return lambda: (self._engine.inject(raw), 0)

    def _clear_injections(self) -> Act:
        return lambda: (self._engine.clear_injections(), 0)

    def _delete_queue(self, queue: int) -> Act:
        return _silent(lambda: self._engine.delete_queue(queue))

    def _reset_queue(self, queue: int, initial: int) -> Act:
        return _silent(lambda: self._engine.reset_queue(queue, initial))

    def _load_program(self, address: int, size: int, message: int, message_size: int, context: int) -> Act:
        try:
            if size > program.MAX_IMAGE_BYTES:
                raise ProgramError(
                    f"program refused: image: {size} bytes; an image has at most {program.MAX_IMAGE_BYTES}"
                )
            image = program.read(self._read(address, size))
            verifier.verify(image, self._profile.program_capabilities)
        except ProgramError as error:
            if message and message_size:
                self._write(message, _message(error.what, message_size))
            raise AdminError(AdminStatus.PROGRAM_REFUSED, error.what) from None
        return lambda: (self._engine.load_program(image, context), len(image.kernels))

    def _unload_program(self, handle: int) -> Act:
        return _silent(lambda: self._engine.unload_program(handle))

    def _create_context(self, address: int, count: int, at: int) -> Act:
        _require(count <= self._profile.ranges_per_context)
        table = np.frombuffer(self._read(address, count * RANGE.itemsize), RANGE)
        ranges = [(int(r["base"]), int(r["size"])) for r in table]
        bounds = self._read(at, CONTEXT_BOUNDS.itemsize) if at else None
        return lambda: (self._engine.create_context(ranges, bounds), 0)

    def _delete_context(self, context: int, options: int) -> Act:
        _require(options in (0, SCRUB))
        return _silent(lambda: self._engine.delete_context(context, options == SCRUB))

    def _set_feature(self, feature: int, value: int) -> Act:
        return _silent(lambda: self._engine.set_feature(feature, value))

    def _get_feature(self, feature: int) -> Act:
        return lambda: (self._engine.get_feature(feature), 0)

    def _abort(self, queue: int, sequence: int) -> Act:
        return _silent(lambda: self._engine.abort(queue, sequence))

    def _get_log(self, log: int, address: int, size: int) -> Act:
        size = min(size, LOG_BYTES_MAX)
        try:
            page, record = self._logs[log]
        except KeyError:
            raise AdminError(AdminStatus.NOT_FOUND, f"there is no log {log}") from None
        whole = page()
        raw = whole[: size - size % record]
        self._write(address, raw)
        return lambda: (len(raw), len(whole))

    def _read(self, address: int, size: int) -> bytes:
        try:
            return bytes(self._engine.dma_read(address, size))
        except OSError as error:
            raise AdminError(AdminStatus.BAD_ADDRESS, str(error)) from None

    def _write(self, address: int, data: bytes) -> None:
        try:
            self._engine.dma_write(address, data)
        except OSError as error:
            raise AdminError(AdminStatus.BAD_ADDRESS, str(error)) from None


def _require(good: bool) -> None:
    if not good:
        raise AdminError(AdminStatus.INVALID_FIELD, "a parameter is out of range, or not used and not zero")


def _nothing() -> Results:
    return 0, 0


def _silent(call: Callable[[], object]) -> Act:
    def act() -> Results:
        call()
        return 0, 0

    return act


def _refuse(refusal: Exception) -> Act:
    def act() -> Results:
        raise refusal

    return act


def _message(text: str, size: int) -> bytes:
    """UTF-8 with a NUL, in at most `size` bytes, cut between characters."""
    raw = text.encode()[: min(size, 4096) - 1]
    return raw.decode(errors="ignore").encode() + b"\0"
