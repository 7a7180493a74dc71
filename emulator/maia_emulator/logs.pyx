"""What GET_LOG tells of queues and semaphores: taken in one moment, between two rounds of the command processor."""

from libc.stdint cimport uint32_t
from libc.string cimport memcpy, memset

from maia_emulator.commands cimport as_fetched
from maia_emulator.queue_state cimport FETCHED, LISTING, MAX_IN_FLIGHT, RUNNING, STARTED, in_flight_t, queue_t
from maia_emulator.queues cimport FrontEnd, satisfied
from maia_emulator.support cimport clock_ns, load32
from maia_rt._fast.commands cimport (
    COMMAND_BYTES,
    FLAG_BARRIER,
    NO_QUEUE,
    NO_SEMAPHORE,
    OPCODE_LAUNCH,
    OPCODE_WAIT_VALUE,
    QUEUE_RUNNING,
    QUEUE_STOPPED,
    STAGE_BARRIER,
    STAGE_IDLE,
    STAGE_REPORT_ROOM,
    STAGE_RUNNING,
    STAGE_SEMAPHORE,
    STAGE_TILES,
    STAGE_VALUE,
    WRITER_HOST,
    WRITER_MIRROR,
    WRITER_NONE,
    command_t,
    queue_log_t,
    semaphore_log_t,
    wait_value_command_t,
)


def queue_log(FrontEnd front not None):
    """QUEUE_LOG records of all queues, by id."""
    cdef queue_log_t record
    cdef uint32_t i
    parts = []
    with nogil:
        front.take()
    try:
        for i in range(front.max_queues):
            if front.queues[i].live:
                describe(front, &front.queues[i], &record)
                parts.append((<char *> &record)[:sizeof(record)])
    finally:
        front.give()
    return b"".join(parts)


def semaphore_log(FrontEnd front not None):
    """SEMAPHORE_LOG records of the semaphores that were ever written or waited for, by index."""
    cdef semaphore_log_t record
    cdef uint32_t i
    parts = []
    with nogil:
        front.take()
    try:
        for i in range(front.semaphore_count):
            if describe_semaphore(front, i, &record):
                parts.append((<char *> &record)[:sizeof(record)])
    finally:
        front.give()
    return b"".join(parts)


cdef void describe(FrontEnd front, queue_t *q, queue_log_t *record) noexcept nogil:
    cdef in_flight_t *entry = NULL
    cdef int i
    memset(record, 0, sizeof(queue_log_t))
    record.time_ns = clock_ns()
    record.queue, record.head, record.retired, record.tail = q.id, q.head, q.retired, q.tail
    record.state = QUEUE_RUNNING if q.state == RUNNING else QUEUE_STOPPED
    record.fault, record.fault_sequence = q.fault, q.fault_sequence
    record.report_tail, record.report_head = q.report_tail, q.report_head
    record.semaphore = <uint32_t> NO_SEMAPHORE
    for i in range(q.flight_count):
        if q.flight[(q.flight_first + i) % MAX_IN_FLIGHT].launch != NULL:
            record.in_flight += 1
            if entry == NULL:
                entry = &q.flight[(q.flight_first + i) % MAX_IN_FLIGHT]
    record.in_flight += q.list.flight_count
    if q.state == RUNNING and q.stage == LISTING and q.list.flight_count:
        # Nothing is at hand: the list waits for its own launches, of which the first in its order is told.
        entry = &q.list.flight[0]
        for i in range(1, q.list.flight_count):
            if q.list.flight[i].sequence < entry.sequence:
                entry = &q.list.flight[i]
        record.stage, record.sequence, record.since_ns = STAGE_RUNNING, q.head + 1, entry.start_ns
        record.list_index, record.list_count = <uint32_t> entry.sequence, q.list.count
        memcpy(record.command, &entry.command, COMMAND_BYTES)
    elif q.state == RUNNING and q.stage:
        record.sequence, record.since_ns = q.head + 1, q.since_ns
        record.list_index, record.list_count = q.list.index if q.list.count else 0, q.list.count
        memcpy(record.command, &q.command, COMMAND_BYTES)
        record.stage = waits_for(front, q, record)
    elif entry != NULL:
        record.stage, record.sequence, record.since_ns = STAGE_RUNNING, entry.sequence, entry.start_ns
        memcpy(record.command, &entry.command, COMMAND_BYTES)
    else:
        record.stage = STAGE_IDLE
    as_fetched(<command_t *> record.command, q.context)


cdef uint32_t waits_for(FrontEnd front, queue_t *q, queue_log_t *record) noexcept nogil:
    """The stage of the command at hand: what it waits for, in the order of `FrontEnd.advance`."""
    cdef wait_value_command_t *wait
    cdef uint32_t value
    cdef int i
    if q.stage == STARTED and q.command.opcode == OPCODE_WAIT_VALUE:
        wait = <wait_value_command_t *> &q.command
        record.address, record.value, record.wanted = wait.address, q.work.word, wait.value
        record.condition, record.mask = wait.condition, wait.mask
        return STAGE_VALUE
    if q.stage != FETCHED or q.held:
        return STAGE_RUNNING
    if not front.may_start(q):
        if q.list.count:
            return STAGE_BARRIER
        if q.flight_count and (q.command.flags & FLAG_BARRIER or q.flight_count == MAX_IN_FLIGHT):
            return STAGE_BARRIER
        return STAGE_REPORT_ROOM
    for i in range(2):
        value = load32(&front.semaphores[q.command.pre[i].index])
        if not satisfied(&q.command.pre[i], value):
            record.semaphore, record.value = q.command.pre[i].index, value
            record.wanted, record.condition = q.command.pre[i].value, q.command.pre[i].op
            return STAGE_SEMAPHORE
    return STAGE_TILES if q.command.opcode == OPCODE_LAUNCH else STAGE_RUNNING


cdef bint describe_semaphore(FrontEnd front, uint32_t index, semaphore_log_t *record) noexcept nogil:
    """Fill in a record; False where there is nothing to tell."""
    cdef uint32_t value = load32(&front.semaphores[index])
    memset(record, 0, sizeof(semaphore_log_t))
    record.index, record.value, record.queue = index, value, <uint32_t> NO_QUEUE
    if index < front.max_queues:
        if not front.queues[index].live:
            return False
        record.writer, record.queue = WRITER_MIRROR, index
        record.sequence, record.time_ns = front.queues[index].published, front.queues[index].published_ns
        return True
    if value != front.writers[index].value:
        # A plain store through BAR 2, which nobody saw: only its value is known.
        record.writer = WRITER_HOST
        return True
    record.writer = front.writers[index].kind
    if record.writer != WRITER_NONE:
        record.time_ns, record.sequence = front.writers[index].time_ns, front.writers[index].sequence
        record.queue = front.writers[index].queue
    return record.writer != WRITER_NONE or front.writers[index].awaited
