"""Kernels and launches as the command processor and the tiles share them."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from maia_emulator.memory cimport context_t, traffic_t
from maia_rt._fast.commands cimport op_t

cdef enum:
    MAX_ARGS = 32
    TILE_SEMAPHORES = 64

cdef struct kernel_t:
    bint live
    uint32_t group          # the first handle of the image it came with
    context_t *context      # whose queues may launch it; NULL: any
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
    uint64_t due[3]         # when the operation that an engine is at leaves the links; 0: it has not begun
    uint32_t semaphores[TILE_SEMAPHORES]
    uint64_t random

cdef struct launch_t:
    kernel_t *kernel
    uint32_t handle
    context_t *context
    uint64_t args[MAX_ARGS]
    char *direct[MAX_ARGS]  # NULL: reached through the DMA table
    bint past_caches[MAX_ARGS]      # long, written, and no other argument's memory
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
