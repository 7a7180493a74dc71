"""The tiles: kernels, launches and the worker threads that play the tiles' engines.

A worker takes a tile's part of a launch and runs the tile's three engines by turns, each as far as its semaphores let
it, until all are at their end or every one waits for another tile or a link; then it puts the part back and takes the
next. So a tile's own state needs no lock, different tiles run at the same time, and nothing but semaphores orders the
engines: with a seed their turns are random, and a kernel that forgot a semaphore shows it.
"""

import os
import threading

from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from maia_emulator.bells cimport rouse
from maia_emulator.launch cimport kernel_t, launch_t, unit_t, worker_t
from maia_emulator.macro_ops cimport run_op
from maia_emulator.memory cimport KIND_HBM, KIND_SRAM, DeviceMemory, context_t
from maia_emulator.support cimport (
    add32,
    clock_ns,
    full_fence,
    load32,
    pthread_cond_broadcast,
    pthread_cond_destroy,
    pthread_cond_init,
    pthread_cond_wait,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    sched_yield,
    store32,
    swap_if32,
)
from maia_rt._fast.commands cimport (
    ARG_IN,
    ARG_OUT,
    ARG_SCALAR,
    FAULT_BAD_FIELD,
    FAULT_NONE,
    FAULT_PROGRAM,
    SHARED_SEMAPHORE,
    op_t,
)

cdef extern from "<sys/prctl.h>" nogil:
    int PR_SET_TIMERSLACK
    int prctl(int option, unsigned long value)

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int microseconds)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t size)
    void *MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE

cdef enum:
    MAX_WORKERS = 64
    LONG_BYTES = 8388608
    LINK_NAP_US = 100       # between looks at operations that are on a link

cdef uint64_t GOLDEN = <uint64_t> 0x9e3779b97f4a7c15    # odd, so that close seeds draw far apart
cdef uint64_t MIX = <uint64_t> 0xbf58476d1ce4e5b9


cdef class Tiles:
    """Every tile of a device and the threads that play them.

    Parameters
    ----------
    memory : DeviceMemory
        Where operands lie.
    workers : int
        Threads; 0 is one a core.
    seed : int
        0 runs the engines of a tile in their fixed order, anything else draws the order.
    """

    def __cinit__(self, DeviceMemory memory not None, int workers=0, uint64_t seed=0):
        self.memory = memory
        self.count = memory.tiles
        self.workers = min(workers or len(os.sched_getaffinity(0)), <int> memory.tiles, <int> MAX_WORKERS)
        self.seed = seed
        self.threads = []
        self.worker = <worker_t *> calloc(self.workers, sizeof(worker_t))
        if self.worker == NULL:
            raise MemoryError
        pthread_mutex_init(&self.mutex, NULL)
        pthread_cond_init(&self.available, NULL)

    def __dealloc__(self):
        free(self.worker)
        pthread_mutex_destroy(&self.mutex)
        pthread_cond_destroy(&self.available)

    def begin(self):
        """Start the worker threads."""
        self.stopping = False
        for index in range(self.workers):
            thread = threading.Thread(target=self._work, args=(index,), name=f"tiles-{index}", daemon=True)
            thread.start()
            self.threads.append(thread)

    def end(self):
        """Stop and join the worker threads; launches that are under way stay where they are."""
        with nogil:
            pthread_mutex_lock(&self.mutex)
            self.stopping = True
            pthread_cond_broadcast(&self.available)
            pthread_mutex_unlock(&self.mutex)
        for thread in self.threads:
            thread.join()
        self.threads.clear()

    def _work(self, int index):
        # Room for four rows, or three matrices, of a whole SRAM each in the smallest elements (MXFP4), widened. Nothing
        # of it is there before it is written.
        cdef size_t size = <size_t> 32 * self.memory.tile_bytes + 4096
        cdef void *scratch = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                                  -1, 0)
        if scratch == MAP_FAILED:
            raise MemoryError
        self.worker[index].scratch = <float *> scratch
        with nogil:
            self.loop(&self.worker[index])
        munmap(scratch, size)

    def totals(self):
        """What the engines did: a dict of counters."""
        cdef worker_t *w
        names = ("macs", "vector_elements", "bytes_tile_in", "bytes_tile_out", "macro_ops", "busy_ns_dma",
                 "busy_ns_tensor", "busy_ns_vector", "bytes_host_to_device", "bytes_device_to_host", "dma_messages",
                 "bytes_from_peers", "bytes_to_peers")
        sums = [0] * len(names)
        for i in range(self.workers):
            w = &self.worker[i]
            row = (w.macs, w.vector_elements, w.tile_in, w.tile_out, w.macro_ops, w.busy[0], w.busy[1], w.busy[2],
                   w.traffic.host_to_device, w.traffic.device_to_host, w.traffic.messages, w.traffic.from_peers,
                   w.traffic.to_peers)
            sums = [a + b for a, b in zip(sums, row, strict=True)]
        return dict(zip(names, sums, strict=True))

    def clear(self):
        """Set the counters to zero."""
        cdef float *scratch
        self.launches = 0
        for i in range(self.workers):
            scratch = self.worker[i].scratch
            memset(&self.worker[i], 0, sizeof(worker_t))
            self.worker[i].scratch = scratch

    cdef launch_t *prepare(self, kernel_t *kernel, uint32_t handle, context_t *context, const uint64_t *args,
                           const uint32_t *physical, uint32_t *status, uint64_t *bad) noexcept nogil:
        """A launch with its arguments checked, or NULL with the fault in ``status``. The caller holds the DMA lock."""
        cdef launch_t *launch
        cdef uint32_t i
        cdef uint64_t size
        cdef int kind
        cdef bint writes
        for i in range(kernel.arg_count):
            if kernel.arg_kind[i] == ARG_SCALAR:
                if args[i] >> 32:
                    status[0] = FAULT_BAD_FIELD
                    return NULL
                continue
            if args[i] & (kernel.arg_alignment[i] - 1):
                bad[0] = args[i]
                status[0] = FAULT_BAD_FIELD
                return NULL
            writes = kernel.arg_kind[i] != ARG_IN
            status[0] = self.memory.reach(args[i], kernel.arg_bytes[i], writes, context, bad)
            if status[0]:
                return NULL
        launch = <launch_t *> calloc(1, sizeof(launch_t))
        if launch != NULL:
            launch.units = <unit_t *> calloc(kernel.tiles, sizeof(unit_t))
        if launch == NULL or launch.units == NULL:
            free(launch)
            status[0] = FAULT_PROGRAM
            return NULL
        launch.kernel, launch.handle, launch.context = kernel, handle, context
        launch.remaining = kernel.tiles
        for i in range(kernel.arg_count):
            launch.args[i] = args[i]
            if kernel.arg_kind[i] == ARG_SCALAR:
                continue
            size = kernel.arg_bytes[i]
            kind = self.memory.resolve(args[i], &size, kernel.arg_kind[i] != ARG_IN, context, &launch.direct[i])
            if not (kind == KIND_HBM or kind == KIND_SRAM) or size != kernel.arg_bytes[i]:
                launch.direct[i] = NULL
        if writes_much(kernel):
            for i in range(kernel.arg_count):
                launch.past_caches[i] = kernel.arg_kind[i] == ARG_OUT and lies_apart(launch, i)
        self.launches += 1
        for i in range(kernel.tiles):
            launch.units[i].launch = launch
            launch.units[i].logical = i
            launch.units[i].physical = physical[i]
            if self.seed:
                launch.units[i].random = (self.seed * GOLDEN + self.launches * MIX + i) | 1
        kernel.running += 1
        return launch

    cdef void start(self, launch_t *launch) noexcept nogil:
        """Give every tile of a launch to the workers."""
        cdef uint32_t i
        pthread_mutex_lock(&self.mutex)
        for i in range(launch.kernel.tiles):
            self.push(&launch.units[i])
        pthread_cond_broadcast(&self.available)
        pthread_mutex_unlock(&self.mutex)

    cdef void release(self, launch_t *launch) noexcept nogil:
        """Free a launch that is done."""
        launch.kernel.running -= 1
        free(launch.units)
        free(launch)

    cdef void push(self, unit_t *unit) noexcept nogil:
        unit.next = NULL
        if self.tail == NULL:
            self.head = unit
        else:
            self.tail.next = unit
        self.tail = unit

    cdef void loop(self, worker_t *worker) noexcept nogil:
        cdef unit_t *unit
        cdef launch_t *launch
        cdef uint64_t nap
        cdef uint32_t fruitless = 0
        cdef bint precise = False
        pthread_mutex_lock(&self.mutex)
        while not self.stopping:
            unit = self.head
            if unit == NULL:
                pthread_cond_wait(&self.available, &self.mutex)
                continue
            self.head = unit.next
            if self.head == NULL:
                self.tail = NULL
            pthread_mutex_unlock(&self.mutex)
            launch = unit.launch
            if self.run(unit, worker):
                if add32(&launch.remaining, <uint32_t> -1) == 0:
                    launch.end_ns = clock_ns()
                    store32(&launch.done, 1)
                    # The front end may free the launch from here on.
                    full_fence()
                    if load32(self.sleeping):
                        rouse(self.bell)
                fruitless = 0
                pthread_mutex_lock(&self.mutex)
                continue
            # Every engine of this tile waits: for another tile, or for what is on a link.
            nap = left(unit)
            fruitless = fruitless + 1 if nap else 0
            if fruitless > self.count:
                if not precise:
                    prctl(PR_SET_TIMERSLACK, <unsigned long> 1)     # the kernel's 50 us are longer than many a piece
                    precise = True
                usleep(<unsigned int> min(nap // 1000, <uint64_t> LINK_NAP_US))
            else:
                sched_yield()
            pthread_mutex_lock(&self.mutex)
            self.push(unit)
        pthread_mutex_unlock(&self.mutex)

    cdef bint run(self, unit_t *unit, worker_t *worker) noexcept nogil:
        """Run a tile's engines; True at their end, False where all of them wait."""
        cdef launch_t *launch = unit.launch
        cdef kernel_t *kernel = launch.kernel
        cdef op_t *op
        cdef uint32_t stream, status
        cdef uint64_t bad = 0
        cdef int engine, turn, first
        cdef bint moved = True, waiting = True
        cdef uint32_t *length = &kernel.length[unit.logical * 3]
        while moved:
            moved = waiting = False
            first = 0
            if unit.random:
                unit.random ^= unit.random << 13
                unit.random ^= unit.random >> 7
                unit.random ^= unit.random << 17
                first = unit.random % 3
            for turn in range(3):
                engine = (first + turn) % 3
                stream = kernel.first[unit.logical * 3 + engine]
                while unit.at[engine] < length[engine]:
                    if load32(&launch.status):
                        return True
                    op = &kernel.ops[stream + unit.at[engine]]
                    if unit.due[engine]:
                        if clock_ns() < unit.due[engine]:
                            waiting = True
                            break
                        unit.due[engine] = 0
                    else:
                        if not ready(unit, op):
                            waiting = True
                            break
                        status = run_op(self.memory, unit, op, worker, &bad)
                        worker.macro_ops += 1
                        add32(&launch.steps, 1)
                        if status:
                            worker.traffic.until = 0
                            if swap_if32(&launch.status, FAULT_NONE, status):
                                launch.detail = stream + unit.at[engine]
                                launch.unit = unit.physical
                                launch.bad = bad
                            return True
                        if worker.traffic.until:
                            unit.due[engine] = worker.traffic.until + self.memory.link.latency_ns
                            worker.traffic.until = 0
                            moved = True
                            continue
                    post(unit, op)
                    unit.at[engine] += 1
                    moved = True
                    if unit.random:
                        break
                if moved and unit.random:
                    break
        if not waiting:
            return True
        return load32(&launch.status) != 0


cdef bint writes_much(kernel_t *kernel) noexcept nogil:
    """Whether it writes so much that the first bytes have left the cores' caches before the last ones come."""
    cdef uint64_t size = 0
    cdef uint32_t i
    for i in range(kernel.arg_count):
        if kernel.arg_kind[i] == ARG_OUT:
            size += kernel.arg_bytes[i]
    return size >= LONG_BYTES


cdef bint lies_apart(launch_t *launch, uint32_t which) noexcept nogil:
    """Whether no other argument lies in an argument's memory; what was just read is best written where it is cached."""
    cdef kernel_t *kernel = launch.kernel
    cdef uint64_t first = launch.args[which], end = first + kernel.arg_bytes[which]
    cdef uint32_t i
    for i in range(kernel.arg_count):
        if (i != which and kernel.arg_kind[i] != ARG_SCALAR and launch.args[i] < end
                and first < launch.args[i] + kernel.arg_bytes[i]):
            return False
    return True


cdef uint64_t left(unit_t *unit) noexcept nogil:
    """Nanoseconds until an operation that is on a link is there; 0 where none is."""
    cdef uint64_t now = 0, first = 0
    cdef int engine
    for engine in range(3):
        if unit.due[engine]:
            if now == 0:
                now = clock_ns()
            if unit.due[engine] <= now:
                return 0
            if first == 0 or unit.due[engine] - now < first:
                first = unit.due[engine] - now
    return first


cdef inline bint ready(unit_t *unit, op_t *op) noexcept nogil:
    cdef int i
    cdef uint32_t index, value
    for i in range(2):
        if op.pre[i].op:
            index = op.pre[i].index & ~<uint32_t> SHARED_SEMAPHORE
            if op.pre[i].index & SHARED_SEMAPHORE:
                value = load32(&unit.launch.semaphores[index])
            else:
                value = unit.semaphores[index]
            if <int32_t> (value - op.pre[i].value) < 0:
                return False
    return True


cdef inline void post(unit_t *unit, op_t *op) noexcept nogil:
    cdef int i
    cdef uint32_t index
    for i in range(2):
        if op.post[i].op:
            index = op.post[i].index & ~<uint32_t> SHARED_SEMAPHORE
            if op.post[i].index & SHARED_SEMAPHORE:
                add32(&unit.launch.semaphores[index], op.post[i].value)
            else:
                unit.semaphores[index] += op.post[i].value


cdef int fill_kernel(kernel_t *out, object kernel, uint32_t group) except -1:
    """Copy a verified kernel image into C."""
    cdef const unsigned char[::1] raw
    cdef uint64_t at = 0
    cdef int i
    memset(out, 0, sizeof(kernel_t))
    ops = sum(len(s.ops) for s in kernel.streams)
    out.ops = <op_t *> malloc(max(1, ops) * sizeof(op_t))
    out.first = <uint32_t *> calloc(kernel.tiles * 3, sizeof(uint32_t))
    out.length = <uint32_t *> calloc(kernel.tiles * 3, sizeof(uint32_t))
    if out.ops == NULL or out.first == NULL or out.length == NULL:
        free_kernel(out)
        raise MemoryError
    for stream in kernel.streams:
        if len(stream.ops) == 0:
            continue
        raw = stream.ops.tobytes()
        memcpy(&out.ops[at], &raw[0], raw.shape[0])
        slot = stream.tile * 3 + int(stream.engine)
        out.first[slot] = at
        out.length[slot] = len(stream.ops)
        at += len(stream.ops)
    out.tiles, out.arg_count, out.group = kernel.tiles, len(kernel.args), group
    for i, arg in enumerate(kernel.args):
        out.arg_kind[i], out.arg_alignment[i], out.arg_bytes[i] = arg.kind, arg.alignment, arg.nbytes
    out.live = True
    return 0


cdef void free_kernel(kernel_t *kernel) noexcept:
    free(kernel.ops)
    free(kernel.first)
    free(kernel.length)
    memset(kernel, 0, sizeof(kernel_t))
