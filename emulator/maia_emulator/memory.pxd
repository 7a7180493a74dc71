from libc.stdint cimport int64_t, uint32_t, uint64_t

from maia_emulator.dma cimport DmaTable
from maia_emulator.links cimport link_t
from maia_emulator.watch cimport watch_t

cdef enum:
    MAX_RANGES = 8
    KIND_HOST = 0
    KIND_HBM = 1
    KIND_SRAM = 2
    KIND_MESSAGE = 3
    KIND_PEER = 4
    KIND_BAD_ADDRESS = -1
    KIND_BAD_CONTEXT = -2

cdef struct context_t:
    bint live
    int queues
    int count           # ranges of HBM; 0: all of it, or, bounded, none
    uint64_t base[MAX_RANGES]
    uint64_t size[MAX_RANGES]
    bint bounded        # the rest holds, and commands count from the context's own first queue, semaphore and cluster
    int host_count
    uint64_t host_base[MAX_RANGES]
    uint64_t host_size[MAX_RANGES]
    uint32_t first_queue
    uint32_t queue_count
    uint32_t first_semaphore
    uint32_t semaphore_count
    uint32_t first_cluster
    uint32_t cluster_count

cdef struct traffic_t:
    uint64_t host_to_device
    uint64_t device_to_host
    uint64_t device_to_device
    uint64_t host_to_host
    uint64_t messages
    uint64_t from_peers
    uint64_t to_peers
    uint64_t since          # from when on its pieces could have left, with a model of links; 0: now
    uint64_t until          # when the last of them has left
    bint past_caches        # what is written is long, and not read again soon
    char *ahead             # what comes to the core meanwhile, or NULL
    watch_t *watch          # of a thread that looks after queues; else NULL

cdef class DeviceMemory:
    cdef readonly DmaTable dma
    cdef readonly int hbm_fd
    cdef readonly uint64_t hbm_bytes
    cdef readonly uint32_t tile_bytes
    cdef readonly uint32_t cluster_bytes
    cdef readonly uint32_t tiles
    cdef readonly uint32_t clusters
    cdef char *hbm
    cdef char *tile_sram
    cdef char *cluster_sram
    cdef link_t link
    cdef object read_message
    cdef object write_message
    cdef int scrub(self, context_t *context) except -1
    cdef int resolve(self, uint64_t address, uint64_t *size, bint write, context_t *context, char **at) noexcept nogil
    cdef int copy(self, uint64_t dst, uint64_t src, uint64_t size, context_t *context, traffic_t *traffic,
                  uint64_t *bad) noexcept nogil
    cdef int load(self, void *dst, uint64_t src, uint64_t size, context_t *context, traffic_t *traffic,
                  uint64_t *bad) noexcept nogil
    cdef int store(self, uint64_t dst, const void *src, uint64_t size, context_t *context, traffic_t *traffic,
                   uint64_t *bad) noexcept nogil
    cdef int transfer(self, uint64_t address, char *buffer, uint64_t size, bint write, context_t *context,
                      traffic_t *traffic, uint64_t *bad) noexcept nogil
    cdef void charge(self, uint64_t size, int source, uint64_t src, int target, uint64_t dst,
                     traffic_t *traffic) noexcept nogil
    cdef int reach(self, uint64_t address, uint64_t size, bint write, context_t *context, uint64_t *bad) noexcept nogil
    cdef int by_message(self, uint64_t address, char *buffer, uint64_t size, bint write,
                        traffic_t *traffic) noexcept nogil
