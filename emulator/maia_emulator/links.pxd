from libc.stdint cimport uint64_t

from maia_emulator.bells cimport bell_t

cdef struct link_t:         # a device's own, as it was told to be
    bint on
    double ns_per_byte
    uint64_t latency_ns
    bell_t *port

cdef uint64_t occupy(link_t *link, uint64_t since, uint64_t size, bint inward, bint outward, bell_t *source,
                     bell_t *target) noexcept nogil
