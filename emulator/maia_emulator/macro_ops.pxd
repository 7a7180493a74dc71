from libc.stdint cimport uint32_t, uint64_t

from maia_emulator.launch cimport unit_t, worker_t
from maia_emulator.memory cimport DeviceMemory
from maia_rt._fast.commands cimport op_t

cdef uint32_t run_op(DeviceMemory memory, unit_t *unit, op_t *op, worker_t *worker, uint64_t *bad) noexcept nogil
