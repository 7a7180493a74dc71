from libc.stdint cimport uint32_t, uint64_t

from maia_emulator.bells cimport bell_t
from maia_emulator.launch cimport kernel_t, launch_t, unit_t, worker_t
from maia_emulator.memory cimport DeviceMemory, context_t
from maia_emulator.support cimport pthread_cond_t, pthread_mutex_t

cdef class Tiles:
    cdef readonly DeviceMemory memory
    cdef readonly uint32_t count
    cdef readonly int workers
    cdef uint64_t seed
    cdef uint64_t launches
    cdef list threads
    cdef worker_t *worker
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t available
    cdef unit_t *head
    cdef unit_t *tail
    cdef bint stopping
    cdef uint32_t *sleeping  # the front end's word: not 0 while it sleeps
    cdef bell_t *bell
    cdef launch_t *prepare(self, kernel_t *kernel, uint32_t handle, context_t *context, const uint64_t *args,
                           const uint32_t *physical, uint32_t *status, uint64_t *bad) noexcept nogil
    cdef void start(self, launch_t *launch) noexcept nogil
    cdef void release(self, launch_t *launch) noexcept nogil
    cdef void push(self, unit_t *unit) noexcept nogil
    cdef void loop(self, worker_t *worker) noexcept nogil
    cdef bint run(self, unit_t *unit, worker_t *worker) noexcept nogil

cdef int fill_kernel(kernel_t *out, object kernel, uint32_t group) except -1
cdef void free_kernel(kernel_t *kernel) noexcept
