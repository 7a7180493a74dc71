from libc.stdint cimport uint8_t, uint32_t, uint64_t

from maia_emulator.commands cimport work_t
from maia_emulator.interrupts cimport Vectors
from maia_emulator.memory cimport DeviceMemory, context_t, traffic_t
from maia_emulator.support cimport pthread_mutex_t
from maia_emulator.launch cimport kernel_t, launch_t
from maia_emulator.tiles cimport Tiles
from maia_rt._fast.commands cimport command_t, counters_t, fault_t, semaphore_op_t

cdef enum:
    MAX_IN_FLIGHT = 16

cdef enum:                  # queue_t.state
    RUNNING = 0
    STOPPING = 1            # failed; earlier commands are still in flight
    STOPPED = 2

cdef enum:                  # queue_t.stage
    EMPTY = 0
    FETCHED = 1
    STARTED = 2
    ON_TILES = 3            # a list's LAUNCH

cdef struct window_t:       # a translation that stays good while the DMA table's generation does
    uint64_t start
    uint64_t size
    char *at
    uint64_t generation

cdef struct in_flight_t:    # a command that has started, and maybe ended, before an earlier one retired
    uint64_t sequence
    launch_t *launch        # NULL once it is done
    command_t command
    uint64_t start_ns
    uint32_t status
    uint32_t steps          # the watchdog's last look
    uint64_t steps_ns

cdef struct writer_t:       # who wrote a semaphore last, as far as the device did it itself
    uint64_t time_ns
    uint64_t sequence
    uint32_t queue
    uint32_t value          # what it was then: another value now is the host's, or a peer's
    uint32_t kind           # SemaphoreWriter
    bint awaited            # a command had to wait for it

cdef struct queue_t:
    bint live
    uint32_t id
    uint32_t vector
    uint32_t mask
    uint32_t report_mask
    context_t *context
    uint64_t ring
    uint64_t progress
    uint64_t reports
    window_t ring_window
    window_t progress_window
    char *doorbell
    uint64_t head           # index of the command to fetch next, or under way
    uint64_t retired
    uint64_t published
    uint64_t published_ns
    uint64_t since_ns       # when the command under way was first found not to go on at once; 0: it was not
    uint32_t tail           # the doorbell as last seen
    uint32_t report_tail
    uint32_t report_head    # as last seen
    uint64_t arm
    uint64_t aborted        # sequence to abort, 0 for none
    int state
    uint32_t fault
    uint64_t fault_sequence
    int stage
    command_t command       # the one under way: of the list, where there is a list
    command_t outer         # the INDIRECT command
    uint64_t list_at
    uint32_t list_count     # 0: no list
    uint32_t list_index
    launch_t *launch        # of a list's LAUNCH
    uint64_t start_ns
    work_t work             # of the command under way
    in_flight_t flight[MAX_IN_FLIGHT]
    int flight_first
    int flight_count

cdef bint satisfied(semaphore_op_t *op, uint32_t value) noexcept nogil

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
    cdef uint32_t stopping
    cdef uint32_t sleeping      # 0 while awake, else this sleep's number
    cdef uint32_t sleep_number
    cdef int wake_fd
    cdef uint64_t spin_ns
    cdef uint64_t now           # when the round began
    cdef uint64_t watchdog_ns
    cdef uint64_t counted_from
    cdef counters_t counters
    cdef traffic_t traffic
    cdef fault_t *faults
    cdef uint64_t fault_count
    cdef uint32_t errors
    cdef bint blocked           # a queue waits for a semaphore
    cdef uint32_t launched      # launches in flight
    cdef void loop(self) noexcept nogil
    cdef bint round(self) noexcept nogil
    cdef void sleep(self) noexcept nogil
    cdef void take(self) noexcept nogil
    cdef void give(self) noexcept nogil
    cdef bint service(self, queue_t *q) noexcept nogil
    cdef bint fetch(self, queue_t *q) noexcept nogil
    cdef bint fetch_listed(self, queue_t *q) noexcept nogil
    cdef int advance(self, queue_t *q) noexcept nogil
    cdef bint may_start(self, queue_t *q) noexcept nogil
    cdef bint semaphores_ready(self, command_t *command) noexcept nogil
    cdef int start_launch(self, queue_t *q) noexcept nogil
    cdef bint find_tiles(self, uint32_t count, uint32_t clusters, uint32_t *physical) noexcept nogil
    cdef int complete(self, queue_t *q) noexcept nogil
    cdef void post(self, queue_t *q, uint64_t sequence, command_t *command) noexcept nogil
    cdef void wrote(self, uint32_t index, uint32_t value, queue_t *q, uint64_t sequence) noexcept nogil
    cdef int fail(self, queue_t *q, uint64_t sequence, uint32_t code, uint64_t bad, uint32_t detail, uint32_t unit,
                  uint32_t kernel, command_t *command, uint64_t start_ns) noexcept nogil
    cdef int fail_here(self, queue_t *q, uint32_t code, uint64_t bad) noexcept nogil
    cdef bint reap(self, queue_t *q) noexcept nogil
    cdef void free_launch(self, launch_t *launch) noexcept nogil
    cdef void report(self, queue_t *q, uint64_t sequence, uint64_t start_ns, uint32_t status,
                     uint32_t detail) noexcept nogil
    cdef void publish(self, queue_t *q) noexcept nogil
    cdef void stop_queue(self, queue_t *q) noexcept nogil
    cdef void write_progress(self, queue_t *q, uint64_t offset, uint64_t value, uint32_t size) noexcept nogil
    cdef void watch(self, queue_t *q) noexcept nogil
    cdef void raise_error(self, uint32_t bit) noexcept nogil
    cdef void quiesce(self, queue_t *q) noexcept nogil
