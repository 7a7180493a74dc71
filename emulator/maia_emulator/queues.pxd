from libc.stdint cimport uint8_t, uint32_t, uint64_t

from maia_emulator.bells cimport bell_t
from maia_emulator.injections cimport Injections
from maia_emulator.interrupts cimport Vectors
from maia_emulator.memory cimport DeviceMemory, traffic_t
from maia_emulator.queue_state cimport in_flight_t, queue_t, writer_t
from maia_emulator.support cimport pthread_mutex_t
from maia_emulator.launch cimport kernel_t, launch_t
from maia_emulator.tiles cimport Tiles
from maia_rt._fast.commands cimport command_t, counters_t, fault_t, semaphore_op_t

cdef enum:                  # what a step did
    BLOCKED = 0
    MOVED = 1
    YIELDED = 2
    FAILED = 3

cdef enum:                  # what `serve` found; a sum
    WORKED = 1
    LONG = 2                # there is more of it
    AWAKE = 4
    BUSY = 8                # somebody else holds it
    PEERS = 16              # with AWAKE: it reaches other devices
    STREAM = 32             # with WORKED: one queue, whose driver keeps ringing for a few commands

cdef enum:                  # ERRORS
    ERROR_FAULT = 1
    ERROR_WATCHDOG = 8
    ERROR_LOG_OVERFLOW = 16

cdef bint satisfied(semaphore_op_t *op, uint32_t value) noexcept nogil

cdef struct nap_t:
    bint asleep
    uint32_t *word          # of the bell
    uint32_t seen
    uint64_t look_at

cdef int serve(FrontEnd front, uint64_t *now) noexcept nogil
cdef void nap_of(FrontEnd front, nap_t *nap) noexcept nogil

cdef class FrontEnd:
    cdef readonly DeviceMemory memory
    cdef readonly Tiles tiles
    cdef readonly Vectors vectors
    cdef queue_t *queues
    cdef uint32_t *live
    cdef uint32_t live_count
    cdef uint32_t max_queues
    cdef uint32_t semaphore_count
    cdef uint32_t *semaphores
    cdef writer_t *writers      # of each semaphore
    cdef char *bar2
    cdef kernel_t *kernels
    cdef uint32_t kernel_count
    cdef uint8_t *tile_busy
    cdef uint32_t tiles_per_cluster
    cdef pthread_mutex_t control
    cdef uint32_t waiting       # threads that want ``control``
    cdef bint left              # the processor serves it no more
    cdef bint asleep            # by itself: looked at when rung, or when its time has come
    cdef uint32_t seen          # the bell then
    cdef uint64_t look_at
    cdef uint64_t links_due     # when the first of the commands that links hold goes on
    cdef uint64_t idle_since
    cdef bint yielded           # in this round a command went on in pieces
    cdef bint stream            # in this round one queue moved, whose driver keeps ringing for a few commands
    cdef uint32_t sleeping      # 0 while awake, else this sleep's number
    cdef uint32_t sleep_number
    cdef uint32_t woken         # times that WAKE was written
    cdef bell_t *bell
    cdef readonly Injections injections
    cdef bint injecting         # the next commands must be judged, or one is held
    cdef bint gone              # removed, as it were: nothing moves any more
    cdef uint32_t due           # what strikes when the admin command under way has been completed
    cdef uint32_t trips         # what struck, and has not been told yet
    cdef public object on_trip
    cdef uint64_t spin_ns
    cdef uint64_t now           # when the round began
    cdef uint64_t watchdog_ns
    cdef uint64_t counted_from
    cdef counters_t counters
    cdef traffic_t traffic
    cdef fault_t *faults
    cdef uint64_t fault_count
    cdef uint32_t errors
    cdef uint32_t blocked       # parts of this device (bells.pxd) that a queue waits for a store to
    cdef uint32_t launched      # launches in flight
    cdef uint32_t level         # priority of the queue that this round is at
    cdef uint32_t claims        # clusters that launches of that priority wait for
    cdef uint32_t claimed       # and those of larger ones
    cdef int attend(self) noexcept nogil
    cdef bint round(self) noexcept nogil
    cdef bint lie_down(self) noexcept nogil
    cdef void get_up(self) noexcept nogil
    cdef uint64_t next_look(self) noexcept nogil
    cdef void wake_register(self) noexcept nogil
    cdef void take(self) noexcept nogil
    cdef void give(self) noexcept nogil
    cdef bint service(self, queue_t *q) noexcept nogil
    cdef bint fetch(self, queue_t *q) noexcept nogil
    cdef int next_listed(self, queue_t *q) noexcept nogil
    cdef int advance(self, queue_t *q) noexcept nogil
    cdef int run_over_links(self, queue_t *q, bint *finished, uint32_t *fault, uint64_t *bad) noexcept nogil
    cdef bint may_start(self, queue_t *q) noexcept nogil
    cdef bint semaphores_ready(self, command_t *command) noexcept nogil
    cdef uint32_t *word(self, queue_t *q, uint32_t offset) noexcept nogil
    cdef uint32_t check(self, queue_t *q, bint listed) noexcept nogil
    cdef void announce(self) noexcept with gil
    cdef int start_launch(self, queue_t *q, launch_t **launch) noexcept nogil
    cdef void fly(self, queue_t *q, launch_t *launch) noexcept nogil
    cdef bint find_tiles(self, uint32_t count, uint32_t clusters, uint32_t *physical) noexcept nogil
    cdef int complete(self, queue_t *q) noexcept nogil
    cdef bint complete_listed(self, queue_t *q, uint32_t index, command_t *command, uint64_t start_ns,
                              uint64_t end_ns) noexcept nogil
    cdef void post(self, queue_t *q, uint64_t sequence, command_t *command) noexcept nogil
    cdef void wrote(self, uint32_t index, uint32_t value, queue_t *q, uint64_t sequence) noexcept nogil
    cdef int fail(self, queue_t *q, uint64_t sequence, uint32_t code, uint64_t bad, uint32_t detail, uint32_t unit,
                  uint32_t kernel, command_t *command, uint64_t start_ns) noexcept nogil
    cdef int stop_here(self, queue_t *q, uint32_t code, uint64_t bad) noexcept nogil
    cdef int fail_here(self, queue_t *q, uint32_t code, uint64_t bad) noexcept nogil
    cdef void fail_listed(self, queue_t *q, uint32_t index, command_t *command, uint32_t code, uint64_t bad,
                          uint32_t unit) noexcept nogil
    cdef int fail_list(self, queue_t *q) noexcept nogil
    cdef bint reap(self, queue_t *q) noexcept nogil
    cdef bint reap_listed(self, queue_t *q) noexcept nogil
    cdef void free_launch(self, launch_t *launch) noexcept nogil
    cdef void report(self, queue_t *q, uint64_t sequence, uint64_t start_ns, uint32_t status,
                     uint32_t detail) noexcept nogil
    cdef void publish(self, queue_t *q) noexcept nogil
    cdef void stop_queue(self, queue_t *q) noexcept nogil
    cdef void write_progress(self, queue_t *q, uint64_t offset, uint64_t value, uint32_t size) noexcept nogil
    cdef void watch(self, in_flight_t *entry) noexcept nogil
    cdef int watch_ms(self) noexcept nogil
    cdef void raise_error(self, uint32_t bit) noexcept nogil
    cdef void quiesce(self, queue_t *q) noexcept nogil
