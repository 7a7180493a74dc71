from libc.stdint cimport uint32_t, uint64_t

from maia_emulator.bells cimport bell_t
from maia_emulator.support cimport pthread_rwlock_t

cdef enum:
    DMA_READ = 1
    DMA_WRITE = 2

cdef struct mapping_t:
    uint64_t iova
    uint64_t size
    char *memory        # NULL: reached by messages only
    uint32_t access
    int file

cdef struct file_t:
    uint64_t device
    uint64_t inode
    char *base
    uint64_t size
    uint32_t references
    bint writable
    uint32_t part       # of a device, a peer or ourselves: what is its bell's part; else 0
    bell_t *bell        # to ring after a store; NULL where that device's BAR 2 is not mapped

cdef class DmaTable:
    cdef pthread_rwlock_t lock
    cdef mapping_t *mappings
    cdef size_t count
    cdef size_t capacity
    cdef file_t *files
    cdef int file_count
    cdef readonly uint64_t generation
    cdef bint enabled
    cdef int peers              # files that are parts of devices
    cdef size_t position(self, uint64_t iova) noexcept nogil
    cdef int find(self, uint64_t address, uint32_t access, char **memory, uint64_t *size) noexcept nogil
    cdef int open_file(self, int fd, uint64_t offset, uint64_t size, bint write) except -1
    cdef void ring(self, uint64_t address) noexcept nogil
    cdef bell_t *bell_at(self, uint64_t address) noexcept nogil
    cdef file_t *file_at(self, uint64_t address) noexcept nogil
    cdef void tie_bells(self) noexcept nogil
    cdef void drop(self, int file) noexcept nogil
