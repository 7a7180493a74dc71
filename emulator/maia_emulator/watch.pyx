"""Leader and followers: one thread looks after every device's queues, and others take over where it would be held up.

Of the threads that a `Processor` has, ``active`` ones look after queues: one as a rule, more while several devices have
long work and cores are free. One whose device asks its client for memory by a message blocks until the client has
answered; it steps aside before that, so that a client that takes its time holds up nobody else's device.
"""

from libc.stdint cimport uint32_t

from maia_emulator.support cimport add32, load32, swap_if32

cdef extern from "futex.h" nogil:
    void futex_wait(uint32_t *word, uint32_t seen, long limit_ns)
    void futex_wake(uint32_t *word)
    void futex_wake_one(uint32_t *word)


cdef void step_aside(watch_t *watch) noexcept nogil:
    """This thread is about to block on somebody outside: let another one watch."""
    if add32(&watch.active, <uint32_t> -1) == 0 and not load32(&watch.dozing):
        call_one(watch)


cdef void step_back(watch_t *watch) noexcept nogil:
    """It goes on."""
    add32(&watch.active, 1)


cdef void call_one(watch_t *watch) noexcept nogil:
    """Let one more thread look after queues, if one is parked."""
    add32(&watch.calls, 1)
    futex_wake_one(&watch.calls)


cdef bint park(watch_t *watch) noexcept nogil:
    """Stop looking after queues until called, unless nobody else would; True where it did."""
    cdef uint32_t seen = load32(&watch.calls), active
    cdef bint dozing
    while True:
        active, dozing = load32(&watch.active), load32(&watch.dozing) != 0
        if active < 2 and not dozing:
            return False
        if swap_if32(&watch.active, active, active - 1):
            break
    if active < 2:
        # Who sleeps on the bells does not know of what this thread has left behind.
        add32(&watch.poke, 1)
        futex_wake(&watch.poke)
    while load32(&watch.calls) == seen and not load32(&watch.stopping):
        futex_wait(&watch.calls, seen, -1)
    add32(&watch.active, 1)
    return True
