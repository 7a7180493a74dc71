"""What injections do to the command processor: it asks here about each command while any is armed."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from maia_emulator.injections cimport WENT, armed_t, trip
from maia_emulator.launch cimport launch_t
from maia_emulator.lists cimport end_listed_launches
from maia_emulator.memory cimport traffic_t
from maia_emulator.queue_state cimport DELAYED, HUNG, MAX_IN_FLIGHT, queue_t
from maia_emulator.queues cimport BLOCKED, ERROR_WATCHDOG, MOVED, FrontEnd
from maia_emulator.support cimport clock_ns, swap_if32
from maia_rt._fast.commands cimport (
    FAULT_ENGINE_HANG,
    FAULT_NONE,
    FAULT_RESET,
    INJECT_DRAWN,
    INJECTION_CORRUPT,
    INJECTION_DELAY,
    INJECTION_FAULT,
    INJECTION_HANG,
    OPCODE_COPY,
    OPCODE_COPY_ND,
    OPCODE_FILL,
    OPCODE_LAUNCH,
    OPCODE_WRITE_IMM,
    copy_descriptor_t,
)


cdef int judge(FrontEnd front, queue_t *q) noexcept nogil:
    """A command is about to start: MOVED where it may, BLOCKED while it is held, or FAILED."""
    cdef armed_t *found
    cdef uint64_t drawn = 0, now = clock_ns()
    if q.judged:
        return MOVED
    if q.held == 0:
        found = front.injections.judge(q.id, q.head + 1, q.command.opcode, &drawn)
        if found != NULL:
            if found.rule.kind == INJECTION_FAULT:
                return front.fail_here(q, found.rule.code, found.rule.value)
            if found.rule.kind == INJECTION_DELAY:
                q.held, q.held_ns = DELAYED, now + found.rule.value
            elif found.rule.kind == INJECTION_HANG:
                q.held, q.held_ns = HUNG, now
            elif found.rule.kind == INJECTION_CORRUPT:
                q.corrupt = True
                q.corrupt_bit = drawn if found.rule.flags & INJECT_DRAWN else found.rule.value
            else:
                strike(front, trip(found))
                if front.gone:
                    return BLOCKED
    if q.held == HUNG and front.watchdog_ns and now - q.held_ns > front.watchdog_ns:
        front.raise_error(ERROR_WATCHDOG)
        return front.fail_here(q, FAULT_ENGINE_HANG, 0)
    if q.held == DELAYED and now >= q.held_ns:
        q.held = 0
    if q.held:
        front.blocked = True
        return BLOCKED
    q.judged = q.command.opcode == OPCODE_LAUNCH
    return MOVED


cdef void corrupt(FrontEnd front, queue_t *q) noexcept nogil:
    """Flip a bit of what the command under way has written."""
    cdef copy_descriptor_t *s = &q.work.shape
    cdef traffic_t aside
    cdef uint64_t address = 0, size = 0, at, bad = 0
    cdef uint8_t byte = 0
    q.corrupt = False
    if q.command.opcode == OPCODE_COPY:
        address, size = q.command.payload[1], q.command.payload[2]
    elif q.command.opcode == OPCODE_FILL:
        address, size = q.command.payload[0], q.command.payload[1]
    elif q.command.opcode == OPCODE_WRITE_IMM:
        address, size = q.command.payload[0], q.command.units
    elif q.command.opcode == OPCODE_COPY_ND:
        size = s.row_bytes * s.rows * s.planes
    if size == 0:
        return
    at = (q.corrupt_bit >> 3) % size
    if q.command.opcode == OPCODE_COPY_ND:
        address = (s.dst + at // s.row_bytes // s.rows * <uint64_t> s.dst_plane_stride
                   + at // s.row_bytes % s.rows * <uint64_t> s.dst_row_stride)
        at %= s.row_bytes
    if front.memory.load(&byte, address + at, 1, q.context, &aside, &bad) == FAULT_NONE:
        byte ^= <uint8_t> (1 << (q.corrupt_bit & 7))
        front.memory.store(address + at, &byte, 1, q.context, &aside, &bad)


cdef void strike(FrontEnd front, uint32_t what) noexcept nogil:
    """FIRMWARE or GONE happens. What firmware and the function do about it is told to `on_trip`."""
    cdef queue_t *q
    cdef launch_t *launch
    cdef uint32_t i
    cdef int j
    front.trips |= what
    if not what & WENT:
        return
    front.gone = True
    for i in range(front.live_count):
        q = &front.queues[front.live[i]]
        end_listed_launches(&q.list, FAULT_RESET)
        for j in range(q.flight_count):
            launch = q.flight[(q.flight_first + j) % MAX_IN_FLIGHT].launch
            if launch != NULL:
                swap_if32(&launch.status, FAULT_NONE, FAULT_RESET)


cdef void let_go(FrontEnd front) noexcept nogil:
    """Nothing is armed any more: let go of everything that is held."""
    cdef uint32_t i
    for i in range(front.max_queues):
        front.queues[i].held, front.queues[i].judged, front.queues[i].corrupt = 0, False, False
    front.injecting = False
