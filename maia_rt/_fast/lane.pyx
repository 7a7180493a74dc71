# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A stream's way into its queue: what every command of every stream passes through.

Between the look at `Account.stopped` and the doorbell the GIL is not given up. So nobody can fail or move a stream in
the middle of a submission, and what was submitted before lies in the ring.
"""

import os

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from maia_rt._fast.commands cimport FLAG_BARRIER, FLAG_REPORT, OPCODE_COPY, OPCODE_INDIRECT, OPCODE_LAUNCH, command_t
from maia_rt._fast.extent cimport Extent
from maia_rt._fast.ring cimport (
    Account, Ring, Ring_arguments, Ring_ask_report, Ring_check_arguments, Ring_encode, Ring_prepare, Ring_publish,
    Ring_semaphores,
)
from maia_rt._fast.sites cimport note_site
from maia_rt._fast.way cimport Way

from maia_rt._fast.ring import QueueStopped

cdef str _package = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
cdef tuple _no_payload = (0, 0, 0)


cdef class Replay:
    """What the launch of a graph consists of while nothing about it changes. Its two payloads are used by turns.

    Parameters
    ----------
    locked : callable
        Says whether somebody changes the graph at the moment.
    note : callable
        Told of each launch: (queue, sequence number, which payload).

    Attributes
    ----------
    account : Account or None
        Of the stream that launched it last.
    plain : bool
        Whether a launch on that stream is one command and nothing else.
    slot : int
        Which payload is next, 0 or 1.
    """

    cdef public Account account
    cdef public bint plain
    cdef public int slot
    cdef uint64_t payloads[2][3]
    cdef object locked, note

    def __init__(self, locked, note):
        self.locked = locked
        self.note = note

    def set(self, payloads):
        """Launch with these from now on: twice three ints."""
        for slot in range(2):
            for word in range(3):
                self.payloads[slot][word] = payloads[slot][word]

    def payload(self):
        """The one that is next."""
        return self.payloads[self.slot][0], self.payloads[self.slot][1], self.payloads[self.slot][2]


cdef class Lane:
    """The base of :class:`maia_rt.Stream`.

    Parameters
    ----------
    account : Account
    queue : QueuePair
    timeout_ns : int
        How long a submission waits for room.

    Attributes
    ----------
    device : Device
    _capture : CaptureLane or None
        What takes this stream's commands while it is captured into a graph.
    _watched : bool
        Whether a validator looks at each command.
    _ways : dict
        By other device, the :class:`Way` there.
    """

    cdef public object device, _capture
    cdef public bint _watched
    cdef public dict _ways
    cdef readonly Account _account
    cdef readonly Ring _ring
    cdef readonly object _queue
    cdef int64_t _timeout_ns

    def __init__(self, Account account not None, queue, int64_t timeout_ns):
        self._account = account
        self._queue = queue
        self._ring = queue.ring
        self._timeout_ns = timeout_ns

    def _submit(self, uint8_t opcode, *, uint32_t units=0, tuple payload not None=_no_payload, tuple pre not None=(),
                tuple post not None=(), bint unbounded=False, bint report=False):
        """Submit one command that starts when all before it on the stream is done. All that streams can do goes here.

        Parameters
        ----------
        opcode, units, payload : int, int, three ints
            As in the contract.
        pre, post : up to two (semaphore, operation, value)
            What the command waits for, and what it posts.
        unbounded : bool
            Whether it waits for something that may be submitted after it or that comes from outside: a semaphore, a
            value in memory, the host. (An event is neither: what it stands for has been submitted.) The stream then
            has its queue for itself until the command is done, so that nobody waits with it.
        report : bool
            Whether the command writes a report record.

        Returns
        -------
        int
            The command's sequence number on the stream's present queue, `_queue`.

        Raises
        ------
        OutOfQueues
            `unbounded`, and no queue would be left for other streams.
        QueueFull, DeviceFault, DeviceLost, ClosedError, ForkedError
        """
        cdef command_t raw
        cdef command_t *slot
        cdef uint8_t flags = FLAG_BARRIER | FLAG_REPORT if report else FLAG_BARRIER
        a, b, c = payload
        Ring_encode(&raw, opcode, flags, units, a, b, c)
        if pre:
            Ring_semaphores(self._ring, raw.pre, pre)
        if post:
            Ring_semaphores(self._ring, raw.post, post)
        if unbounded:
            return self._claim(&raw)
        slot = Lane_slot(self)
        slot[0] = raw
        return Lane_publish(self, slot)

    def _launch(self, uint32_t kernel, uint32_t units, tuple args not None):
        """Submit a LAUNCH; return its sequence number.

        Parameters
        ----------
        kernel, units : int
        args : tuple
            Device addresses as ints, scalars as floats: those become FP32. At most 32.
        """
        Ring_check_arguments(self._ring, args)
        cdef command_t *slot = Lane_slot(self)
        Ring_encode(slot, OPCODE_LAUNCH, FLAG_BARRIER, units, kernel | <uint64_t>len(args) << 32,
                    Ring_arguments(self._ring, args), 0)
        return Lane_publish(self, slot)

    def _copy_whole(self, dst, src):
        """Submit a copy within this device, or to or from a peer; False where that takes a second look."""
        cdef Extent to, at
        cdef uint64_t target, source
        cdef command_t *slot
        if self._watched or self._capture is not None or not isinstance(dst, Extent) or not isinstance(src, Extent):
            return False
        to, at = <Extent>dst, <Extent>src
        if (to._run == 0 or to._run != at._run or to.readonly
                or (to.device is not self.device and at.device is not self.device)):
            return False
        # First, for it may wait, and what is looked at below must hold until the doorbell.
        slot = Lane_slot(self)
        if ((to if to._parent is None else to._parent)._closed
                or (at if at._parent is None else at._parent)._closed):
            return False
        target = to._address if to.device is self.device else Lane_reach(self, to)
        source = at._address if at.device is self.device else Lane_reach(self, at)
        if target == 0 or source == 0:
            return False
        Ring_encode(slot, OPCODE_COPY, FLAG_BARRIER, 0, source, target, to._run)
        Lane_publish(self, slot)
        return True

    def _launch_again(self, Replay replay not None):
        """Launch a graph as it was launched before. False where that takes more than one command and its doorbell.

        The GIL is held all the while, so nobody sees half of it.
        """
        cdef Ring ring = self._ring
        cdef command_t *slot
        cdef int which = replay.slot
        cdef uint64_t head = ring.head
        # Made first: nothing after the look around may call the collector, which may let other threads in.
        cdef tuple mark = (self._queue, head + 1, which)
        if (not replay.plain or replay.account is not self._account or self._account.stopped or replay.slot != which
                or self._ring is not ring or ring.gate or ring.head != head or head == ring.limit or replay.locked()):
            return False
        slot = &ring.slots[ring.head & ring.mask]
        Ring_encode(slot, OPCODE_INDIRECT, FLAG_BARRIER, 0, replay.payloads[which][0], replay.payloads[which][1],
                    replay.payloads[which][2])
        replay.slot = which ^ 1
        Lane_publish(self, slot)
        replay.note(mark)
        return True

    def _mark(self):
        """Return where the stream is: its queue, and the sequence number of its newest command there."""
        return self._queue, self._account.last

    cdef object _claim(self, const command_t *raw):
        cdef command_t *slot
        claim = None
        while claim is None:
            if self._account.stopped:
                self._resume()
            else:
                claim = self._begin_unbounded()
        try:
            slot = Lane_slot(self)
            slot[0] = raw[0]
            sequence = Lane_publish(self, slot)
        except BaseException:
            claim.drop()
            raise
        claim.hold(sequence)
        return sequence

    def _passes(self, queue, uint64_t sequence):
        """Say whether the next command comes after a sequence number by itself: because it is on the same queue."""
        if self._queue is not queue or self._account.stopped:
            return False
        self._account.follow = max(self._account.follow, sequence)
        return True

    def _settle(self, queue, uint64_t last, uint32_t why):
        """Go over to another queue, where the newest command of the stream is `last`; in one step for other threads.

        `why` are the bits of `Account.stopped` that called for it.
        """
        self._queue = queue
        self._ring = queue.ring
        self._account.last = last
        self._account.follow = 0
        self._account.stopped &= ~why


def known_words(kernel, list checks not None, tuple args not None):
    """Encode the arguments of a launch that are all known to fit.

    Parameters
    ----------
    kernel : maia_rt.Kernel
    checks : list
        Of the kernel, one an argument.
    args : tuple
        What is passed.

    Returns
    -------
    tuple of int or float, or None
        None where one of them is to be looked at.
    """
    cdef Py_ssize_t index, count = len(checks)
    if len(args) != count:
        return None
    cdef list words = []
    cdef Extent memory
    for index in range(count):
        check, arg = checks[index], args[index]
        if isinstance(arg, Extent):
            memory = <Extent>arg
            if check not in memory._fits or (memory if memory._parent is None else memory._parent)._closed:
                return None
            words.append(memory._address)
        elif check.scalar:
            words.append(check.number(kernel, arg))
        else:
            return None
    return tuple(words)


cdef command_t *Lane_slot(Lane self) except NULL:
    """The slot of the stream's next command. From here to the doorbell the GIL is held."""
    cdef Ring ring
    while True:
        if self._account.stopped:
            self._resume()
            continue
        ring = self._ring
        if not ring.gate and ring.head != ring.limit:
            return &ring.slots[ring.head & ring.mask]
        try:
            Ring_prepare(ring, self._timeout_ns)
        except QueueStopped:
            self._queue.repair()


cdef inline uint64_t Lane_reach(Lane self, Extent memory):
    """Where the device finds memory of a peer; 0 where that takes a second look."""
    way = self._ways.get(memory.device)
    return 0 if way is None else (<Way>way).reach(memory._address, memory._run)


cdef inline object Lane_publish(Lane self, command_t *slot):
    cdef Ring ring = self._ring
    if slot.flags & FLAG_REPORT:
        Ring_ask_report(ring)
    sequence = Ring_publish(ring, slot, self._account)
    if ring.sites != NULL:
        note_site(&ring.sites[ring.head & ring.mask], ring.head, <PyObject *>_package)
    return sequence
