# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, binding=False
"""A queue's submission ring, progress block and report ring, as the driver sees them.

Indices run freely in 64 bits and are masked where a slot is touched; the device sees their low 32 bits. The command
that is written at index i has the sequence number i + 1: it is done once progress, the number of commands retired, is
that large. Its low 16 bits stand in the command, so the device notices a slot that was not written anew.

One thread at a time writes to the ring. For single commands that is the holder of the GIL, which is never released
between the choice of a slot and the doorbell. A batch does release it: then `gate` sends the others to a mutex.
"""

import os
import weakref

from cpython.buffer cimport (
    Py_buffer, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport Py_XDECREF
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from maia_rt._fast.atomics cimport fence, load32, load64, now_ns, prefetch_for_write, store32
from maia_rt._fast.command cimport Command
from maia_rt._fast.commands cimport (
    COMMAND_BYTES, FLAG_BARRIER, FLAG_REPORT, OPCODE_LAUNCH, OPCODE_NOP, PROGRESS_BYTES, QUEUE_RUNNING,
    WAIT_GE, command_t, progress_t, report_t, semaphore_op_t,
)
from maia_rt._fast.registers cimport DOORBELL_NEEDS_WAKE, DOORBELL_REPORT_HEAD, DOORBELL_TAIL
from maia_rt._fast.sites cimport site_t
from maia_rt._fast.waiters cimport CLOSED, DONE, LOST, STOPPED, TIMED_OUT, Waiters, pthread_mutex_t

from maia_rt.errors import ClosedError, DeviceLost, ForkedError, InvalidArgument, QueueFull


cdef extern from "<pthread.h>" nogil:
    """
    #include <pthread.h>
    static inline int maia_lock_for(pthread_mutex_t *mutex, long ns) {
        struct timespec t;
        clock_gettime(CLOCK_REALTIME, &t);
        t.tv_nsec += ns;
        t.tv_sec += t.tv_nsec / 1000000000;
        t.tv_nsec %= 1000000000;
        return pthread_mutex_timedlock(mutex, &t);
    }
    """
    int pthread_mutex_init(pthread_mutex_t *, const void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int maia_lock_for(pthread_mutex_t *mutex, long ns)

cdef enum Gate:
    OPEN = 0
    BATCH = 1
    SHUT = 2
    DEAD = 3
    FORKED = 4

cdef enum:
    VOID = 0xFFFFFFFF  # the owner of what will never run
    MAX_ARGS = 32
    KEEP_GIL = 128  # commands that are copied faster than the GIL changes hands

WAIT_DONE = DONE
WAIT_TIMED_OUT = TIMED_OUT
WAIT_STOPPED = STOPPED
WAIT_LOST = LOST
WAIT_CLOSED = CLOSED
ARG_SLOT_BYTES = MAX_ARGS * 8

_live = weakref.WeakSet()


class QueueStopped(Exception):
    """The queue stands still after a fault; the queue's owner lets it run again."""


cdef class Account:
    """What one stream has submitted, on whichever queue.

    Parameters
    ----------
    number : int
        From 1; marks its commands in the rings.
    name : str
        For error texts.
    priority : int
        Of the queue that it wants, larger is more urgent.

    Attributes
    ----------
    last : int
        The sequence number of its newest command, on its present queue.
    follow : int
        A sequence number on the present queue that its next command comes after, if that goes elsewhere.
    submitted, failed, aborted : int
        Commands.
    stopped : int
        Not 0: the next command has to ask first. Bits are the owner's.
    failure : dict or None
        The facts of the fault that the stream stands still for, as DeviceFault takes them.
    lost : list
        What that fault cost, until somebody asks for it.
    queues : dict
        By queue that the stream has left: its last sequence number there.
    """

    def __init__(self, uint32_t number, str name, uint32_t priority=0):
        self.number = number
        self.name = name
        self.priority = priority
        self.lost = []
        self.queues = {}

    def stop(self, uint32_t why):
        """Set bits of `stopped`: the next command asks first. In one step for other threads."""
        self.stopped |= why

    def go(self, uint32_t why):
        """Clear bits of `stopped`."""
        self.stopped &= ~why


cdef class Ring:
    """The driver's end of one queue.

    Parameters
    ----------
    commands : buffer
        The ring: a power of two times 64 bytes, writable.
    progress : buffer
        The progress block, 64 bytes.
    reports : buffer
        The report ring: a power of two times 32 bytes, at least twice as many records as the ring has commands.
    doorbell : buffer
        The queue's doorbell page, writable.
    args : buffer
        One argument slot of 256 bytes for each command of the ring; may be empty: no launches then.
    args_address : int
        Where the device sees `args`.
    initial : int
        The index that ring, doorbell and progress start at.
    name : str
        For error texts.
    timeout_ns : int
        How long a submission waits for room.
    spin_ns : int
        How long a wait spins before it sleeps.
    wake : callable, optional
        Called after a doorbell while the device sleeps. None: the device never sleeps.
    sites : bool
        Whether the submitting line of each command is remembered.
    queue_fd, event_fd, liveness_fd : int
        The queue's vector, the device's event vector, the transport; -1 for none.
    on_event, service : callable
        Called when the last two are readable.

    Attributes
    ----------
    sole : Account or None
        Whose are the commands that are submitted here, not through a lane.

    Raises
    ------
    InvalidArgument
        A buffer has the wrong size.
    """

    def __cinit__(self):
        pthread_mutex_init(&self.batch, NULL)
        self.gate = SHUT

    def __init__(self, commands, progress, reports, doorbell, args, uint64_t args_address=0, *, uint64_t initial=0,
                 str name="queue", int64_t timeout_ns=30_000_000_000, int64_t spin_ns=20_000, wake=None,
                 bint sites=False, int queue_fd=-1, int event_fd=-1, int liveness_fd=-1, service=None, on_event=None):
        if self.view_count:
            raise InvalidArgument("a ring is made once")
        for number, (buffer, writable) in enumerate(
                ((commands, True), (progress, False), (reports, False), (doorbell, True), (args, True))):
            PyObject_GetBuffer(buffer, &self.views[number], PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
            self.view_count += 1
        cdef uint64_t entries = self.views[0].len // COMMAND_BYTES
        cdef uint64_t report_entries = self.views[2].len // sizeof(report_t)
        if (not entries or entries & (entries - 1) or self.views[0].len % COMMAND_BYTES
                or not report_entries or report_entries & (report_entries - 1) or self.views[2].len % sizeof(report_t)
                or self.views[1].len < PROGRESS_BYTES or self.views[3].len < 4096
                or report_entries < 2 * entries or 0 < self.views[4].len < <Py_ssize_t>(entries * ARG_SLOT_BYTES)):
            raise InvalidArgument(f"{name}: memory of the wrong size: {[self.views[i].len for i in range(5)]} bytes")
        self.slots = <command_t *>self.views[0].buf
        self.progress_block = <const progress_t *>self.views[1].buf
        self.reports = <const report_t *>self.views[2].buf
        self.doorbell = <uint8_t *>self.views[3].buf
        self.args = <uint64_t *>self.views[4].buf if self.views[4].len else NULL
        self.args_address = args_address
        self.mask = entries - 1
        self.report_mask = <uint32_t>report_entries - 1
        # A command does not start without room for its record, so room for a whole ring of them stays free.
        self.reports_limit = <uint32_t>(report_entries - entries)
        self.owners = <uint32_t *>calloc(entries, sizeof(uint32_t))
        self.sites = <site_t *>calloc(entries, sizeof(site_t)) if sites else NULL
        if self.owners == NULL or (sites and self.sites == NULL):
            raise MemoryError
        self.name = name
        self.timeout_ns = timeout_ns
        self.records = []
        self.waiters = Waiters(queue_fd, liveness_fd, event_fd, spin_ns, wake, service, on_event)
        self.waiters.progress = self.progress_block
        self.waiters.doorbell = self.doorbell
        self.waiters.can_sleep = self.can_sleep = wake is not None
        self.head = self.initial = initial
        self.limit = initial + entries
        self.gate = OPEN
        _live.add(self)

    def __dealloc__(self):
        # Nothing here may touch the shared memory: a forked child does not have it.
        while self.view_count:
            self.view_count -= 1
            PyBuffer_Release(&self.views[self.view_count])
        pthread_mutex_destroy(&self.batch)
        cdef uint64_t i
        if self.sites != NULL:
            for i in range(self.mask + 1):
                Py_XDECREF(self.sites[i].code)
        free(self.sites)
        free(self.owners)

    # Submission ------------------------------------------------------------------------------------------------------

    def submit(self, uint8_t opcode, uint8_t flags, uint32_t units, uint64_t a, uint64_t b, uint64_t c):
        """Submit one command without semaphores; return its sequence number.

        Raises
        ------
        QueueFull
            No slot became free within the queue's time.
        QueueStopped
            There is no room, and the queue stands still.
        DeviceLost, ClosedError, ForkedError
        """
        cdef command_t *slot = Ring_slot(self, flags)
        Ring_encode(slot, opcode, flags, units, a, b, c)
        return Ring_publish(self, slot, self.sole)

    def submit_with(self, uint8_t opcode, uint8_t flags, uint32_t units, uint64_t a, uint64_t b, uint64_t c,
                    tuple pre not None, tuple post not None):
        """Submit one command with semaphore operations; return its sequence number. Raises as `submit`.

        Parameters
        ----------
        opcode, flags, units, a, b, c : int
        pre, post : tuple of (semaphore, operation, value)
            Up to two each.
        """
        cdef command_t raw
        Ring_encode(&raw, opcode, flags, units, a, b, c)
        Ring_semaphores(self, raw.pre, pre)
        Ring_semaphores(self, raw.post, post)
        cdef command_t *slot = Ring_slot(self, flags)
        slot[0] = raw
        return Ring_publish(self, slot, self.sole)

    def submit_for(self, Account account not None, uint16_t semaphore, uint32_t value):
        """Submit, for an account whose stream is on another queue still, a NOP that waits for a semaphore's value.

        The account's `last` stays what it is. Returns the sequence number; raises as `submit`.
        """
        cdef command_t *slot = Ring_slot(self, FLAG_BARRIER)
        Ring_encode(slot, OPCODE_NOP, FLAG_BARRIER, 0, 0, 0, 0)
        slot.pre[0].index = semaphore
        slot.pre[0].op = WAIT_GE
        slot.pre[0].value = value
        return Ring_hand_over(self, slot, account)

    def submit_encoded(self, Command command not None):
        """Submit a copy of an encoded command; return its sequence number. Raises as `submit`."""
        cdef command_t *slot = Ring_slot(self, command.raw.flags)
        slot[0] = command.raw
        return Ring_publish(self, slot, self.sole)

    def submit_wait(self, uint8_t flags, uint16_t semaphore, uint8_t op, uint32_t value):
        """Submit a NOP that waits for a semaphore; return its sequence number. Raises as `submit`."""
        cdef command_t *slot = Ring_slot(self, flags)
        Ring_encode(slot, OPCODE_NOP, flags, 0, 0, 0, 0)
        slot.pre[0].index = semaphore
        slot.pre[0].op = op
        slot.pre[0].value = value
        return Ring_publish(self, slot, self.sole)

    def submit_launch(self, uint8_t flags, uint32_t kernel, uint32_t units, tuple args not None):
        """Submit a LAUNCH; return its sequence number.

        Parameters
        ----------
        flags, kernel, units : int
        args : tuple
            Device addresses as ints, scalars as floats: those become FP32. At most 32.

        Raises
        ------
        InvalidArgument
            Too many arguments, or the queue has no argument slots. Besides as `submit`.
        """
        Ring_check_arguments(self, args)
        cdef command_t *slot = Ring_slot(self, flags)
        Ring_encode(slot, OPCODE_LAUNCH, flags, units, kernel | <uint64_t>len(args) << 32,
                    Ring_arguments(self, args), 0)
        return Ring_publish(self, slot, self.sole)

    def submit_batch(self, commands):
        """Submit encoded commands, one after the other and nobody's between them, with one doorbell for each ringful.

        Parameters
        ----------
        commands : buffer
            N x 64 bytes, such as an array of dtype ``commands.COMMAND``. Sequence numbers are filled in on the way.

        Returns
        -------
        int
            The last command's sequence number; that of the newest command so far where there is none.

        Raises
        ------
        QueueFull
            No room within the queue's time. The text says how many were submitted. Besides as `submit`.
        """
        cdef Py_buffer view
        cdef uint64_t left = 0, count = 0, take, entries = self.mask + 1
        cdef bint held
        cdef const command_t *source
        if not PyObject_CheckBuffer(commands):
            raise InvalidArgument(f"{self.name}: a batch is a buffer of commands, not {type(commands).__name__}")
        PyObject_GetBuffer(commands, &view, PyBUF_SIMPLE)
        try:
            if view.len % COMMAND_BYTES:
                raise InvalidArgument(f"{self.name}: {view.len} bytes are no whole number of commands")
            source = <const command_t *>view.buf
            count = left = view.len // COMMAND_BYTES
            while self.gate:
                Ring_pass_gate(self, self.timeout_ns)
            held = left > KEEP_GIL or left > self.limit - self.head
            if held:
                self.gate = BATCH
                self.waiters.active += 1
                # Free, unless the holder of a former batch is just letting go of it.
                with nogil:
                    pthread_mutex_lock(&self.batch)
            try:
                while left:
                    if self.limit - self.head < min(left, entries // 2 + 1):
                        Ring_make_room(self, min(left, entries // 2 + 1), self.timeout_ns)
                    take = min(left, self.limit - self.head)
                    if self.reports_asked >= self.reports_limit:
                        Ring_drain(self)
                    if take > KEEP_GIL:
                        with nogil:
                            Ring_write(self, source, take)
                    else:
                        Ring_write(self, source, take)
                    left -= take
                    source += take
                    Ring_own(self, self.sole, take)
                    sequence = Ring_doorbell(self, take)
                return sequence if count else self.head
            except QueueFull as error:
                raise QueueFull(f"{error.what}; {count - left} of a batch of {count} commands were submitted",
                                cause=error.cause, hint=error.hint) from None
            finally:
                if held:
                    self.waiters.active -= 1
                    if self.gate == BATCH:
                        self.gate = OPEN
                    pthread_mutex_unlock(&self.batch)
        finally:
            PyBuffer_Release(&view)

    # Progress --------------------------------------------------------------------------------------------------------

    def poll(self):
        """Read how far the device is: the sequence number of the last command that retired."""
        Ring_must_be_open(self)
        return load64(&self.progress_block.progress)

    def done(self, uint64_t sequence):
        """Say whether the command `sequence` has retired and did not fail."""
        Ring_must_be_open(self)
        return self.waiters.look(sequence) == DONE

    def wait(self, uint64_t sequence, int64_t timeout_ns):
        """Wait until the command `sequence` has retired; return a ``WAIT_*`` status.

        Any number of threads may wait. A signal whose handler raises ends the wait with that exception; so do
        exceptions of the callables that the ring was given.
        """
        Ring_must_be_open(self)
        cdef int status = self.waiters.wait(sequence, timeout_ns)
        Ring_note(self, status)
        return status

    def kick(self):
        """Make every waiting thread look at the queue again."""
        if self.gate != FORKED:
            with nogil:
                self.waiters.kick_all()

    def take_reports(self):
        """Take the report records that have come since the last call.

        Returns
        -------
        list of (sequence, start_ns, end_ns, status, detail)
        """
        Ring_must_be_open(self)
        Ring_drain(self)
        taken = self.records
        self.records = []
        return taken

    # State -----------------------------------------------------------------------------------------------------------

    @property
    def entries(self):
        """Commands that the ring holds."""
        return self.mask + 1

    @property
    def head(self):
        """The sequence number of the newest command."""
        return self.head

    @property
    def initial(self):
        """The index that the ring started at."""
        return self.initial

    @property
    def state(self):
        """(state, fault code, sequence number of the failed command), as in the progress block."""
        Ring_must_be_open(self)
        cdef uint32_t state = load32(&self.progress_block.state)
        return state, self.progress_block.fault, self.progress_block.fault_sequence

    @property
    def closed(self):
        """Whether the ring has been closed."""
        return self.gate == SHUT

    def command_at(self, uint64_t sequence):
        """Read back the 64 bytes of a command; None where its slot has been used again."""
        Ring_must_be_open(self)
        if self.head - sequence > self.mask:
            return None
        return (<const uint8_t *>&self.slots[(sequence - 1) & self.mask])[:COMMAND_BYTES]

    @property
    def stopped(self):
        """Whether the queue stands still after a fault. A closed ring does not."""
        if self.gate == SHUT or self.gate == FORKED:
            return False
        return load32(&self.progress_block.state) != QUEUE_RUNNING

    def site(self, uint64_t sequence):
        """Return (code object, byte offset) of the line that submitted a command, None where it is not known."""
        cdef site_t *site
        if self.sites == NULL:
            return None
        site = &self.sites[sequence & self.mask]
        return (<object>site.code, site.lasti) if site.code != NULL and site.sequence == sequence else None

    def owner(self, uint64_t sequence):
        """Return the number of the account that submitted a command; 0 for none, or where its slot was used again."""
        return self.owners[(sequence - 1) & self.mask] if self.head - sequence <= self.mask else 0

    def outstanding(self, number=None):
        """Return the sequence numbers of what has not retired, of one account where its number is given.

        What was made void does not count.
        """
        cdef uint64_t i
        cdef uint32_t owner
        if self.gate == SHUT or self.gate == FORKED:
            return []
        cdef uint32_t wanted = 0 if number is None else number
        cdef bint whole = number is None
        found = []
        i = load64(&self.progress_block.progress)
        while i != self.head:
            owner = self.owners[i & self.mask]
            i += 1
            if owner != VOID and (whole or owner == wanted):
                found.append(i)
        return found

    # A queue that stopped --------------------------------------------------------------------------------------------

    def hold(self, bint blocking=True):
        """Keep submissions out until `let_go`; those of other threads wait. Return whether it is held.

        Parameters
        ----------
        blocking : bool
            Whether to wait for another thread's batch.
        """
        Ring_must_be_open(self)
        while self.gate == BATCH:
            if not blocking:
                return False
            Ring_await_batch(self, self.timeout_ns)
        Ring_must_be_open(self)
        self.held_over = self.gate
        self.gate = BATCH
        self.waiters.active += 1
        # Free, unless the holder of a former batch is just letting go of it.
        with nogil:
            pthread_mutex_lock(&self.batch)
        return True

    def let_go(self):
        """Let submissions in again."""
        self.waiters.active -= 1
        if self.gate == BATCH:
            self.gate = self.held_over
        pthread_mutex_unlock(&self.batch)

    def void(self, uint64_t first, number):
        """Turn an account's commands from `first` on into NOPs. The queue must stand still, and be held.

        They keep their sequence numbers, wait for nothing, post nothing and report nothing.

        Parameters
        ----------
        first : int
        number : int or None
            None for everybody's.

        Returns
        -------
        list of (sequence, 64 bytes, site, number)
            What was lost, in order.
        """
        Ring_must_be_open(self)
        Ring_drain(self)
        cdef uint64_t i
        cdef command_t *slot
        cdef uint32_t owner
        lost = []
        self.reports_asked = 0
        for i in range(max(first, load64(&self.progress_block.progress) + 1), self.head + 1):
            slot = &self.slots[(i - 1) & self.mask]
            owner = self.owners[(i - 1) & self.mask]
            if owner != VOID and (number is None or owner == <uint32_t>number):
                lost.append((i, (<const uint8_t *>slot)[:COMMAND_BYTES], self.site(i), owner))
                Ring_encode(slot, OPCODE_NOP, FLAG_BARRIER, 0, 0, 0, 0)
                self.owners[(i - 1) & self.mask] = VOID
            self.reports_asked += (slot.flags & FLAG_REPORT) != 0
        return lost

    def resume(self, uint64_t initial):
        """Go on after the device has reset the queue to the index `initial`: what lies there is rung for again."""
        Ring_must_be_open(self)
        self.report_head = 0
        self.limit = initial + self.mask + 1
        if self.head != initial:
            Ring_doorbell(self, 0)
        self.waiters.rearm()

    def close(self, int64_t timeout_ns=2_000_000_000):
        """End every wait with ``WAIT_CLOSED`` and let go of the memory. Idempotent; waits for other threads to leave.

        Returns
        -------
        bool
            Whether they left in time; if not, the memory stays until the ring is collected.
        """
        if self.gate == SHUT or self.gate == FORKED:
            return True
        self.gate = SHUT
        if not self.waiters.shut(timeout_ns):
            return False
        while self.view_count:
            self.view_count -= 1
            PyBuffer_Release(&self.views[self.view_count])
        return True


cdef inline command_t *Ring_slot(Ring self, uint8_t flags) except NULL:
    """The slot of the next command. From here to the doorbell the GIL is held."""
    while self.gate or self.head == self.limit:
        Ring_prepare(self, self.timeout_ns)
    if flags & FLAG_REPORT:
        Ring_ask_report(self)
    return &self.slots[self.head & self.mask]


cdef int Ring_ask_report(Ring self) except -1:
    if self.reports_asked >= self.reports_limit:
        Ring_drain(self)
    self.reports_asked += 1
    return 0


cdef void Ring_encode(command_t *slot, uint8_t opcode, uint8_t flags, uint32_t units,
                      uint64_t a, uint64_t b, uint64_t c) noexcept:
    slot.opcode = opcode
    slot.flags = flags
    slot.units = units
    memset(slot.pre, 0, sizeof(slot.pre))
    memset(slot.post, 0, sizeof(slot.post))
    slot.payload[0] = a
    slot.payload[1] = b
    slot.payload[2] = c


cdef int Ring_semaphores(Ring self, semaphore_op_t *slots, tuple operations) except -1:
    cdef Py_ssize_t i
    if len(operations) > 2:
        raise InvalidArgument(f"{self.name}: a command has two semaphore operations of a kind, not {len(operations)}")
    for i in range(len(operations)):
        index, op, value = operations[i]
        slots[i].index = index
        slots[i].op = op
        slots[i].value = value
    return 0


cdef int Ring_check_arguments(Ring self, tuple args) except -1:
    if len(args) > MAX_ARGS or self.args == NULL:
        raise InvalidArgument(f"{self.name}: {len(args)} arguments; a launch takes {MAX_ARGS if self.args else 0}")
    return 0


cdef uint64_t Ring_arguments(Ring self, tuple args) except 1:
    """Write a launch's arguments to the place that belongs to the next command; return their device address."""
    cdef uint64_t at = (self.head & self.mask) * MAX_ARGS
    cdef Py_ssize_t i
    cdef float single
    cdef object value
    for i in range(len(args)):
        value = args[i]
        if type(value) is float:
            single = value
            self.args[at + i] = 0
            memcpy(&self.args[at + i], &single, sizeof(single))
        else:
            self.args[at + i] = value
    return self.args_address + at * 8 if len(args) else 0


cdef object Ring_publish(Ring self, command_t *slot, Account account):
    if account is not None:
        account.last = self.head + 1
    return Ring_hand_over(self, slot, account)


cdef object Ring_hand_over(Ring self, command_t *slot, Account account):
    slot.sequence = <uint16_t>(self.head + 1)
    if account is None:
        self.owners[self.head & self.mask] = 0
    else:
        self.owners[self.head & self.mask] = account.number
        account.submitted += 1
    # The device read the slots ahead a ring ago: take their lines back before the next call's fence has to wait for it.
    prefetch_for_write(&self.slots[(self.head + 2) & self.mask])
    return Ring_doorbell(self, 1)


cdef void Ring_own(Ring self, Account account, uint64_t count) noexcept:
    """Note whose the next `count` commands are, which are about to be published."""
    cdef uint64_t i
    cdef uint32_t number = 0 if account is None else account.number
    for i in range(count):
        self.owners[(self.head + i) & self.mask] = number
    if number:
        account.last = self.head + count
        account.submitted += count


cdef inline object Ring_doorbell(Ring self, uint64_t count):
    cdef uint32_t sleep
    cdef uint64_t sequence = self.head + count
    self.head = sequence
    self.doorbells += 1
    store32(self.doorbell + DOORBELL_TAIL, <uint32_t>sequence)
    if self.can_sleep:
        fence()
        sleep = load32(self.doorbell + DOORBELL_NEEDS_WAKE)
        if sleep and sleep != self.waiters.woken:
            self.waiters.wake_device()
    return sequence


cdef void Ring_write(Ring self, const command_t *source, uint64_t count) noexcept nogil:
    cdef uint64_t i, index
    cdef command_t *slot
    for i in range(count):
        index = self.head + i
        slot = &self.slots[index & self.mask]
        memcpy(slot, source + i, COMMAND_BYTES)
        slot.sequence = <uint16_t>(index + 1)
        self.reports_asked += (slot.flags & FLAG_REPORT) != 0


cdef int Ring_prepare(Ring self, int64_t timeout_ns) except -1:
    if self.gate:
        Ring_pass_gate(self, timeout_ns)
    else:
        Ring_make_room(self, 1, timeout_ns)
    return 0


cdef int Ring_pass_gate(Ring self, int64_t timeout_ns) except -1:
    """Wait for another thread's batch, or raise what the ring's state calls for."""
    if self.gate == BATCH:
        return Ring_await_batch(self, timeout_ns)
    Ring_must_be_open(self)
    if self.gate == DEAD:
        Ring_raise(self, LOST, timeout_ns)
    return 0


cdef int Ring_await_batch(Ring self, int64_t timeout_ns) except -1:
    cdef int64_t deadline = now_ns() + timeout_ns
    cdef bint taken
    while self.gate == BATCH:
        PyErr_CheckSignals()
        if now_ns() >= deadline:
            raise QueueFull(f"{self.name}: another thread's batch did not fit for {timeout_ns / 1e9:g} s",
                            cause="the device hangs, or a command waits for a semaphore that nobody signals",
                            hint="give each thread a stream of its own")
        self.waiters.active += 1
        with nogil:
            taken = maia_lock_for(&self.batch, 100_000_000) == 0
            if taken:
                pthread_mutex_unlock(&self.batch)
        self.waiters.active -= 1
    return 0


cdef int Ring_must_be_open(Ring self) except -1:
    if self.gate == SHUT:
        raise ClosedError(f"{self.name} has been closed")
    if self.gate == FORKED:
        raise ForkedError(f"{self.name} was made before fork", hint="open the device anew in the child")
    return 0


cdef int Ring_refresh(Ring self) except -1:
    cdef uint64_t progress = load64(&self.progress_block.progress)
    if self.head - progress > self.mask + 1:
        raise DeviceLost(f"{self.name}: the device reports progress {progress} of {self.head} commands",
                         cause="the device, or the memory shared with it, is broken", hint="reset the device")
    self.limit = progress + self.mask + 1
    return 0


cdef int Ring_make_room(Ring self, uint64_t count, int64_t timeout_ns) except -1:
    """Wait until `count` slots are free. Other threads may take them before this one goes on."""
    Ring_refresh(self)
    if self.limit - self.head >= count:
        return 0
    cdef uint64_t sequence = self.head + count - (self.mask + 1)
    cdef int status = self.waiters.wait(sequence, timeout_ns)
    Ring_note(self, status)
    if status != DONE:
        Ring_raise(self, status, timeout_ns, sequence)
    return Ring_refresh(self)


cdef int Ring_note(Ring self, int status) except -1:
    if status == LOST and (self.gate == OPEN or self.gate == BATCH):
        self.gate = DEAD
    return 0


cdef int Ring_raise(Ring self, int status, int64_t timeout_ns, uint64_t sequence=0) except -1:
    if status == STOPPED:
        raise QueueStopped(self.name)
    if status == LOST:
        raise DeviceLost(f"{self.name}: the device is gone", cause="its server ended or its link is down",
                         hint="open the device anew")
    if status == CLOSED:
        raise ClosedError(f"{self.name} has been closed")
    raise QueueFull(f"{self.name}: the ring's {self.mask + 1} entries stayed full for {timeout_ns / 1e9:g} s; "
                    f"waited for command {sequence}, the device has retired "
                    f"{load64(&self.progress_block.progress)} of {self.head}",
                    cause="the device hangs, or a command waits for a semaphore that nobody signals",
                    hint="synchronize more often, or make the queue longer")


cdef int Ring_drain(Ring self) except -1:
    """Move new report records to `records` and give their room back."""
    cdef uint32_t tail = load32(&self.progress_block.report_tail)
    cdef uint32_t count = tail - self.report_head
    cdef const report_t *record
    if count == 0:
        return 0
    if count > self.report_mask + 1:
        raise DeviceLost(f"{self.name}: the device reports {count} records in a ring of {self.report_mask + 1}",
                         cause="the device, or the memory shared with it, is broken", hint="reset the device")
    while self.report_head != tail:
        record = &self.reports[self.report_head & self.report_mask]
        self.records.append((record.sequence, record.start_ns, record.end_ns, record.status, record.detail))
        self.report_head += 1
        if self.reports_asked:
            self.reports_asked -= 1
    store32(self.doorbell + DOORBELL_REPORT_HEAD, self.report_head)
    if self.waiters.device_sleeps():
        self.waiters.wake_device()
    return 0


def _forget_in_child():
    cdef Ring ring
    for ring in list(_live):
        ring.gate = FORKED
        store32(&ring.waiters.closing, 1)


os.register_at_fork(after_in_child=_forget_in_child)
