"""What the threads that serve front ends share, for those who must let another one watch meanwhile."""

from libc.stdint cimport uint32_t

cdef struct watch_t:
    uint32_t active         # threads that look after queues
    uint32_t dozing         # 1: one of the others sleeps on the bells
    uint32_t calls          # the futex that the rest are parked on
    uint32_t poke           # a futex in the sleeper's list
    uint32_t stopping

cdef void step_aside(watch_t *watch) noexcept nogil
cdef void step_back(watch_t *watch) noexcept nogil
cdef void call_one(watch_t *watch) noexcept nogil
cdef bint park(watch_t *watch) noexcept nogil
