# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Waiting for a queue's progress word: spin a little, then arm the queue's vector and sleep.

Several threads may wait for different sequence numbers of one queue, which has one vector and one ARM word:

    leader      polls the queue's eventfd, the transport and the device's event vector
    followers   poll an eventfd of their own, which the leader writes when they are done or shall lead
    watches     are no threads but event loops: each has an eventfd that is written when it is done, and polls it beside
                the queue's. Whichever thread or loop finds that one readable does the leader's work.

ARM always holds the smallest sequence that anybody waits for. Whoever stores it fences and reads progress again; the
device does the same the other way round (progress, fence, ARM), so one of the two sees the other and no wake-up is
lost. The mutex is held for a few loads and stores only and never while the GIL is taken.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.unistd cimport close, usleep

from maia_rt._fast.atomics cimport fence, load32, load64, now_ns, pause, store32, store64
from maia_rt._fast.commands cimport QUEUE_RUNNING
from maia_rt._fast.registers cimport DOORBELL_ARM, DOORBELL_NEEDS_WAKE


cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *, const void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)

cdef extern from "<poll.h>" nogil:
    """
    #include <poll.h>
    #include <unistd.h>
    static inline int maia_ppoll(struct pollfd *fds, nfds_t n, int64_t ns) {
        struct timespec t = {ns / 1000000000, ns % 1000000000};
        return ppoll(fds, n, &t, 0);
    }
    /* An eventfd that cannot take another count is readable already; one that has none was drained by somebody else. */
    static inline void maia_kick(int fd) {
        uint64_t one = 1;
        if (write(fd, &one, sizeof one) < 0) {}
    }
    static inline void maia_drain(int fd) {
        uint64_t count;
        if (read(fd, &count, sizeof count) < 0) {}
    }
    """
    struct pollfd:
        int fd
        short events
        short revents
    short POLLIN, POLLERR, POLLHUP, POLLNVAL, POLLRDHUP
    int maia_ppoll(pollfd *fds, unsigned long count, int64_t timeout_ns)
    void kick "maia_kick"(int fd)
    void drain "maia_drain"(int fd)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int EFD_CLOEXEC, EFD_NONBLOCK

cdef enum:
    PAUSES = 16  # between two looks at the clock


cdef class Waiters:
    """Who waits for one queue.

    Parameters of the constructor are set by `maia_rt._fast.ring.Ring`, which owns the memory pointed into.
    """

    def __cinit__(self):
        pthread_mutex_init(&self.mutex, NULL)
        self.queue_fd = self.liveness_fd = self.event_fd = -1

    def __init__(self, int queue_fd, int liveness_fd, int event_fd, int64_t spin_ns, wake, service, on_event):
        self.queue_fd = queue_fd
        self.liveness_fd = liveness_fd
        self.event_fd = event_fd
        self.spin_ns = self.spin_budget_ns = spin_ns
        self.wake = wake
        self.service = service
        self.on_event = on_event
        # One wait at a time never makes another: it cannot fail for want of a descriptor.
        self.spares[0] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.spares[0] < 0:
            raise OSError(errno, "eventfd")
        self.spare_count = 1

    @property
    def spin_ns(self):
        """How long a wait spins at most before it sleeps. Settable."""
        return self.spin_ns

    @spin_ns.setter
    def spin_ns(self, int64_t nanoseconds):
        self.spin_ns = self.spin_budget_ns = nanoseconds

    def __dealloc__(self):
        Waiters_close_spares(self)
        pthread_mutex_destroy(&self.mutex)

    cdef int wait(self, uint64_t sequence, int64_t timeout_ns) except -1:
        """Wait until progress reaches `sequence`. The caller holds the GIL; a signal handler's exception ends the wait.
        """
        cdef int status = self.look(sequence)
        if status != PENDING:
            return status
        if timeout_ns <= 0:
            return TIMED_OUT
        cdef int64_t start = now_ns()
        self.active += 1
        try:
            with nogil:
                status = Waiters_spin(self, sequence, min(timeout_ns, self.spin_budget_ns), start)
                if status == PENDING:
                    status = Waiters_block(self, sequence, start + timeout_ns)
                    # A wait that spinning would have covered brings the budget back; one that was long halves it.
                    if now_ns() - start < self.spin_ns:
                        self.spin_budget_ns = self.spin_ns
                    else:
                        self.spin_budget_ns = max(self.spin_budget_ns // 2, self.spin_ns // 16)
                else:
                    self.spin_budget_ns = self.spin_ns
        finally:
            self.active -= 1
        return status

    cdef int look(self, uint64_t sequence) noexcept nogil:
        """What is known now of the command `sequence`."""
        # Contract 7.5: progress is read before state, and what a stopped queue had before its fault is retired. The
        # failed command itself counts as retired too.
        cdef bint reached = <int64_t>(load64(&self.progress.progress) - sequence) >= 0
        if load32(&self.progress.state) != QUEUE_RUNNING:
            return STOPPED if <int64_t>(sequence - self.progress.fault_sequence) >= 0 else DONE
        if reached:
            return DONE
        return CLOSED if load32(&self.closing) else PENDING

    cdef void kick_all(self) noexcept nogil:
        """Make everybody look again: the device told that something happened, or the queue closes."""
        cdef waiter_t *waiter
        cdef watch_t *watch
        pthread_mutex_lock(&self.mutex)
        waiter = self.first
        while waiter != NULL:
            kick(waiter.fd)
            waiter = waiter.next
        watch = self.watches
        while watch != NULL:
            kick(watch.fd)
            watch = watch.next
        pthread_mutex_unlock(&self.mutex)

    cdef int rearm(self) except -1:
        """Tell everybody to look again and arm anew: the device has forgotten what it was armed with."""
        cdef bint must_wake
        with nogil:
            pthread_mutex_lock(&self.mutex)
            self.armed = 0
            must_wake = Waiters_arm(self)
            pthread_mutex_unlock(&self.mutex)
        if must_wake:
            self.wake_device()
        return 0

    cdef bint shut(self, int64_t timeout_ns):
        """End every wait with CLOSED; return whether all have ended within the time."""
        cdef int64_t deadline = now_ns() + timeout_ns
        store32(&self.closing, 1)
        with nogil:
            self.kick_all()
        while self.active and now_ns() < deadline:
            with nogil:
                usleep(200)
        if self.active:
            return False
        Waiters_close_spares(self)
        return True

    cdef bint device_sleeps(self) noexcept nogil:
        """Whether the device must be woken to see what was just stored in the doorbell page."""
        cdef uint32_t sleep
        if not self.can_sleep:
            return False
        fence()
        sleep = load32(self.doorbell + DOORBELL_NEEDS_WAKE)
        return sleep != 0 and sleep != self.woken

    cdef int wake_device(self) except -1:
        """Write WAKE, once for each sleep: a device that was told needs time to get up, not to be told again."""
        cdef uint32_t sleep = load32(self.doorbell + DOORBELL_NEEDS_WAKE)
        self.wake()
        self.woken = sleep
        return 0


@cython.no_gc_clear  # its end needs the waiters
cdef class Watch:
    """A wait for a queue that no thread sits in; for event loops.

    Poll `fd` and a duplicate of the queue's eventfd; when one is readable, call `serve` and look how far the queue is.
    Any thread may call, all with the GIL. It ends with its last reference, or with `close`.

    Parameters
    ----------
    waiters : Waiters
    """

    def __cinit__(self):
        self.me.fd = -1

    def __init__(self, Waiters waiters not None):
        if self.waiters is not None:
            raise TypeError("a watch is made once")
        self.me.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.me.fd < 0:
            raise OSError(errno, "eventfd")
        self.waiters = waiters
        # Who holds the mutex never waits for the GIL.
        pthread_mutex_lock(&waiters.mutex)
        self.me.next = waiters.watches
        waiters.watches = &self.me
        pthread_mutex_unlock(&waiters.mutex)

    def __dealloc__(self):
        Watch_end(self)

    @property
    def fd(self):
        """An eventfd that becomes readable when it is time to look; -1 once it has been closed."""
        return self.me.fd

    def want(self, sequence):
        """Have `fd` written once progress reaches `sequence`, or the queue stops. None: want nothing."""
        cdef bint must_wake = False
        if self.me.fd < 0:
            return
        pthread_mutex_lock(&self.waiters.mutex)
        self.me.wanting = False
        if sequence is not None:
            self.me.sequence = sequence
            self.me.wanting = True
        # A queue that is closed, or of before a fork, has no memory any more.
        if not load32(&self.waiters.closing):
            must_wake = Waiters_arm(self.waiters)
        pthread_mutex_unlock(&self.waiters.mutex)
        if must_wake:
            self.waiters.wake_device()

    def serve(self):
        """Take what the eventfds say, and tell those who are done."""
        cdef bint must_wake = False
        if self.me.fd < 0:
            return
        drain(self.me.fd)
        if load32(&self.waiters.closing):
            return
        drain(self.waiters.queue_fd)
        pthread_mutex_lock(&self.waiters.mutex)
        self.me.wanting = False
        must_wake = Waiters_arm(self.waiters)
        pthread_mutex_unlock(&self.waiters.mutex)
        if must_wake:
            self.waiters.wake_device()

    def close(self):
        """End it. Idempotent."""
        Watch_end(self)


cdef void Watch_end(Watch self) noexcept:
    cdef watch_t **link
    if self.me.fd < 0:
        return
    pthread_mutex_lock(&self.waiters.mutex)
    link = &self.waiters.watches
    while link[0] != &self.me:
        link = &link[0].next
    link[0] = self.me.next
    pthread_mutex_unlock(&self.waiters.mutex)
    close(self.me.fd)
    self.me.fd = -1


cdef int Waiters_spin(Waiters self, uint64_t sequence, int64_t budget_ns, int64_t start) noexcept nogil:
    cdef int status, _i
    while True:
        for _i in range(PAUSES):
            status = self.look(sequence)
            if status != PENDING:
                return status
            pause()
        if now_ns() - start >= budget_ns:
            return PENDING


cdef int Waiters_block(Waiters self, uint64_t sequence, int64_t deadline) except -1 nogil:
    cdef waiter_t me
    cdef bint must_wake
    cdef int status
    me.sequence = sequence
    pthread_mutex_lock(&self.mutex)
    if self.spare_count:
        self.spare_count -= 1
        me.fd = self.spares[self.spare_count]
    else:
        me.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if me.fd < 0:
        pthread_mutex_unlock(&self.mutex)
        with gil:
            raise OSError(errno, "eventfd")
    me.leads = self.first == NULL
    me.next = self.first
    self.first = &me
    self.sleeps += 1
    must_wake = Waiters_arm(self)
    pthread_mutex_unlock(&self.mutex)
    try:
        status = Waiters_sleep(self, &me, deadline, must_wake)
    finally:
        must_wake = Waiters_leave(self, &me)
    if must_wake:
        with gil:
            self.wake_device()
    return status


cdef int Waiters_sleep(Waiters self, waiter_t *me, int64_t deadline, bint must_wake) except -1 nogil:
    cdef pollfd fds[4]
    cdef int status, count
    cdef uint32_t led = me.leads, leads
    cdef int64_t left
    while True:
        status = self.look(me.sequence)
        if status != PENDING:
            return status
        leads = load32(&me.leads)
        if leads and not led:
            # The last leader's interrupt may have been for somebody else.
            led = leads
            pthread_mutex_lock(&self.mutex)
            must_wake = Waiters_arm(self) or must_wake
            pthread_mutex_unlock(&self.mutex)
        if must_wake:
            with gil:
                self.wake_device()
            must_wake = False
        left = deadline - now_ns()
        if left <= 0:
            return TIMED_OUT
        fds[0] = pollfd(me.fd, POLLIN, 0)
        fds[1] = pollfd(self.queue_fd, POLLIN, 0)
        fds[2] = pollfd(self.liveness_fd, POLLIN | POLLRDHUP, 0)
        fds[3] = pollfd(self.event_fd, POLLIN, 0)
        count = maia_ppoll(fds, 4 if leads else 1, left)
        if count < 0:
            if errno != EINTR:
                with gil:
                    raise OSError(errno, "ppoll")
            with gil:
                PyErr_CheckSignals()
            continue
        if fds[0].revents:
            drain(me.fd)
        if not leads:
            continue
        if fds[1].revents:
            drain(self.queue_fd)
            pthread_mutex_lock(&self.mutex)
            must_wake = Waiters_arm(self)
            pthread_mutex_unlock(&self.mutex)
        if fds[2].revents & (POLLHUP | POLLRDHUP | POLLERR | POLLNVAL):
            status = self.look(me.sequence)
            return LOST if status == PENDING else status
        if fds[2].revents:
            with gil:
                self.service()
        if fds[3].revents:
            with gil:
                self.on_event()


cdef bint Waiters_arm(Waiters self) noexcept nogil:
    """Tell those who are done and arm for the next; called with the mutex. Return whether the device must be woken."""
    cdef waiter_t *waiter
    cdef watch_t *watch
    cdef uint64_t progress, lowest = 0
    cdef uint32_t stopped
    cdef bint found, must_wake = False
    while True:
        stopped = load32(&self.progress.state) != QUEUE_RUNNING
        progress = load64(&self.progress.progress)
        found = False
        waiter = self.first
        while waiter != NULL:
            if stopped or <int64_t>(progress - waiter.sequence) >= 0:
                kick(waiter.fd)
            elif not found or <int64_t>(waiter.sequence - lowest) < 0:
                found = True
                lowest = waiter.sequence
            waiter = waiter.next
        watch = self.watches
        while watch != NULL:
            if watch.wanting:
                if stopped or <int64_t>(progress - watch.sequence) >= 0:
                    # Once: a loop need not run in circles while somebody repairs the queue.
                    watch.wanting = False
                    kick(watch.fd)
                elif not found or <int64_t>(watch.sequence - lowest) < 0:
                    found = True
                    lowest = watch.sequence
            watch = watch.next
        if not found or lowest == self.armed:
            return must_wake
        self.armed = lowest
        store64(self.doorbell + DOORBELL_ARM, lowest)
        if self.can_sleep:
            must_wake = self.device_sleeps()
        else:
            fence()


cdef bint Waiters_leave(Waiters self, waiter_t *me) noexcept nogil:
    cdef waiter_t **link
    cdef bint must_wake = False
    cdef bint kept = False
    pthread_mutex_lock(&self.mutex)
    link = &self.first
    while link[0] != me:
        link = &link[0].next
    link[0] = me.next
    if self.first != NULL:
        if me.leads:
            store32(&self.first.leads, 1)
            kick(self.first.fd)
    if self.first != NULL or self.watches != NULL:
        must_wake = Waiters_arm(self)
    drain(me.fd)
    if self.spare_count < 16:
        self.spares[self.spare_count] = me.fd
        self.spare_count += 1
        kept = True
    pthread_mutex_unlock(&self.mutex)
    if not kept:
        close(me.fd)
    return must_wake


cdef void Waiters_close_spares(Waiters self) noexcept:
    while self.spare_count:
        self.spare_count -= 1
        close(self.spares[self.spare_count])
