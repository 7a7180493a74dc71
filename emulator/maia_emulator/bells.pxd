from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    BELL_BYTES = 4096       # of each file, behind its BAR

cdef enum:                  # bell_t.part, and what a sleeper wants to hear of
    PART_DOORBELLS = 1      # BAR 2: a queue waits for a semaphore
    PART_HBM = 2            # BAR 4: a queue waits for a value in memory

cdef struct bell_t:         # page aligned, zero but for what is said
    uint64_t magic
    uint64_t id[2]          # the device: the same behind both of its BARs
    uint32_t part
    uint32_t padding[9]
    uint32_t rings          # the futex
    uint32_t wants          # sum of parts whose writer shall ring; 0 while awake
    uint32_t padding1[14]
    uint64_t in_until       # the lanes of its port (links.pyx)
    uint64_t out_until

cdef void ring(bell_t *bell, uint32_t part) noexcept nogil
cdef void rouse(bell_t *bell) noexcept nogil
