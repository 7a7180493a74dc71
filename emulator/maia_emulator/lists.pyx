"""INDIRECT lists, and what makes them more than a row of commands: branches, values in memory, times, failures.

The command processor drives them; here is what needs nothing but a queue and memory.
"""

from libc.stdint cimport int32_t, uint32_t, uint64_t

from maia_emulator.memory cimport KIND_BAD_CONTEXT, KIND_MESSAGE, DeviceMemory, context_t, traffic_t
from maia_emulator.queue_state cimport MAX_IN_FLIGHT, list_fault_t, list_t, queue_t
from maia_emulator.support cimport clock_ns, load32, swap_if32
from maia_rt._fast.commands cimport (
    BRANCH_SEMAPHORE,
    CONDITION_AND,
    CONDITION_EQ,
    CONDITION_GE,
    FAULT_ADDRESS,
    FAULT_CONTEXT,
    FAULT_NONE,
    FLAG_BARRIER,
    LIST_CONCURRENT,
    OPCODE_BRANCH,
    branch_command_t,
    command_t,
    indirect_command_t,
    listed_times_t,
    wait_value_command_t,
)

cdef enum:
    MESSAGE_PAUSE_NS = 1000000  # between looks at a word that only messages reach


cdef void begin_list(queue_t *q) noexcept nogil:
    """Take the INDIRECT command under way as the queue's list."""
    cdef indirect_command_t *command = <indirect_command_t *> &q.command
    q.list.command = q.command
    q.list.at, q.list.times, q.list.count = command.list, command.times, command.count
    q.list.concurrent = command.options & LIST_CONCURRENT
    q.list.index = q.list.next = 0
    q.list.flight_count = 0
    q.list.fault.code = FAULT_NONE


cdef bint list_may_start(queue_t *q) noexcept nogil:
    """Whether the listed command at hand need not wait for those in flight."""
    if q.list.flight_count == 0:
        return True
    return (q.list.concurrent and q.list.flight_count < MAX_IN_FLIGHT and not q.command.flags & FLAG_BARRIER
            and q.command.opcode != OPCODE_BRANCH)


cdef void note_list_fault(list_t *list, uint32_t index, command_t *command, uint32_t code, uint64_t bad, uint32_t unit,
                          uint32_t kernel) noexcept nogil:
    """A listed command has failed: of several, the list tells of the first."""
    cdef list_fault_t *fault = &list.fault
    if fault.code and fault.index <= index:
        return
    fault.code, fault.index, fault.unit, fault.kernel, fault.bad = code, index, unit, kernel, bad
    fault.command = command[0]


cdef void end_listed_launches(list_t *list, uint32_t code) noexcept nogil:
    """Let what the list has on tiles fail at its next macro-operation."""
    cdef int i
    for i in range(list.flight_count):
        swap_if32(&list.flight[i].launch.status, FAULT_NONE, code)


cdef uint32_t write_times(DeviceMemory memory, queue_t *q, uint32_t index, uint64_t start_ns, uint64_t end_ns,
                          traffic_t *traffic, uint64_t *bad) noexcept nogil:
    """Record when a listed command ran."""
    cdef listed_times_t times
    times.start_ns, times.end_ns = start_ns, end_ns
    return memory.store(q.list.times + <uint64_t> index * sizeof(listed_times_t), &times, sizeof(listed_times_t),
                        q.context, traffic, bad)


cdef inline bint holds(uint32_t word, uint32_t value, uint32_t condition) noexcept nogil:
    if condition == CONDITION_GE:
        return <int32_t> (word - value) >= 0
    if condition == CONDITION_EQ:
        return word == value
    if condition == CONDITION_AND:
        return word & value != 0
    return word != value


cdef uint32_t load_word(DeviceMemory memory, uint64_t address, context_t *context, traffic_t *traffic, uint32_t *word,
                        bint *by_message, uint64_t *bad) noexcept nogil:
    """A 32-bit word as a whole, with acquire, wherever it lies."""
    cdef char *at = NULL
    cdef uint64_t size = 4
    cdef int kind = memory.resolve(address, &size, False, context, &at)
    by_message[0] = kind == KIND_MESSAGE
    if kind < 0:
        bad[0] = address
        return FAULT_CONTEXT if kind == KIND_BAD_CONTEXT else FAULT_ADDRESS
    if kind == KIND_MESSAGE or size < 4:
        return memory.load(word, address, 4, context, traffic, bad)
    word[0] = load32(<uint32_t *> at)
    return FAULT_NONE


cdef uint32_t wait_for_value(DeviceMemory memory, command_t *command, work_t *work, context_t *context,
                             traffic_t *traffic, bint *finished, uint64_t *bad) noexcept nogil:
    """Look once for a WAIT_VALUE; ``finished`` where its condition holds."""
    cdef wait_value_command_t *c = <wait_value_command_t *> command
    cdef uint32_t word = 0, fault
    cdef bint by_message = False
    finished[0] = False
    # The time of the next look, where looking costs the client an answer.
    if work.done and clock_ns() < work.done:
        return FAULT_NONE
    fault = load_word(memory, c.address, context, traffic, &word, &by_message, bad)
    if fault:
        return fault
    work.word = word
    finished[0] = holds(word & c.mask, c.value, c.condition)
    work.done = clock_ns() + MESSAGE_PAUSE_NS if by_message else 0
    return FAULT_NONE


cdef uint32_t follow_branch(DeviceMemory memory, queue_t *q, uint32_t *semaphores, traffic_t *traffic,
                            uint64_t *bad) noexcept nogil:
    """Set where the list goes on after the BRANCH at hand."""
    cdef branch_command_t *c = <branch_command_t *> &q.command
    cdef uint32_t word = 0, fault
    cdef bint by_message = False
    if c.source == BRANCH_SEMAPHORE:
        word = load32(&semaphores[c.where])
    else:
        fault = load_word(memory, c.where, q.context, traffic, &word, &by_message, bad)
        if fault:
            return fault
    if holds(word & c.mask, c.value, c.condition):
        q.list.next = c.target
    return FAULT_NONE
