"""Which command an injection strikes: matches are counted, and drawn for, queue by queue.

So the commands of a queue decide which of them are struck, and not how the queues happen to interleave.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from maia_rt._fast.commands cimport (
    ANY_QUEUE,
    INJECT_ENDS,
    INJECTION_CORRUPT,
    INJECTION_GONE,
    MAX_INJECTIONS,
    OPCODE_COPY,
    OPCODE_COPY_ND,
    OPCODE_FILL,
    OPCODE_WRITE_IMM,
)

cdef enum:
    CORRUPTIBLE = 1 << OPCODE_COPY | 1 << OPCODE_COPY_ND | 1 << OPCODE_FILL | 1 << OPCODE_WRITE_IMM

cdef uint64_t GOLDEN = 0x9E3779B97F4A7C15


cdef uint64_t mix(uint64_t x) noexcept nogil:
    """The finisher of splitmix64."""
    x = (x ^ (x >> 30)) * <uint64_t> 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * <uint64_t> 0x94D049BB133111EB
    return x ^ (x >> 31)


cdef uint64_t draw(uint64_t seed, uint32_t queue, uint64_t match) noexcept nogil:
    return mix(mix(seed + GOLDEN * (queue + <uint64_t> 1)) + GOLDEN * (match + 1))


cdef uint32_t trip(armed_t *armed) noexcept nogil:
    """What a FIRMWARE or GONE that strikes lets happen."""
    if armed.rule.kind == INJECTION_GONE:
        return WENT | (HUNG_UP if armed.rule.flags & INJECT_ENDS else 0)
    return DIED if armed.rule.flags & INJECT_ENDS else FELL_SILENT


cdef class Injections:
    """The injections that are armed. Callers hold the command processor's ``control``."""

    def __cinit__(self, uint32_t max_queues):
        cdef int i
        self.max_queues = max_queues
        for i in range(MAX_INJECTIONS):
            self.armed[i].matches = <uint64_t *> calloc(max_queues, sizeof(uint64_t))
            if self.armed[i].matches == NULL:
                raise MemoryError

    def __dealloc__(self):
        cdef int i
        for i in range(MAX_INJECTIONS):
            free(self.armed[i].matches)

    def arm(self, bytes raw not None):
        """Arm a checked INJECTION structure; its number, or 0 where there is no room."""
        cdef armed_t *slot
        cdef const char *at = raw
        if len(raw) != sizeof(slot.rule):
            raise ValueError(f"{len(raw)} bytes are no INJECTION")
        self.compact()
        if self.count == MAX_INJECTIONS:
            return 0
        slot = &self.armed[self.count]
        memcpy(&slot.rule, at, sizeof(slot.rule))
        memset(slot.matches, 0, self.max_queues * sizeof(uint64_t))
        self.numbers += 1
        slot.number, slot.struck, slot.spent = self.numbers, 0, False
        self.count += 1
        return slot.number

    cdef void compact(self) noexcept nogil:
        """Take out what has struck as often as it should."""
        cdef armed_t spare
        cdef uint32_t i, kept = 0
        for i in range(self.count):
            if self.armed[i].spent:
                continue
            spare = self.armed[kept]
            self.armed[kept] = self.armed[i]
            self.armed[i] = spare
            kept += 1
        self.count = kept

    cdef void clear(self) noexcept nogil:
        self.count = 0

    cdef armed_t *judge(self, uint32_t queue, uint64_t sequence, uint8_t opcode, uint64_t *drawn) noexcept nogil:
        """Count a command that is about to start; the injection that strikes it, or NULL."""
        cdef armed_t *found = NULL
        cdef armed_t *one
        cdef uint64_t match, random
        cdef uint32_t i, opcodes
        for i in range(self.count):
            one = &self.armed[i]
            opcodes = one.rule.opcodes
            if opcodes == 0:
                opcodes = CORRUPTIBLE if one.rule.kind == INJECTION_CORRUPT else <uint32_t> 0xFFFFFFFF
            if (one.spent or not opcodes >> opcode & 1
                    or (one.rule.queue != <uint32_t> ANY_QUEUE and one.rule.queue != queue)
                    or (one.rule.sequence and one.rule.sequence != sequence)):
                continue
            match = one.matches[queue]
            one.matches[queue] += 1
            if match < one.rule.after or (match - one.rule.after + 1) % one.rule.every:
                continue
            random = draw(one.rule.seed, queue, match)
            if found != NULL or (one.rule.probability and <uint32_t> (random >> 32) >= one.rule.probability):
                continue
            found = one
            drawn[0] = mix(random + GOLDEN)
        if found != NULL:
            found.struck += 1
            found.spent = found.struck == found.rule.times
            self.struck += 1
        return found
