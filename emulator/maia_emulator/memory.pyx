"""The device's address space: host memory, HBM, cluster SRAM and tile SRAM behind one 64-bit address.

Functions without the GIL expect their caller to hold the DMA table's lock for reading. Memory that only messages reach
is the exception that proves costly: the lock is given back while the client answers.
"""

import os

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memmove, memset

from maia_emulator.bells import imprint

from maia_emulator.bells cimport BELL_BYTES, PART_HBM
from maia_emulator.dma cimport DMA_READ, DMA_WRITE, DmaTable
from maia_emulator.links cimport occupy
from maia_emulator.support cimport copy_past_caches, pthread_rwlock_rdlock, pthread_rwlock_unlock
from maia_emulator.watch cimport step_aside, step_back, watch_t
from maia_rt._fast.commands cimport FAULT_ADDRESS, FAULT_CONTEXT

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t size)
    int madvise(void *address, size_t size, int advice)
    void *MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MADV_DONTNEED, MADV_HUGEPAGE

cdef extern from *:
    """
    #include <fcntl.h>
    #include <linux/falloc.h>
    /* Gives a memfd's pages back: whoever has it mapped reads zeros. */
    static int punch(int fd, long offset, long size) {
        return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size);
    }
    """
    int punch(int fd, long offset, long size) nogil

cdef enum:
    BOUNCE = 32768

cdef uint64_t HBM_BASE = <uint64_t> 1 << 48
cdef uint64_t CLUSTER_BASE = <uint64_t> 2 << 48
cdef uint64_t TILE_BASE = <uint64_t> 3 << 48


cdef void *anonymous(size_t size) except NULL:
    cdef void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if memory == MAP_FAILED:
        raise MemoryError(f"{size} bytes of SRAM")
    madvise(memory, size, MADV_HUGEPAGE)
    return memory


cdef void forget(char *memory, size_t size) noexcept nogil:
    """Zero anonymous memory, by giving its pages back where it has whole ones."""
    if (<size_t> memory | size) & 4095 or madvise(memory, size, MADV_DONTNEED):
        memset(memory, 0, size)


cdef inline int range_of(uint64_t *base, uint64_t *size, int count, uint64_t address) noexcept nogil:
    """Which of a context's ranges an address lies in, -1 for none."""
    cdef int i
    for i in range(count):
        if address >= base[i] and address - base[i] < size[i]:
            return i
    return -1


cdef inline bint foreign(context_t *context, uint64_t cluster) noexcept nogil:
    """Whether a cluster is not for the queues of this context."""
    return (context != NULL and context.bounded
            and not context.first_cluster <= cluster < <uint64_t> context.first_cluster + context.cluster_count)


cdef class DeviceMemory:
    """HBM, SRAM and the client's memory."""

    def __cinit__(self, *, uint32_t clusters, uint32_t tiles, uint32_t tile_bytes, uint32_t cluster_bytes,
                  uint64_t hbm_bytes, bytes id not None):
        cdef void *memory
        self.dma = DmaTable()
        self.tiles, self.clusters = tiles, clusters
        self.tile_bytes, self.cluster_bytes, self.hbm_bytes = tile_bytes, cluster_bytes, hbm_bytes
        self.hbm_fd = -1
        self.hbm_fd = os.memfd_create("maia-hbm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # BAR 4 is a power of two; the part above HBM is there for nobody to use.
        size = 1 << (hbm_bytes - 1).bit_length()
        os.ftruncate(self.hbm_fd, size + BELL_BYTES)
        imprint(self.hbm_fd, size, PART_HBM, id)
        memory = mmap(NULL, hbm_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, self.hbm_fd, 0)
        if memory == MAP_FAILED:
            raise MemoryError(f"{hbm_bytes} bytes of address space for HBM")
        self.hbm = <char *> memory
        madvise(memory, hbm_bytes, MADV_HUGEPAGE)
        self.tile_sram = <char *> anonymous(<size_t> tiles * tile_bytes)
        self.cluster_sram = <char *> anonymous(<size_t> clusters * cluster_bytes)

    def __dealloc__(self):
        if self.hbm != NULL:
            munmap(self.hbm, self.hbm_bytes)
        if self.tile_sram != NULL:
            munmap(self.tile_sram, <size_t> self.tiles * self.tile_bytes)
        if self.cluster_sram != NULL:
            munmap(self.cluster_sram, <size_t> self.clusters * self.cluster_bytes)
        if self.hbm_fd >= 0:
            os.close(self.hbm_fd)

    def set_messages(self, read, write):
        """Callbacks for memory that came without a descriptor: ``read(address, size)``, ``write(address, data)``."""
        self.read_message, self.write_message = read, write

    def clear(self):
        """Zero HBM and SRAM."""
        punch(self.hbm_fd, 0, self.hbm_bytes)
        madvise(self.tile_sram, <size_t> self.tiles * self.tile_bytes, MADV_DONTNEED)
        madvise(self.cluster_sram, <size_t> self.clusters * self.cluster_bytes, MADV_DONTNEED)

    cdef int scrub(self, context_t *context) except -1:
        """Zero what a context had for itself: its HBM, and the SRAM of its clusters."""
        cdef int i
        cdef uint64_t per_cluster = self.tiles // self.clusters
        for i in range(context.count):
            if punch(self.hbm_fd, context.base[i], context.size[i]):
                memset(self.hbm + context.base[i], 0, context.size[i])
        if context.bounded:
            forget(self.cluster_sram + context.first_cluster * <uint64_t> self.cluster_bytes,
                   context.cluster_count * <uint64_t> self.cluster_bytes)
            forget(self.tile_sram + context.first_cluster * per_cluster * self.tile_bytes,
                   context.cluster_count * per_cluster * self.tile_bytes)
        return 0

    def read(self, uint64_t address, uint64_t size):
        """Read device or client memory for firmware.

        Raises
        ------
        OSError
            EFAULT where nothing answers.
        """
        cdef bytearray data = bytearray(size)
        cdef char *raw = data
        cdef uint64_t bad = 0
        cdef int fault
        with nogil:
            pthread_rwlock_rdlock(&self.dma.lock)
            fault = self.load(raw, address, size, NULL, NULL, &bad)
            pthread_rwlock_unlock(&self.dma.lock)
        if fault:
            raise OSError(14, f"no memory at {bad:#x}")
        return bytes(data)

    def write(self, uint64_t address, bytes data not None):
        """Write device or client memory for firmware; raises as `read`."""
        cdef const char *raw = data
        cdef uint64_t bad = 0, size = len(data)
        cdef int fault
        with nogil:
            pthread_rwlock_rdlock(&self.dma.lock)
            fault = self.store(address, raw, size, NULL, NULL, &bad)
            pthread_rwlock_unlock(&self.dma.lock)
        if fault:
            raise OSError(14, f"no memory at {bad:#x}")

    def mapped(self, uint64_t address, uint64_t size):
        """Whether all of a range can be reached for writing."""
        cdef uint64_t bad = 0
        cdef int fault
        with nogil:
            pthread_rwlock_rdlock(&self.dma.lock)
            fault = self.reach(address, size, True, NULL, &bad)
            pthread_rwlock_unlock(&self.dma.lock)
        return fault == 0

    def is_direct(self, uint64_t address, uint64_t size):
        """Whether a range is one piece of memory that is reached without a message, for reading and writing."""
        cdef uint64_t length = size
        cdef char *at = NULL
        cdef int kind
        with nogil:
            pthread_rwlock_rdlock(&self.dma.lock)
            kind = self.resolve(address, &length, True, NULL, &at)
            pthread_rwlock_unlock(&self.dma.lock)
        return kind >= 0 and kind != KIND_MESSAGE and length >= size

    cdef int resolve(self, uint64_t address, uint64_t *size, bint write, context_t *context,
                     char **at) noexcept nogil:
        """Where an address lies; ``size`` is cut to what follows there without a gap. Returns a KIND."""
        cdef uint64_t window = address >> 48, offset, unit
        cdef int i, found
        if window == 0:
            if context != NULL and context.bounded:
                i = range_of(context.host_base, context.host_size, context.host_count, address)
                if i < 0:
                    return KIND_BAD_CONTEXT
                size[0] = min(size[0], context.host_base[i] + context.host_size[i] - address)
            found = self.dma.find(address, DMA_WRITE if write else DMA_READ, at, size)
            if found == 0:
                return KIND_HOST
            return KIND_MESSAGE if found == 1 else KIND_PEER if found == 2 else KIND_BAD_ADDRESS
        if window == 1:
            offset = address - HBM_BASE
            if offset >= self.hbm_bytes:
                return KIND_BAD_ADDRESS
            if context != NULL and (context.count or context.bounded):
                i = range_of(context.base, context.size, context.count, offset)
                if i < 0:
                    return KIND_BAD_CONTEXT
                size[0] = min(size[0], context.base[i] + context.size[i] - offset)
            size[0] = min(size[0], self.hbm_bytes - offset)
            at[0] = self.hbm + offset
            return KIND_HBM
        unit = (address >> 32) & 0xffff
        offset = <uint32_t> address
        if window == 2 and unit < self.clusters and offset < self.cluster_bytes:
            if foreign(context, unit):
                return KIND_BAD_CONTEXT
            size[0] = min(size[0], self.cluster_bytes - offset)
            at[0] = self.cluster_sram + unit * self.cluster_bytes + offset
            return KIND_SRAM
        if window == 3 and unit < self.tiles and offset < self.tile_bytes:
            if foreign(context, unit // (self.tiles // self.clusters)):
                return KIND_BAD_CONTEXT
            size[0] = min(size[0], self.tile_bytes - offset)
            at[0] = self.tile_sram + unit * self.tile_bytes + offset
            return KIND_SRAM
        return KIND_BAD_ADDRESS

    cdef void charge(self, uint64_t size, int source, uint64_t src, int target, uint64_t dst,
                     traffic_t *traffic) noexcept nogil:
        """Let a piece that was moved take its time on the links. The caller holds the DMA table's lock."""
        cdef bint inward = source == KIND_HOST or source == KIND_MESSAGE or source == KIND_PEER
        cdef bint outward = target == KIND_HOST or target == KIND_MESSAGE or target == KIND_PEER
        if inward or outward:
            traffic.until = max(traffic.until, occupy(
                &self.link, traffic.since, size, inward, outward,
                self.dma.bell_at(src) if source == KIND_PEER else NULL,
                self.dma.bell_at(dst) if target == KIND_PEER else NULL))

    cdef int reach(self, uint64_t address, uint64_t size, bint write, context_t *context,
                   uint64_t *bad) noexcept nogil:
        """0 where all of a range can be reached, else the fault and the first bad address."""
        cdef uint64_t length
        cdef char *at
        cdef int kind
        while size:
            length = size
            kind = self.resolve(address, &length, write, context, &at)
            if kind < 0:
                bad[0] = address
                return FAULT_CONTEXT if kind == KIND_BAD_CONTEXT else FAULT_ADDRESS
            address += length
            size -= length
        return 0

    cdef int by_message(self, uint64_t address, char *buffer, uint64_t size, bint write,
                        traffic_t *traffic) noexcept nogil:
        """Ask the client to read or write its own memory. Gives the table's lock back meanwhile."""
        cdef int fault = 0
        cdef watch_t *watch = traffic.watch if traffic != NULL else NULL
        pthread_rwlock_unlock(&self.dma.lock)
        if watch != NULL:
            step_aside(watch)
        with gil:
            try:
                if write:
                    self.write_message(address, buffer[:size])
                else:
                    data = self.read_message(address, size)
                    if <uint64_t> len(data) != size:
                        raise OSError(5, "short answer")
                    memcpy(buffer, <const char *> data, size)
            except (OSError, TypeError):  # TypeError: nobody listens for messages any more
                fault = FAULT_ADDRESS
        if watch != NULL:
            step_back(watch)
        pthread_rwlock_rdlock(&self.dma.lock)
        if traffic != NULL:
            traffic.messages += 1
        return fault

    cdef int load(self, void *dst, uint64_t src, uint64_t size, context_t *context, traffic_t *traffic,
                  uint64_t *bad) noexcept nogil:
        """Read ``size`` bytes at a device address into the engine's own memory."""
        return self.transfer(src, <char *> dst, size, False, context, traffic, bad)

    cdef int store(self, uint64_t dst, const void *src, uint64_t size, context_t *context, traffic_t *traffic,
                   uint64_t *bad) noexcept nogil:
        """Write ``size`` bytes of the engine's own memory to a device address."""
        return self.transfer(dst, <char *> src, size, True, context, traffic, bad)

    cdef int transfer(self, uint64_t address, char *buffer, uint64_t size, bint write, context_t *context,
                      traffic_t *traffic, uint64_t *bad) noexcept nogil:
        cdef uint64_t length
        cdef char *at
        cdef int kind, fault
        while size:
            length = size
            kind = self.resolve(address, &length, write, context, &at)
            fault = 0
            if kind < 0:
                fault = FAULT_CONTEXT if kind == KIND_BAD_CONTEXT else FAULT_ADDRESS
            elif kind == KIND_MESSAGE:
                fault = self.by_message(address, buffer, length, write, traffic)
            elif write:
                memcpy(at, buffer, length)
                if kind == KIND_PEER:
                    self.dma.ring(address)
            else:
                memcpy(buffer, at, length)
            if self.link.on and traffic != NULL and fault == 0:
                if write:
                    self.charge(length, KIND_SRAM, 0, kind, address, traffic)
                else:
                    self.charge(length, kind, address, KIND_SRAM, 0, traffic)
            if fault:
                bad[0] = address
                return fault
            buffer += length
            address += length
            size -= length
        return 0

    cdef int copy(self, uint64_t dst, uint64_t src, uint64_t size, context_t *context, traffic_t *traffic,
                  uint64_t *bad) noexcept nogil:
        """Move bytes between any two device addresses."""
        cdef uint64_t length, chunk
        cdef char *to
        cdef char *origin
        cdef int source, target, fault
        cdef char bounce[BOUNCE]
        while size:
            length = size
            source = self.resolve(src, &length, False, context, &origin)
            chunk = length
            target = self.resolve(dst, &chunk, True, context, &to)
            length = min(length, chunk)
            if source < 0 or target < 0:
                bad[0] = src if source < 0 else dst
                return FAULT_CONTEXT if KIND_BAD_CONTEXT in (source, target) else FAULT_ADDRESS
            if source == KIND_MESSAGE or target == KIND_MESSAGE:
                length = min(length, <uint64_t> BOUNCE)
                fault = self.load(bounce, src, length, context, traffic, bad)
                if fault == 0:
                    fault = self.store(dst, bounce, length, context, traffic, bad)
                if fault:
                    return fault
            else:
                if traffic.past_caches and (to + length <= origin or origin + length <= to):
                    copy_past_caches(to, origin, length, traffic.ahead)
                else:
                    memmove(to, origin, length)
                if target == KIND_PEER:
                    self.dma.ring(dst)
                if self.link.on:
                    self.charge(length, source, src, target, dst, traffic)
            if source == KIND_PEER or target == KIND_PEER:
                traffic.from_peers += length if source == KIND_PEER else 0
                traffic.to_peers += length if target == KIND_PEER else 0
            elif source == KIND_HOST or source == KIND_MESSAGE:
                if target == KIND_HOST or target == KIND_MESSAGE:
                    traffic.host_to_host += length
                else:
                    traffic.host_to_device += length
            elif target == KIND_HOST or target == KIND_MESSAGE:
                traffic.device_to_host += length
            else:
                traffic.device_to_device += length
            src += length
            dst += length
            size -= length
        return 0
