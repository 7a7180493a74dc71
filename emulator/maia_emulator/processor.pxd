from libc.stdint cimport uint32_t, uint64_t

from maia_emulator.watch cimport watch_t

cdef enum:
    MAX_FRONTS = 64

cdef class Processor:
    cdef list members
    cdef list threads
    cdef uint32_t count
    cdef uint32_t cores
    cdef void *fronts[MAX_FRONTS]
    cdef watch_t watch
    cdef void loop(self) noexcept nogil
    cdef int look(self, uint64_t *now) noexcept nogil
    cdef bint doze(self, uint64_t now, bint busy) noexcept nogil
