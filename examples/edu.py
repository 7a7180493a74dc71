"""A whole driver for a PCI device that is not ours: QEMU's "edu", a factorial unit with DMA and interrupts.

    maia bind 0000:00:03.0                                # once: take the function from the kernel's drivers
    python examples/edu.py 0000:00:03.0
    python examples/edu.py 0000:00:03.0 --prove-iommu     # and show that stray DMA reaches nothing

It uses maia_rt as a library for any PCI device (docs/any-pci-device.md); what it knows of this one is from QEMU's
docs/specs/edu.rst. The device itself: qemu-system-x86_64 -device edu.
"""

import argparse
import os
import sys

from maia_rt.errors import DeviceNotFound, MaiaError
from maia_rt.memory import PinnedPool
from maia_rt.transport import Bar, ConfigSpace, Interrupts, PciIrq, open_device

VENDOR, DEVICE = 0x1234, 0x11E8

# Registers of BAR 0, by offset. Those below 0x80 take 4-byte accesses only, the others 4 or 8.
IDENTIFICATION = 0x00  # read-only: 0xRRrr00ed, revision RR.rr
LIVENESS = 0x04  # reads as the inverse of what was written
FACTORIAL = 0x08  # write n, read n! modulo 2^32
STATUS = 0x20
STATUS_COMPUTING = 0x01
STATUS_INTERRUPT = 0x80  # an interrupt when the factorial is there
INTERRUPT_STATUS = 0x24  # read-only: why it interrupts
INTERRUPT_ACKNOWLEDGE = 0x64
BECAUSE_FACTORIAL, BECAUSE_DMA = 0x001, 0x100
DMA_SOURCE, DMA_DESTINATION, DMA_COUNT, DMA_COMMAND = 0x80, 0x88, 0x90, 0x98
DMA_START, DMA_TO_MEMORY, DMA_INTERRUPT = 0x1, 0x2, 0x4

BUFFER, BUFFER_SIZE = 0x40000, 4096  # the device's own memory, in its address space
ADDRESS_BITS = 28  # what its DMA engine drives: buffers must lie below 256 MiB of I/O addresses


class Edu:
    """The device's verbs."""

    def __init__(self, registers, interrupts):
        self.registers = registers
        self.interrupts = interrupts
        self.interrupt_count = 0

    def is_alive(self):
        self.registers.write32(LIVENESS, 0x12345678)
        return self.registers.read32(LIVENESS) == 0x12345678 ^ 0xFFFFFFFF

    def factorial_polled(self, number):
        self.registers.write32(STATUS, 0)
        self.registers.write32(FACTORIAL, number)
        self.registers.poll32(STATUS, mask=STATUS_COMPUTING, value=0, timeout=2.0, what="STATUS.COMPUTING")
        return self.registers.read32(FACTORIAL)

    def factorial(self, number):
        self.registers.write32(STATUS, STATUS_INTERRUPT)
        self.registers.write32(FACTORIAL, number)
        self.await_interrupt(BECAUSE_FACTORIAL)
        return self.registers.read32(FACTORIAL)

    def read_memory(self, iova):
        """Fill the device's buffer from memory."""
        self.copy(iova, BUFFER, DMA_START | DMA_INTERRUPT)

    def write_memory(self, iova):
        """Write the device's buffer to memory."""
        self.copy(BUFFER, iova, DMA_START | DMA_INTERRUPT | DMA_TO_MEMORY)

    def copy(self, source, destination, command):
        self.registers.write64(DMA_SOURCE, source)
        self.registers.write64(DMA_DESTINATION, destination)
        self.registers.write64(DMA_COUNT, BUFFER_SIZE)
        self.registers.write64(DMA_COMMAND, command)
        self.await_interrupt(BECAUSE_DMA)

    def await_interrupt(self, reason):
        """Sleep until the device interrupts for `reason`, and tell it that this was seen."""
        seen = 0
        while not seen & reason:
            self.interrupt_count += self.interrupts.wait(timeout=5.0)
            seen = self.registers.read32(INTERRUPT_STATUS)
            self.registers.write32(INTERRUPT_ACKNOWLEDGE, seen)
            self.interrupts.rearm()  # matters for INTx alone


def prove_iommu(edu, memory):
    """Let the device write to, then read from, memory that has been taken back from it; return what happened."""
    with memory.allocate(BUFFER_SIZE, 4096) as source:
        source.view()[:] = b"\xaa" * BUFFER_SIZE
        edu.read_memory(source.iova)
    block = memory.allocate(BUFFER_SIZE, 4096)
    iova, view = block.iova, block.view()
    edu.write_memory(iova)
    mapped = view == b"\xaa" * BUFFER_SIZE
    block.free()
    memory.trim()  # unmaps what is wholly free; our view keeps the memory itself
    view[:] = b"\x55" * BUFFER_SIZE
    edu.write_memory(iova)
    write_blocked = view == b"\x55" * BUFFER_SIZE
    edu.read_memory(iova)
    with memory.allocate(BUFFER_SIZE, 4096) as result:
        edu.write_memory(result.iova)
        read_blocked = b"\x55" not in bytes(result.view())
    return mapped, write_blocked, read_blocked


def main():
    parser = argparse.ArgumentParser(description="Drive QEMU's edu device.")
    parser.add_argument("device", help="a PCI address, bound to vfio-pci, or a vfio-user socket")
    parser.add_argument("--interface", choices=["group", "cdev"], help="of the kernel's VFIO; by default what there is")
    parser.add_argument("--intx", action="store_true", help="use the interrupt pin instead of MSI")
    parser.add_argument("--prove-iommu", action="store_true", help="show that DMA to unmapped addresses is blocked")
    args = parser.parse_args()
    # What is opened last is closed first: memory is unmapped, interrupts go off, the device is given back.
    with open_device(args.device, interface=args.interface) as device:
        space = ConfigSpace(device)
        header = space.header
        if (header.vendor, header.device) != (VENDOR, DEVICE):
            raise DeviceNotFound(f"{device.name}: this is {header.vendor:04x}:{header.device:04x}, not QEMU's edu",
                                 cause="it is another device's address",
                                 hint=f"find the device: lspci -D -d {VENDOR:04x}:{DEVICE:04x}")
        space.enable()
        kind = PciIrq.INTX if args.intx else PciIrq.MSI
        with (Bar(device, 0) as registers, Interrupts(device, kind=kind) as interrupts,
              PinnedPool(device, address_bits=ADDRESS_BITS) as memory):
            edu = Edu(registers, interrupts)
            identification = registers.read32(IDENTIFICATION)
            print(f"{device.name} by {device.info.kind}")
            print(f"identification: {identification:#010x}, revision {identification >> 24}."
                  f"{identification >> 16 & 0xFF}")
            print(f"liveness: {'ok' if edu.is_alive() else 'FAILED'}")
            print(f"factorial, polled: 10! = {edu.factorial_polled(10)}")
            print(f"factorial, by interrupt: 12! = {edu.factorial(12)}")
            pattern = os.urandom(BUFFER_SIZE)
            with memory.allocate(BUFFER_SIZE, 4096) as source, memory.allocate(BUFFER_SIZE, 4096) as result:
                source.view()[:] = pattern
                edu.read_memory(source.iova)
                edu.write_memory(result.iova)
                equal = result.view() == pattern
            print(f"DMA of {BUFFER_SIZE} bytes to the device and back: {'equal' if equal else 'DIFFERENT'}")
            print(f"interrupts: {edu.interrupt_count} by {interrupts.kind.name}")
            if args.prove_iommu:
                mapped, write_blocked, read_blocked = prove_iommu(edu, memory)
                print(f"DMA write to mapped memory: {'arrived' if mapped else 'LOST'}")
                print(f"DMA write after the unmap: {'blocked' if write_blocked else 'WENT THROUGH'}")
                print(f"DMA read after the unmap: {'blocked' if read_blocked else 'WENT THROUGH'}")
                print("The device was told nothing and interrupted as ever; the kernel's log has the faults: "
                      "dmesg | grep -i fault")


if __name__ == "__main__":
    try:
        main()
    except MaiaError as error:
        sys.exit(f"{error.what}\n  likely cause: {error.cause or 'not known'}\n  try: {error.hint or 'nothing'}")
