"""The PCI function: everything that a client of the device can reach, and its reset."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
from collections.abc import Callable, Sequence

from maia_emulator.admin import AdminCommands
from maia_emulator.config_space import BAR_PREFETCHABLE, ConfigSpace
from maia_emulator.engine import Engine
from maia_emulator.firmware import Firmware
from maia_emulator.injections import DIED, FELL_SILENT, HUNG_UP, WENT
from maia_emulator.irqs import IrqIndex, LineIrq, MsixIrq
from maia_emulator.message_dma import MessageDma
from maia_emulator.processor import Processor
from maia_emulator.profiles import Profile
from maia_emulator.regions import ConfigRegion, DoorbellBar, HbmBar, Region, RegisterBar, Removed
from maia_emulator.register_file import RegisterFile
from maia_rt.contract.commands import CONTRACT_MAJOR, CONTRACT_MINOR
from maia_rt.contract.function import DEVICE_ID, VENDOR_ID
from maia_rt.contract.injection import Injection
from maia_rt.contract.registers import BAR0, BAR0_BYTES, MSIX_PBA_OFFSET, MSIX_TABLE_OFFSET, SemaphoreWrite
from maia_rt.transport import wire


class Function:
    """A device of one profile: configuration space, regions, interrupts, firmware and engine.

    Bus Master Enable gates all access to host memory. It does not gate interrupts, because they leave as eventfds and
    VFIO's loopback triggers work without it; a device that reaches no host memory has nothing to tell by them but
    ERRORS.

    Parameters
    ----------
    profile : Profile
    seed, number : int
        They determine the serial number; the seed also whatever the engine draws by chance.
    workers : int
        Threads of the engine that play tiles; 0 is one a core.
    spin_us : int
        How long an idle engine watches doorbells before it sleeps, in microseconds.
    injections : sequence of Injection
        Armed from the start, and again after each reset.
    processor : Processor, optional
        The threads that look after queues, for several devices to share.

    Attributes
    ----------
    hang_up : callable
        Ends the connection of the present client.
    """

    def __init__(
        self, profile: Profile, *, seed: int = 0, number: int = 0, workers: int = 0, spin_us: int = 100,
        vendor_id: int = VENDOR_ID, device_id: int = DEVICE_ID, injections: Sequence[Injection] = (),
        processor: Processor | None = None,
    ) -> None:
        serial = serial_number(seed, number)
        self.engine = Engine(
            clusters=profile.clusters, tiles_per_cluster=profile.tiles_per_cluster,
            tile_sram_bytes=profile.tile_sram_bytes, cluster_sram_bytes=profile.cluster_sram_bytes,
            hbm_bytes=profile.hbm_bytes, max_queues=profile.max_queues, semaphores=profile.semaphores,
            vectors=profile.vectors, workers=workers, spin_us=spin_us, seed=seed,
            processor=processor,
        )
        for fd in (self.engine.bar2_fd, self.engine.hbm_fd):
            # A client gets these descriptors: it may not cut off what our engines touch.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.message_dma = MessageDma()
        self.engine.set_message_dma(self.message_dma.read, self.message_dma.write)
        self.registers = RegisterFile(_constants(profile, self.engine, serial))
        self.config = ConfigSpace(
            vendor_id=vendor_id, device_id=device_id, serial=serial, link_speed=profile.link_speed,
            bars={0: (BAR0_BYTES, 0), 2: (self.engine.bar2_bytes, 0), 4: (profile.hbm_bar_bytes, BAR_PREFETCHABLE)},
            vectors=profile.vectors, msix_bar=0, msix_table=MSIX_TABLE_OFFSET, msix_pba=MSIX_PBA_OFFSET,
            bus_master=self._set_bus_master, flr=self.reset,
        )
        self._register_bar = RegisterBar(self.registers, profile.vectors, self.engine.pending)
        self._doorbell_bar = DoorbellBar(self.engine.bar2_fd, self.engine.bar2_bytes, self.engine.wake)
        self.regions: list[Region] = [Region() for _ in range(wire.PCI_NUM_REGIONS)]
        self.regions[wire.PciRegion.BAR0] = self._register_bar
        self.regions[wire.PciRegion.BAR2] = self._doorbell_bar
        self.regions[wire.PciRegion.BAR4] = HbmBar(self.engine.hbm_fd, profile.hbm_bar_bytes, profile.hbm_bytes)
        self.regions[wire.PciRegion.CONFIG] = ConfigRegion(self.config)
        line = wire.IRQ_FLAG_EVENTFD
        self.irqs: list[IrqIndex] = [
            LineIrq(line | wire.IRQ_FLAG_MASKABLE | wire.IRQ_FLAG_AUTOMASKED),
            LineIrq(line, count=0),
            MsixIrq(self.engine, profile.vectors),
            LineIrq(line),
            LineIrq(line),
        ]
        self.firmware = Firmware(self.engine, self.registers, AdminCommands(self.engine, profile, serial))
        self._wire_registers()
        self.hang_up: Callable[[], None] = lambda: None
        self._present = list(self.regions)
        self.engine.on_trip(self._tripped)
        self.engine.inject_always([injection.pack() for injection in injections])
        self.engine.set_bus_master(False)
        self.engine.start()

    def reset(self) -> None:
        """Function level reset, DEVICE_RESET: everything but the client's DMA mappings and eventfds starts anew.

        Needs nothing of the client: message DMA under way is ended, so a client that waits for us is no deadlock.
        """
        if self.engine.gone:
            raise OSError(errno.ENODEV, "the device has been removed")
        self.reset_device()
        self.config.reset()

    def reset_device(self) -> None:
        """Reset all but configuration space (CONTROL.RESET)."""
        with self.message_dma.barred():
            self.firmware.halt()
            self.engine.reset()
        self.registers.reset()
        self._register_bar.reset()

    def release_client(self) -> None:
        """Drop everything that belonged to a client that is gone; the next one finds a fresh device."""
        self.message_dma.detach()
        # One that was removed is there again for the next client.
        self.reset_device()
        self.config.reset()
        self.regions[:] = self._present
        self.registers.memory.hidden = False
        self.engine.dma_unmap_all()
        for index in self.irqs:
            for vector in range(index.count):
                index.assign(vector, -1)
                index.mask(vector, False)
        # What was pending without an eventfd is not the next client's.
        self.reset()

    def close(self) -> None:
        """Stop every thread and give back every descriptor."""
        self.message_dma.detach()
        self.firmware.stop()
        self.engine.stop()
        self._doorbell_bar.close()

    def _tripped(self, what: int) -> None:
        """Do what an injection of FIRMWARE or GONE leaves to us. Called by the command processor's thread."""
        if what & WENT and not self.engine.gone:
            return  # its client was quicker to leave
        if what & (WENT | FELL_SILENT | DIED):
            self.firmware.fail(silent=not what & DIED or bool(what & WENT))
        if what & WENT:
            self.regions[:] = [Removed(region) for region in self._present]
            self.registers.memory.hidden = True
        if what & HUNG_UP:
            self.hang_up()

    def _set_bus_master(self, enabled: bool) -> None:
        with self.message_dma.barred() if not enabled else contextlib.nullcontext():
            self.engine.set_bus_master(enabled)

    def _wire_registers(self) -> None:
        registers, engine = self.registers, self.engine
        registers.on_read("CLOCK", engine.clock_ns)
        registers.on_read("ERRORS", engine.errors)
        registers.on_write("ERRORS", lambda written, _: engine.clear_errors(written))
        registers.on_write("CONTROL", self._control)
        registers.on_write("ADMIN_TAIL", lambda written, _: self.firmware.ring_doorbell(written))
        registers.on_write("SEMAPHORE_OP", self._semaphore_op)
        registers.on_write("WAKE", lambda _written, _before: engine.wake())
        registers.memory.set_wake(BAR0["WAKE"].offset, engine.front)

    def _control(self, written: int, before: int) -> None:
        control = BAR0["CONTROL"]
        if control.get(written, "RESET"):
            self.reset_device()
            return
        enabled, was_enabled = control.get(written, "ENABLE"), control.get(before, "ENABLE")
        if enabled and not was_enabled:
            self.firmware.boot()
        elif was_enabled and not enabled:
            with self.message_dma.barred():
                self.firmware.halt()

    def _semaphore_op(self, written: int, _: int) -> None:
        register = BAR0["SEMAPHORE_OP"]
        op = register.get(written, "OP")
        if op in (SemaphoreWrite.SET, SemaphoreWrite.ADD):
            self.engine.semaphore_op(register.get(written, "INDEX"), op, register.get(written, "VALUE"))


def serial_number(seed: int, number: int) -> int:
    """The 64-bit serial number of the device `number` of a seed: repeatable, and never 0."""
    digest = hashlib.blake2b(f"maia {seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") | 1


def _constants(profile: Profile, engine: Engine, serial: int) -> dict[str, int]:
    """The registers whose values are "by profile"."""

    def pack(name: str, **fields: int) -> int:
        value = BAR0[name].reset
        for field, to in fields.items():
            value = BAR0[name].set(value, field, to)
        return value

    return {
        "VERSION": pack("VERSION", MAJOR=CONTRACT_MAJOR, MINOR=CONTRACT_MINOR),
        "DEVICE": pack("DEVICE", PROFILE=profile.id, EMULATED=1),
        "SERIAL": serial,
        "CAPS": pack("CAPS", NEEDS_WAKE=1, INDIRECT=1, SIGNAL_REMOTE=1, CRC=1, FP32=1, FP16=1, BF16=1,
                     WAIT_VALUE=1, BRANCH=1, LIST_OPTIONS=1, CRC_COMPARE=1, FP8=1, MX=1, INT8=1, INJECTION=1,
                     BOUNDED_CONTEXTS=1, HOST_DOORBELLS=1),
        "QUEUE_CAPS": pack("QUEUE_CAPS", MAX_QUEUES=profile.max_queues, MAX_ENTRIES_LOG2=profile.max_entries_log2,
                           MIN_ENTRIES_LOG2=profile.min_entries_log2),
        "SCHEDULING_CAPS": pack("SCHEDULING_CAPS", PRIORITIES=profile.priorities),
        "SEMAPHORE_CAPS": pack("SEMAPHORE_CAPS", COUNT=profile.semaphores, PRE_OPS=2, POST_OPS=2),
        "CONTEXT_CAPS": pack("CONTEXT_CAPS", MAX_CONTEXTS=profile.max_contexts, RANGES=profile.ranges_per_context),
        "PROGRAM_CAPS": pack("PROGRAM_CAPS", MAX_KERNELS=profile.max_kernels, MAX_ARGS=profile.max_args,
                             TILE_SEMAPHORES=profile.tile_semaphores),
        "TOPOLOGY": pack("TOPOLOGY", CLUSTERS=profile.clusters, TILES_PER_CLUSTER=profile.tiles_per_cluster),
        "SEMAPHORE_WINDOW": engine.semaphore_window_offset,
        "HBM_SIZE": profile.hbm_bytes,
        "CLUSTER_SRAM_SIZE": profile.cluster_sram_bytes,
        "TILE_SRAM_SIZE": profile.tile_sram_bytes,
    }
