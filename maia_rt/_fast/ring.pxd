from cpython.buffer cimport Py_buffer
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from maia_rt._fast.commands cimport command_t, progress_t, report_t, semaphore_op_t
from maia_rt._fast.sites cimport site_t
from maia_rt._fast.waiters cimport Waiters, pthread_mutex_t


cdef class Account:
    cdef readonly uint32_t number
    cdef readonly str name
    cdef readonly uint32_t priority
    cdef public uint64_t last
    cdef public uint64_t submitted
    cdef readonly uint32_t stopped
    cdef public uint64_t follow
    cdef public uint64_t failed
    cdef public uint64_t aborted
    cdef public object failure
    cdef public list lost
    cdef public dict queues

cdef class Ring:
    cdef object __weakref__
    cdef Py_buffer views[5]
    cdef int view_count
    cdef command_t *slots
    cdef const report_t *reports
    cdef const progress_t *progress_block
    cdef uint8_t *doorbell
    cdef uint64_t *args
    cdef uint64_t args_address
    cdef uint64_t mask
    cdef uint64_t head
    cdef uint64_t limit
    cdef uint64_t initial
    cdef int gate
    cdef int held_over      # the gate that `hold` found
    cdef bint can_sleep
    cdef uint32_t report_head
    cdef uint32_t report_mask
    cdef uint32_t reports_asked
    cdef uint32_t reports_limit
    cdef list records
    cdef uint32_t *owners   # by slot: the number of the account that submitted it, 0 for none
    cdef site_t *sites      # by slot: the submitting line; NULL where nobody wants to know
    cdef public Account sole
    cdef pthread_mutex_t batch
    cdef readonly Waiters waiters
    cdef readonly str name
    cdef readonly uint64_t doorbells
    cdef public int64_t timeout_ns

cdef void Ring_encode(command_t *slot, uint8_t opcode, uint8_t flags, uint32_t units,
                      uint64_t a, uint64_t b, uint64_t c) noexcept
cdef int Ring_semaphores(Ring self, semaphore_op_t *slots, tuple operations) except -1
cdef int Ring_check_arguments(Ring self, tuple args) except -1
cdef uint64_t Ring_arguments(Ring self, tuple args) except 1
cdef int Ring_prepare(Ring self, int64_t timeout_ns) except -1
cdef int Ring_ask_report(Ring self) except -1
cdef object Ring_publish(Ring self, command_t *slot, Account account)
