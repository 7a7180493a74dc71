"""The admin commands of a client: each is checked, put into the device's numbers, and done in the client's context."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from maia_rt.contract.commands import (
    ANY_QUEUE,
    COMMAND_BYTES,
    COUNTERS,
    CREATE_QUEUE,
    FAULT,
    IDENTIFY,
    NO_VECTOR,
    PROGRESS_BYTES,
    QUEUE_LOG,
    REPORT_BYTES,
    SEMAPHORE_LOG,
    AdminOpcode,
    AdminStatus,
    Log,
)
from maia_rt.firmware import Firmware
from maia_rt.share.tenant import Tenant, as_rows

Result = tuple[int, int, int]
"""Status and two results."""
_NO_UNIT: Final = 0xFFFFFFFF
_TOP_LOG2: Final = 16


class ShareAdmin:
    """Runs admin commands for one client. What is about the whole device is no command of a share's (INVALID_OPCODE).

    Addresses are host memory of the client's, which it has mapped for reading and writing; a share's admin commands
    reach no other.

    Parameters
    ----------
    firmware : Firmware
    tenant : Tenant
    """

    def __init__(self, firmware: Firmware, tenant: Tenant) -> None:
        self._firmware = firmware
        self._tenant = tenant
        self._commands: dict[int, tuple[Callable[..., Result], int]] = {
            AdminOpcode.IDENTIFY: (self._identify, 1), AdminOpcode.DELETE_QUEUE: (self._delete_queue, 1),
            AdminOpcode.RESET_QUEUE: (self._reset_queue, 2), AdminOpcode.ABORT: (self._abort, 2),
            AdminOpcode.LOAD_PROGRAM: (self._load_program, 4), AdminOpcode.UNLOAD_PROGRAM: (self._unload_program, 1),
            AdminOpcode.GET_FEATURE: (self._get_feature, 1), AdminOpcode.GET_LOG: (self._get_log, 3),
        }

    def run(self, command: np.void) -> Result:
        """Run one ADMIN_COMMAND."""
        opcode, p = int(command["opcode"]), [int(word) for word in command["p"]]
        if opcode != AdminOpcode.CREATE_QUEUE and opcode not in self._commands:
            return AdminStatus.INVALID_OPCODE, 0, 0
        if command["flags"]:
            return AdminStatus.INVALID_FIELD, 0, 0
        with self._tenant.lock:
            try:
                if opcode == AdminOpcode.CREATE_QUEUE:
                    return self._create_queue(np.frombuffer(command["p"].tobytes(), CREATE_QUEUE)[0])
                method, count = self._commands[opcode]
                if any(p[count:]):
                    return AdminStatus.INVALID_FIELD, 0, 0
                return method(*p[:count])
            except OSError:
                return AdminStatus.BAD_ADDRESS, 0, 0

    # --- queues ------------------------------------------------------------------------------------------------------

    def _create_queue(self, given: np.void) -> Result:
        tenant, part = self._tenant, self._tenant.partition
        wanted, vector = int(given["queue"]), int(given["vector"])
        if given["context"]:
            return AdminStatus.NOT_FOUND, 0, 0
        if (given["doorbell"] or (wanted != ANY_QUEUE and wanted >= part.queues)
                or (vector != NO_VECTOR and not 1 <= vector <= part.queues)
                or max(given["entries_log2"], given["reports_log2"]) > _TOP_LOG2):
            return AdminStatus.INVALID_FIELD, 0, 0
        sizes = {"ring": COMMAND_BYTES << int(given["entries_log2"]), "progress": PROGRESS_BYTES,
                 "reports": REPORT_BYTES << int(given["reports_log2"])}
        if not all(tenant.maps.holds(int(given[name]), size) for name, size in sizes.items()):
            return AdminStatus.BAD_ADDRESS, 0, 0
        if wanted == ANY_QUEUE:
            free = [number for number in range(part.queues) if number not in tenant.queues]
            if not free:
                return AdminStatus.NO_RESOURCE, 0, 0
            wanted = free[0]
        row = np.array(given, CREATE_QUEUE)
        row["queue"], row["context"] = part.first_queue + wanted, tenant.context
        row["doorbell"] = tenant.doorbell(wanted)
        if vector != NO_VECTOR:
            row["vector"] = part.first_queue + vector
        status, _, _ = self._firmware.run(AdminOpcode.CREATE_QUEUE, params=row)
        if status == AdminStatus.OK:
            tenant.queues[wanted] = int(given["progress"])
            tenant.forget_stop(wanted)
        return status, wanted if status == AdminStatus.OK else 0, 0

    def _delete_queue(self, queue: int) -> Result:
        result = self._pass_on(AdminOpcode.DELETE_QUEUE, queue)
        if result[0] == AdminStatus.OK:
            del self._tenant.queues[queue]
        return result

    def _reset_queue(self, queue: int, initial: int) -> Result:
        result = self._pass_on(AdminOpcode.RESET_QUEUE, queue, initial)
        self._tenant.forget_stop(queue)
        return result

    def _abort(self, queue: int, sequence: int) -> Result:
        return self._pass_on(AdminOpcode.ABORT, queue, sequence)

    def _pass_on(self, opcode: AdminOpcode, queue: int, *more: int) -> Result:
        if queue not in self._tenant.queues:
            return AdminStatus.NOT_FOUND, 0, 0
        return self._firmware.run(opcode, self._tenant.partition.first_queue + queue, *more)

    # --- programs ----------------------------------------------------------------------------------------------------

    def _load_program(self, address: int, size: int, message: int, message_size: int) -> Result:
        tenant = self._tenant
        if not size or not tenant.maps.holds(address, size):
            return AdminStatus.BAD_ADDRESS, 0, 0
        if message and not tenant.maps.holds(message, min(message_size, 4096)):
            return AdminStatus.BAD_ADDRESS, 0, 0
        status, first, count = self._firmware.run(AdminOpcode.LOAD_PROGRAM, address, size, message,
                                                  min(message_size, 4096), tenant.context)
        if status == AdminStatus.OK:
            if sum(tenant.programs.values()) + count > tenant.partition.kernels:
                self._firmware.unload_program(first)
                return AdminStatus.NO_RESOURCE, 0, 0
            tenant.programs[first] = count
        return status, first, count

    def _unload_program(self, first: int) -> Result:
        if first not in self._tenant.programs:
            return AdminStatus.NOT_FOUND, 0, 0
        result = self._firmware.run(AdminOpcode.UNLOAD_PROGRAM, first)
        if result[0] == AdminStatus.OK:
            del self._tenant.programs[first]
        return result

    # --- what there is to know ---------------------------------------------------------------------------------------

    def _identify(self, address: int) -> Result:
        self._tenant.maps.write(address, self._firmware.page(AdminOpcode.IDENTIFY, IDENTIFY.itemsize))
        return AdminStatus.OK, 0, 0

    def _get_feature(self, feature: int) -> Result:
        return self._firmware.run(AdminOpcode.GET_FEATURE, feature)

    def _get_log(self, log: int, address: int, size: int) -> Result:
        rows = {Log.COUNTERS: (self._counters, 1), Log.FAULTS: (self._faults, FAULT.itemsize),
                Log.QUEUES: (self._queue_log, QUEUE_LOG.itemsize),
                Log.SEMAPHORES: (self._semaphore_log, SEMAPHORE_LOG.itemsize)}
        if log not in set(Log):
            return AdminStatus.NOT_FOUND, 0, 0
        read, record = rows[Log(log)]
        whole = read()
        data = whole[:min(size, len(whole)) // record * record]
        self._tenant.maps.write(address, data)
        return AdminStatus.OK, len(data), len(whole)

    def _counters(self) -> bytes:
        return self._firmware.page(AdminOpcode.GET_LOG, COUNTERS.itemsize)

    def _faults(self) -> bytes:
        tenant = self._tenant
        tenant.note(self._firmware.faults())
        tiles = tenant.partition.first_cluster * self._firmware.capabilities.tiles_per_cluster
        found = []
        for kept in tenant.faults:
            row = copy.copy(kept)
            row["queue"] -= tenant.partition.first_queue
            if row["unit"] != _NO_UNIT:
                row["unit"] -= tiles
            found.append(row)
        return as_rows(found, FAULT)

    def _queue_log(self) -> bytes:
        found: list[Any] = []
        for row in self._firmware.queue_log().copy():
            number = int(row["queue"]) - self._tenant.partition.first_queue
            if number not in self._tenant.queues:
                continue
            row["queue"] = number
            own = self._tenant.partition.number_of(int(row["semaphore"]))
            if own is not None:
                row["semaphore"] = own
            found.append(row)
        return as_rows(found, QUEUE_LOG)

    def _semaphore_log(self) -> bytes:
        found: list[Any] = []
        part = self._tenant.partition
        for row in self._firmware.semaphore_log().copy():
            own = part.number_of(int(row["index"]))
            if own is None:
                continue
            row["index"] = own
            if 0 <= int(row["queue"]) - part.first_queue < part.queues:
                row["queue"] -= part.first_queue
            found.append(row)
        return as_rows(found, SEMAPHORE_LOG)
