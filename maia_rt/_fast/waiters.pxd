from libc.stdint cimport int64_t, uint32_t, uint64_t

from maia_rt._fast.commands cimport progress_t


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass

cdef enum WaitStatus:
    DONE = 0
    TIMED_OUT = 1
    STOPPED = 2
    LOST = 3
    CLOSED = 4
    PENDING = 5

cdef struct waiter_t:
    uint64_t sequence
    int fd
    uint32_t leads
    waiter_t *next

cdef struct watch_t:
    uint64_t sequence   # the smallest that is wanted; valid while `wanting`
    bint wanting
    int fd
    watch_t *next

cdef class Waiters:
    cdef pthread_mutex_t mutex
    cdef waiter_t *first
    cdef watch_t *watches
    cdef const progress_t *progress
    cdef unsigned char *doorbell
    cdef bint can_sleep
    cdef uint32_t woken     # the sleep that the device was last woken from
    cdef uint64_t armed
    cdef uint32_t closing
    cdef int active
    cdef readonly int queue_fd
    cdef int liveness_fd
    cdef int event_fd
    cdef int spares[16]
    cdef int spare_count
    cdef int64_t spin_ns
    cdef int64_t spin_budget_ns
    cdef readonly object wake
    cdef object service
    cdef object on_event
    cdef readonly uint64_t sleeps

    cdef int look(self, uint64_t sequence) noexcept nogil
    cdef int wait(self, uint64_t sequence, int64_t timeout_ns) except -1
    cdef void kick_all(self) noexcept nogil
    cdef int rearm(self) except -1
    cdef bint shut(self, int64_t timeout_ns)
    cdef bint device_sleeps(self) noexcept nogil
    cdef int wake_device(self) except -1

cdef class Watch:
    cdef watch_t me
    cdef readonly Waiters waiters
