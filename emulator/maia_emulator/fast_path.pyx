# cython: boundscheck=False, wraparound=False
"""The socket of one client, and the registers that are answered without waking the interpreter.

A register read is one round trip, and most of a Python server's time goes into taking the interpreter lock and
building objects. Here the header is received, judged and, where it asks for a plain register, answered without the
lock. Every other message goes up to `session.Session` whole.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from maia_emulator.queues cimport FrontEnd

import os

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    #include <unistd.h>

    #define CONNECTION_FDS 16

    /* vfio-user, section Header; the body of REGION_READ and REGION_WRITE follows. */
    typedef struct {
        uint16_t id, command;
        uint32_t size, flags, error;
        uint64_t offset;
        uint32_t region, count;
        uint64_t data;
    } connection_message;

    /* One recvmsg. Descriptors beyond the room for them are closed and set *truncated. */
    static ssize_t connection_take(int fd, void *buffer, size_t size, int *fds, int *count, int *truncated)
    {
        union { char room[CMSG_SPACE(CONNECTION_FDS * sizeof(int))]; struct cmsghdr align; } control;
        struct iovec part = {buffer, size};
        struct msghdr message;
        struct cmsghdr *head;
        ssize_t got;

        memset(&message, 0, sizeof message);
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control.room;
        message.msg_controllen = sizeof control.room;
        got = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
        if (got < 0 || message.msg_controllen == 0)
            return got;
        if (message.msg_flags & MSG_CTRUNC)
            *truncated = 1;
        for (head = CMSG_FIRSTHDR(&message); head; head = CMSG_NXTHDR(&message, head)) {
            size_t i, n;
            if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS)
                continue;
            n = (head->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            for (i = 0; i < n; i++) {
                int one;
                memcpy(&one, CMSG_DATA(head) + i * sizeof(int), sizeof one);
                if (*count < CONNECTION_FDS) {
                    fds[(*count)++] = one;
                } else {
                    close(one);
                    *truncated = 1;
                }
            }
        }
        return got;
    }

    static ssize_t connection_put(int fd, struct iovec *parts, size_t count, const int *fds, size_t fd_count)
    {
        union { char room[CMSG_SPACE(CONNECTION_FDS * sizeof(int))]; struct cmsghdr align; } control;
        struct msghdr message;

        memset(&message, 0, sizeof message);
        message.msg_iov = parts;
        message.msg_iovlen = count;
        if (fd_count) {
            struct cmsghdr *head;
            memset(&control, 0, sizeof control);
            message.msg_control = control.room;
            message.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
            head = CMSG_FIRSTHDR(&message);
            head->cmsg_level = SOL_SOCKET;
            head->cmsg_type = SCM_RIGHTS;
            head->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
            memcpy(CMSG_DATA(head), fds, fd_count * sizeof(int));
        }
        return sendmsg(fd, &message, MSG_NOSIGNAL);
    }

    static uint32_t register_load32(const uint8_t *at)
    {
        return __atomic_load_n((const uint32_t *)at, __ATOMIC_ACQUIRE);
    }

    static uint64_t register_load64(const uint8_t *at)
    {
        return __atomic_load_n((const uint64_t *)at, __ATOMIC_ACQUIRE);
    }

    static void register_store32(uint8_t *at, uint32_t value)
    {
        __atomic_store_n((uint32_t *)at, value, __ATOMIC_RELEASE);
    }

    static void register_store64(uint8_t *at, uint64_t value)
    {
        __atomic_store_n((uint64_t *)at, value, __ATOMIC_RELEASE);
    }
    """
    enum: CONNECTION_FDS
    enum: SHUT_RDWR
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct connection_message:
        uint16_t id, command
        uint32_t size, flags, error
        uint64_t offset
        uint32_t region, count
        uint64_t data
    ssize_t connection_take(int fd, void *buffer, size_t size, int *fds, int *count, int *truncated)
    ssize_t connection_put(int fd, iovec *parts, size_t count, const int *fds, size_t fd_count)
    uint32_t register_load32(const uint8_t *at)
    uint64_t register_load64(const uint8_t *at)
    void register_store32(uint8_t *at, uint32_t value)
    void register_store64(uint8_t *at, uint64_t value)
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int shutdown(int fd, int how)

# vfio-user: Header, Commands.
cdef enum:
    HEADER_BYTES = 16
    ACCESS_BYTES = 16
    REGION_READ = 9
    REGION_WRITE = 10
    TYPE_REPLY = 1
    NO_REPLY = 16
    TYPE_MASK = 15

cdef enum:
    DONE = 0
    END_OF_STREAM = 1
    CUT_SHORT = 2

# What may be done with a word of the register memory without asking anybody.
PLAIN_READ_4 = 1
PLAIN_READ_8 = 2
PLAIN_WRITE_4 = 4
PLAIN_WRITE_8 = 8

cdef enum:
    WAKES_4 = 16    # a write of 4 bytes wakes the device, and stores nothing


cdef class RegisterMemory:
    """The values of a register block, shared by the session's fast path and everybody else.

    Loads and stores are single, aligned and ordered, so a reader never sees half of a value.

    Parameters
    ----------
    size : int
        Bytes, a multiple of 8.

    Attributes
    ----------
    hidden : bool
        No access is plain.
    """

    cdef uint8_t *values
    cdef uint8_t *plain
    cdef readonly uint32_t size
    cdef public bint hidden
    cdef FrontEnd front

    def __cinit__(self, uint32_t size):
        if size % 8:
            raise ValueError(f"{size} bytes are no whole number of 64-bit registers")
        self.values = <uint8_t *>calloc(size, 1)
        self.plain = <uint8_t *>calloc(size // 4, 1)
        if self.values == NULL or self.plain == NULL:
            raise MemoryError
        self.size = size

    def __dealloc__(self):
        free(self.values)
        free(self.plain)

    def load(self, uint32_t offset, int width):
        """Return the 4 or 8 bytes at `offset` as an integer."""
        self.check(offset, width)
        return register_load32(self.values + offset) if width == 4 else register_load64(self.values + offset)

    def store(self, uint32_t offset, int width, uint64_t value):
        """Store an integer of 4 or 8 bytes at `offset`."""
        self.check(offset, width)
        if width == 4:
            register_store32(self.values + offset, <uint32_t>value)
        else:
            register_store64(self.values + offset, value)

    def set_plain(self, uint32_t offset, int accesses):
        """Say which accesses to the word at `offset` are plain (a sum of PLAIN_*)."""
        self.check(offset, 4)
        self.plain[offset // 4] = <uint8_t>accesses

    def set_wake(self, uint32_t offset, FrontEnd front not None):
        """Have writes of 4 bytes to the word at `offset` wake a command processor."""
        self.set_plain(offset, WAKES_4)
        self.front = front

    cdef int check(self, uint32_t offset, int width) except -1:
        if width not in (4, 8) or offset % width or offset > self.size - width:
            raise ValueError(f"no register access of {width} bytes at {offset:#x}")
        return 0

    cdef bint answer(self, connection_message *message, uint32_t *reply_size) noexcept nogil:
        """Serve a plain access in place; False where it is not one."""
        cdef uint8_t allowed
        cdef uint32_t width = message.count
        if self.hidden or message.region != 0 or (width != 4 and width != 8) or message.offset % width \
                or message.offset > self.size - width:
            return False
        allowed = self.plain[message.offset // 4]
        if message.command == REGION_READ:
            if not allowed & (1 if width == 4 else 2):
                return False
            if width == 4:
                message.data = register_load32(self.values + message.offset)
            else:
                message.data = register_load64(self.values + message.offset)
            reply_size[0] = HEADER_BYTES + ACCESS_BYTES + width
        else:
            if allowed & WAKES_4 and width == 4:
                self.front.wake_register()
                reply_size[0] = HEADER_BYTES + ACCESS_BYTES
                return True
            if not allowed & (4 if width == 4 else 8):
                return False
            if width == 4:
                register_store32(self.values + message.offset, <uint32_t>message.data)
            else:
                register_store64(self.values + message.offset, message.data)
            reply_size[0] = HEADER_BYTES + ACCESS_BYTES
        return True


cdef class Connection:
    """A connected socket that carries vfio-user messages.

    One thread receives; any thread sends. A failed send leaves half a message in the stream, so it shuts the socket
    down: the receiver then sees the end.

    Parameters
    ----------
    sock : socket.socket
        Blocking. Kept open by the caller for the life of the connection.
    registers : RegisterMemory, optional
        Plain accesses to region 0 are answered from it once `fast` is set.
    max_body : int
        The largest body that is received, in bytes.
    """

    cdef object sock
    cdef int fd
    cdef RegisterMemory registers
    cdef pthread_mutex_t sending
    cdef uint32_t max_body
    cdef public bint fast
    cdef readonly uint64_t fast_accesses

    def __cinit__(self, sock, RegisterMemory registers, uint32_t max_body):
        pthread_mutex_init(&self.sending, NULL)
        self.sock = sock
        self.fd = sock.fileno()
        self.registers = registers
        self.max_body = max_body

    def __dealloc__(self):
        pthread_mutex_destroy(&self.sending)

    def receive(self):
        """Wait for a message that is no plain register access.

        Returns
        -------
        header : tuple of int
            id, command, size, flags, errno.
        body : bytes or None
            None where the header's size is impossible: the stream cannot be read on.
        fds : list of int
            Close-on-exec descriptors, the caller's to close.
        truncated : bool
            More descriptors came than there is room for; the others were closed.

        Raises
        ------
        EOFError
            The peer closed between messages.
        ConnectionError
            The peer closed within a message.
        OSError
            The socket failed.
        """
        cdef connection_message message
        cdef int fds[CONNECTION_FDS]
        cdef int count = 0, truncated = 0, rc
        cdef uint32_t body_size = 0, have = 0
        cdef bytes body
        cdef uint8_t *into
        with nogil:
            rc = self.next_message(&message, &have, fds, &count, &truncated)
        if rc == DONE:
            body_size = message.size - HEADER_BYTES
            if message.size < HEADER_BYTES or body_size > self.max_body:
                body = None
            else:
                body = PyBytes_FromStringAndSize(NULL, body_size)
                into = <uint8_t *>PyBytes_AS_STRING(body)
                memcpy(into, &message.offset, have)
                if body_size > have:
                    with nogil:
                        rc = self.fill(into + have, body_size - have, fds, &count, &truncated)
                    if rc == END_OF_STREAM:
                        rc = CUT_SHORT
        received = [fds[i] for i in range(count)]
        if rc == DONE:
            header = (message.id, message.command, message.size, message.flags, message.error)
            return header, body, received, bool(truncated)
        for one in received:
            os.close(one)
        if rc == END_OF_STREAM:
            raise EOFError("the client closed the connection")
        if rc == CUT_SHORT:
            raise ConnectionError("the client closed the connection within a message")
        raise OSError(-rc, os.strerror(-rc))

    def send(self, bytes head, bytes body=b"", fds=()):
        """Send one message; `fds` travel with its first byte.

        Raises
        ------
        OSError
            The peer is gone, or did not read for the socket's send time-out. The socket has been shut down.
        """
        cdef iovec parts[2]
        cdef int raw[CONNECTION_FDS]
        cdef int count = 0, rc
        for one in fds:
            if count == CONNECTION_FDS:
                raise ValueError(f"a message carries at most {CONNECTION_FDS} descriptors")
            raw[count] = one
            count += 1
        parts[0].iov_base = PyBytes_AS_STRING(head)
        parts[0].iov_len = len(head)
        parts[1].iov_base = PyBytes_AS_STRING(body)
        parts[1].iov_len = len(body)
        with nogil:
            rc = self.put(parts, raw, count)
        if rc:
            raise OSError(-rc, os.strerror(-rc))

    def shut_down(self):
        """End the connection both ways: whoever waits in `receive` or `send` returns."""
        shutdown(self.fd, SHUT_RDWR)

    cdef int next_message(self, connection_message *message, uint32_t *have, int *fds, int *count,
                          int *truncated) noexcept nogil:
        """Receive headers, serve plain accesses; DONE at the first message that is something else.

        `have` is how much of its body has been received too, behind the header.
        """
        cdef uint32_t body_size, reply_size = 0
        cdef iovec part
        cdef int rc
        while True:
            have[0] = 0
            rc = self.fill(<uint8_t *>message, HEADER_BYTES, fds, count, truncated)
            if rc != DONE:
                return rc
            if not self.fast or (message.command != REGION_READ and message.command != REGION_WRITE) \
                    or message.flags & TYPE_MASK or self.registers is None:
                return DONE
            body_size = message.size - HEADER_BYTES
            if message.command == REGION_READ:
                if body_size != ACCESS_BYTES:
                    return DONE
            elif body_size != ACCESS_BYTES + 4 and body_size != ACCESS_BYTES + 8:
                return DONE
            rc = self.fill(<uint8_t *>&message.offset, body_size, fds, count, truncated)
            if rc != DONE:
                return CUT_SHORT if rc == END_OF_STREAM else rc
            have[0] = body_size
            if count[0] or truncated[0]:
                return DONE
            if message.command == REGION_WRITE and body_size != ACCESS_BYTES + message.count:
                return DONE
            if not self.registers.answer(message, &reply_size):
                return DONE
            self.fast_accesses += 1
            if message.flags & NO_REPLY:
                continue
            message.size = reply_size
            message.flags = TYPE_REPLY
            message.error = 0
            part.iov_base = message
            part.iov_len = reply_size
            rc = self.put(&part, NULL, -1)
            if rc:
                return rc

    cdef int fill(self, uint8_t *buffer, size_t want, int *fds, int *count, int *truncated) noexcept nogil:
        """Receive exactly `want` bytes. Returns DONE, END_OF_STREAM, CUT_SHORT or a negative errno."""
        cdef size_t done = 0
        cdef ssize_t got
        while done < want:
            got = connection_take(self.fd, buffer + done, want - done, fds, count, truncated)
            if got > 0:
                done += <size_t>got
            elif got == 0:
                return CUT_SHORT if done else END_OF_STREAM
            elif errno != EINTR:
                return -errno
        return DONE

    cdef int put(self, iovec *parts, const int *fds, int count) noexcept nogil:
        """Send one message: two parts with `count` descriptors, or one part where `count` is -1. 0 or -errno."""
        cdef int n = 1 if count < 0 else 2
        cdef int first = 0
        cdef int left = 0 if count < 0 else count
        cdef ssize_t sent
        cdef int rc = 0
        pthread_mutex_lock(&self.sending)
        while first < n:
            sent = connection_put(self.fd, parts + first, n - first, fds, left)
            if sent < 0:
                if errno == EINTR:
                    continue
                rc = -errno
                shutdown(self.fd, SHUT_RDWR)
                break
            left = 0
            while first < n and <size_t>sent >= parts[first].iov_len:
                sent -= <ssize_t>parts[first].iov_len
                first += 1
            if first < n:
                parts[first].iov_base = <char *>parts[first].iov_base + sent
                parts[first].iov_len -= <size_t>sent
        pthread_mutex_unlock(&self.sending)
        return rc
