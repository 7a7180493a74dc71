"""Injections as the command processor asks for them."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from maia_rt._fast.commands cimport MAX_INJECTIONS, injection_t

cpdef enum:                 # what struck that others than the queue must be told
    FELL_SILENT = 1
    DIED = 2
    WENT = 4
    HUNG_UP = 8

cdef struct armed_t:
    injection_t rule
    uint32_t number
    uint32_t struck
    bint spent
    uint64_t *matches       # of each queue, so far

cdef class Injections:
    cdef armed_t armed[MAX_INJECTIONS]
    cdef uint32_t count
    cdef uint32_t numbers       # given so far
    cdef uint32_t max_queues
    cdef uint64_t struck
    cdef armed_t *judge(self, uint32_t queue, uint64_t sequence, uint8_t opcode, uint64_t *drawn) noexcept nogil
    cdef void compact(self) noexcept nogil
    cdef void clear(self) noexcept nogil

cdef uint32_t trip(armed_t *armed) noexcept nogil
