"""A driver for any NVMe controller, as far as its first read: bring-up, Identify, an I/O queue with an MSI-X vector.

    maia bind 0000:00:04.0                                # once: take the function from the kernel's nvme driver
    python examples/nvme_identify.py 0000:00:04.0
    python examples/nvme_identify.py 0000:00:04.0 --read 7 --vectors

It only reads. It uses maia_rt as a library for any PCI device (docs/any-pci-device.md); what it knows of NVMe, names
included, is from the NVM Express Base and NVM Command Set specifications.
"""

import argparse
import contextlib
import functools
import struct
import sys
import zlib

from maia_rt.errors import DeviceNotFound, MaiaError, TransportError, Unsupported
from maia_rt.memory import PinnedPool
from maia_rt.transport import Bar, ConfigSpace, Interrupts, PciIrq, SharedWords, open_device, poll_until

CLASS_NVME = 0x010802
PAGE = 4096

# Registers of BAR 0 (Base specification, controller properties).
CAP, VS, CC, CSTS, AQA, ASQ, ACQ, DOORBELLS = 0x00, 0x08, 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
CC_ENABLE, CC_SHUTDOWN_NORMAL = 1 << 0, 1 << 14
CC_ENTRY_SIZES = 6 << 16 | 4 << 20  # submission entries of 2^6 bytes, completion entries of 2^4
CSTS_READY, CSTS_FATAL, CSTS_SHUTDOWN, CSTS_SHUTDOWN_COMPLETE = 1 << 0, 1 << 1, 3 << 2, 2 << 2

DELETE_SQ, CREATE_SQ, DELETE_CQ, CREATE_CQ, IDENTIFY, SET_FEATURES = 0x00, 0x01, 0x04, 0x05, 0x06, 0x09  # admin
READ = 0x02  # NVM command set
IDENTIFY_NAMESPACE, IDENTIFY_CONTROLLER, IDENTIFY_ACTIVE_NAMESPACES = 0, 1, 2
NUMBER_OF_QUEUES = 0x07

STATUS = {  # (status code type, status code)
    (0, 0x01): "Invalid Command Opcode", (0, 0x02): "Invalid Field in Command", (0, 0x03): "Command ID Conflict",
    (0, 0x04): "Data Transfer Error", (0, 0x05): "Commands Aborted due to Power Loss", (0, 0x06): "Internal Error",
    (0, 0x07): "Command Abort Requested", (0, 0x08): "Command Aborted due to SQ Deletion",
    (0, 0x0B): "Invalid Namespace or Format", (0, 0x0C): "Command Sequence Error", (0, 0x13): "PRP Offset Invalid",
    (0, 0x80): "LBA Out of Range", (0, 0x81): "Capacity Exceeded", (0, 0x82): "Namespace Not Ready",
    (1, 0x00): "Completion Queue Invalid", (1, 0x01): "Invalid Queue Identifier", (1, 0x02): "Invalid Queue Size",
    (1, 0x08): "Invalid Interrupt Vector", (1, 0x0C): "Invalid Queue Deletion",
    (2, 0x81): "Unrecovered Read Error", (2, 0x86): "Access Denied",
    (2, 0x87): "Deallocated or Unwritten Logical Block",
}


class QueuePair:
    """A submission queue and its completion queue, for one command at a time."""

    def __init__(self, controller, number, vector=None):
        self.name = f"{controller.name}: queue {number}"
        self.number, self.entries, self.vector = number, controller.entries, vector
        self.registers, self.interrupts = controller.registers, controller.interrupts
        self.submissions = controller.memory.allocate(self.entries * 64, PAGE)
        self.completions = controller.memory.allocate(self.entries * 16, PAGE)
        self.completions.view()[:] = bytes(self.completions.size)  # no entry may look new
        self.words = SharedWords(self.completions.view(), self.name)
        self.tail_doorbell = DOORBELLS + 2 * number * controller.stride
        self.head_doorbell = self.tail_doorbell + controller.stride
        self.tail = self.head = 0
        self.phase = 1  # of new completion entries; it turns over with the queue

    def execute(self, opcode, *dwords, namespace=0, data=0, timeout=5.0):
        """Run a command with these dwords from 10 on and `data` as its PRP 1; return dword 0 of its completion."""
        command = self.tail
        dwords += (0,) * (6 - len(dwords))
        entry = struct.pack("<BBHI16xQQ6I", opcode, 0, command, namespace, data, 0, *dwords)
        self.submissions.view()[command * 64:command * 64 + 64] = entry
        self.tail = (self.tail + 1) % self.entries
        self.registers.write32(self.tail_doorbell, self.tail)
        if self.vector is not None:
            self.interrupts.wait(self.vector, timeout=timeout)
        # Dword 3 is the command's identifier, the phase bit and the status; the phase says that the entry is there.
        at = self.head * 16
        last = poll_until(functools.partial(self.words.read32, at + 12), mask=1 << 16, value=self.phase << 16,
                          timeout=timeout, what=f"{self.name}: the completion of command {opcode:#04x}")
        result = self.words.read32(at)
        self.head = (self.head + 1) % self.entries
        self.phase ^= self.head == 0
        self.registers.write32(self.head_doorbell, self.head)
        if last & 0xFFFF != command:
            raise TransportError(f"{self.name}: command {command} was answered as {last & 0xFFFF}",
                                 cause="the controller is confused", hint="reset it")
        kind, code = last >> 25 & 7, last >> 17 & 0xFF
        if kind or code:
            status = f"status {kind}/{code:#04x}, {STATUS.get((kind, code), 'see the specification')}"
            raise TransportError(f"{self.name}: command {opcode:#04x} failed with {status}",
                                 cause="the controller refuses what the command asks for",
                                 hint="compare its fields with Identify")
        return result

    def close(self):
        self.words.close()
        self.submissions.free()
        self.completions.free()


class Controller:
    """An NVMe controller, its admin queue, and what Identify says."""

    def __init__(self, registers, memory, interrupts):
        self.name = registers.name
        self.registers, self.memory, self.interrupts = registers, memory, interrupts
        capabilities = registers.read64(CAP)
        self.entries = min(capabilities & 0xFFFF, 15) + 1
        self.timeout = max(capabilities >> 24 & 0xFF, 1) * 0.5
        self.stride = 4 << (capabilities >> 32 & 0xF)
        if capabilities >> 48 & 0xF:
            raise Unsupported(f"{self.name}: the controller takes no pages of {PAGE} bytes",
                              cause="it asks for larger ones in CAP.MPSMIN", hint="another controller")
        self.queues = []

    def enable(self):
        self.disable()
        self.admin = self.add_queue(0)
        self.registers.write32(AQA, self.entries - 1 << 16 | self.entries - 1)
        self.registers.write64(ASQ, self.admin.submissions.iova)
        self.registers.write64(ACQ, self.admin.completions.iova)
        self.registers.write32(CC, CC_ENTRY_SIZES | CC_ENABLE)
        self.await_status(CSTS_READY | CSTS_FATAL, CSTS_READY, "CSTS.RDY")
        self.admin.execute(SET_FEATURES, NUMBER_OF_QUEUES, 0)  # one of each: the counts are zero-based

    def disable(self):
        self.registers.write32(CC, 0)
        self.await_status(CSTS_READY, 0, "CSTS.RDY")

    def shut_down(self):
        if self.registers.read32(CC) & CC_ENABLE:
            self.registers.write32(CC, CC_ENTRY_SIZES | CC_ENABLE | CC_SHUTDOWN_NORMAL)
            self.await_status(CSTS_SHUTDOWN, CSTS_SHUTDOWN_COMPLETE, "CSTS.SHST")

    def close(self):
        # The last step first, each whatever becomes of the one before: a disabled controller touches no memory.
        with contextlib.ExitStack() as steps:
            for queue in self.queues:
                steps.callback(queue.close)
            steps.callback(self.disable)
            steps.callback(self.shut_down)

    def await_status(self, mask, value, what):
        self.registers.poll32(CSTS, mask=mask, value=value, timeout=self.timeout, what=what)

    def add_queue(self, number, vector=None):
        self.queues.append(QueuePair(self, number, vector))
        return self.queues[-1]

    def identify(self, what, namespace=0):
        with self.memory.allocate(PAGE, PAGE) as page:
            self.admin.execute(IDENTIFY, what, namespace=namespace, data=page.iova)
            return bytes(page.view())

    def create_io_queue(self, number, vector):
        queue = self.add_queue(number, vector)
        size = self.entries - 1 << 16 | number
        self.admin.execute(CREATE_CQ, size, vector << 16 | 0b11, data=queue.completions.iova)  # interrupts, contiguous
        self.admin.execute(CREATE_SQ, size, number << 16 | 0b01, data=queue.submissions.iova)
        return queue

    def delete_io_queue(self, queue):
        self.admin.execute(DELETE_SQ, queue.number)
        self.admin.execute(DELETE_CQ, queue.number)


def text(field):
    return field.decode("ascii", "replace").strip(" \0")


def show(controller, device, lba):
    version = controller.registers.read32(VS)
    print(f"controller: NVMe {version >> 16}.{version >> 8 & 0xFF} at {device.name} by {device.info.kind}")
    about = controller.identify(IDENTIFY_CONTROLLER)
    print(f"model: {text(about[24:64])}\nserial: {text(about[4:24])}\nfirmware: {text(about[64:72])}")
    queue = controller.create_io_queue(1, vector=1) if lba is not None else None
    active = struct.unpack("<1024I", controller.identify(IDENTIFY_ACTIVE_NAMESPACES))
    for namespace in filter(None, active):
        about = controller.identify(IDENTIFY_NAMESPACE, namespace)
        blocks, used = int.from_bytes(about[0:8], "little"), about[26] & 0xF
        metadata, power, _ = struct.unpack_from("<HBB", about, 128 + 4 * used)
        print(f"namespace {namespace}: {blocks} blocks of {1 << power} bytes, {(blocks << power) / (1 << 20):g} MiB; "
              f"LBA format {used} of {about[25] + 1}, {metadata} bytes of metadata")
        if queue is not None:
            block = read_block(controller, queue, namespace, lba, (1 << power) + metadata)
            print(f"block {lba}: CRC-32 {zlib.crc32(block):#010x}, begins {block[:16].hex(' ')}")
    if queue is not None:
        controller.delete_io_queue(queue)


def read_block(controller, queue, namespace, lba, size):
    if size not in (512, 1024, 2048, PAGE):
        raise Unsupported(f"{controller.name}: blocks of {size} bytes with their metadata are not read here",
                          cause="this example uses PRP 1 alone", hint="a namespace with another LBA format")
    with controller.memory.allocate(PAGE, PAGE) as page:
        queue.execute(READ, lba & 0xFFFFFFFF, lba >> 32, 0, namespace=namespace, data=page.iova)
        return bytes(page.view()[:size])


def block_number(word):
    number = int(word, 0)
    if not 0 <= number < 1 << 64:
        raise argparse.ArgumentTypeError(f"{word} is not the number of a block")
    return number


def main():
    parser = argparse.ArgumentParser(description="Identify an NVMe controller and read one of its blocks.")
    parser.add_argument("device", help="a PCI address, bound to vfio-pci, or a vfio-user socket")
    parser.add_argument("--interface", choices=["group", "cdev"], help="of the kernel's VFIO; by default what there is")
    parser.add_argument("--read", type=block_number, metavar="LBA", help="read this block of every namespace")
    parser.add_argument("--vectors", action="store_true", help="fire every MSI-X vector and count what arrives")
    arguments = parser.parse_args()
    # What is opened last is closed first: the controller, its memory, the interrupts, the device.
    with open_device(arguments.device, interface=arguments.interface) as device:
        space = ConfigSpace(device)
        header = space.header
        if header.class_code != CLASS_NVME:
            raise DeviceNotFound(f"{device.name}: the class is {header.class_code:06x}, not {CLASS_NVME:06x} (NVMe)",
                                 cause="it is another device's address", hint="find the device: lspci -D -d ::0108")
        space.enable()
        with Bar(device, 0) as registers, Interrupts(device, 2, kind=PciIrq.MSIX) as interrupts:
            with (PinnedPool(device) as memory,
                  contextlib.closing(Controller(registers, memory, interrupts)) as controller):
                controller.enable()
                show(controller, device, arguments.read)
            if arguments.vectors:
                count = device.irqs[PciIrq.MSIX].count
                interrupts.add(count - len(interrupts))
                interrupts.trigger(0, count)
                fired = sum(interrupts.wait(vector, timeout=1.0) > 0 for vector in range(count))
                print(f"MSI-X: {fired} of {count} vectors fired")


if __name__ == "__main__":
    try:
        main()
    except MaiaError as error:
        sys.exit(f"{error.what}\n  likely cause: {error.cause or 'not known'}\n  try: {error.hint or 'nothing'}")
