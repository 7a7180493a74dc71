from libc.stdint cimport uint32_t

from maia_emulator.queue_state cimport queue_t
from maia_emulator.queues cimport FrontEnd

cdef int judge(FrontEnd front, queue_t *q) noexcept nogil
cdef void corrupt(FrontEnd front, queue_t *q) noexcept nogil
cdef void strike(FrontEnd front, uint32_t what) noexcept nogil
cdef void let_go(FrontEnd front) noexcept nogil
