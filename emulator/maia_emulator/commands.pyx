"""What single commands do, a bounded piece at a time: so that a long copy in one queue never holds up the others."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from maia_emulator.memory cimport KIND_BAD_CONTEXT, KIND_MESSAGE, KIND_PEER, DeviceMemory, context_t, traffic_t
from maia_emulator.support cimport add32, store32
from maia_rt._fast.commands cimport (
    BRANCH_MEMORY,
    BRANCH_SEMAPHORE,
    CONDITION_AND,
    CONDITION_GE,
    CRC_COMPARE,
    FAULT_ADDRESS,
    FAULT_BAD_FIELD,
    FAULT_BAD_OPCODE,
    FAULT_CHECKSUM,
    FAULT_CONTEXT,
    FAULT_NONE,
    FAULT_SEMAPHORE,
    FAULT_SEMAPHORE_OVERFLOW,
    FAULT_TRAP,
    FLAG_BARRIER,
    FLAG_REPORT,
    LIST_CONCURRENT,
    MAX_INDIRECT,
    MAX_INLINE_BYTES,
    OPCODE_BRANCH,
    OPCODE_COPY,
    OPCODE_COPY_ND,
    OPCODE_CRC,
    OPCODE_FILL,
    OPCODE_INDIRECT,
    OPCODE_LAUNCH,
    OPCODE_NOP,
    OPCODE_SIGNAL_REMOTE,
    OPCODE_TRAP,
    OPCODE_WAIT_VALUE,
    OPCODE_WRITE_IMM,
    POST_ADD,
    POST_NONE,
    POST_SET,
    WAIT_ACQUIRE,
    WAIT_NONE,
    branch_command_t,
    command_t,
    copy_command_t,
    copy_descriptor_t,
    crc_command_t,
    fill_command_t,
    indirect_command_t,
    launch_command_t,
    signal_remote_command_t,
    trap_command_t,
    wait_value_command_t,
    write_imm_command_t,
)

cdef extern from "crc32.h" nogil:
    uint32_t maia_crc32(uint32_t crc, const unsigned char *data, size_t size)

cdef enum:
    PIECE = 1 << 20         # bytes a turn
    LONG = 1 << 21          # a copy of so many leaves the caches alone: less may well be there, and be wanted there
    ADDRESS_BITS = 62       # sizes stay below this, so that sums cannot wrap


cdef uint32_t check_command(command_t *command, bint listed, uint32_t mirrors, uint32_t semaphores) noexcept nogil:
    """The fault that a command's fields alone earn it, or none. ``mirrors`` semaphores are read-only."""
    cdef int i
    cdef uint8_t op
    cdef bint plain
    if command.opcode < OPCODE_NOP or command.opcode > OPCODE_BRANCH:
        return FAULT_BAD_OPCODE
    if command.flags & ~<uint8_t> (FLAG_BARRIER | FLAG_REPORT):
        return FAULT_BAD_FIELD
    for i in range(2):
        op = command.pre[i].op
        if op > WAIT_ACQUIRE or command.pre[i].reserved or (op == WAIT_NONE and command.pre[i].index):
            return FAULT_BAD_FIELD
        if op != WAIT_NONE and command.pre[i].index >= semaphores:
            return FAULT_SEMAPHORE
        if op == WAIT_ACQUIRE and command.pre[i].index < mirrors:
            return FAULT_SEMAPHORE
        op = command.post[i].op
        if op > POST_ADD or command.post[i].reserved or (op == POST_NONE and command.post[i].index):
            return FAULT_BAD_FIELD
        if op != POST_NONE and (command.post[i].index >= semaphores or command.post[i].index < mirrors):
            return FAULT_SEMAPHORE
        if op == POST_ADD and command.post[i].value >> 31:
            return FAULT_SEMAPHORE_OVERFLOW
    plain = command.opcode != OPCODE_LAUNCH and command.opcode != OPCODE_WRITE_IMM
    if plain and command.units and not (command.opcode == OPCODE_CRC and command.units == CRC_COMPARE):
        return FAULT_BAD_FIELD
    if command.opcode == OPCODE_NOP:
        plain = command.payload[0] == 0 and command.payload[1] == 0 and command.payload[2] == 0
    elif command.opcode == OPCODE_COPY or command.opcode == OPCODE_FILL or command.opcode == OPCODE_CRC:
        # The size is the last word of COPY, the middle one of the others.
        plain = command.payload[2 if command.opcode == OPCODE_COPY else 1] >> ADDRESS_BITS == 0
        if command.opcode == OPCODE_FILL:
            plain = plain and fill_is_aligned(<fill_command_t *> command)
        elif command.opcode == OPCODE_CRC:
            plain = plain and (<crc_command_t *> command).result & 3 == 0
    elif command.opcode == OPCODE_COPY_ND:
        plain = command.payload[0] & 63 == 0 and command.payload[1] == 0 and command.payload[2] == 0
    elif command.opcode == OPCODE_WRITE_IMM:
        plain = 1 <= command.units <= MAX_INLINE_BYTES
    elif command.opcode == OPCODE_LAUNCH:
        plain = (<launch_command_t *> command).reserved == 0 and (<launch_command_t *> command).args & 7 == 0
    elif command.opcode == OPCODE_SIGNAL_REMOTE:
        plain = signal_is_good(<signal_remote_command_t *> command)
        if plain and signal_overflows(<signal_remote_command_t *> command):
            return FAULT_SEMAPHORE_OVERFLOW
    elif command.opcode == OPCODE_INDIRECT:
        if listed:
            return FAULT_BAD_OPCODE
        plain = list_is_good(<indirect_command_t *> command)
    elif command.opcode == OPCODE_TRAP:
        plain = command.payload[0] >> 32 == 0 and command.payload[1] == 0 and command.payload[2] == 0
    elif command.opcode == OPCODE_WAIT_VALUE:
        plain = wait_is_good(<wait_value_command_t *> command)
    elif command.opcode == OPCODE_BRANCH:
        if not listed:
            return FAULT_BAD_OPCODE
        plain = branch_is_good(<branch_command_t *> command)
        if plain and names_no_semaphore(<branch_command_t *> command, semaphores):
            return FAULT_SEMAPHORE
    return FAULT_NONE if plain else FAULT_BAD_FIELD


cdef inline uint16_t place(context_t *context, uint64_t index) noexcept nogil:
    """The device's number of a bounded context's semaphore: mirrors of its queues first, then its free ones."""
    if index < context.queue_count:
        return <uint16_t> (context.first_queue + index)
    return <uint16_t> (context.first_semaphore + index - context.queue_count)


cdef uint32_t check_confined(command_t *command, bint listed, context_t *context) noexcept nogil:
    """As `check_command`, for a queue of a bounded context: from here on the command has the device's own numbers."""
    cdef branch_command_t *branch = <branch_command_t *> command
    cdef uint32_t fault = check_command(command, listed, context.queue_count,
                                        context.queue_count + context.semaphore_count)
    cdef int i
    if fault:
        return fault
    for i in range(2):
        if command.pre[i].op != WAIT_NONE:
            command.pre[i].index = place(context, command.pre[i].index)
        if command.post[i].op != POST_NONE:
            command.post[i].index = place(context, command.post[i].index)
    if command.opcode == OPCODE_BRANCH and branch.source == BRANCH_SEMAPHORE:
        branch.where = place(context, branch.where)
    elif command.opcode == OPCODE_LAUNCH:
        if <uint64_t> command.units >> context.cluster_count:
            return FAULT_BAD_FIELD
        # 0 is all of its clusters, never all of the device's.
        if command.units == 0:
            command.units = <uint32_t> ((<uint64_t> 1 << context.cluster_count) - 1)
        command.units <<= context.first_cluster
    command.flags |= PLACED
    return FAULT_NONE


cdef inline uint64_t unplace(context_t *context, uint64_t index) noexcept nogil:
    if index - context.first_queue < context.queue_count:
        return index - context.first_queue
    return index - context.first_semaphore + context.queue_count


cdef void as_fetched(command_t *command, context_t *context) noexcept nogil:
    """Undo `check_confined` where it was done, for logs. (A mask that said all clusters names them one by one.)"""
    cdef branch_command_t *branch = <branch_command_t *> command
    cdef int i
    if not (context.bounded and command.flags & PLACED):
        return
    command.flags &= ~<uint8_t> PLACED
    for i in range(2):
        if command.pre[i].op != WAIT_NONE:
            command.pre[i].index = <uint16_t> unplace(context, command.pre[i].index)
        if command.post[i].op != POST_NONE:
            command.post[i].index = <uint16_t> unplace(context, command.post[i].index)
    if command.opcode == OPCODE_BRANCH and branch.source == BRANCH_SEMAPHORE:
        branch.where = unplace(context, branch.where)
    elif command.opcode == OPCODE_LAUNCH:
        command.units >>= context.first_cluster


cdef inline bint fill_is_aligned(fill_command_t *c) noexcept nogil:
    return (c.width == 1 or c.width == 2 or c.width == 4) and (c.dst | c.size) & (c.width - 1) == 0


cdef inline bint signal_is_good(signal_remote_command_t *c) noexcept nogil:
    return (c.op == POST_SET or c.op == POST_ADD) and c.address & 3 == 0 and c.reserved == 0


cdef inline bint signal_overflows(signal_remote_command_t *c) noexcept nogil:
    return c.op == POST_ADD and c.value >> 31


cdef inline bint list_is_good(indirect_command_t *c) noexcept nogil:
    return (c.list & 63 == 0 and 1 <= c.count <= MAX_INDIRECT and c.options & ~<uint32_t> LIST_CONCURRENT == 0
            and c.times & 7 == 0)


cdef inline bint wait_is_good(wait_value_command_t *c) noexcept nogil:
    return c.address & 3 == 0 and CONDITION_GE <= c.condition <= CONDITION_AND and c.reserved == 0


cdef inline bint branch_is_good(branch_command_t *c) noexcept nogil:
    if not CONDITION_GE <= c.condition <= CONDITION_AND:
        return False
    return c.source == BRANCH_SEMAPHORE or (c.source == BRANCH_MEMORY and c.where & 3 == 0)


cdef inline bint names_no_semaphore(branch_command_t *c, uint32_t semaphores) noexcept nogil:
    return c.source == BRANCH_SEMAPHORE and c.where >= semaphores


cdef uint32_t run_command(DeviceMemory memory, command_t *command, work_t *work, context_t *context,
                          traffic_t *traffic, bint *finished, uint64_t *bad) noexcept nogil:
    """Do a piece of a checked command, none that steers others. Returns the fault; sets ``finished`` at its end."""
    cdef uint64_t size
    cdef copy_command_t *copy
    cdef uint32_t fault = FAULT_NONE
    finished[0] = True
    if command.opcode == OPCODE_COPY:
        copy = <copy_command_t *> command
        size = min(copy.size - work.done, <uint64_t> PIECE)
        traffic.past_caches, traffic.ahead = copy.size >= LONG, NULL
        fault = memory.copy(copy.dst + work.done, copy.src + work.done, size, context, traffic, bad)
        traffic.past_caches = False
        work.done += size
        finished[0] = work.done == copy.size
    elif command.opcode == OPCODE_COPY_ND:
        fault = copy_rows(memory, command.payload[0], work, context, traffic, finished, bad)
    elif command.opcode == OPCODE_FILL:
        fault = fill(memory, <fill_command_t *> command, work, context, traffic, finished, bad)
    elif command.opcode == OPCODE_WRITE_IMM:
        fault = memory.store((<write_imm_command_t *> command).dst, (<write_imm_command_t *> command).data,
                             command.units, context, traffic, bad)
    elif command.opcode == OPCODE_CRC:
        fault = checksum(memory, <crc_command_t *> command, work, context, traffic, finished, bad)
    elif command.opcode == OPCODE_SIGNAL_REMOTE:
        fault = signal(memory, <signal_remote_command_t *> command, context, traffic, bad)
    elif command.opcode == OPCODE_TRAP:
        bad[0] = (<trap_command_t *> command).code
        fault = FAULT_TRAP
    return fault


cdef uint32_t copy_rows(DeviceMemory memory, uint64_t descriptor, work_t *work, context_t *context,
                        traffic_t *traffic, bint *finished, uint64_t *bad) noexcept nogil:
    cdef copy_descriptor_t *s = &work.shape
    cdef uint64_t moved = 0, row, plane, rows, size
    cdef uint32_t fault
    if not work.begun:
        # Taken once: what the client does to the descriptor from here on changes nothing.
        fault = memory.load(s, descriptor, sizeof(copy_descriptor_t), context, traffic, bad)
        if fault:
            return fault
        if s.row_bytes >> ADDRESS_BITS:
            return FAULT_BAD_FIELD
        work.begun = True
    rows = <uint64_t> s.rows * s.planes
    while work.done < rows and moved < PIECE:
        plane, row = work.done // s.rows, work.done % s.rows
        size = min(s.row_bytes - work.within, PIECE - moved)
        fault = memory.copy(
            s.dst + plane * <uint64_t> s.dst_plane_stride + row * <uint64_t> s.dst_row_stride + work.within,
            s.src + plane * <uint64_t> s.src_plane_stride + row * <uint64_t> s.src_row_stride + work.within,
            size, context, traffic, bad)
        if fault:
            return fault
        work.within += size
        if work.within == s.row_bytes:
            work.within = 0
            work.done += 1
        moved += size + 64
    finished[0] = work.done == rows
    return FAULT_NONE


cdef uint32_t fill(DeviceMemory memory, fill_command_t *command, work_t *work, context_t *context, traffic_t *traffic,
                   bint *finished, uint64_t *bad) noexcept nogil:
    cdef char pattern[4096]
    cdef uint64_t piece = 0, size, used = min(command.size - work.done, <uint64_t> sizeof(pattern))
    cdef uint32_t i, fault
    cdef uint16_t half = <uint16_t> command.pattern
    if command.width == 1:
        memset(pattern, command.pattern & 0xff, used)
    else:
        for i in range(<uint32_t> (used + 3) // 4):
            memcpy(&pattern[4 * i], &command.pattern, 4)
            if command.width == 2:
                memcpy(&pattern[4 * i], &half, 2)
                memcpy(&pattern[4 * i + 2], &half, 2)
    while work.done < command.size and piece < PIECE:
        size = min(command.size - work.done, <uint64_t> sizeof(pattern))
        fault = memory.store(command.dst + work.done, pattern, size, context, traffic, bad)
        if fault:
            return fault
        work.done += size
        piece += size
    finished[0] = work.done == command.size
    return FAULT_NONE


cdef uint32_t checksum(DeviceMemory memory, crc_command_t *command, work_t *work, context_t *context,
                       traffic_t *traffic, bint *finished, uint64_t *bad) noexcept nogil:
    cdef char buffer[16384]
    cdef uint64_t piece = 0, size
    cdef uint32_t fault, expected = 0
    while work.done < command.size and piece < PIECE:
        size = min(command.size - work.done, <uint64_t> sizeof(buffer))
        fault = memory.load(buffer, command.src + work.done, size, context, traffic, bad)
        if fault:
            return fault
        work.crc = maia_crc32(work.crc, <const unsigned char *> buffer, size)
        work.done += size
        piece += size
    finished[0] = work.done == command.size
    if not finished[0]:
        return FAULT_NONE
    if command.units != CRC_COMPARE:
        return memory.store(command.result, &work.crc, 4, context, traffic, bad)
    fault = memory.load(&expected, command.result, 4, context, traffic, bad)
    if fault == FAULT_NONE and expected != work.crc:
        bad[0] = command.src
        fault = FAULT_CHECKSUM
    return fault


cdef uint32_t signal(DeviceMemory memory, signal_remote_command_t *command, context_t *context, traffic_t *traffic,
                     uint64_t *bad) noexcept nogil:
    """A 32-bit store, or an atomic add, at an address: a peer's semaphore window, most likely."""
    cdef char *at = NULL
    cdef uint64_t size = 4
    cdef int kind = memory.resolve(command.address, &size, True, context, &at)
    if kind == KIND_MESSAGE and command.op == POST_SET:
        return memory.store(command.address, &command.value, 4, context, traffic, bad)
    if kind < 0 or kind == KIND_MESSAGE or size < 4:
        # Messages cannot add: two devices could lose one of their increments.
        bad[0] = command.address
        return FAULT_CONTEXT if kind == KIND_BAD_CONTEXT else FAULT_ADDRESS
    if command.op == POST_SET:
        store32(<uint32_t *> at, command.value)
    else:
        add32(<uint32_t *> at, command.value)
    if kind == KIND_PEER:
        memory.dma.ring(command.address)
    return FAULT_NONE
