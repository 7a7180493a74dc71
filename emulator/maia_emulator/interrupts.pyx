"""MSI-X vectors: an eventfd each, a mask and a pending bit."""

import os

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from maia_emulator.support cimport (
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *data, size_t size)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)
    short POLLOUT


cdef class Vectors:
    """The function's interrupt vectors. A vector that is masked or has no eventfd stays pending."""

    def __cinit__(self, int count):
        self.count = count
        self.eventfds = <int *> calloc(count, sizeof(int))
        self.masked = <unsigned char *> calloc(count, 1)
        self.waiting = <unsigned char *> calloc(count, 1)
        if self.eventfds == NULL or self.masked == NULL or self.waiting == NULL:
            raise MemoryError
        for i in range(count):
            self.eventfds[i] = -1
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        if self.eventfds != NULL:
            for i in range(self.count):
                if self.eventfds[i] >= 0:
                    os.close(self.eventfds[i])
        free(self.eventfds)
        free(self.masked)
        free(self.waiting)
        pthread_mutex_destroy(&self.lock)

    cdef void fire(self, int vector) noexcept nogil:
        """Raise a vector from any thread."""
        if vector < 0 or vector >= self.count:
            return
        pthread_mutex_lock(&self.lock)
        self.fired += 1
        self.deliver(vector)
        pthread_mutex_unlock(&self.lock)

    cdef void deliver(self, int vector) noexcept nogil:
        cdef uint64_t one = 1
        cdef pollfd room
        self.waiting[vector] = 1
        if self.eventfds[vector] >= 0 and not self.masked[vector]:
            # A client may hand us a counter at its top: writing would block, and it has an interrupt to find already.
            self.waiting[vector] = 0
            room.fd, room.events = self.eventfds[vector], POLLOUT
            if poll(&room, 1, 0) == 1 and write(self.eventfds[vector], &one, 8) < 0:
                pass

    def assign(self, int vector, int eventfd):
        """Give a vector an eventfd (a duplicate is kept), or -1 for none; one that is pending fires at once."""
        cdef int kept = os.dup(eventfd) if eventfd >= 0 else -1, old
        with nogil:
            pthread_mutex_lock(&self.lock)
            old = self.eventfds[vector]
            self.eventfds[vector] = kept
            if self.waiting[vector]:
                self.deliver(vector)
            pthread_mutex_unlock(&self.lock)
        if old >= 0:
            os.close(old)

    def mask(self, int vector, bint masked):
        """Mask or unmask a vector; unmasking one that is pending fires it."""
        with nogil:
            pthread_mutex_lock(&self.lock)
            self.masked[vector] = masked
            if self.waiting[vector]:
                self.deliver(vector)
            pthread_mutex_unlock(&self.lock)

    def trigger(self, int vector):
        """Raise a vector."""
        self.fire(vector)

    def pending(self):
        """The pending bits, bit v for vector v."""
        return sum(1 << i for i in range(self.count) if self.waiting[i])

    def clear(self):
        """Forget what is pending and every mask; eventfds stay."""
        for i in range(self.count):
            self.waiting[i] = 0
            self.masked[i] = 0
