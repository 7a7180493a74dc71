"""A driver for the admin queue in plain Python, over `raw_client`: it knows the contract's bytes and no driver code."""

import mmap
import struct
import time

from helpers.raw_client import CONFIG, DMA_MAP, DMA_READ, DMA_WRITE, REPLY, Descriptors, RawClient, dma_map, header

CONTROL, STATUS, HEARTBEAT, ERRORS = 0x80, 0x84, 0x88, 0x8C
ADMIN_SQ, ADMIN_CQ, ADMIN_SIZE, ADMIN_TAIL, ADMIN_HEAD = 0xA0, 0xA8, 0xB0, 0xB4, 0xB8
RESET, BOOTING, READY, FAILED = range(4)
(IDENTIFY, CREATE_QUEUE, DELETE_QUEUE, RESET_QUEUE, LOAD_PROGRAM, UNLOAD_PROGRAM, CREATE_CONTEXT, DELETE_CONTEXT,
 SET_FEATURE, GET_FEATURE, ABORT, GET_LOG) = (
    0x01, 0x10, 0x11, 0x12, 0x20, 0x21, 0x30, 0x31, 0x40, 0x41, 0x50, 0x60)
(OK, INVALID_OPCODE, INVALID_FIELD, NO_RESOURCE, NOT_FOUND, IN_USE, BAD_ADDRESS, PROGRAM_REFUSED, INTERNAL) = range(9)

MEMORY = 1 << 20
"""Bytes of host memory that a `Driver` maps: rings first, free from `SPARE` on."""
SPARE = 0x10000


class MessageClient(RawClient):
    """Its memory has no descriptor: it answers DMA_READ and DMA_WRITE while it waits for replies."""

    memory = bytearray(MEMORY)
    base = 0
    served = 0

    def recv(self):
        while True:
            message = super().recv()
            if message.flags & 1 or message.command not in (DMA_READ, DMA_WRITE):
                return message
            self.serve(message)

    def serve(self, message):
        self.served += 1
        address, count = struct.unpack_from("<QQ", message.body)
        at = address - self.base
        body = struct.pack("<QQ", address, count)
        if message.command == DMA_READ:
            body += self.memory[at : at + count]
        else:
            assert len(message.body) == 16 + count
            self.memory[at : at + count] = message.body[16:]
        self.send_raw(header(message.command, len(body), message.id, REPLY) + body)


class Driver:
    """Host memory at IOVA `base`, an admin queue in it, and its commands. A context manager."""

    def __init__(self, path, *, base=0x100000, log2=4, messages=False, **options):
        self.base, self.entries = base, 1 << log2
        self.sq, self.cq, self.spare = base, base + 0x8000, base + SPARE
        self._descriptors = Descriptors()
        self.client = (MessageClient if messages else RawClient)(path, **options)
        if messages:
            self.client.memory, self.client.base = bytearray(MEMORY), base
            self.memory = self.client.memory
            self.client.call(DMA_MAP, dma_map(base, MEMORY))
        else:
            fd = self._descriptors.memory(MEMORY)
            self.memory = mmap.mmap(fd, MEMORY)
            self.client.call(DMA_MAP, dma_map(base, MEMORY), [fd])
        self.log2 = log2
        self.tail = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.__exit__()
        if isinstance(self.memory, mmap.mmap):
            self.memory.close()
        self._descriptors.__exit__()

    def put(self, address, data):
        at = address - self.base
        self.memory[at : at + len(data)] = data

    def get(self, address, size):
        at = address - self.base
        return bytes(self.memory[at : at + size])

    def boot(self, state=READY):
        self.client.write(CONFIG, 4, b"\6\0")  # memory space, bus master
        self.client.write64(ADMIN_SQ, self.sq)
        self.client.write64(ADMIN_CQ, self.cq)
        self.client.write32(ADMIN_SIZE, self.log2)
        self.client.write32(CONTROL, 1)
        self.tail = 0
        assert self.state(lambda now: now != BOOTING) == state
        return self

    def state(self, good):
        """Poll STATUS until its boot state is good; returns the state."""
        deadline = time.monotonic() + 10
        while not good(state := self.client.read32(STATUS) & 0xF) and time.monotonic() < deadline:
            time.sleep(0.001)
        return state

    def error(self):
        return self.client.read32(STATUS) >> 8 & 0xFF

    def post(self, raw):
        """Write a 64-byte command and its doorbell; returns its index."""
        index = self.tail
        self.put(self.sq + index % self.entries * 64, raw)
        self.tail = (self.tail + 1) & 0xFFFFFFFF
        self.client.write32(ADMIN_TAIL, self.tail)
        return index

    def wait(self, index):
        """The completion of the command with that index: (id, status, result0, result1)."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if (self.client.read32(ADMIN_HEAD) - index - 1) & 0xFFFFFFFF < 0x80000000:
                raw = self.get(self.cq + index % self.entries * 32, 32)
                number, status, result0, result1, sequence, reserved = struct.unpack("<IIQQII", raw)
                assert (sequence, reserved) == ((index + 1) & 0xFFFFFFFF, 0)
                return number, status, result0, result1
            time.sleep(0.001)
        raise AssertionError(f"admin command {index} is not done: STATUS {self.client.read32(STATUS):#x}")

    def command(self, opcode, *p, flags=0, number=0x5A5A):
        """Run a command: (status, result0, result1)."""
        raw = struct.pack("<HHI7Q", opcode, flags, number, *p, *[0] * (7 - len(p)))
        got, *rest = self.wait(self.post(raw))
        assert got == number
        return tuple(rest)

    def create_queue(self, ring=None, progress=None, reports=None, initial=0, log2=4, reports_log2=4, vector=0xFFFF,
                     context=0, queue=0xFFFFFFFF):
        raw = struct.pack(
            "<QQQQBBHHBBIIQ", ring or self.spare, progress or self.spare + 0x8000, reports or self.spare + 0x9000,
            initial, log2, reports_log2, vector, context, 0, 0, queue, 0, 0,
        )
        return self.command(CREATE_QUEUE, *struct.unpack("<7Q", raw))
