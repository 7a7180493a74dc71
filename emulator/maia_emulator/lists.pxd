from libc.stdint cimport uint32_t, uint64_t

from maia_emulator.commands cimport work_t
from maia_emulator.memory cimport DeviceMemory, context_t, traffic_t
from maia_emulator.queue_state cimport list_t, queue_t
from maia_rt._fast.commands cimport command_t

cdef void begin_list(queue_t *q) noexcept nogil
cdef bint list_may_start(queue_t *q) noexcept nogil
cdef void note_list_fault(list_t *list, uint32_t index, command_t *command, uint32_t code, uint64_t bad, uint32_t unit,
                          uint32_t kernel) noexcept nogil
cdef void end_listed_launches(list_t *list, uint32_t code) noexcept nogil
cdef uint32_t write_times(DeviceMemory memory, queue_t *q, uint32_t index, uint64_t start_ns, uint64_t end_ns,
                          traffic_t *traffic, uint64_t *bad) noexcept nogil
cdef uint32_t wait_for_value(DeviceMemory memory, command_t *command, work_t *work, context_t *context,
                             traffic_t *traffic, bint *finished, uint64_t *bad) noexcept nogil
cdef uint32_t follow_branch(DeviceMemory memory, queue_t *q, uint32_t *semaphores, traffic_t *traffic,
                            uint64_t *bad) noexcept nogil
