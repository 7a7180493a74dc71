"""A queue as the command processor keeps it."""

from libc.stdint cimport uint32_t, uint64_t

from maia_emulator.commands cimport work_t
from maia_emulator.launch cimport launch_t
from maia_emulator.memory cimport context_t
from maia_rt._fast.commands cimport command_t

cdef enum:
    MAX_IN_FLIGHT = 16

cdef enum:                  # queue_t.state
    RUNNING = 0
    STOPPING = 1            # failed; other commands are still in flight
    STOPPED = 2

cdef enum:                  # queue_t.stage
    EMPTY = 0
    LISTING = 1             # within a list: the next of it is to be fetched
    FETCHED = 2
    STARTED = 3

cdef enum:                  # queue_t.held, by an injection
    DELAYED = 1
    HUNG = 2

cdef struct window_t:       # a translation that stays good while the DMA table's generation does
    uint64_t start
    uint64_t size
    char *at
    uint64_t generation

cdef struct in_flight_t:    # a command that has started, and maybe ended, before an earlier one retired
    uint64_t sequence       # of a list: its index there
    launch_t *launch        # NULL once it is done
    command_t command
    uint64_t start_ns
    uint32_t status
    uint32_t steps          # the watchdog's last look
    uint64_t steps_ns

cdef struct list_fault_t:   # the first failure, by index, of a list that is ending because of it
    uint32_t code           # 0: none
    uint32_t index
    uint32_t unit
    uint32_t kernel
    uint64_t bad
    command_t command

cdef struct list_t:         # the INDIRECT command under way
    command_t command
    uint64_t at
    uint64_t times          # 0: not wanted
    uint64_t start_ns       # of the listed command under way
    uint32_t count          # 0: no list
    uint32_t index
    uint32_t next           # where it goes on after that
    bint concurrent
    in_flight_t flight[MAX_IN_FLIGHT]
    int flight_count        # launches, in no order
    list_fault_t fault

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
    uint32_t priority
    uint32_t mask
    uint32_t report_mask
    context_t *context
    uint64_t ring
    uint64_t progress
    uint64_t reports
    window_t ring_window
    window_t progress_window
    char *doorbell
    uint64_t doorbell_at    # its host address; 0: in BAR 2
    window_t doorbell_window
    uint64_t head           # index of the command to fetch next, or under way
    uint64_t retired
    uint64_t published
    uint64_t published_ns
    uint64_t since_ns       # when the command under way was first found not to go on at once; 0: it was not
    uint32_t tail           # the doorbell as last seen
    uint32_t streak         # commands found since a look at it was in vain
    uint32_t report_tail
    uint32_t report_head    # as last seen
    uint64_t arm
    uint64_t aborted        # sequence to abort, 0 for none
    int state
    uint32_t fault
    uint64_t fault_sequence
    int stage
    command_t command       # the one under way: of the list, where there is a list
    int held                # what an injection does to the command under way
    uint64_t held_ns        # DELAYED: until when; HUNG: since when
    bint judged             # a LAUNCH that waits for tiles only has been judged
    bint corrupt            # its result gets a bit flipped
    uint64_t corrupt_bit
    uint64_t start_ns
    work_t work             # of the command under way
    uint64_t link_since     # with a model of links: when it started,
    uint64_t link_until     # until when it is held,
    bint link_last          # and whether it is done then
    in_flight_t flight[MAX_IN_FLIGHT]
    int flight_first
    int flight_count
    list_t list
