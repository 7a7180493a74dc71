"""One emulated device behind its registers: what the server and the firmware hold in their hands.

The engine owns BAR 2 (doorbell pages and semaphore window), HBM (BAR 4), the client's DMA mappings, the interrupt
vectors, and the threads: one command processor and the tile workers.
"""

import os

import numpy as np

from maia_emulator import logs
from maia_emulator.bells import imprint
from maia_rt.contract.commands import COUNTERS, CREATE_QUEUE, AdminStatus, Feature

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from maia_emulator.bells cimport BELL_BYTES, PART_DOORBELLS
from maia_emulator.injections cimport armed_t, trip
from maia_emulator.interrupts cimport Vectors
from maia_emulator.memory cimport MAX_RANGES, DeviceMemory, context_t
from maia_emulator.processor cimport Processor
from maia_emulator.queue_state cimport MAX_IN_FLIGHT, in_flight_t, queue_t, writer_t
from maia_emulator.queues cimport FrontEnd
from maia_emulator.strikes cimport let_go, strike
from maia_emulator.support cimport (
    add32,
    and32,
    clock_ns,
    load32,
    pthread_rwlock_rdlock,
    pthread_rwlock_unlock,
    store32,
    store64,
    swap_if32,
)
from maia_emulator.tiles cimport Tiles, fill_kernel, free_kernel
from maia_emulator.watch cimport watch_t
from maia_rt._fast.commands cimport (
    ANY_QUEUE,
    FAULT_ABORTED,
    FAULT_LOG_ENTRIES,
    FAULT_NONE,
    INJECT_NOW,
    NO_QUEUE,
    NO_VECTOR,
    POST_SET,
    WRITER_HOST,
    context_bounds_t,
    counters_t,
    create_queue_t,
    fault_t,
    injection_t,
    progress_t,
)
from maia_rt._fast.registers cimport DOORBELL_ARM, DOORBELL_NEEDS_WAKE, DOORBELL_REPORT_HEAD, DOORBELL_TAIL

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t size)
    void *MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_SHARED

MIN_ENTRIES_LOG2 = 2
MAX_ENTRIES_LOG2 = 16
MAX_CONTEXTS = 32
PRIORITIES = 4
MAX_KERNELS = 4096
DEFAULT_WATCHDOG_MS = 10_000
cdef uint64_t DOORBELL_PAGE = 4096


class AdminError(Exception):
    """An admin command is refused.

    Attributes
    ----------
    status : AdminStatus
        What its completion says.
    result0 : int
        The completion's first result.
    """

    def __init__(self, status, text, result0=0):
        super().__init__(text)
        self.status = status
        self.result0 = result0


cdef class Engine:
    """A device's memory, queues and units. Thread safe.

    Parameters
    ----------
    clusters, tiles_per_cluster, tile_sram_bytes, cluster_sram_bytes, hbm_bytes, max_queues, semaphores, vectors : int
        The device's shape.
    workers : int
        Threads that play the tiles; 0 is one a core.
    spin_us : int
        Microseconds without work after which the command processor sleeps.
    seed : int
        Draws the order of a tile's engines; 0 keeps it fixed.
    processor : Processor, optional
        The threads that look after the queues: several devices of a process share them. Else a thread of its own.
    """

    cdef readonly DeviceMemory memory
    cdef readonly Tiles tiles
    cdef readonly Vectors vectors
    cdef readonly FrontEnd front
    cdef readonly int bar2_fd
    cdef readonly uint64_t bar2_bytes
    cdef readonly uint64_t semaphore_window_offset
    cdef char *bar2
    cdef context_t *contexts
    cdef Processor processor
    cdef bint started
    cdef dict features
    cdef tuple permanent
    cdef dict added

    def __cinit__(self, *, uint32_t clusters, uint32_t tiles_per_cluster, uint32_t tile_sram_bytes,
                  uint32_t cluster_sram_bytes, uint64_t hbm_bytes, uint32_t max_queues, uint32_t semaphores,
                  int vectors, int workers=0, uint32_t spin_us=100, uint64_t seed=0, Processor processor=None):
        cdef void *memory
        self.bar2_fd = -1
        self.contexts = <context_t *> calloc(MAX_CONTEXTS, sizeof(context_t))
        if self.contexts == NULL:
            raise MemoryError
        self.contexts[0].live = True
        self.semaphore_window_offset = max_queues * DOORBELL_PAGE
        self.bar2_bytes = 1 << (self.semaphore_window_offset + 4 * semaphores - 1).bit_length()
        self.bar2_fd = os.memfd_create("maia-doorbells", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.bar2_fd, self.bar2_bytes + BELL_BYTES)
        id = os.urandom(16)
        imprint(self.bar2_fd, self.bar2_bytes, PART_DOORBELLS, id)
        memory = mmap(NULL, self.bar2_bytes + BELL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, self.bar2_fd, 0)
        if memory == MAP_FAILED:
            raise MemoryError("BAR 2")
        self.bar2 = <char *> memory
        self.memory = DeviceMemory(clusters=clusters, tiles=clusters * tiles_per_cluster, tile_bytes=tile_sram_bytes,
                                   cluster_bytes=cluster_sram_bytes, hbm_bytes=hbm_bytes, id=id)
        self.vectors = Vectors(vectors)
        self.tiles = Tiles(self.memory, workers, seed)
        self.front = FrontEnd(self.memory, self.tiles, self.vectors, max_queues=max_queues, semaphores=semaphores,
                              max_kernels=MAX_KERNELS, tiles_per_cluster=tiles_per_cluster, spin_us=spin_us,
                              bar2_address=<size_t> self.bar2, bell_address=<size_t> self.bar2 + self.bar2_bytes)
        self.processor = processor or Processor()
        self.front.counted_from = clock_ns()
        self.features = {}
        self.permanent = ()
        self.added = {}
        self._set_defaults()

    def __dealloc__(self):
        if self.bar2 != NULL:
            munmap(self.bar2, self.bar2_bytes + BELL_BYTES)
        if self.bar2_fd >= 0:
            os.close(self.bar2_fd)
        free(self.contexts)

    # Life ---------------------------------------------------------------------------------------------------------

    def start(self):
        """Start the threads."""
        self.processor.enter(self.front)
        self.tiles.begin()
        self.started = True

    def stop(self):
        """End and join the threads. Idempotent."""
        if self.started:
            self.clear()
            self.processor.leave(self.front)
            self.tiles.end()
            self.started = False

    def reset(self):
        """Function reset: no queue, context or program is left; memory reads as zero. DMA mappings stay."""
        self.clear()
        self.memory.clear()
        self.vectors.clear()

    def clear(self):
        """CONTROL.ENABLE 1 -> 0: no queue, context or program is left; counters, semaphores and log start anew."""
        cdef uint32_t i
        cdef FrontEnd front = self.front
        cdef watch_t *watch
        with nogil:
            front.take()
            for i in range(front.max_queues):
                if front.queues[i].live:
                    front.quiesce(&front.queues[i])
                    front.queues[i].live = False
            front.live_count = 0
        try:
            for i in range(1, front.kernel_count):
                if front.kernels[i].live:
                    free_kernel(&front.kernels[i])
            memset(self.contexts, 0, MAX_CONTEXTS * sizeof(context_t))
            self.contexts[0].live = True
            memset(self.bar2, 0, self.bar2_bytes)
            front.injections.clear()
            front.injections.struck = front.due = front.trips = 0
            let_go(front)
            front.gone = False
            memset(front.writers, 0, front.semaphore_count * sizeof(writer_t))
            memset(&front.counters, 0, sizeof(counters_t))
            watch = front.traffic.watch
            memset(&front.traffic, 0, sizeof(front.traffic))
            front.traffic.watch = watch
            front.counted_from = clock_ns()
            front.fault_count = 0
            store32(&front.errors, 0)
            store32(&front.woken, 0)
            self.tiles.clear()
            self.added.clear()
            self._set_defaults()
            for raw in self.permanent:
                front.injections.arm(raw)
            front.injecting = bool(self.permanent)
        finally:
            front.give()

    def _set_defaults(self):
        self.features[Feature.WATCHDOG_MS] = DEFAULT_WATCHDOG_MS
        self.front.watchdog_ns = DEFAULT_WATCHDOG_MS * 1_000_000

    def clock_ns(self):
        """Device time in nanoseconds."""
        return clock_ns()

    def wake(self):
        """The WAKE register."""
        self.front.wake_register()

    # Injections ---------------------------------------------------------------------------------------------------

    def on_trip(self, told):
        """Call ``told`` with a sum of `injections.FELL_SILENT`, DIED, WENT and HUNG_UP when one of them strikes."""
        self.front.on_trip = told

    def inject_always(self, injections):
        """Arm INJECTION structures now, and anew with each `clear`."""
        self.permanent = tuple(injections)
        for raw in self.permanent:
            self.inject(raw)

    def inject(self, bytes raw not None):
        """Arm a checked INJECTION structure; returns its number. One that strikes at once waits for `strike_due`."""
        cdef injection_t rule
        cdef FrontEnd front = self.front
        cdef armed_t armed
        memcpy(&rule, <const char *> raw, sizeof(rule))
        if rule.queue != <uint32_t> ANY_QUEUE and rule.queue >= front.max_queues:
            raise AdminError(AdminStatus.INVALID_FIELD, f"there is no queue {rule.queue}")
        with nogil:
            front.take()
        try:
            if rule.flags & INJECT_NOW:
                armed.rule = rule
                front.due |= trip(&armed)
                front.injections.numbers += 1
                return front.injections.numbers
            number = front.injections.arm(raw)
            if not number:
                raise AdminError(AdminStatus.NO_RESOURCE, "no room for another injection")
            front.injecting = True
            return number
        finally:
            front.give()

    def strike_due(self):
        """Let what was armed to strike at once do so."""
        cdef FrontEnd front = self.front
        if front.due:
            with nogil:
                front.take()
                front.injections.struck += 1
                strike(front, front.due)
                front.due = 0
                front.give()
            front.wake()

    def clear_injections(self):
        """Disarm all; returns how often they struck."""
        cdef FrontEnd front = self.front
        with nogil:
            front.take()
            front.injections.clear()
            let_go(front)
            front.give()
        front.wake()
        return front.injections.struck

    @property
    def gone(self):
        """Whether the device has been removed, as it were."""
        return self.front.gone

    @property
    def rings(self):
        """How often the device was woken, or might have been; for tests."""
        return load32(&self.front.bell.rings)

    def set_link(self, double gbps, double latency_us):
        """Model the links to host and peers from now on.

        Parameters
        ----------
        gbps : float
            Gigabits a second, each way; 0 is without limit.
        latency_us : float
            Microseconds that every command over a link takes at least.
        """
        self.memory.link.port = self.front.bell
        self.memory.link.ns_per_byte = 8 / gbps if gbps else 0
        self.memory.link.latency_ns = <uint64_t> (latency_us * 1000)
        self.memory.link.on = gbps > 0 or latency_us > 0

    # Memory -------------------------------------------------------------------------------------------------------

    @property
    def hbm_fd(self):
        """The memfd behind BAR 4."""
        return self.memory.hbm_fd

    @property
    def hbm_bytes(self):
        """HBM in bytes."""
        return self.memory.hbm_bytes

    def dma_map(self, iova, size, fd, offset, flags):
        """See `DmaTable.map`."""
        self.memory.dma.map(iova, size, fd, offset, flags)

    def dma_unmap(self, iova, size):
        """See `DmaTable.unmap`."""
        return self.memory.dma.unmap(iova, size)

    def dma_unmap_all(self):
        """See `DmaTable.unmap_all`."""
        self.memory.dma.unmap_all()

    def set_bus_master(self, enabled):
        """See `DmaTable.enable`. DMA is let through until this says otherwise."""
        self.memory.dma.enable(enabled)

    def set_message_dma(self, read, write):
        """See `DeviceMemory.set_messages`."""
        self.memory.set_messages(read, write)

    def dma_read(self, address, size):
        """See `DeviceMemory.read`."""
        return self.memory.read(address, size)

    def dma_write(self, address, data):
        """See `DeviceMemory.write`."""
        self.memory.write(address, bytes(data))

    # Interrupts and errors ----------------------------------------------------------------------------------------

    def set_vector(self, vector, eventfd):
        """See `Vectors.assign`."""
        self.vectors.assign(vector, eventfd)

    def mask_vector(self, vector, masked):
        """See `Vectors.mask`."""
        self.vectors.mask(vector, masked)

    def trigger(self, vector):
        """See `Vectors.trigger`."""
        self.vectors.trigger(vector)

    def pending(self):
        """See `Vectors.pending`."""
        return self.vectors.pending()

    def errors(self):
        """The ERRORS register."""
        return load32(&self.front.errors)

    def clear_errors(self, uint32_t mask):
        """Clear bits of the ERRORS register."""
        and32(&self.front.errors, ~mask)

    def raise_error(self, uint32_t bit):
        """Set a bit of the ERRORS register; vector 0 fires where it was clear."""
        self.front.raise_error(bit)

    # Admin --------------------------------------------------------------------------------------------------------

    def queue_ids(self):
        """The ids of the queues there are."""
        return [i for i in range(self.front.max_queues) if self.front.queues[i].live]

    def create_queue(self, bytes params not None):
        """Create a queue from a CREATE_QUEUE structure; returns its id."""
        cdef create_queue_t p
        cdef queue_t *q
        cdef FrontEnd front = self.front
        cdef context_t *context
        cdef uint32_t i, place, first, end
        cdef const char *raw = params
        if len(params) != CREATE_QUEUE.itemsize:
            raise AdminError(AdminStatus.INVALID_FIELD, "parameters of the wrong size")
        memcpy(&p, raw, sizeof(p))
        if p.reserved0 or p.reserved1:
            raise AdminError(AdminStatus.INVALID_FIELD, "a reserved parameter is not zero")
        if not MIN_ENTRIES_LOG2 <= p.entries_log2 <= MAX_ENTRIES_LOG2 or p.reports_log2 > MAX_ENTRIES_LOG2:
            raise AdminError(AdminStatus.INVALID_FIELD, "ring length out of range")
        if p.ring % 64 or p.progress % 64 or p.reports % 64:
            raise AdminError(AdminStatus.INVALID_FIELD, "an address is no multiple of 64")
        if p.priority >= PRIORITIES:
            raise AdminError(AdminStatus.INVALID_FIELD, f"there is no priority {p.priority}")
        if p.vector != NO_VECTOR and p.vector >= <uint32_t> self.vectors.count:
            raise AdminError(AdminStatus.INVALID_FIELD, f"there is no vector {p.vector}")
        if p.queue != <uint32_t> ANY_QUEUE and p.queue >= front.max_queues:
            raise AdminError(AdminStatus.INVALID_FIELD, f"there is no queue {p.queue}")
        for address, size in ((p.ring, 64 << p.entries_log2), (p.progress, 64), (p.reports, 32 << p.reports_log2)):
            self._require_host(address, size)
        if p.doorbell:
            if p.doorbell % DOORBELL_PAGE:
                raise AdminError(AdminStatus.INVALID_FIELD, "a doorbell page starts at a multiple of 4096")
            if p.doorbell >> 48 or not self.memory.is_direct(p.doorbell, DOORBELL_PAGE):
                raise AdminError(AdminStatus.BAD_ADDRESS, f"no doorbell can be watched at {p.doorbell:#x}")
        with nogil:
            front.take()
        try:
            if p.context >= MAX_CONTEXTS or not self.contexts[p.context].live:
                raise AdminError(AdminStatus.NOT_FOUND, f"there is no context {p.context}")
            context = &self.contexts[p.context]
            first, end = 0, front.max_queues
            if context.bounded:
                first, end = context.first_queue, context.first_queue + context.queue_count
            i = p.queue
            if i == <uint32_t> ANY_QUEUE:
                i = first
                while i < end and front.queues[i].live:
                    i += 1
                if i == end:
                    raise AdminError(AdminStatus.NO_RESOURCE, f"all {end - first} queues are in use")
            elif not first <= i < end:
                raise AdminError(AdminStatus.INVALID_FIELD, f"context {p.context} has no queue {i}")
            q = &front.queues[i]
            if q.live:
                raise AdminError(AdminStatus.IN_USE, f"queue {i} exists")
            memset(q, 0, sizeof(queue_t))
            q.id, q.vector, q.context, q.priority = i, p.vector, context, p.priority
            q.mask, q.report_mask = (1 << p.entries_log2) - 1, (1 << p.reports_log2) - 1
            q.ring, q.progress, q.reports = p.ring, p.progress, p.reports
            q.doorbell, q.doorbell_at = self.bar2 + i * DOORBELL_PAGE, p.doorbell
            self._rewind(q, p.initial)
            q.live = True
            q.context.queues += 1
            # Kept in the order of service: larger priorities first, then as they were made.
            place = front.live_count
            while place and front.queues[front.live[place - 1]].priority < q.priority:
                front.live[place] = front.live[place - 1]
                place -= 1
            front.live[place] = i
            front.live_count += 1
        finally:
            front.give()
        self.front.wake()
        return i

    def _require_host(self, uint64_t address, uint64_t size):
        if (address + size) >> 48 or not self.memory.mapped(address, size):
            raise AdminError(AdminStatus.BAD_ADDRESS, f"{address:#x} + {size:#x} is not host memory mapped for writing")

    cdef void _rewind(self, queue_t *q, uint64_t initial):
        """Start a queue at a free-running index: ring, doorbell page, progress block and mirror."""
        cdef progress_t block
        q.head = q.retired = q.published = initial
        q.tail, q.report_tail, q.report_head, q.arm, q.aborted = <uint32_t> initial, 0, 0, 0, 0
        q.state = q.stage = q.flight_first = q.flight_count = 0
        q.fault, q.fault_sequence = 0, 0
        q.list.count = q.list.flight_count = 0
        with nogil:
            pthread_rwlock_rdlock(&self.memory.dma.lock)
            store32(self.front.word(q, DOORBELL_TAIL), <uint32_t> initial)
            store32(self.front.word(q, DOORBELL_REPORT_HEAD), 0)
            store64(<uint64_t *> self.front.word(q, DOORBELL_ARM), 0)
            store32(self.front.word(q, DOORBELL_NEEDS_WAKE), load32(&self.front.sleeping))
            pthread_rwlock_unlock(&self.memory.dma.lock)
        store32(&self.front.semaphores[q.id], <uint32_t> initial)
        memset(&block, 0, sizeof(block))
        block.progress = initial
        try:
            self.memory.write(q.progress, (<char *> &block)[:sizeof(block)])
        except OSError:
            pass  # the client has unmapped it since: commands will fault

    cdef queue_t *_queue(self, uint64_t id) except NULL:
        if id >= self.front.max_queues or not self.front.queues[id].live:
            raise AdminError(AdminStatus.NOT_FOUND, f"there is no queue {id}")
        return &self.front.queues[id]

    def delete_queue(self, uint64_t id):
        """Delete a queue; what it has in flight is aborted."""
        cdef queue_t *q
        cdef FrontEnd front = self.front
        cdef uint32_t i, kept = 0
        with nogil:
            front.take()
        try:
            q = self._queue(id)
            with nogil:
                front.quiesce(q)
            q.live = False
            q.context.queues -= 1
            for i in range(front.live_count):
                if front.live[i] != id:
                    front.live[kept] = front.live[i]
                    kept += 1
            front.live_count = kept
        finally:
            front.give()

    def reset_queue(self, uint64_t id, uint64_t initial):
        """Empty a queue and let it run from index ``initial``; what it had in flight is aborted."""
        cdef queue_t *q
        cdef FrontEnd front = self.front
        with nogil:
            front.take()
        try:
            q = self._queue(id)
            with nogil:
                front.quiesce(q)
            self._rewind(q, initial)
        finally:
            front.give()
        self.front.wake()

    def abort(self, uint64_t id, uint64_t sequence):
        """Fail one command with ABORTED: waiting, under way, in flight or still in the ring."""
        cdef queue_t *q
        cdef in_flight_t *entry
        cdef FrontEnd front = self.front
        cdef uint32_t rung
        cdef int i
        with nogil:
            front.take()
        try:
            q = self._queue(id)
            with nogil:
                pthread_rwlock_rdlock(&self.memory.dma.lock)
                rung = load32(self.front.word(q, DOORBELL_TAIL))
                pthread_rwlock_unlock(&self.memory.dma.lock)
            tail = q.head + <uint32_t> (rung - <uint32_t> q.head)
            if sequence <= q.retired or sequence > tail or q.state:
                raise AdminError(AdminStatus.NOT_FOUND, f"queue {id} has no command {sequence} to abort")
            for i in range(q.flight_count):
                entry = &q.flight[(q.flight_first + i) % MAX_IN_FLIGHT]
                if entry.sequence == sequence and entry.launch != NULL:
                    swap_if32(&entry.launch.status, FAULT_NONE, FAULT_ABORTED)
                    break
            else:
                q.aborted = sequence
        finally:
            front.give()
        self.front.wake()

    def create_context(self, ranges, bounds=None):
        """A context confined to ``ranges``, pairs of address and size; returns its id.

        Parameters
        ----------
        ranges : list of (int, int)
            Of HBM; with bounds, of host addresses too.
        bounds : bytes, optional
            A CONTEXT_BOUNDS structure: the context then has no more than it and the ranges say.
        """
        cdef context_bounds_t b
        cdef context_t made
        cdef const char *raw
        memset(&made, 0, sizeof(made))
        if not 1 <= len(ranges) <= MAX_RANGES:
            raise AdminError(AdminStatus.INVALID_FIELD, f"a context has 1 to {<int> MAX_RANGES} ranges")
        if bounds is not None:
            raw = bounds
            memcpy(&b, raw, sizeof(b))
            self._check_bounds(&b)
            made.bounded = True
            made.first_queue, made.queue_count = b.first_queue, b.queues
            made.first_semaphore, made.semaphore_count = b.first_semaphore, b.semaphores
            made.first_cluster, made.cluster_count = b.first_cluster, b.clusters
        base = 1 << 48
        for start, size in ranges:
            if bounds is not None and size and start + size <= base:
                made.host_base[made.host_count], made.host_size[made.host_count] = start, size
                made.host_count += 1
            elif size == 0 or start < base or start + size > base + self.memory.hbm_bytes:
                raise AdminError(AdminStatus.BAD_ADDRESS, f"{start:#x} + {size:#x} is not in HBM")
            else:
                made.base[made.count], made.size[made.count] = start - base, size
                made.count += 1
        made.live = True
        with nogil:
            self.front.take()
        try:
            for id in range(1, MAX_CONTEXTS):
                if not self.contexts[id].live:
                    self.contexts[id] = made
                    return id
            raise AdminError(AdminStatus.NO_RESOURCE, f"all {MAX_CONTEXTS} contexts are in use")
        finally:
            self.front.give()

    cdef int _check_bounds(self, context_bounds_t *b) except -1:
        cdef FrontEnd front = self.front
        clusters = self.tiles.count // front.tiles_per_cluster
        if (b.reserved or not b.queues or not b.clusters or b.queues > front.max_queues
                or b.first_queue > front.max_queues - b.queues or b.semaphores > front.semaphore_count
                or b.clusters > clusters or b.first_cluster > clusters - b.clusters
                or b.first_semaphore > front.semaphore_count - b.semaphores
                or (b.semaphores and b.first_semaphore < front.max_queues)):
            raise AdminError(AdminStatus.INVALID_FIELD, "the bounds are not within the device")
        return 0

    def delete_context(self, uint64_t id, bint scrub=False):
        """Delete a context that no queue uses, and its programs; with ``scrub`` what it had reads as zero."""
        cdef context_t *context
        cdef FrontEnd front = self.front
        cdef uint32_t i, end
        with nogil:
            front.take()
        try:
            if id == 0 or id >= <uint64_t> MAX_CONTEXTS or not self.contexts[id].live:
                raise AdminError(AdminStatus.NOT_FOUND, f"there is no context {id}")
            context = &self.contexts[id]
            if context.queues:
                raise AdminError(AdminStatus.IN_USE, f"context {id} has {context.queues} queues")
            for i in range(1, front.kernel_count):
                if front.kernels[i].live and front.kernels[i].context == context:
                    free_kernel(&front.kernels[i])
            if scrub:
                self.memory.scrub(context)
                if context.bounded:
                    for i in range(context.first_queue, context.first_queue + context.queue_count):
                        store32(&front.semaphores[i], 0)
                    end = context.first_semaphore + context.semaphore_count
                    for i in range(context.first_semaphore, end):
                        store32(&front.semaphores[i], 0)
                        memset(&front.writers[i], 0, sizeof(writer_t))
            context.live = False
        finally:
            front.give()

    def load_program(self, image, uint64_t context=0):
        """Load a verified `maia_rt.contract.program.Image`; returns the first of its consecutive kernel handles.

        Only queues of ``context`` may launch them, or any where it is 0.
        """
        cdef FrontEnd front = self.front
        cdef uint32_t first, i, count = len(image.kernels), free_run = 0
        with nogil:
            front.take()
        try:
            if context >= <uint64_t> MAX_CONTEXTS or not self.contexts[context].live:
                raise AdminError(AdminStatus.NOT_FOUND, f"there is no context {context}")
            for first in range(1, front.kernel_count):
                free_run = 0 if front.kernels[first].live else free_run + 1
                if free_run == count:
                    break
            else:
                raise AdminError(AdminStatus.NO_RESOURCE, f"no room for {count} kernels of {MAX_KERNELS}")
            first -= count - 1
            try:
                for i in range(count):
                    fill_kernel(&front.kernels[first + i], image.kernels[i], first)
                    front.kernels[first + i].context = &self.contexts[context] if context else NULL
            except MemoryError:
                for i in range(count):
                    free_kernel(&front.kernels[first + i])
                raise AdminError(AdminStatus.NO_RESOURCE, "no memory for the program") from None
            return first
        finally:
            front.give()

    def unload_program(self, uint64_t first):
        """Unload the program whose first kernel handle this is, unless one of its kernels runs."""
        cdef FrontEnd front = self.front
        cdef uint32_t i
        with nogil:
            front.take()
        try:
            if (not 0 < first < front.kernel_count or not front.kernels[first].live
                    or front.kernels[first].group != first):
                raise AdminError(AdminStatus.NOT_FOUND, f"no program starts at kernel {first}")
            group = [i for i in range(first, front.kernel_count)
                     if front.kernels[i].live and front.kernels[i].group == first]
            if any(front.kernels[i].running for i in group):
                raise AdminError(AdminStatus.IN_USE, "a kernel of the program runs")
            for i in group:
                free_kernel(&front.kernels[i])
        finally:
            front.give()

    def set_feature(self, uint64_t id, uint64_t value):
        """SET_FEATURE."""
        if id not in self.features:
            raise AdminError(AdminStatus.NOT_FOUND, f"there is no feature {id}")
        if value > 1 << 32:
            raise AdminError(AdminStatus.INVALID_FIELD, f"{value} is too large")
        self.features[Feature(id)] = value
        self.front.watchdog_ns = self.features[Feature.WATCHDOG_MS] * 1_000_000

    def get_feature(self, uint64_t id):
        """GET_FEATURE."""
        if id not in self.features:
            raise AdminError(AdminStatus.NOT_FOUND, f"there is no feature {id}")
        return self.features[id]

    def semaphore_op(self, uint64_t index, int op, uint32_t value):
        """The SEMAPHORE_OP register: set or add; anything it may not do is ignored."""
        cdef writer_t *writer
        if not self.front.max_queues <= index < self.front.semaphore_count:
            return
        if op == POST_SET:
            store32(&self.front.semaphores[index], value)
        else:
            value = add32(&self.front.semaphores[index], value)
        writer = &self.front.writers[index]
        writer.time_ns, writer.sequence, writer.queue, writer.value = clock_ns(), 0, <uint32_t> NO_QUEUE, value
        writer.kind = WRITER_HOST
        self.front.wake()

    def add_counter(self, name, n):
        """Count what the server sees: admin_commands, dma_messages."""
        self.added[name] = self.added.get(name, 0) + n

    def counters(self):
        """One COUNTERS record."""
        cdef counters_t c = self.front.counters
        record = np.frombuffer((<char *> &c)[:sizeof(c)], COUNTERS)[0].copy()
        traffic = self.front.traffic
        record["time_ns"] = clock_ns() - self.front.counted_from
        record["interrupts"] = self.vectors.fired
        record["wakes"] = self.front.woken
        record["bytes_host_to_device"] += traffic.host_to_device
        record["bytes_device_to_host"] += traffic.device_to_host
        record["bytes_device_to_device"] += traffic.device_to_device
        record["bytes_host_to_host"] += traffic.host_to_host
        record["dma_messages"] += traffic.messages
        record["bytes_from_peers"] += traffic.from_peers
        record["bytes_to_peers"] += traffic.to_peers
        for source in (self.tiles.totals(), self.added):
            for name, value in source.items():
                record[name] += value
        return record.tobytes()

    def faults(self):
        """The fault log: FAULT records, oldest first."""
        cdef fault_t *log = self.front.faults
        count = min(self.front.fault_count, <uint64_t> FAULT_LOG_ENTRIES)
        first = self.front.fault_count - count
        return b"".join((<char *> &log[(first + i) % FAULT_LOG_ENTRIES])[:sizeof(fault_t)] for i in range(count))

    def queue_log(self):
        """QUEUE_LOG records of all queues, by id."""
        return logs.queue_log(self.front)

    def semaphore_log(self):
        """SEMAPHORE_LOG records of the semaphores that were ever written or waited for, by index."""
        return logs.semaphore_log(self.front)
