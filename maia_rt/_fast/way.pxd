from libc.stdint cimport uint64_t


cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <poll.h>
    """
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int milliseconds) nogil
    enum:
        POLLRDHUP


cdef class Way:
    cdef public uint64_t _copies, _every
    cdef bint plain
    cdef uint64_t first, size, shift
    cdef pollfd ends[2]
    cdef uint64_t reach(self, uint64_t address, uint64_t size)
