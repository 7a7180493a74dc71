"""The PCI function that a client sees: registers of its own before a part of the device."""

from __future__ import annotations

import errno
import struct
from typing import Final

import numpy as np

from maia_rt.contract.commands import ADMIN_COMMAND, ADMIN_COMPLETION, DOORBELL_STRIDE, AdminStatus, PostOp
from maia_rt.contract.function import DEVICE_ID, VENDOR_ID
from maia_rt.contract.registers import BAR0, BAR0_BYTES, Bar0, BootState
from maia_rt.firmware import Firmware
from maia_rt.share.admin import ShareAdmin
from maia_rt.share.tenant import Tenant
from maia_rt.transport import wire
from maia_rt.transport.protocol import Transport
from maia_rt.transport.uapi import PciRegion

CONFIG_BYTES: Final = 256
_LIVE: Final = range(Bar0.HEARTBEAT, Bar0.HEARTBEAT + 4), range(Bar0.CLOCK, Bar0.CLOCK + 8)
"""Registers that are read from the device itself."""
_ENABLE: Final = BAR0["CONTROL"].field("ENABLE").mask
_RESET: Final = BAR0["CONTROL"].field("RESET").mask
_STORED: Final = {Bar0.ADMIN_SQ: 8, Bar0.ADMIN_CQ: 8, Bar0.ADMIN_SIZE: 4, Bar0.SCRATCH: 4}
_HIDDEN: Final = ("BOUNDED_CONTEXTS", "HOST_DOORBELLS", "INJECTION")
"""Capabilities that are about the whole device."""
_U32: Final = 0xFFFFFFFF
_BAD_REGISTERS: Final = 1
_BAD_MEMORY: Final = 2


class ShareFunction:
    """Registers, configuration space and admin queue of one share. Its session's thread calls.

    Parameters
    ----------
    transport : Transport
        The device.
    firmware : Firmware
    tenant : Tenant

    Attributes
    ----------
    sizes : dict
        Region -> bytes, of those there are.
    """

    def __init__(self, transport: Transport, firmware: Firmware, tenant: Tenant) -> None:
        self._transport = transport
        self._firmware = firmware
        self._tenant = tenant
        self._admin = ShareAdmin(firmware, tenant)
        self._enabled = False
        part = tenant.partition
        self._window = part.queues * DOORBELL_STRIDE
        self._semaphores = part.queues + part.semaphores
        bar2 = 1 << (self._window + 4 * self._semaphores - 1).bit_length()
        self.sizes: dict[int, int] = {PciRegion.BAR0: BAR0_BYTES, PciRegion.BAR2: bar2, PciRegion.CONFIG: CONFIG_BYTES}
        self._registers = bytearray(BAR0_BYTES)
        for register in BAR0.values():
            if register.readable and not register.writable:
                self._store(register.name, firmware.register(register.name))
        for name, value in self._own().items():
            self._store(name, value)
        self._config = bytearray(CONFIG_BYTES)
        self._config[:4] = struct.pack("<HH", VENDOR_ID, DEVICE_ID)
        self._config[9:12] = b"\x00\x00\x12"
        self._status(BootState.RESET)

    def _own(self) -> dict[str, int]:
        """The registers in which a share is not like its device."""
        part, offered = self._tenant.partition, self._firmware.capabilities

        def changed(name: str, **fields: int) -> int:
            register = BAR0[name]
            value = self._load(register.offset, register.width_bytes)
            for field, to in fields.items():
                value = register.set(value, field, to)
            return value

        return {
            "CAPS": changed("CAPS", **dict.fromkeys(_HIDDEN, 0)),
            "QUEUE_CAPS": changed("QUEUE_CAPS", MAX_QUEUES=part.queues),
            "SEMAPHORE_CAPS": changed("SEMAPHORE_CAPS", COUNT=self._semaphores),
            "CONTEXT_CAPS": changed("CONTEXT_CAPS", MAX_CONTEXTS=1),
            "PROGRAM_CAPS": changed("PROGRAM_CAPS", MAX_KERNELS=part.kernels),
            "TOPOLOGY": changed("TOPOLOGY", CLUSTERS=part.clusters),
            "SEMAPHORE_WINDOW": self._window,
            "HBM_BASE": part.hbm_base, "HBM_SIZE": part.hbm_bytes,
            "CLUSTER_SRAM_BASE": offered.cluster_sram_base + (part.first_cluster << 32),
            "TILE_SRAM_BASE": offered.tile_sram_base + (part.first_cluster * offered.tiles_per_cluster << 32),
            "HOST_FIRST": part.host_first, "HOST_LAST": part.host_last,
        }

    # --- regions -----------------------------------------------------------------------------------------------------

    def read(self, region: int, offset: int, size: int) -> bytes:
        """Read a region within its bounds."""
        if region == PciRegion.CONFIG:
            return bytes(self._config[offset:offset + size])
        if region == PciRegion.BAR2:
            return self._read_bar2(offset, size)
        if any(offset in live for live in _LIVE) and size in (4, 8):
            return self._transport.read(PciRegion.BAR0, offset, size).to_bytes(size, "little")
        if offset == Bar0.ERRORS and size == 4:
            return self._tenant.errors.to_bytes(4, "little")
        return bytes(self._registers[offset:offset + size])

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write a region within its bounds. OSError EIO where the device did not do it."""
        if region == PciRegion.CONFIG:
            if offset == 4 and len(data) == 2:      # the command register: no more than memory space and bus mastering
                self._config[4:6] = struct.pack("<H", int.from_bytes(data, "little") & 0x406)
        elif region == PciRegion.BAR2:
            self._write_bar2(offset, data)
        else:
            self._write_register(offset, len(data), int.from_bytes(data, "little"))

    def _read_bar2(self, offset: int, size: int) -> bytes:
        index = (offset - self._window) // 4
        if offset < self._window:
            return bytes(self._tenant.doorbells.view()[offset:offset + size]).ljust(size, b"\0")
        if size != 4 or offset % 4 or index >= self._semaphores:
            return bytes(size)
        part = self._tenant.partition
        place = part.first_queue + index if index < part.queues else part.place_semaphore(index)
        return self._firmware.semaphore(place or 0).to_bytes(4, "little")

    def _write_bar2(self, offset: int, data: bytes) -> None:
        if offset + len(data) <= self._window:
            self._tenant.doorbells.view()[offset:offset + len(data)] = data
            self._wake()
        elif len(data) == 4 and offset % 4 == 0:
            self._post((offset - self._window) // 4, PostOp.SET, int.from_bytes(data, "little"))

    def _write_register(self, offset: int, size: int, value: int) -> None:
        if offset == Bar0.WAKE:
            self._wake()
        elif offset == Bar0.ADMIN_TAIL and size == 4:
            self._ring(value)
        elif offset == Bar0.ERRORS and size == 4:
            with self._tenant.lock:
                self._tenant.errors &= ~value
        elif offset == Bar0.SEMAPHORE_OP and size == 8:
            self._post(value & 0xFFFF, value >> 16 & 0xFF, value >> 32)
        elif offset == Bar0.CONTROL and size == 4:
            self._control(value)
        elif any(start <= offset and offset + size <= start + width for start, width in _STORED.items()):
            self._registers[offset:offset + size] = value.to_bytes(size, "little")

    def _wake(self) -> None:
        self._transport.write(PciRegion.BAR0, Bar0.WAKE, 4, 1, posted=True)

    def _post(self, index: int, op: int, value: int) -> None:
        place = self._tenant.partition.place_semaphore(index)
        if place is not None and self._enabled and op in (PostOp.SET, PostOp.ADD):
            self._firmware.post_semaphore(place, PostOp(op), value)

    # --- boot --------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """As after power-on: nothing is left of what the client made."""
        self._enabled = False
        self._tenant.end()
        for offset, width in _STORED.items():
            self._registers[offset:offset + width] = bytes(width)
        self._store_word(Bar0.CONTROL, 0)
        self._store_word(Bar0.ADMIN_TAIL, 0)
        self._store_word(Bar0.ADMIN_HEAD, 0)
        self._tenant.errors = 0
        self._status(BootState.RESET)

    def _control(self, value: int) -> None:
        if value & _RESET:
            self.reset()
        elif value & _ENABLE and not self._enabled:
            self._enabled = True
            self._store_word(Bar0.CONTROL, _ENABLE)
            self._boot()
        elif not value & _ENABLE and self._enabled:
            self._enabled = False
            self._tenant.end()
            self._store_word(Bar0.CONTROL, 0)
            self._status(BootState.RESET)

    def _boot(self) -> None:
        log2, sq, cq = (self._load(at, 8) for at in (Bar0.ADMIN_SIZE, Bar0.ADMIN_SQ, Bar0.ADMIN_CQ))
        log2 &= _U32
        if not 1 <= log2 <= 12 or sq % 64 or cq % 64:
            self._status(BootState.FAILED, _BAD_REGISTERS)
            return
        self._entries, self._sq, self._cq = 1 << log2, sq, cq
        try:
            self._tenant.maps.read(sq, self._entries * ADMIN_COMMAND.itemsize)
            self._tenant.maps.write(cq, bytes(self._entries * ADMIN_COMPLETION.itemsize))
        except OSError:
            self._status(BootState.FAILED, _BAD_MEMORY)
            return
        self._store_word(Bar0.ADMIN_TAIL, 0)
        self._store_word(Bar0.ADMIN_HEAD, 0)
        self._tenant.begin()
        self._status(BootState.READY)

    def _status(self, state: BootState, error: int = 0) -> None:
        status = BAR0["STATUS"]
        self._store_word(Bar0.STATUS, status.set(status.set(0, "BOOT", state), "ERROR", error))

    # --- admin queue -------------------------------------------------------------------------------------------------

    def _ring(self, tail: int) -> None:
        """Run the commands up to `tail`. They are done when the write of the doorbell is answered."""
        head = self._load(Bar0.ADMIN_HEAD, 4)
        if BAR0["STATUS"].get(self._load(Bar0.STATUS, 4), "BOOT") != BootState.READY:
            return
        self._store_word(Bar0.ADMIN_TAIL, tail)
        if (tail - head) & _U32 > self._entries:
            self._die(_BAD_REGISTERS)
            return
        while head != tail:
            slot = head % self._entries
            head = (head + 1) & _U32
            try:
                raw = self._tenant.maps.read(self._sq + slot * ADMIN_COMMAND.itemsize, ADMIN_COMMAND.itemsize)
                command = np.frombuffer(raw, ADMIN_COMMAND)[0]
                record = np.zeros((), ADMIN_COMPLETION)
                status, *results = self._admin.run(command)
                record["id"], record["status"], record["sequence"] = command["id"], status, head
                record["result"] = results if status == AdminStatus.OK else 0
                at, whole = self._cq + slot * ADMIN_COMPLETION.itemsize, record.tobytes()
                self._tenant.maps.write(at, whole[:24])
                self._tenant.maps.write(at + 24, whole[24:])
            except OSError:
                self._die(_BAD_MEMORY)
                return
            self._store_word(Bar0.ADMIN_HEAD, head)
            self._tenant.fire()

    def _die(self, reason: int) -> None:
        with self._tenant.lock:
            self._tenant.errors |= BAR0["ERRORS"].field("ADMIN").mask
        self._status(BootState.FAILED, reason)
        self._tenant.fire()

    # --- registers ---------------------------------------------------------------------------------------------------

    def _load(self, offset: int, size: int) -> int:
        return int.from_bytes(self._registers[offset:offset + size], "little")

    def _store(self, name: str, value: int) -> None:
        register = BAR0[name]
        self._registers[register.offset:register.offset + register.width_bytes] = \
            value.to_bytes(register.width_bytes, "little")

    def _store_word(self, offset: int, value: int) -> None:
        self._registers[offset:offset + 4] = value.to_bytes(4, "little")


def flags_of(function: ShareFunction, region: int) -> int:
    """A region's REGION_FLAG_*; 0 where there is none."""
    if region not in function.sizes:
        return 0
    mappable = wire.REGION_FLAG_MMAP if region == PciRegion.BAR2 else 0
    return wire.REGION_FLAG_READ | wire.REGION_FLAG_WRITE | mappable


def check_bounds(function: ShareFunction, region: int, offset: int, size: int) -> None:
    """Raise OSError EINVAL unless these bytes of a region exist."""
    if region not in function.sizes or offset + size > function.sizes[region]:
        raise OSError(errno.EINVAL, "no such bytes")
