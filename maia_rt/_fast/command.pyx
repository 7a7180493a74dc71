# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A command, encoded once and submitted as often as wanted."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from maia_rt._fast cimport commands as layout

from maia_rt.errors import InvalidArgument


cdef class Command:
    """64 encoded bytes. Made by the constructors named after the opcodes; the ring fills in the sequence number.

    Parameters
    ----------
    opcode, flags, units : int
        As in the contract.
    a, b, c : int
        The three 64-bit words of the payload.
    """

    def __init__(self, uint8_t opcode, uint8_t flags=0, uint32_t units=0, uint64_t a=0, uint64_t b=0, uint64_t c=0):
        self.raw.opcode = opcode
        self.raw.flags = flags
        self.raw.units = units
        self.raw.payload[0] = a
        self.raw.payload[1] = b
        self.raw.payload[2] = c

    @staticmethod
    def from_bytes(data):
        """Take 64 bytes as they are; nothing is checked."""
        cdef const unsigned char[::1] view = data
        if view.shape[0] != sizeof(layout.command_t):
            raise InvalidArgument(f"a command has {sizeof(layout.command_t)} bytes, not {view.shape[0]}")
        cdef Command self = Command.__new__(Command)
        memcpy(&self.raw, &view[0], sizeof(layout.command_t))
        return self

    @staticmethod
    def nop(uint8_t flags=0):
        """Nothing, but for its semaphores and its place in the order."""
        return Command(layout.OPCODE_NOP, flags)

    @staticmethod
    def copy(uint64_t dst, uint64_t src, uint64_t size, uint8_t flags=0):
        """Copy `size` bytes from device address `src` to `dst`."""
        return Command(layout.OPCODE_COPY, flags, 0, src, dst, size)

    @staticmethod
    def copy_nd(uint64_t descriptor, uint8_t flags=0):
        """Copy as the COPY_DESCRIPTOR at device address `descriptor` says."""
        return Command(layout.OPCODE_COPY_ND, flags, 0, descriptor)

    @staticmethod
    def fill(uint64_t dst, uint64_t size, uint32_t pattern, uint32_t width, uint8_t flags=0):
        """Fill `size` bytes with the low `width` bytes (1, 2 or 4) of `pattern`, again and again."""
        return Command(layout.OPCODE_FILL, flags, 0, dst, size, pattern | <uint64_t>width << 32)

    @staticmethod
    def write_imm(uint64_t dst, data, uint8_t flags=0):
        """Write the 1 to 16 bytes of `data`, which travel inside the command."""
        cdef const unsigned char[::1] view = data
        if not 1 <= view.shape[0] <= layout.MAX_INLINE_BYTES:
            raise InvalidArgument(f"WRITE_IMM carries 1 to {<int>layout.MAX_INLINE_BYTES} bytes, not {view.shape[0]}")
        cdef Command self = Command(layout.OPCODE_WRITE_IMM, flags, <uint32_t>view.shape[0], dst)
        memcpy(&self.raw.payload[1], &view[0], view.shape[0])
        return self

    @staticmethod
    def launch(uint32_t kernel, uint64_t args, uint32_t arg_count, uint32_t units=0, uint8_t flags=0):
        """Launch a kernel; its argument words lie at device address `args`, the caller keeps them there."""
        return Command(layout.OPCODE_LAUNCH, flags, units, kernel | <uint64_t>arg_count << 32, args)

    @staticmethod
    def crc(uint64_t src, uint64_t size, uint64_t result, uint8_t flags=0, bint expected=False):
        """Write the CRC of `size` bytes at `src` to `result`; or, with `expected`, compare it with the one there."""
        return Command(layout.OPCODE_CRC, flags, layout.CRC_COMPARE if expected else 0, src, size, result)

    @staticmethod
    def wait_value(uint64_t address, uint32_t value, uint32_t condition=layout.CONDITION_GE, uint32_t mask=0xffffffff,
                   uint8_t flags=0):
        """Wait until the 32-bit word at `address`, after `mask`, meets a Condition with `value`."""
        return Command(layout.OPCODE_WAIT_VALUE, flags, 0, address, value | <uint64_t>mask << 32, condition)

    @staticmethod
    def branch(uint32_t target, uint64_t where, uint32_t value, uint16_t condition=layout.CONDITION_GE,
               uint32_t mask=0xffffffff, uint16_t source=layout.BRANCH_MEMORY, uint8_t flags=0):
        """In a list: go on at listed command `target` if the word at `where` (see BranchSource) meets a Condition."""
        return Command(layout.OPCODE_BRANCH, flags, 0, where, value | <uint64_t>mask << 32,
                       target | <uint64_t>condition << 32 | <uint64_t>source << 48)

    @staticmethod
    def signal_remote(uint64_t address, uint32_t op, uint32_t value, uint8_t flags=0):
        """Set or add to the semaphore word at device address `address`: a peer's window."""
        return Command(layout.OPCODE_SIGNAL_REMOTE, flags, 0, address, op | <uint64_t>value << 32)

    @staticmethod
    def indirect(uint64_t commands, uint32_t count, uint64_t times=0, bint concurrent=False, uint8_t flags=0):
        """Run the `count` commands that lie at device address `commands`.

        `times` is 0 or the address of 16 bytes for each of them; `concurrent` lets them overlap but for BARRIERs.
        """
        return Command(layout.OPCODE_INDIRECT, flags, 0, commands,
                       count | <uint64_t>(layout.LIST_CONCURRENT if concurrent else 0) << 32, times)

    @staticmethod
    def trap(uint32_t code, uint8_t flags=0):
        """Stop the queue with a TRAP fault."""
        return Command(layout.OPCODE_TRAP, flags, 0, code)

    def pre(self, int slot, uint16_t index, uint8_t op, uint32_t value):
        """Wait for semaphore `index` before the command starts; `slot` is 0 or 1. Returns the command itself."""
        if not 0 <= slot < 2:
            raise InvalidArgument(f"a command has two pre-semaphore operations, not a number {slot}")
        self.raw.pre[slot] = layout.semaphore_op_t(index, op, 0, value)
        return self

    def post(self, int slot, uint16_t index, uint8_t op, uint32_t value):
        """Set or add to semaphore `index` when the command is done; `slot` is 0 or 1. Returns the command itself."""
        if not 0 <= slot < 2:
            raise InvalidArgument(f"a command has two post-semaphore operations, not a number {slot}")
        self.raw.post[slot] = layout.semaphore_op_t(index, op, 0, value)
        return self

    def __bytes__(self):
        return (<const unsigned char *>&self.raw)[:sizeof(layout.command_t)]
