"""The threads that look after the queues of every device of this process.

One thread goes round all devices, so that however many there are, one core at most spins; a device that has had nothing
to do for a while sleeps by itself and costs a look at one word then. While several devices move at a time and one of
them has long work, such as a copy of many pieces, more threads join, up to one a core. With nothing awake the last one
sleeps on all bells (bells.pyx).
"""

import os
import threading

from libc.stdint cimport int64_t, uint32_t, uint64_t

from maia_emulator.bells cimport rouse
from maia_emulator.queues cimport AWAKE, BUSY, LONG, PEERS, STREAM, WORKED, FrontEnd, nap_t, nap_of, serve
from maia_emulator.support cimport add32, clock_ns, load32, pause_cpu, sched_yield, store32, swap_if32
from maia_emulator.watch cimport call_one, park

cdef extern from "futex.h" nogil:
    void futex_wait(uint32_t *word, uint32_t seen, int64_t limit_ns)
    int futex_wait_many(uint32_t **words, uint32_t *seen, int count, int64_t limit_ns)
    void futex_wake(uint32_t *word)

# Front ends are kept as plain pointers, for a thread without the GIL cannot hold objects; `members` keeps them alive.
ctypedef int (*serve_t)(void *front, uint64_t *now) noexcept nogil
ctypedef void (*nap_of_t)(void *front, nap_t *nap) noexcept nogil

cdef enum:
    LAST_LOOKS = 16         # of a thread that is not needed any more, and
    MANY_LOOKS = 128        # while the other one is held up by long work
    PATIENCE = 4096         # looks at a device that somebody else holds, before it is left alone for a while
    BUSY_NS = 1000000       # between looks at a device that somebody else holds
    BLIND_NS = 1000000      # between looks where the kernel cannot sleep on several bells
    STREAM_NS = 1000        # between looks at a doorbell that is rung all the time

cdef serve_t serve_one = <serve_t> <void *> serve
cdef nap_of_t nap_of_one = <nap_of_t> <void *> nap_of


cdef class Processor:
    """Serves front ends from `enter` to `leave`."""

    def __cinit__(self):
        self.members = []
        self.threads = []
        self.cores = len(os.sched_getaffinity(0))

    def enter(self, FrontEnd front not None):
        """Serve a front end from now on.

        Raises
        ------
        ValueError
            There are `MAX_FRONTS` already.
        """
        if self.count == MAX_FRONTS:
            raise ValueError(f"a process serves {<int> MAX_FRONTS} devices")
        front.traffic.watch = &self.watch
        front.left = False
        self.members.append(front)
        self.fronts[self.count] = <void *> front
        store32(&self.count, self.count + 1)
        # As many as devices, for all but one may be held up by their clients.
        thread = threading.Thread(target=self._serve, name=f"command-processor-{len(self.threads)}", daemon=True)
        thread.start()
        self.threads.append(thread)
        self._disturb()

    def leave(self, FrontEnd front not None):
        """Serve it no more; nothing of it is under way when this returns. Idempotent."""
        if front in self.members and not front.left:
            with nogil:
                front.take()
                front.left, front.asleep = True, False
                front.give()
                rouse(front.bell)   # who sleeps on it must not do so any more
            # Not before: a thread may be held up by another device's client.
            if all((<FrontEnd> member).left for member in self.members):
                self._halt()

    def _halt(self):
        store32(&self.watch.stopping, 1)
        for thread in self.threads:
            while thread.is_alive():
                self._disturb()     # again and again, for a client may have written to a bell
                thread.join(0.1)
        self.threads.clear()
        self.members.clear()
        self.count = self.watch.stopping = self.watch.active = self.watch.dozing = 0

    def _disturb(self):
        """Make every thread that sleeps look about."""
        add32(&self.watch.calls, 1)
        futex_wake(&self.watch.calls)
        add32(&self.watch.poke, 1)
        futex_wake(&self.watch.poke)
        for member in self.members:
            if not (<FrontEnd> member).left:        # else its bell is gone
                rouse((<FrontEnd> member).bell)

    def _serve(self):
        with nogil:
            self.loop()

    cdef void loop(self) noexcept nogil:
        cdef int what, looks = 0, _i
        cdef uint64_t now = 0, until
        add32(&self.watch.active, 1)
        while not load32(&self.watch.stopping):
            what = self.look(&now)
            if what & WORKED:
                looks = 0
                if what & LONG and load32(&self.watch.active) < self.cores:
                    call_one(&self.watch)
                if what & STREAM:
                    # Each look takes the doorbell's cache line away from its writer, who needs it for every command.
                    until = clock_ns() + STREAM_NS
                    while clock_ns() < until:
                        pause_cpu()
                continue
            looks += 1
            if self.count > 1 and looks >= (MANY_LOOKS if what & BUSY else LAST_LOOKS) and park(&self.watch):
                looks = 0
            elif what & AWAKE or (what & BUSY and looks < PATIENCE):
                for _i in range(8):
                    pause_cpu()
                if (what & PEERS or self.count > 1) and looks % 16 == 0:
                    # A device of another process, or a thread of ours, that was woken may be on this very core.
                    sched_yield()
            elif self.doze(now, what & BUSY != 0):
                now = clock_ns()
                looks = 0
        add32(&self.watch.active, <uint32_t> -1)

    cdef int look(self, uint64_t *now) noexcept nogil:
        """Go round all devices: what `serve` returned, in sum; LONG only if others moved too, STREAM only if not."""
        cdef int count = load32(&self.count), what = 0, one, i, moved = 0
        for i in range(count):
            one = serve_one(self.fronts[i], now)
            moved += one & WORKED
            what |= one
        if moved < 2:
            what &= ~LONG
        else:
            what &= ~STREAM
        return what

    cdef bint doze(self, uint64_t now, bint busy) noexcept nogil:
        """Sleep until a device is rung, or wants to be looked at; False where another thread does so already."""
        cdef uint32_t *words[MAX_FRONTS + 1]
        cdef uint32_t seen[MAX_FRONTS + 1]
        cdef nap_t nap
        cdef uint64_t until = now + BUSY_NS if busy else <uint64_t> -1
        cdef int64_t limit = -1
        cdef int fronts = load32(&self.count), i, count = 1
        if not swap_if32(&self.watch.dozing, 0, 1):
            return False
        words[0], seen[0] = &self.watch.poke, load32(&self.watch.poke)
        for i in range(fronts):
            nap_of_one(self.fronts[i], &nap)
            if nap.asleep:
                words[count], seen[count] = nap.word, nap.seen
                count += 1
                until = min(until, nap.look_at)
        add32(&self.watch.active, <uint32_t> -1)
        if not load32(&self.watch.stopping):
            if until != <uint64_t> -1:
                limit = max(0, <int64_t> (until - clock_ns()))
            if fronts == 1 and count == 2:
                futex_wait(words[1], seen[1], limit)
            elif futex_wait_many(words, seen, count, limit):
                futex_wait(words[0], seen[0], BLIND_NS if limit < 0 else min(limit, <int64_t> BLIND_NS))
        add32(&self.watch.active, 1)
        store32(&self.watch.dozing, 0)
        return True
