# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, binding=False
"""Words that a device shares with us: each access is one load or one store of exactly its width, in program order.

Neither a memoryview nor ctypes promises that: both copy bytes, and leave it to the C library in how many pieces.
"""

import os
import weakref

from cpython.buffer cimport Py_buffer, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.number cimport PyNumber_Index
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from maia_rt.errors import ClosedError, ForkedError, InvalidArgument, Unsupported

# The barriers are those of Linux's readl and writel: what was stored before a register write is visible to a device
# that the write sets off, and nothing is loaded early that a register read has yet to announce. x86 keeps that order
# by itself as long as the compiler does; on Arm a device is an observer of the outer shareable domain.
cdef extern from *:
    """
    #include <stdint.h>

    #if defined(__aarch64__)
    #define MAIA_AFTER_LOAD()   __asm__ __volatile__("dmb oshld" ::: "memory")
    #define MAIA_BEFORE_STORE() __asm__ __volatile__("dmb osh" ::: "memory")
    #elif defined(__x86_64__)
    #define MAIA_AFTER_LOAD()   __asm__ __volatile__("" ::: "memory")
    #define MAIA_BEFORE_STORE() __asm__ __volatile__("" ::: "memory")
    #else
    #define MAIA_AFTER_LOAD()   __atomic_thread_fence(__ATOMIC_SEQ_CST)
    #define MAIA_BEFORE_STORE() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    #endif

    #define MAIA_WORD(bits) \\
    static inline uint##bits##_t maia_read##bits(const void *p) { \\
        uint##bits##_t value = *(const volatile uint##bits##_t *)p; \\
        MAIA_AFTER_LOAD(); \\
        return value; \\
    } \\
    static inline void maia_write##bits(void *p, uint##bits##_t value) { \\
        MAIA_BEFORE_STORE(); \\
        *(volatile uint##bits##_t *)p = value; \\
    }
    MAIA_WORD(8)
    MAIA_WORD(16)
    MAIA_WORD(32)
    MAIA_WORD(64)
    """
    uint8_t read8 "maia_read8"(const void *address) noexcept nogil
    uint16_t read16 "maia_read16"(const void *address) noexcept nogil
    uint32_t read32 "maia_read32"(const void *address) noexcept nogil
    uint64_t read64 "maia_read64"(const void *address) noexcept nogil
    void write8 "maia_write8"(void *address, uint8_t value) noexcept nogil
    void write16 "maia_write16"(void *address, uint16_t value) noexcept nogil
    void write32 "maia_write32"(void *address, uint32_t value) noexcept nogil
    void write64 "maia_write64"(void *address, uint64_t value) noexcept nogil

cdef enum:
    OPEN, CLOSED, FORKED

_live = weakref.WeakSet()


cdef class SharedWords:
    """Memory that a device reads or writes at the same time: a mapped BAR, a ring, a completion queue.

    Offsets are in bytes, values little endian (as PCI and both processors are) and unsigned. A read is an acquire, a
    write a release: a register write comes after every earlier store to memory, a read before every later load.

    Parameters
    ----------
    owner : buffer
        A memoryview of ``Transport.map`` or of a DMA block. It is held until :meth:`close`.
    name : str
        For error texts.

    Raises
    ------
    InvalidArgument
        From every access that is not aligned to its width or not within the memory, or whose value has more bits.
    Unsupported
        From writes to read-only memory.
    ClosedError, ForkedError
        After :meth:`close`; in a forked child, which does not have the memory.

    Examples
    --------
    >>> words = SharedWords(bytearray(16))
    >>> words.write32(4, 0x12345678)
    >>> hex(words.read16(6)), words.read64(8)
    ('0x1234', 0)
    >>> words.close()
    """

    cdef object __weakref__
    cdef Py_buffer view
    cdef uint8_t *base
    cdef Py_ssize_t size
    cdef int state
    cdef bint held
    cdef readonly str name

    def __cinit__(self, owner, str name="memory"):
        try:
            PyObject_GetBuffer(owner, &self.view, PyBUF_WRITABLE)
        except BufferError:
            PyObject_GetBuffer(owner, &self.view, PyBUF_SIMPLE)
        self.held = True
        self.base = <uint8_t *>self.view.buf
        self.size = self.view.len
        self.name = name
        if self.size and <uint64_t>self.base % 8:
            raise InvalidArgument(f"{name}: words need memory aligned to 8 bytes", cause="it is a slice that starts "
                                  "elsewhere", hint="slice at a multiple of 8")
        self.state = OPEN
        _live.add(self)

    def __dealloc__(self):
        # The memory is not touched: a forked child does not have it.
        if self.held:
            PyBuffer_Release(&self.view)

    def __len__(self):
        """How many bytes there are."""
        return self.size

    @property
    def writable(self):
        """Whether the memory can be written."""
        return not self.view.readonly

    @property
    def closed(self):
        """Whether close has been called."""
        return self.state == CLOSED

    def read8(self, offset):
        """Read one byte."""
        return read8(Words_at(self, offset, 1))

    def read16(self, offset):
        """Read 2 bytes at a multiple of 2."""
        return read16(Words_at(self, offset, 2))

    def read32(self, offset):
        """Read 4 bytes at a multiple of 4."""
        return read32(Words_at(self, offset, 4))

    def read64(self, offset):
        """Read 8 bytes at a multiple of 8."""
        return read64(Words_at(self, offset, 8))

    def write8(self, offset, value):
        """Write one byte."""
        cdef uint64_t bits = Words_value(self, value, 0xFF)
        write8(Words_to(self, offset, 1), <uint8_t>bits)

    def write16(self, offset, value):
        """Write 2 bytes at a multiple of 2."""
        cdef uint64_t bits = Words_value(self, value, 0xFFFF)
        write16(Words_to(self, offset, 2), <uint16_t>bits)

    def write32(self, offset, value):
        """Write 4 bytes at a multiple of 4."""
        cdef uint64_t bits = Words_value(self, value, 0xFFFFFFFF)
        write32(Words_to(self, offset, 4), <uint32_t>bits)

    def write64(self, offset, value):
        """Write 8 bytes at a multiple of 8."""
        cdef uint64_t bits = Words_value(self, value, 0xFFFFFFFFFFFFFFFF)
        write64(Words_to(self, offset, 8), bits)

    def close(self):
        """Let go of the memory; idempotent."""
        self.state = CLOSED
        if self.held:
            self.held = False
            PyBuffer_Release(&self.view)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __repr__(self):
        return f"<SharedWords {self.name}: {self.size} bytes{', closed' if self.state == CLOSED else ''}>"


cdef uint8_t *Words_at(SharedWords self, offset, Py_ssize_t width) except NULL:
    """Return where a word is, checked."""
    cdef Py_ssize_t at
    if self.state != OPEN:
        Words_refuse(self)
    number = PyNumber_Index(offset)
    try:
        at = number
    except OverflowError:
        at = -1
    if at < 0 or at > self.size - width:
        raise InvalidArgument(f"{self.name}: {width} bytes at {offset:#x} are not within its {self.size:#x} bytes")
    if at & (width - 1):
        raise InvalidArgument(f"{self.name}: {width} bytes at {offset:#x} are not aligned",
                              hint="access them at a multiple of their width, or in narrower pieces")
    return self.base + at


cdef uint8_t *Words_to(SharedWords self, offset, Py_ssize_t width) except NULL:
    cdef uint8_t *address = Words_at(self, offset, width)
    if self.view.readonly:
        raise Unsupported(f"{self.name}: the memory is read-only")
    return address


cdef uint64_t Words_value(SharedWords self, value, uint64_t most) except? 0:
    cdef uint64_t bits
    number = PyNumber_Index(value)
    try:
        bits = number
    except OverflowError:
        bits, most = 1, 0
    if bits > most:
        raise InvalidArgument(f"{self.name}: {value:#x} does not fit into the word")
    return bits


cdef int Words_refuse(SharedWords self) except -1:
    if self.state == FORKED:
        raise ForkedError(f"{self.name} was mapped before fork", hint="open the device anew in the child")
    raise ClosedError(f"{self.name} has been closed")


def _forget_in_child():
    cdef SharedWords words
    for words in list(_live):
        if words.state == OPEN:
            words.state = FORKED


os.register_at_fork(after_in_child=_forget_in_child)
