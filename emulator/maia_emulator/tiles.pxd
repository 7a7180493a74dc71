from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from maia_emulator.memory cimport DeviceMemory, context_t, traffic_t
from maia_emulator.support cimport pthread_cond_t, pthread_mutex_t
from maia_rt._fast.commands cimport op_t

cdef enum:
    MAX_ARGS = 32
    TILE_SEMAPHORES = 64
    MAX_WORKERS = 64

cdef struct kernel_t:
    bint live
    uint32_t group          # the first handle of the image it came with
    uint32_t running
    uint32_t tiles
    uint32_t arg_count
    uint8_t arg_kind[MAX_ARGS]
    uint16_t arg_alignment[MAX_ARGS]
    uint64_t arg_bytes[MAX_ARGS]
    op_t *ops
    uint32_t *first         # tiles * 3 streams: where each starts in ops, and
    uint32_t *length        # how many operations it has

cdef struct unit_t:         # a tile's part in a launch
    launch_t *launch
    unit_t *next
    uint32_t logical
    uint32_t physical
    uint32_t at[3]
    uint32_t semaphores[TILE_SEMAPHORES]
    uint64_t random

cdef struct launch_t:
    kernel_t *kernel
    uint32_t handle
    context_t *context
    uint64_t args[MAX_ARGS]
    char *direct[MAX_ARGS]  # NULL: reached through the DMA table
    uint32_t semaphores[TILE_SEMAPHORES]
    uint32_t remaining
    uint32_t status         # a FaultCode; the first one wins
    uint32_t detail
    uint32_t unit
    uint64_t bad
    uint64_t end_ns
    uint32_t steps          # operations done, for the watchdog
    uint32_t done
    unit_t *units

cdef struct worker_t:
    uint64_t macs
    uint64_t vector_elements
    uint64_t tile_in
    uint64_t tile_out
    uint64_t macro_ops
    uint64_t busy[3]
    traffic_t traffic
    float *scratch
    uint64_t padding[4]

cdef class Tiles:
    cdef readonly DeviceMemory memory
    cdef readonly uint32_t count
    cdef readonly int workers
    cdef uint64_t seed
    cdef uint64_t launches
    cdef list threads
    cdef worker_t *worker
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t available
    cdef unit_t *head
    cdef unit_t *tail
    cdef bint stopping
    cdef uint32_t *sleeping  # the front end's flag: 1 while it sleeps
    cdef int wake_fd
    cdef launch_t *prepare(self, kernel_t *kernel, uint32_t handle, context_t *context, const uint64_t *args,
                           const uint32_t *physical, uint32_t *status, uint64_t *bad) noexcept nogil
    cdef void start(self, launch_t *launch) noexcept nogil
    cdef void release(self, launch_t *launch) noexcept nogil
    cdef void push(self, unit_t *unit) noexcept nogil
    cdef void loop(self, worker_t *worker) noexcept nogil
    cdef bint run(self, unit_t *unit, worker_t *worker) noexcept nogil
    cdef bint ready(self, unit_t *unit, op_t *op) noexcept nogil
    cdef void post(self, unit_t *unit, op_t *op) noexcept nogil
    cdef uint32_t execute(self, unit_t *unit, op_t *op, worker_t *worker, uint64_t *bad) noexcept nogil
    cdef uint32_t move(self, unit_t *unit, op_t *op, worker_t *worker, uint64_t *bad) noexcept nogil
    cdef uint32_t move_row(self, unit_t *unit, op_t *op, uint64_t dst, uint64_t src, uint64_t size,
                           worker_t *worker, uint64_t *bad) noexcept nogil
    cdef uint32_t gather(self, unit_t *unit, op_t *op, worker_t *worker, uint64_t *bad) noexcept nogil
    cdef uint32_t fill(self, unit_t *unit, op_t *op, worker_t *worker, uint64_t *bad) noexcept nogil
    cdef void tensor(self, unit_t *unit, op_t *op, worker_t *worker) noexcept nogil
    cdef uint32_t vector(self, unit_t *unit, op_t *op, worker_t *worker) noexcept nogil

cdef int fill_kernel(kernel_t *out, object kernel, uint32_t group) except -1
cdef void free_kernel(kernel_t *kernel) noexcept
