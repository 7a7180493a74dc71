"""The client's memory as the device sees it: a sorted table of DMA mappings.

With a guest's IOMMU on, QEMU maps 4 KiB at a time, each page with a descriptor of the same file. So there is one mmap a
file, shared by all mappings into it, and a look-up runs on over neighbours that continue each other in the file too.

Engine threads hold ``lock`` for reading while they touch client memory; unmapping takes it for writing, which is how an
unmap waits until no engine touches the range.
"""

import errno
import os
import stat

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memmove

from maia_emulator.bells import recognise

from maia_emulator.bells cimport ring as ring_bell
from maia_emulator.bells cimport BELL_BYTES, PART_DOORBELLS, bell_t
from maia_emulator.support cimport pthread_rwlock_t, pthread_rwlock_unlock, pthread_rwlock_wrlock

cdef extern from *:
    """
    #include <pthread.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stddef.h>
    #include <sys/mman.h>
    #include <unistd.h>

    static int init_rwlock(pthread_rwlock_t *lock) {
        pthread_rwlockattr_t attributes;
        pthread_rwlockattr_init(&attributes);
    #ifdef __GLIBC__
        /* Engines take the lock again and again; an unmap must not wait for them all to pause by chance. */
        pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    #endif
        int result = pthread_rwlock_init(lock, &attributes);
        pthread_rwlockattr_destroy(&attributes);
        return result;
    }

    /* A client may cut its file short after mapping it; touching the lost part raises SIGBUS. Inside client mappings
     * the page is replaced by an empty one: the client reads and writes nothing, the emulator lives on. */
    #define GUARDS 1024
    static struct { volatile uintptr_t start, end; } guards[GUARDS];
    static struct sigaction before_guard;

    static void on_bus_error(int number, siginfo_t *info, void *context) {
        uintptr_t at = (uintptr_t)info->si_addr;
        for (int i = 0; i < GUARDS; i++)
            if (guards[i].start <= at && at < guards[i].end) {
                uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
                if (mmap((void *)(at & ~(page - 1)), page, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED)
                    return;
            }
        (void)number; (void)context;
        sigaction(SIGBUS, &before_guard, NULL);
    }

    static void install_guard(void) {
        struct sigaction action = {0};
        action.sa_sigaction = on_bus_error;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigaction(SIGBUS, &action, &before_guard);
    }

    static int guard(void *start, size_t size) {
        for (int i = 0; i < GUARDS; i++) {
            uintptr_t empty = 0;
            if (__atomic_compare_exchange_n(&guards[i].start, &empty, (uintptr_t)start, 0, __ATOMIC_SEQ_CST,
                                            __ATOMIC_SEQ_CST)) {
                guards[i].end = (uintptr_t)start + size;
                return 0;
            }
        }
        return -1;
    }

    static void unguard(void *start) {
        for (int i = 0; i < GUARDS; i++)
            if (guards[i].start == (uintptr_t)start) { guards[i].end = 0; guards[i].start = 0; return; }
    }
    """
    int init_rwlock(pthread_rwlock_t *lock) nogil
    int pthread_rwlock_destroy(pthread_rwlock_t *lock) nogil
    void install_guard() nogil
    int guard(void *start, size_t size) nogil
    void unguard(void *start) nogil

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t size)
    int madvise(void *address, size_t size, int advice)
    void *MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_SHARED, MAP_NORESERVE, MADV_HUGEPAGE

from libc.errno cimport EACCES
from libc.errno cimport errno as c_errno

MAX_MAPPINGS = 65535
"""Announced to clients as max_dma_maps."""

install_guard()


cdef class DmaTable:
    """The DMA mappings of one client."""

    def __cinit__(self):
        if init_rwlock(&self.lock):
            raise MemoryError
        self.generation = 1
        self.enabled = True

    def __dealloc__(self):
        self.unmap_all()
        free(self.mappings)
        free(self.files)
        pthread_rwlock_destroy(&self.lock)

    def __len__(self):
        return self.count

    def map(self, uint64_t iova, uint64_t size, int fd, uint64_t offset, uint32_t access):
        """Add a mapping; ``fd`` is -1 for memory that is reached by messages, and stays the caller's.

        Raises
        ------
        OSError
            EINVAL for a range that is empty, wraps or leaves the file; EEXIST for one that overlaps another; ENOSPC
            for too many; EACCES for write access to a file opened for reading; mmap's own errno.
        """
        cdef int file = -1
        cdef char *memory = NULL
        cdef size_t at
        cdef bint overlaps
        cdef mapping_t *grown
        if size == 0 or iova + size - 1 < iova or access & ~<uint32_t>(DMA_READ | DMA_WRITE):
            raise OSError(errno.EINVAL, "a DMA range is not empty, does not wrap and has flags 1 to 3")
        if self.count >= MAX_MAPPINGS:
            raise OSError(errno.ENOSPC, f"more than {MAX_MAPPINGS} DMA mappings")
        at = self.position(iova)
        overlaps = at > 0 and self.mappings[at - 1].iova + self.mappings[at - 1].size > iova
        overlaps = overlaps or (at < self.count and self.mappings[at].iova <= iova + size - 1)
        if overlaps:
            raise OSError(errno.EEXIST, f"DMA range {iova:#x} + {size:#x} overlaps another")
        if fd >= 0:
            file = self.open_file(fd, offset, size, access & DMA_WRITE)
            memory = self.files[file].base + (offset if self.files[file].inode else 0)
        if self.count == self.capacity:
            with nogil:
                pthread_rwlock_wrlock(&self.lock)
                grown = <mapping_t *> realloc(self.mappings, (self.capacity * 2 + 64) * sizeof(mapping_t))
                if grown != NULL:
                    self.mappings = grown
                    self.capacity = self.capacity * 2 + 64
                pthread_rwlock_unlock(&self.lock)
            if grown == NULL:
                self.drop(file)
                raise OSError(errno.ENOMEM, "no memory for the DMA table")
        with nogil:
            pthread_rwlock_wrlock(&self.lock)
            memmove(&self.mappings[at + 1], &self.mappings[at], (self.count - at) * sizeof(mapping_t))
            self.mappings[at].iova = iova
            self.mappings[at].size = size
            self.mappings[at].memory = memory
            self.mappings[at].access = access
            self.mappings[at].file = file
            self.count += 1
            self.generation += 1
            self.tie_bells()
            pthread_rwlock_unlock(&self.lock)

    def unmap(self, uint64_t iova, uint64_t size):
        """Remove every mapping that lies in a range, once no engine touches any.

        The vfio-user text speaks of one mapping, matched exactly. The kernel's type1 takes any number that lie wholly
        in the range, none as well, and QEMU counts on that: where a guest takes 2 MiB of 4 KiB pages back, it sends
        one unmap; refused, the old mappings would stay, and DMA would go where it must not. And where the guest turns
        its IOMMU on, QEMU takes back all there could be.

        Returns
        -------
        int
            How many bytes were mapped there.

        Raises
        ------
        OSError
            EINVAL for a range that is empty, wraps, or would cut a mapping; nothing is removed then.
        """
        cdef uint64_t bytes_removed = 0
        cdef uint64_t last = iova + size - 1
        cdef size_t first = self.position(iova)
        cdef size_t end = first
        cdef size_t i
        while end < self.count and self.mappings[end].iova + self.mappings[end].size - 1 <= last:
            end += 1
        if (size == 0 or last < iova or (end < self.count and self.mappings[end].iova <= last)
                or (first > 0 and self.mappings[first - 1].iova + self.mappings[first - 1].size - 1 >= iova)):
            raise OSError(errno.EINVAL, f"DMA range {iova:#x} + {size:#x} is empty, wraps or would cut a mapping")
        with nogil:
            pthread_rwlock_wrlock(&self.lock)
            for i in range(first, end):
                bytes_removed += self.mappings[i].size
                self.drop(self.mappings[i].file)
            memmove(&self.mappings[first], &self.mappings[end], (self.count - end) * sizeof(mapping_t))
            self.count -= end - first
            self.generation += 1
            self.tie_bells()
            pthread_rwlock_unlock(&self.lock)
        return bytes_removed

    def unmap_all(self):
        """Remove every mapping, once no engine touches any."""
        cdef size_t i
        with nogil:
            pthread_rwlock_wrlock(&self.lock)
            for i in range(self.count):
                self.drop(self.mappings[i].file)
            self.count = 0
            self.generation += 1
            self.tie_bells()
            pthread_rwlock_unlock(&self.lock)

    def enable(self, bint enabled):
        """Let DMA through or not (Bus Master Enable); returns when no engine is at it against this."""
        with nogil:
            pthread_rwlock_wrlock(&self.lock)
            self.enabled = enabled
            self.generation += 1
            pthread_rwlock_unlock(&self.lock)

    cdef size_t position(self, uint64_t iova) noexcept nogil:
        """The index of the first mapping at or above an address."""
        cdef size_t low = 0, high = self.count, middle
        while low < high:
            middle = (low + high) >> 1
            if self.mappings[middle].iova < iova:
                low = middle + 1
            else:
                high = middle
        return low

    cdef int find(self, uint64_t address, uint32_t access, char **memory, uint64_t *size) noexcept nogil:
        """Where an address lies, and how far its memory goes on without a gap, up to ``size``.

        The caller holds ``lock``. Returns 0; 1 for memory reached by messages only (``memory`` is NULL); 2 for a
        device's, which is told of stores by `ring`; -1 where nothing is mapped with this access, or the function may
        not do DMA.
        """
        cdef size_t at = self.position(address)
        cdef mapping_t *m
        cdef uint64_t length
        cdef char *end
        cdef int file
        if not self.enabled:
            return -1
        if at == self.count or self.mappings[at].iova != address:
            if at == 0:
                return -1
            at -= 1
        m = &self.mappings[at]
        if address - m.iova >= m.size or (m.access & access) != access:
            return -1
        length = m.size - (address - m.iova)
        if m.memory == NULL:
            memory[0] = NULL
            size[0] = min(length, size[0])
            return 1
        memory[0] = m.memory + (address - m.iova)
        file = m.file
        end = m.memory + m.size
        while length < size[0] and at + 1 < self.count:
            at += 1
            m = &self.mappings[at]
            if (m.iova != address + length or m.memory != end or (m.access & access) != access
                    or m.file != file):
                break
            length += m.size
            end += m.size
        size[0] = min(length, size[0])
        return 2 if self.files[file].part else 0

    cdef void ring(self, uint64_t address) noexcept nogil:
        """Tell the device whose memory has just been written at an address. The caller holds ``lock``."""
        cdef file_t *file = self.file_at(address)
        if file.bell != NULL:
            ring_bell(file.bell, file.part)

    cdef bell_t *bell_at(self, uint64_t address) noexcept nogil:
        """The bell of the device whose memory lies at an address; NULL where it is not known. As `ring`."""
        return self.file_at(address).bell

    cdef file_t *file_at(self, uint64_t address) noexcept nogil:
        """The file behind an address where one is mapped."""
        cdef size_t at = self.position(address)
        if at == self.count or self.mappings[at].iova != address:
            at -= 1
        return &self.files[self.mappings[at].file]

    cdef void tie_bells(self) noexcept nogil:
        """Find the bell of each file that is part of a device. The caller holds ``lock`` for writing."""
        cdef int i, j
        cdef bell_t *own
        cdef bell_t *bell
        self.peers = 0
        for i in range(self.file_count):
            if self.files[i].references == 0 or self.files[i].part == 0:
                continue
            self.peers += 1
            self.files[i].bell = NULL
            own = bell_of(&self.files[i])
            for j in range(self.file_count):
                if (self.files[j].references == 0 or self.files[j].part != PART_DOORBELLS
                        or not self.files[j].writable):
                    continue
                bell = bell_of(&self.files[j])
                if bell.id[0] == own.id[0] and bell.id[1] == own.id[1]:
                    self.files[i].bell = bell
                    break

    cdef int open_file(self, int fd, uint64_t offset, uint64_t size, bint write) except -1:
        """The index of the mmap that covers a file's range, shared with earlier mappings of the same file."""
        cdef int i, slot = -1
        cdef void *base
        cdef file_t *grown
        cdef bint writable = True
        cdef uint64_t length, start
        cdef uint32_t part
        status = os.fstat(fd)
        regular = stat.S_ISREG(status.st_mode)
        if offset + size < offset or (regular and offset + size > <uint64_t> status.st_size):
            raise OSError(errno.EINVAL,
                          f"the file has {status.st_size:#x} bytes, the mapping wants {size:#x} at {offset:#x}")
        for i in range(self.file_count):
            if self.files[i].references == 0:
                slot = i
            elif (regular and self.files[i].inode == status.st_ino and self.files[i].device == status.st_dev
                    and offset + size <= self.files[i].size and (self.files[i].writable or not write)):
                self.files[i].references += 1
                return i
        start, length = (0, status.st_size) if regular else (offset, size)
        part = recognise(fd, length) if regular else 0
        base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, start)
        if base == MAP_FAILED and c_errno == EACCES and not write:
            writable = False
            base = mmap(NULL, length, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, start)
        if base == MAP_FAILED:
            raise OSError(c_errno, "the memory of a DMA mapping cannot be mapped")
        if guard(base, length):
            munmap(base, length)
            raise OSError(errno.ENOSPC, "too many files behind DMA mappings")
        if slot < 0:
            with nogil:
                pthread_rwlock_wrlock(&self.lock)
                grown = <file_t *> realloc(self.files, (self.file_count + 1) * sizeof(file_t))
                if grown != NULL:
                    self.files = grown
                    slot = self.file_count
                    self.files[slot].references = 0
                    self.file_count += 1
                pthread_rwlock_unlock(&self.lock)
            if grown == NULL:
                unguard(base)
                munmap(base, length)
                raise MemoryError
        self.files[slot].device = status.st_dev
        self.files[slot].inode = status.st_ino if regular else 0
        self.files[slot].base = <char *> base
        self.files[slot].size = length
        self.files[slot].references = 1
        self.files[slot].writable = writable
        self.files[slot].part = part
        self.files[slot].bell = NULL
        if part:
            madvise(base, length, MADV_HUGEPAGE)
        return slot

    cdef void drop(self, int file) noexcept nogil:
        if file < 0:
            return
        self.files[file].references -= 1
        if self.files[file].references == 0:
            unguard(self.files[file].base)
            munmap(self.files[file].base, self.files[file].size)


cdef inline bell_t *bell_of(file_t *file) noexcept nogil:
    """The page that ends the file of a device's BAR."""
    return <bell_t *> (file.base + file.size - <uint64_t> BELL_BYTES)
