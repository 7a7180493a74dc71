"""The command processor of a device: it watches the doorbells and runs the queues, on a thread of `Processor`.

For each queue it fetches the next command (once), checks it, waits for its barrier, report room, semaphores and tiles,
runs it, posts its semaphores and moves progress on. Launches run on the tiles meanwhile; everything else runs here,
long copies a piece a turn. When nothing moves for a while it sleeps until a doorbell's writer, a tile, a peer or
another thread wakes it.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from maia_emulator.bells cimport PART_DOORBELLS, PART_HBM, bell_t, rouse
from maia_emulator.commands cimport as_fetched, check_command, check_confined, run_command
from maia_emulator.injections cimport Injections
from maia_emulator.interrupts cimport Vectors
from maia_emulator.launch cimport MAX_ARGS, kernel_t, launch_t
from maia_emulator.lists cimport (
    begin_list,
    end_listed_launches,
    follow_branch,
    list_may_start,
    note_list_fault,
    wait_for_value,
    write_times,
)
from maia_emulator.memory cimport KIND_HOST, KIND_SRAM, DeviceMemory
from maia_emulator.queue_state cimport (
    EMPTY,
    FETCHED,
    LISTING,
    MAX_IN_FLIGHT,
    RUNNING,
    STARTED,
    STOPPED,
    STOPPING,
    in_flight_t,
    queue_t,
    window_t,
    writer_t,
)
from maia_emulator.strikes cimport corrupt, judge
from maia_emulator.support cimport (
    add32,
    and32,
    clock_ns,
    full_fence,
    load32,
    load64,
    or32,
    prefetch,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_trylock,
    pthread_mutex_unlock,
    pthread_rwlock_rdlock,
    pthread_rwlock_unlock,
    sched_yield,
    store32,
    store64,
    swap_if32,
)
from maia_emulator.tiles cimport Tiles
from maia_rt._fast.commands cimport (
    COMMAND_BYTES,
    FAULT_ABORTED,
    FAULT_BAD_FIELD,
    FAULT_BAD_KERNEL,
    FAULT_BAD_SEQUENCE,
    FAULT_DOORBELL,
    FAULT_ENGINE_HANG,
    FAULT_LOG_ENTRIES,
    FAULT_NONE,
    FAULT_RESET,
    FLAG_BARRIER,
    FLAG_REPORT,
    NO_UNIT,
    OPCODE_BRANCH,
    OPCODE_INDIRECT,
    OPCODE_LAUNCH,
    OPCODE_SIGNAL_REMOTE,
    OPCODE_WAIT_VALUE,
    POST_NONE,
    POST_SET,
    QUEUE_STOPPED,
    REPORT_BYTES,
    WAIT_ACQUIRE,
    WAIT_EQ,
    WAIT_NONE,
    WRITER_QUEUE,
    branch_command_t,
    command_t,
    fault_t,
    launch_command_t,
    report_t,
    semaphore_op_t,
    signal_remote_command_t,
)
from maia_rt._fast.registers cimport DOORBELL_ARM, DOORBELL_NEEDS_WAKE, DOORBELL_REPORT_HEAD, DOORBELL_TAIL

cdef extern from "<unistd.h>" nogil:
    int usleep(unsigned int microseconds)

cdef enum:
    AHEAD = 4
    DOORBELL_PAGE = 4096
    MAX_LEVEL = 255
    TURN = 64               # commands a queue may run before the next queue's turn
    STREAK = 16             # commands without a look in vain between them, from which on a driver streams
    FEW = 32                # commands of one look, from which on it is worth its cost


cdef char *translate(DeviceMemory memory, window_t *window, uint64_t address, uint64_t size, bint write) noexcept nogil:
    """Client memory by a remembered translation; NULL where only `DeviceMemory.load` and `store` can reach it."""
    cdef int kind
    if (window.generation == memory.dma.generation and address >= window.start
            and address - window.start + size <= window.size):
        return window.at + (address - window.start)
    window.start, window.size = address, <uint64_t> 1 << 30
    kind = memory.resolve(address, &window.size, write, NULL, &window.at)
    if kind != KIND_HOST or window.size < size:
        window.generation = 0
        return NULL
    window.generation = memory.dma.generation
    return window.at


cdef bint satisfied(semaphore_op_t *op, uint32_t value) noexcept nogil:
    """Whether a semaphore of this value lets a pre-semaphore operation through."""
    if op.op == WAIT_NONE:
        return True
    return value == op.value if op.op == WAIT_EQ else <int32_t> (value - op.value) >= 0


cdef inline bint held_by_tiles(queue_t *q) noexcept nogil:
    """Whether nothing in the queue can start before a launch of its own ends, which wakes us anyway."""
    if q.list.count and q.list.flight_count:
        return q.stage == LISTING or (q.stage == FETCHED and not list_may_start(q))
    return (q.stage == FETCHED and q.list.count == 0 and q.flight_count
            and (q.command.flags & FLAG_BARRIER or q.flight_count == MAX_IN_FLIGHT))


cdef char[DOORBELL_PAGE] nobodys_page


cdef class FrontEnd:
    """Queues, semaphores, contexts' users, kernels and the fault log.

    ``control`` is held by the thread that serves it for each round, and by whoever changes what it works on.
    """

    def __cinit__(self, DeviceMemory memory not None, Tiles tiles not None, Vectors vectors not None, *,
                  uint32_t max_queues, uint32_t semaphores, uint32_t max_kernels, uint32_t tiles_per_cluster,
                  uint32_t spin_us, size_t bar2_address, size_t bell_address):
        self.memory, self.tiles, self.vectors = memory, tiles, vectors
        self.max_queues, self.semaphore_count = max_queues, semaphores
        self.kernel_count, self.tiles_per_cluster = max_kernels + 1, tiles_per_cluster
        self.spin_ns = <uint64_t> spin_us * 1000
        self.bar2 = <char *> bar2_address
        self.bell = <bell_t *> bell_address
        self.semaphores = <uint32_t *> (self.bar2 + <size_t> max_queues * 4096)
        self.queues = <queue_t *> calloc(max_queues, sizeof(queue_t))
        self.live = <uint32_t *> calloc(max_queues, sizeof(uint32_t))
        self.writers = <writer_t *> calloc(semaphores, sizeof(writer_t))
        self.kernels = <kernel_t *> calloc(self.kernel_count, sizeof(kernel_t))
        self.tile_busy = <uint8_t *> calloc(tiles.count, 1)
        self.faults = <fault_t *> calloc(FAULT_LOG_ENTRIES, sizeof(fault_t))
        if (self.queues == NULL or self.live == NULL or self.kernels == NULL or self.tile_busy == NULL
                or self.faults == NULL or self.writers == NULL):
            raise MemoryError
        self.injections = Injections(max_queues)
        tiles.sleeping, tiles.bell = &self.sleeping, self.bell
        pthread_mutex_init(&self.control, NULL)

    def __dealloc__(self):
        free(self.queues)
        free(self.live)
        free(self.writers)
        free(self.kernels)
        free(self.tile_busy)
        free(self.faults)
        pthread_mutex_destroy(&self.control)

    def wake(self):
        """Make a sleeping command processor look at its doorbells."""
        rouse(self.bell)

    cdef void wake_register(self) noexcept nogil:
        """WAKE was written; any thread calls."""
        add32(&self.woken, 1)
        rouse(self.bell)

    cdef void take(self) noexcept nogil:
        """Take ``control`` from any thread but the command processor's."""
        add32(&self.waiting, 1)
        pthread_mutex_lock(&self.control)
        add32(&self.waiting, <uint32_t> -1)

    cdef void give(self) noexcept nogil:
        pthread_mutex_unlock(&self.control)

    cdef int attend(self) noexcept nogil:
        """Have one round, and fall asleep where there has been nothing to do for long. The caller holds ``control``."""
        cdef uint64_t begun = self.now
        cdef bint rung = load32(&self.bell.rings) != self.seen
        if self.asleep and rung:
            self.get_up()
        if self.round():
            self.counters.busy_ns_command += clock_ns() - begun
            self.get_up()
            return WORKED | (LONG if self.yielded else STREAM if self.stream else 0)
        if self.asleep:
            self.look_at = self.next_look()
            return 0
        if self.idle_since == 0:
            self.idle_since = begun
        # While tiles work, this thread's core is better spent on them.
        if self.live_count == 0 or begun - self.idle_since >= (2000 if self.launched else self.spin_ns):
            return WORKED if self.lie_down() else 0
        return AWAKE | PEERS if self.memory.dma.peers else AWAKE

    cdef uint32_t *word(self, queue_t *q, uint32_t offset) noexcept nogil:
        """A word of the queue's doorbell page. The caller holds the DMA table's lock for reading."""
        if q.doorbell_at and q.doorbell_window.generation != self.memory.dma.generation:
            q.doorbell = translate(self.memory, &q.doorbell_window, q.doorbell_at, DOORBELL_PAGE, True)
            if q.doorbell == NULL:
                q.doorbell = nobodys_page       # the client has taken it away: nothing moves any more
        return <uint32_t *> (q.doorbell + offset)

    cdef uint32_t check(self, queue_t *q, bint listed) noexcept nogil:
        """The fault that the fields of the command at hand alone earn it, or none."""
        if q.context.bounded:
            return check_confined(&q.command, listed, q.context)
        return check_command(&q.command, listed, self.max_queues, self.semaphore_count)

    cdef void announce(self) noexcept with gil:
        """Tell what injections did to the whole device, from outside of every lock."""
        what = and32(&self.trips, 0)
        if what and self.on_trip is not None:
            self.on_trip(what)

    cdef bint round(self) noexcept nogil:
        """One look at every queue; True where any of them moved."""
        cdef uint32_t i, moved = 0
        self.blocked = 0
        self.yielded = self.stream = False
        self.links_due = <uint64_t> -1
        self.launched = 0
        self.claimed = self.claims = 0
        self.level = MAX_LEVEL
        if self.gone:
            return False
        pthread_rwlock_rdlock(&self.memory.dma.lock)
        for i in range(self.live_count):
            moved += self.service(&self.queues[self.live[i]])
            if self.gone:
                break
        pthread_rwlock_unlock(&self.memory.dma.lock)
        if moved > 1:
            self.stream = False
        return moved > 0

    cdef bint lie_down(self) noexcept nogil:
        """Fall asleep, unless a last look finds something to do: True then."""
        cdef uint32_t i, seen = load32(&self.bell.rings)
        # What is waited for is known after the look below, too late for a peer that stores meanwhile.
        store32(&self.bell.wants, PART_DOORBELLS | PART_HBM)
        # Each sleep has a number, so that drivers can tell it from the one that they have ended already.
        self.sleep_number = self.sleep_number + 1 or 1
        store32(&self.sleeping, self.sleep_number)
        pthread_rwlock_rdlock(&self.memory.dma.lock)
        for i in range(self.live_count):
            if not held_by_tiles(&self.queues[self.live[i]]):
                store32(self.word(&self.queues[self.live[i]], DOORBELL_NEEDS_WAKE), self.sleep_number)
        pthread_rwlock_unlock(&self.memory.dma.lock)
        full_fence()
        # A doorbell rung before its writer could see the word is found here.
        self.asleep, self.seen = True, seen
        self.now = clock_ns()
        if self.round() or self.trips:
            self.get_up()
            return True
        store32(&self.bell.wants, self.blocked)
        self.look_at = self.next_look()
        self.counters.sleeps += 1
        return False

    cdef uint64_t next_look(self) noexcept nogil:
        """When to look at a sleeping device that nobody has rung."""
        if self.blocked:
            # What is waited for may be written by one who does not ring.
            return min(self.links_due, self.now + 5000000)
        if self.launched:
            return min(self.links_due, self.now + self.watch_ms() * <uint64_t> 1000000)   # to find one that hangs
        return self.links_due

    cdef void get_up(self) noexcept nogil:
        cdef uint32_t i
        self.idle_since = 0
        if not self.asleep:
            return
        self.asleep = False
        store32(&self.bell.wants, 0)
        store32(&self.sleeping, 0)
        pthread_rwlock_rdlock(&self.memory.dma.lock)
        for i in range(self.live_count):
            store32(self.word(&self.queues[self.live[i]], DOORBELL_NEEDS_WAKE), 0)
        pthread_rwlock_unlock(&self.memory.dma.lock)
        # A store made while the word could still be read is seen by the next look at the doorbells.
        full_fence()

    cdef bint service(self, queue_t *q) noexcept nogil:
        """Take a queue as far as it goes, or a turn's worth; True where it moved."""
        cdef bint moved = False, backwards
        cdef uint32_t tail
        cdef int turn, step
        cdef uint64_t arm
        if q.priority < self.level:
            # What queues of larger priority wait for is not for this one.
            self.level = q.priority
            self.claimed |= self.claims
            self.claims = 0
        if q.flight_count or q.list.flight_count:
            moved = self.reap(q)
        if q.state == RUNNING:
            tail = load32(self.word(q, DOORBELL_TAIL))
            if tail != q.tail:
                backwards = <int32_t> (tail - q.tail) < 0
                q.tail = tail
                self.counters.doorbells += 1
                if backwards:
                    self.stop_here(q, FAULT_DOORBELL, tail)
                    moved = True
            for turn in range(TURN):
                if q.state != RUNNING:
                    break
                if q.stage == EMPTY:
                    if q.tail == <uint32_t> q.head:
                        q.streak = min(q.streak + turn, <uint32_t> STREAK) if turn else 0
                        self.stream |= q.streak == STREAK and turn < FEW
                        break
                    if q.tail - <uint32_t> q.head > q.mask + 1 or q.tail - <uint32_t> q.retired > q.mask + 1:
                        self.fail_here(q, FAULT_DOORBELL, q.tail)
                        moved = True
                        break
                    if not self.fetch(q):
                        moved = True
                        break
                step = self.advance(q)
                if step != MOVED and q.since_ns == 0:
                    q.since_ns = clock_ns()
                if step == BLOCKED:
                    break
                moved = True
                if step != MOVED:
                    self.yielded |= step == YIELDED
                    break
        if q.retired != q.published:
            self.publish(q)
        if q.state == STOPPING and q.flight_count == 0 and q.list.flight_count == 0:
            if q.list.count and q.list.fault.code:
                self.fail_list(q)       # it was ending when an earlier launch failed too
            self.stop_queue(q)
            moved = True
        arm = load64(<uint64_t *> self.word(q, DOORBELL_ARM))
        if arm != q.arm:
            q.arm = arm
            if arm and arm <= q.published:
                self.vectors.fire(q.vector)
        self.launched += q.flight_count + q.list.flight_count
        return moved

    cdef bint fetch(self, queue_t *q) noexcept nogil:
        """Copy the next command out of the ring, once, and check it."""
        cdef uint64_t address = q.ring + (q.head & q.mask) * COMMAND_BYTES, bad = 0
        cdef char *at = translate(self.memory, &q.ring_window, address, COMMAND_BYTES, False)
        cdef uint32_t fault = FAULT_NONE
        if at != NULL:
            # The slots come from another core's cache; four on the way at a time hide what each one takes.
            # None that its writer has yet to fill: it would have to fetch the line back.
            if q.tail - <uint32_t> q.head > AHEAD and (q.head + AHEAD & q.mask) > (q.head & q.mask):
                prefetch(at + AHEAD * COMMAND_BYTES)
            memcpy(&q.command, at, COMMAND_BYTES)
        else:
            memset(&q.command, 0, COMMAND_BYTES)
            fault = self.memory.load(&q.command, address, COMMAND_BYTES, NULL, &self.traffic, &bad)
        q.list.count, q.since_ns = 0, 0
        if fault == FAULT_NONE and q.command.sequence != <uint16_t> (q.head + 1):
            fault = FAULT_BAD_SEQUENCE
            bad = q.command.sequence
        if fault == FAULT_NONE:
            fault = self.check(q, False)
        if fault:
            self.fail_here(q, fault, bad)
            return False
        q.stage = FETCHED
        return True

    cdef int next_listed(self, queue_t *q) noexcept nogil:
        """Go on with the list: its end where nothing is left and nothing in flight, else its next command."""
        cdef uint64_t bad = 0
        cdef uint32_t fault
        if q.list.fault.code:
            return BLOCKED if q.list.flight_count else self.fail_list(q)
        if q.list.flight_count and (not q.list.concurrent or q.list.index == q.list.count):
            return BLOCKED
        q.since_ns = 0
        if q.list.index == q.list.count:
            q.command = q.list.command
            q.list.count = 0
            return self.complete(q)
        fault = self.memory.load(&q.command, q.list.at + <uint64_t> q.list.index * COMMAND_BYTES, COMMAND_BYTES,
                                 q.context, &self.traffic, &bad)
        if fault:
            q.command = q.list.command
        else:
            fault = self.check(q, True)
            if (fault == FAULT_NONE and q.command.opcode == OPCODE_BRANCH
                    and (<branch_command_t *> &q.command).target > q.list.count):
                fault = FAULT_BAD_FIELD
        if fault:
            return self.fail_here(q, fault, bad)
        q.list.next = q.list.index + 1
        q.stage = FETCHED
        return MOVED

    cdef bint may_start(self, queue_t *q) noexcept nogil:
        """Whether barrier, report room and in-flight limit let the queue's next command start."""
        if q.list.count:
            return list_may_start(q)    # the INDIRECT command itself has passed the rest
        if q.flight_count and (q.command.flags & FLAG_BARRIER or q.flight_count == MAX_IN_FLIGHT):
            return False
        if q.report_tail - q.report_head + q.flight_count <= q.report_mask:
            return True
        # The driver writes to this cache line with every doorbell, so it is looked at only when the records run out.
        q.report_head = load32(self.word(q, DOORBELL_REPORT_HEAD))
        return q.report_tail - q.report_head + q.flight_count <= q.report_mask

    cdef bint semaphores_ready(self, command_t *command) noexcept nogil:
        cdef int i
        for i in range(2):
            if command.pre[i].op == WAIT_NONE:
                continue
            if not satisfied(&command.pre[i], load32(&self.semaphores[command.pre[i].index])):
                self.writers[command.pre[i].index].awaited = True
                return False
        return True

    cdef int advance(self, queue_t *q) noexcept nogil:
        """Take the command under way one step further."""
        cdef bint finished = True
        cdef uint64_t bad = 0
        cdef uint32_t fault
        cdef int step, i
        cdef launch_t *launch = NULL
        if q.aborted == q.head + 1:
            q.aborted = 0
            return self.stop_here(q, FAULT_ABORTED, 0)
        if q.list.count and q.list.fault.code and (q.stage == FETCHED or q.command.opcode == OPCODE_WAIT_VALUE):
            q.stage = LISTING       # a launch ahead of it has failed
        if q.stage == LISTING:
            return self.next_listed(q)
        if q.stage == FETCHED:
            if not self.may_start(q):
                return BLOCKED
            if not self.semaphores_ready(&q.command):
                self.blocked |= PART_DOORBELLS
                return BLOCKED
            if self.injecting:
                step = judge(self, q)
                if step != MOVED:
                    return step
            if q.command.opcode == OPCODE_LAUNCH:
                step = self.start_launch(q, &launch)
                if step != MOVED:
                    return step
                q.judged = False
            for i in range(2):
                if q.command.pre[i].op == WAIT_ACQUIRE:
                    self.wrote(q.command.pre[i].index, add32(&self.semaphores[q.command.pre[i].index],
                                                             -q.command.pre[i].value), q, q.head + 1)
            self.counters.by_opcode[q.command.opcode] += 1
            if q.list.count == 0:
                q.start_ns = clock_ns() if q.command.flags & FLAG_REPORT else 0
            elif q.list.times:
                q.list.start_ns = clock_ns()
            memset(&q.work, 0, sizeof(q.work))
            q.stage = STARTED
            if self.memory.link.on:
                q.link_since, q.link_until, q.link_last = clock_ns(), 0, False
            if q.command.opcode == OPCODE_INDIRECT:
                begin_list(q)
                return self.next_listed(q)
            if q.command.opcode == OPCODE_LAUNCH:
                self.fly(q, launch)
                return MOVED
        if q.command.opcode == OPCODE_WAIT_VALUE:
            fault = wait_for_value(self.memory, &q.command, &q.work, q.context, &self.traffic, &finished, &bad)
            if not finished and fault == FAULT_NONE:
                self.blocked |= PART_HBM | PART_DOORBELLS
                return BLOCKED
        elif q.command.opcode == OPCODE_BRANCH:
            fault = follow_branch(self.memory, q, self.semaphores, &self.traffic, &bad)
        elif self.memory.link.on:
            step = self.run_over_links(q, &finished, &fault, &bad)
            if step == BLOCKED:
                return BLOCKED
        else:
            fault = run_command(self.memory, &q.command, &q.work, q.context, &self.traffic, &finished, &bad)
        if fault:
            return self.fail_here(q, fault, bad)
        if not finished:
            return YIELDED
        if self.injecting and q.corrupt:
            corrupt(self, q)
        return self.complete(q)

    cdef int run_over_links(self, queue_t *q, bint *finished, uint32_t *fault, uint64_t *bad) noexcept nogil:
        """`run_command` with a model of links: what it moves takes its time. BLOCKED while it does.

        A piece is moved at once, and the command held as long as its links take; nobody can tell before it is done.
        A signal would tell, so it is held first.
        """
        cdef uint64_t now = clock_ns()
        cdef char *at = NULL
        cdef uint64_t size = 4, address
        cdef int kind
        fault[0] = FAULT_NONE
        if now < q.link_until:
            self.links_due = min(self.links_due, q.link_until)
            return BLOCKED
        if q.link_last:
            finished[0] = True
            return MOVED
        self.traffic.since, self.traffic.until = q.link_since, 0
        if q.command.opcode == OPCODE_SIGNAL_REMOTE and not q.work.begun:
            q.work.begun = True
            address = (<signal_remote_command_t *> &q.command).address
            kind = self.memory.resolve(address, &size, True, q.context, &at)
            if kind >= 0:
                self.memory.charge(4, KIND_SRAM, 0, kind, address, &self.traffic)
            finished[0] = False
        else:
            fault[0] = run_command(self.memory, &q.command, &q.work, q.context, &self.traffic, finished, bad)
            q.link_last = finished[0]
        if self.traffic.until and fault[0] == FAULT_NONE:
            q.link_until = self.traffic.until
            if q.link_last or q.command.opcode == OPCODE_SIGNAL_REMOTE:
                q.link_until += self.memory.link.latency_ns     # the pieces of a long one follow each other
            finished[0] = False
        return MOVED

    cdef void fly(self, queue_t *q, launch_t *launch) noexcept nogil:
        """Start a launch that has its tiles; the queue, or its list, goes on behind it."""
        cdef in_flight_t *entry
        if q.list.count:
            entry = &q.list.flight[q.list.flight_count]
            q.list.flight_count += 1
            entry.sequence = q.list.index
            q.list.index = q.list.next
            q.stage = LISTING
        else:
            entry = &q.flight[(q.flight_first + q.flight_count) % MAX_IN_FLIGHT]
            q.flight_count += 1
            q.head += 1
            entry.sequence = q.head
            q.stage = EMPTY
        entry.launch, entry.command, entry.status = launch, q.command, FAULT_NONE
        entry.start_ns = entry.steps_ns = clock_ns()
        entry.steps = 0
        self.tiles.start(launch)
        self.counters.launches += 1

    cdef int start_launch(self, queue_t *q, launch_t **launch) noexcept nogil:
        """Find tiles for a LAUNCH and prepare it: MOVED with ``launch`` set, BLOCKED, or FAILED."""
        cdef launch_command_t *command = <launch_command_t *> &q.command
        cdef kernel_t *kernel
        cdef uint64_t args[MAX_ARGS]
        cdef uint32_t physical[4096]
        cdef uint32_t fault = FAULT_NONE, i, within = 0
        cdef uint64_t bad = 0
        if command.kernel >= self.kernel_count or not self.kernels[command.kernel].live:
            return self.fail_here(q, FAULT_BAD_KERNEL, command.kernel)
        kernel = &self.kernels[command.kernel]
        if kernel.context != NULL and kernel.context != q.context:
            return self.fail_here(q, FAULT_BAD_KERNEL, command.kernel)
        if command.units >> ((self.tiles.count - 1) // self.tiles_per_cluster) >> 1:
            return self.fail_here(q, FAULT_BAD_FIELD, 0)
        for i in range(self.tiles.count):
            if command.units == 0 or command.units >> (i // self.tiles_per_cluster) & 1:
                within += 1
        if within < kernel.tiles or command.arg_count != kernel.arg_count:
            return self.fail_here(q, FAULT_BAD_KERNEL, command.kernel)
        if not self.find_tiles(kernel.tiles, command.units, physical):
            self.claims |= command.units or <uint32_t> 0xffffffff
            return BLOCKED
        fault = self.memory.load(args, command.args, <uint64_t> kernel.arg_count * 8, q.context, &self.traffic, &bad)
        if fault == FAULT_NONE:
            launch[0] = self.tiles.prepare(kernel, command.kernel, q.context, args, physical, &fault, &bad)
        if fault:
            return self.fail_here(q, fault, bad)
        for i in range(kernel.tiles):
            self.tile_busy[physical[i]] = 1
        return MOVED

    cdef bint find_tiles(self, uint32_t count, uint32_t clusters, uint32_t *physical) noexcept nogil:
        cdef uint32_t i, found = 0
        cdef uint32_t usable = (clusters or <uint32_t> 0xffffffff) & ~self.claimed
        for i in range(self.tiles.count):
            if found == count:
                break
            if not self.tile_busy[i] and usable >> (i // self.tiles_per_cluster) & 1:
                physical[found] = i
                found += 1
        return found == count

    cdef int complete(self, queue_t *q) noexcept nogil:
        """The command under way is done: of a list, go on with the next; else retire it when its turn comes."""
        cdef int i, step
        if q.list.count:
            q.stage = LISTING
            if not self.complete_listed(q, q.list.index, &q.command, q.list.start_ns, 0):
                return FAILED
            q.list.index = q.list.next
            step = self.next_listed(q)
            return MOVED if step == BLOCKED else step
        self.counters.commands += 1
        self.post(q, q.head + 1, &q.command)
        if q.command.flags & FLAG_REPORT:
            self.report(q, q.head + 1, q.start_ns, FAULT_NONE, 0)
        q.stage = EMPTY
        q.head += 1
        if q.flight_count == 0:
            q.retired = q.head
            return MOVED
        i = (q.flight_first + q.flight_count) % MAX_IN_FLIGHT
        q.flight[i].sequence, q.flight[i].launch, q.flight[i].status = q.head, NULL, FAULT_NONE
        q.flight_count += 1
        return MOVED

    cdef bint complete_listed(self, queue_t *q, uint32_t index, command_t *command, uint64_t start_ns,
                              uint64_t end_ns) noexcept nogil:
        """A listed command has succeeded, if its times can be written; ``end_ns`` 0 is now."""
        cdef uint64_t bad = 0
        cdef uint32_t fault
        if q.list.times:
            fault = write_times(self.memory, q, index, start_ns, end_ns or clock_ns(), &self.traffic, &bad)
            if fault:
                self.fail_listed(q, index, command, fault, bad, NO_UNIT)
                return False
        self.counters.commands += 1
        self.post(q, q.head + 1, command)
        return True

    cdef void post(self, queue_t *q, uint64_t sequence, command_t *command) noexcept nogil:
        cdef uint32_t index, value
        cdef int i
        for i in range(2):
            if command.post[i].op == POST_NONE:
                continue
            index, value = command.post[i].index, command.post[i].value
            if command.post[i].op == POST_SET:
                store32(&self.semaphores[index], value)
            else:
                value = add32(&self.semaphores[index], value)
            self.wrote(index, value, q, sequence)

    cdef void wrote(self, uint32_t index, uint32_t value, queue_t *q, uint64_t sequence) noexcept nogil:
        """Remember who gave a semaphore its value."""
        cdef writer_t *writer = &self.writers[index]
        writer.time_ns, writer.sequence, writer.queue, writer.value = self.now, sequence, q.id, value
        writer.kind = WRITER_QUEUE

    cdef bint reap(self, queue_t *q) noexcept nogil:
        """Look after launches in flight: finish what is done, retire in order."""
        cdef in_flight_t *entry
        cdef launch_t *launch
        cdef bint moved = self.reap_listed(q) if q.list.flight_count else False
        cdef int i
        for i in range(q.flight_count):
            entry = &q.flight[(q.flight_first + i) % MAX_IN_FLIGHT]
            launch = entry.launch
            if launch == NULL:
                continue
            if not load32(&launch.done):
                self.watch(entry)
                continue
            moved = True
            entry.launch = NULL
            entry.status = launch.status
            if launch.status:
                self.fail(q, entry.sequence, launch.status, launch.bad, launch.detail, launch.unit, launch.handle,
                          &entry.command, entry.start_ns)
            else:
                self.counters.commands += 1
                self.post(q, entry.sequence, &entry.command)
                if entry.command.flags & FLAG_REPORT:
                    self.report(q, entry.sequence, entry.start_ns, FAULT_NONE, 0)
            self.free_launch(launch)
        while q.flight_count and q.flight[q.flight_first].launch == NULL:
            if q.state == RUNNING or q.retired + 1 < q.fault_sequence:
                q.retired += 1
            q.flight_first = (q.flight_first + 1) % MAX_IN_FLIGHT
            q.flight_count -= 1
            moved = True
        return moved

    cdef bint reap_listed(self, queue_t *q) noexcept nogil:
        """Likewise for those of its list."""
        cdef in_flight_t entry
        cdef bint moved = False
        cdef int i = 0
        while i < q.list.flight_count:
            if not load32(&q.list.flight[i].launch.done):
                self.watch(&q.list.flight[i])
                i += 1
                continue
            moved = True
            entry = q.list.flight[i]
            q.list.flight_count -= 1
            q.list.flight[i] = q.list.flight[q.list.flight_count]
            if entry.launch.status:
                self.fail_listed(q, <uint32_t> entry.sequence, &entry.command, entry.launch.status, entry.launch.bad,
                                 entry.launch.unit)
            else:
                self.complete_listed(q, <uint32_t> entry.sequence, &entry.command, entry.start_ns,
                                     entry.launch.end_ns)
            self.free_launch(entry.launch)
        return moved

    cdef void watch(self, in_flight_t *entry) noexcept nogil:
        """Fail a launch that made no step within the watchdog's time."""
        cdef uint64_t now
        cdef uint32_t steps
        if self.watchdog_ns == 0:
            return
        now = clock_ns()
        steps = load32(&entry.launch.steps)
        if steps != entry.steps:
            entry.steps, entry.steps_ns = steps, now
        elif now - entry.steps_ns > self.watchdog_ns and swap_if32(&entry.launch.status, FAULT_NONE,
                                                                   FAULT_ENGINE_HANG):
            self.raise_error(ERROR_WATCHDOG)

    cdef int watch_ms(self) noexcept nogil:
        """How long to sleep while launches run: short enough to find one that hangs in time."""
        return <int> min(self.watchdog_ns // 4000000 + 1, <uint64_t> 100) if self.watchdog_ns else 100

    cdef void free_launch(self, launch_t *launch) noexcept nogil:
        cdef uint32_t i
        for i in range(launch.kernel.tiles):
            self.tile_busy[launch.units[i].physical] = 0
        self.tiles.release(launch)

    cdef int stop_here(self, queue_t *q, uint32_t code, uint64_t bad) noexcept nogil:
        """The command under way fails from outside, with what its list has in flight."""
        if q.list.count:
            end_listed_launches(&q.list, code)
            if q.stage == LISTING:
                q.command = q.list.command      # the next one has not been read
        return self.fail_here(q, code, bad)

    cdef int fail_here(self, queue_t *q, uint32_t code, uint64_t bad) noexcept nogil:
        """The command under way fails."""
        cdef uint32_t kernel = 0
        if q.list.count:
            self.fail_listed(q, q.list.index, &q.command, code, bad, NO_UNIT)
            q.stage = LISTING
            return FAILED if q.list.flight_count else self.fail_list(q)
        if q.command.opcode == OPCODE_LAUNCH:
            kernel = (<launch_command_t *> &q.command).kernel
        self.fail(q, q.head + 1, code, bad, 0, NO_UNIT, kernel, &q.command, q.start_ns)
        q.stage = EMPTY
        return FAILED

    cdef void fail_listed(self, queue_t *q, uint32_t index, command_t *command, uint32_t code, uint64_t bad,
                          uint32_t unit) noexcept nogil:
        """A listed command fails; its list does once nothing of it is in flight."""
        cdef uint32_t kernel = 0
        if command.opcode == OPCODE_LAUNCH:
            kernel = (<launch_command_t *> command).kernel
        note_list_fault(&q.list, index, command, code, bad, unit, kernel)

    cdef int fail_list(self, queue_t *q) noexcept nogil:
        """The list fails, as the first of its commands that did."""
        self.fail(q, q.head + 1, q.list.fault.code, q.list.fault.bad, q.list.fault.index, q.list.fault.unit,
                  q.list.fault.kernel, &q.list.fault.command, q.start_ns)
        q.list.count = 0
        q.stage = EMPTY
        return FAILED

    cdef int fail(self, queue_t *q, uint64_t sequence, uint32_t code, uint64_t bad, uint32_t detail, uint32_t unit,
                  uint32_t kernel, command_t *command, uint64_t start_ns) noexcept nogil:
        """Log a failed command, report it and stop the queue."""
        cdef fault_t *log = &self.faults[self.fault_count % FAULT_LOG_ENTRIES]
        q.held, q.judged, q.corrupt = 0, False, False
        memset(log, 0, sizeof(fault_t))
        log.time_ns, log.sequence, log.address, log.code, log.queue = clock_ns(), sequence, bad, code, q.id
        log.unit, log.detail, log.kernel = unit, detail, kernel
        memcpy(log.command, command, COMMAND_BYTES)
        as_fetched(<command_t *> log.command, q.context)
        self.fault_count += 1
        if self.fault_count > FAULT_LOG_ENTRIES:
            or32(&self.errors, ERROR_LOG_OVERFLOW)
        self.counters.faults += 1
        self.counters.commands_failed += 1
        self.report(q, sequence, start_ns, code, detail)
        if q.state == RUNNING or sequence < q.fault_sequence:
            q.fault, q.fault_sequence = code, sequence
        q.state = STOPPING
        return FAILED

    cdef void stop_queue(self, queue_t *q) noexcept nogil:
        """Everything that was in flight has ended: show the fault."""
        q.state = STOPPED
        self.write_progress(q, 12, q.fault, 4)
        self.write_progress(q, 16, q.fault_sequence, 8)
        self.write_progress(q, 8, QUEUE_STOPPED, 4)
        self.vectors.fire(q.vector)
        self.raise_error(ERROR_FAULT)

    cdef void raise_error(self, uint32_t bit) noexcept nogil:
        if not or32(&self.errors, bit) & bit:
            self.vectors.fire(0)

    cdef void report(self, queue_t *q, uint64_t sequence, uint64_t start_ns, uint32_t status,
                     uint32_t detail) noexcept nogil:
        cdef report_t record
        cdef uint64_t bad = 0
        record.sequence, record.start_ns, record.end_ns = sequence, start_ns, clock_ns()
        record.status, record.detail = status, detail
        self.memory.store(q.reports + <uint64_t> (q.report_tail & q.report_mask) * REPORT_BYTES, &record,
                          REPORT_BYTES, NULL, &self.traffic, &bad)
        q.report_tail += 1
        self.write_progress(q, 24, q.report_tail, 4)

    cdef void write_progress(self, queue_t *q, uint64_t offset, uint64_t value, uint32_t size) noexcept nogil:
        """Store a word of the progress block; a client that took the memory away has only itself to wonder."""
        cdef char *at = translate(self.memory, &q.progress_window, q.progress + offset, size, True)
        cdef uint64_t bad = 0
        if at == NULL:
            self.memory.store(q.progress + offset, &value, size, NULL, &self.traffic, &bad)
        elif size == 8:
            store64(<uint64_t *> at, value)
        else:
            store32(<uint32_t *> at, <uint32_t> value)

    cdef void publish(self, queue_t *q) noexcept nogil:
        """Show progress: the mirror semaphore, the progress word, and the interrupt where one is armed."""
        cdef uint64_t before = q.published, arm
        q.published, q.published_ns = q.retired, self.now
        store32(&self.semaphores[q.id], <uint32_t> q.retired)
        self.write_progress(q, 0, q.retired, 8)
        # The driver arms, fences, reads progress; we write progress, fence, read ARM: one of us sees the other.
        full_fence()
        arm = load64(<uint64_t *> self.word(q, DOORBELL_ARM))
        if arm != q.arm:
            q.arm = arm
            if arm and arm <= q.published:
                self.vectors.fire(q.vector)
        elif before < arm <= q.published:
            self.vectors.fire(q.vector)

    cdef void quiesce(self, queue_t *q) noexcept nogil:
        """Abort what a queue has in flight and wait for the tiles to let go. The caller holds ``control``."""
        cdef in_flight_t *entry
        cdef bint busy = True
        cdef int i
        q.state = STOPPED
        while busy:
            busy = False
            end_listed_launches(&q.list, FAULT_RESET)
            i = 0
            while i < q.list.flight_count:
                if load32(&q.list.flight[i].launch.done):
                    self.free_launch(q.list.flight[i].launch)
                    q.list.flight_count -= 1
                    q.list.flight[i] = q.list.flight[q.list.flight_count]
                else:
                    busy = True
                    i += 1
            for i in range(q.flight_count):
                entry = &q.flight[(q.flight_first + i) % MAX_IN_FLIGHT]
                if entry.launch == NULL:
                    continue
                swap_if32(&entry.launch.status, FAULT_NONE, FAULT_RESET)
                if not load32(&entry.launch.done):
                    busy = True
                    continue
                self.free_launch(entry.launch)
                entry.launch = NULL
            if busy:
                usleep(50)
        q.flight_count = 0
        q.list.count = 0
        q.held, q.judged, q.corrupt = 0, False, False
        q.stage = EMPTY


cdef int serve(FrontEnd front, uint64_t *now) noexcept nogil:
    """Give a front end its turn, unless it sleeps or somebody else holds it; ``now`` is moved on."""
    cdef int what
    if front.left or (front.asleep and now[0] < front.look_at and load32(&front.bell.rings) == front.seen):
        return 0
    if front.trips:
        front.announce()
    if load32(&front.waiting):
        sched_yield()               # a mutex is not fair: let the one who asked have it
        return BUSY
    if pthread_mutex_trylock(&front.control):
        return BUSY
    front.now = now[0] = clock_ns()
    what = 0 if front.left else front.attend()
    pthread_mutex_unlock(&front.control)
    return what


cdef void nap_of(FrontEnd front, nap_t *nap) noexcept nogil:
    """How to sleep until a front end wants attention."""
    nap.asleep, nap.word, nap.seen, nap.look_at = front.asleep, &front.bell.rings, front.seen, front.look_at
