from libc.stdint cimport uint64_t

from maia_emulator.support cimport pthread_mutex_t

cdef class Vectors:
    cdef pthread_mutex_t lock
    cdef readonly int count
    cdef int *eventfds
    cdef unsigned char *masked
    cdef unsigned char *waiting
    cdef readonly uint64_t fired
    cdef void fire(self, int vector) noexcept nogil
    cdef void deliver(self, int vector) noexcept nogil
