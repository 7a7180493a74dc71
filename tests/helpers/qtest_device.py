"""Our device in a QEMU without a guest: its BARs in place, and a driver for its admin queue."""

import struct

from helpers.admin_queue import MEMORY, Driver
from helpers.emulator import eventually
from helpers.qtest import MMIO, PciFunction
from helpers.raw_client import CONFIG

COMMAND = 0x04
MEMORY_SPACE, BUS_MASTER = 2, 4
PLACES = {0: MMIO, 2: MMIO + 0x10_0000, 4: 0x80_0000_0000}
MSIX_TABLE, MSIX_PBA = 0x8000, 0xC000


class Device(PciFunction):
    """Registers as `RawClient` offers them, but through the machine's memory: `region` is the index of a BAR."""

    def __init__(self, machine, devfn=0x10, bus=0):
        super().__init__(machine, devfn, bus)
        self.msix = self.capability(0x11)
        self.express = self.capability(0x10)

    def enable(self, command=MEMORY_SPACE | BUS_MASTER):
        """Place the BARs and write the command register; returns itself."""
        for bar, address in PLACES.items():
            self.place(bar, address)
        self.write(COMMAND, 2, command)
        return self

    def write(self, offset, size, value):
        """Write configuration space; as `RawClient.write` where `value` is bytes."""
        if isinstance(value, bytes):
            region, offset, size = offset, size, len(value)
            assert region == CONFIG
            value = int.from_bytes(value, "little")
        super().write(offset, size, value)

    def read32(self, offset, region=0):
        return self.machine.load(PLACES[region] + offset, 4)

    def read64(self, offset, region=0):
        return self.machine.load(PLACES[region] + offset, 8)

    def write32(self, offset, value, region=0):
        self.machine.store(PLACES[region] + offset, 4, value)

    def write64(self, offset, value, region=0):
        self.machine.store(PLACES[region] + offset, 8, value)

    def alive(self):
        return self.read32(0) == 0x4149414D

    # MSI-X (PCIe 6.0, 7.7.2): the machine delivers a message as a write of `data` to `address`, which may be memory.

    def set_msix(self, *, enabled=True, masked=False):
        control = self.read(self.msix + 2, 2) & 0x3FFF
        self.write(self.msix + 2, 2, control | enabled << 15 | masked << 14)

    def set_vector(self, vector, address, data, *, masked=False):
        at = MSIX_TABLE + 16 * vector
        self.write32(at + 12, 1)
        self.write32(at, address & 0xFFFFFFFF)
        self.write32(at + 4, address >> 32)
        self.write32(at + 8, data)
        self.write32(at + 12, int(masked))

    def mask_vector(self, vector, masked):
        self.write32(MSIX_TABLE + 16 * vector + 12, int(masked))

    def pending(self):
        return self.read64(MSIX_PBA)

    def reset(self):
        """Start a function level reset as software does: all other bits as they were."""
        at = self.express + 8
        self.write(at, 2, self.read(at, 2) | 1 << 15)


class RootPort(PciFunction):
    """A PCI Express root port of bus 0 with a bus behind it, and windows for the places of our BARs."""

    # Hot plug by the slot itself, as PCI Express has it, and not by ACPI.
    NATIVE = ("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
    OPTION = ("-device", "pcie-root-port,id=rp0,chassis=1,addr=3")

    def __init__(self, machine, devfn=0x18, bus=1):
        super().__init__(machine, devfn)
        self.bus = bus
        self.slot_control = self.capability(0x10) + 0x18
        self.open()

    def open(self):
        """Do what firmware does after each reset."""
        self.write(0x18, 4, self.bus << 16 | self.bus << 8)
        self.write(0x20, 4, (MMIO >> 16) | (MMIO + 0xFF_0000) & 0xFFFF0000)  # base and limit, by 1 MiB
        place, limit = PLACES[4], PLACES[4] + (1 << 38) - 1
        self.write(0x24, 4, place >> 16 & 0xFFF0 | limit & 0xFFF00000)
        self.write(0x28, 4, place >> 32)
        self.write(0x2C, 4, limit >> 32)
        self.write(COMMAND, 2, MEMORY_SPACE | BUS_MASTER)

    # Slot Control (PCIe 6.0, 7.5.3.10): bit 10 is power off, bits 9:8 the power indicator: 1 on, 3 off.

    def take(self):
        """Power the slot on, as software does that finds a new device in it."""
        self._power(1 << 8)

    def let_go(self):
        """Power the slot off, as software does that was asked for the device."""
        self._power(1 << 10 | 3 << 8)

    def _power(self, bits):
        self.write(self.slot_control, 2, self.read(self.slot_control, 2) & ~0x700 | bits)


class QtestDriver(Driver):
    """`Driver` whose device is behind QEMU; its memory is the machine's, where the device sees it at `base`.

    Parameters
    ----------
    device : Device
    base : int
        The IOVA of the memory.
    memory : int, optional
        The address of the memory in the machine, where a virtual IOMMU makes it another than `base`.
    """

    def __init__(self, device, *, base=0x100000, memory=None, log2=4):
        self.base, self.entries, self.log2 = base, 1 << log2, log2
        self._to_memory = 0 if memory is None else memory - base
        self.sq, self.cq, self.spare = base, base + 0x8000, base + 0x10000
        self.client = device
        self.machine = device.machine
        self.machine("memset", base + self._to_memory, MEMORY, 0)
        self.tail = 0

    def __exit__(self, *_):
        pass

    def put(self, address, data):
        self.machine.write(address + self._to_memory, data)

    def get(self, address, size):
        return self.machine.read(address + self._to_memory, size)

    # One queue, its ring, progress block and reports where `create_queue` puts them.

    def open_queue(self, **options):
        """Create queue 0; its commands go to `submit`."""
        status, number, _ = self.create_queue(queue=0, **options)
        assert (status, number) == (0, 0)
        self.commands = 0
        return self

    def submit(self, opcode, payload=b"", *, flags=0, units=0, pre=bytes(16), post=bytes(16), arm=False):
        """Write a command, ring its doorbell, and wake the device; returns its sequence number."""
        slot = self.commands % 16
        self.commands += 1
        head = struct.pack("<BBHI", opcode, flags, self.commands & 0xFFFF, units)
        self.put(self.spare + slot * 64, (head + pre + post + payload).ljust(64, b"\0"))
        if arm:
            self.client.write64(0x10, self.commands, region=2)
        self.client.write32(0, self.commands, region=2)
        self.client.write32(0xC8, 1)
        return self.commands

    def progress(self):
        """(progress, state, fault, fault_sequence) of queue 0."""
        return struct.unpack("<QIIQ", self.get(self.spare + 0x8000, 24))

    def copy(self, src, dst, size):
        """Copy after all earlier commands; returns the sequence number."""
        return self.submit(2, struct.pack("<QQQ", src, dst, size), flags=1)

    def done(self, sequence, seconds=10):
        """Wait until a command has retired."""
        assert eventually(lambda: self.progress()[0] >= sequence, seconds), f"the queue says {self.progress()}"

    def failed(self, sequence, seconds=10):
        """Wait until a command has stopped the queue; returns its fault code."""
        assert eventually(lambda: self.progress()[1], seconds), f"the queue says {self.progress()}"
        done, state, fault, number = self.progress()
        assert (done, state, number) == (sequence - 1, 1, sequence)
        return fault
