# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, binding=False
"""Host memory by address: where the bytes of a Python object are, and copies from one address to another."""

from cpython.buffer cimport (
    Py_buffer, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from libc.stdint cimport uint64_t
from libc.string cimport memcpy

cdef enum:
    KEEP_GIL = 16384  # bytes that are copied faster than the GIL changes hands


cdef class HostMemory:
    """The contiguous bytes of an object, which stay where they are as long as this lives.

    Parameters
    ----------
    owner : buffer
    writable : bool

    Attributes
    ----------
    address, nbytes : int

    Raises
    ------
    TypeError, ValueError, BufferError
        The object has no buffer, or one that is not contiguous or not writable.
    """

    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, owner, bint writable=False):
        PyObject_GetBuffer(owner, &self.view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    def __getbuffer__(self, Py_buffer *view, int flags):
        # The memory as bytes; this object keeps it.
        PyBuffer_FillInfo(view, self, self.view.buf, self.view.len, self.view.readonly, flags)

    @property
    def address(self):
        """The address of the first byte."""
        return <uint64_t>self.view.buf

    @property
    def nbytes(self):
        """How many bytes there are."""
        return self.view.len

    def copy_to(self, uint64_t address, Py_ssize_t start, Py_ssize_t size):
        """Copy `size` bytes from `start` on to an address, which the caller answers for."""
        Host_check(self, start, size)
        Host_copy(<void *>address, <char *>self.view.buf + start, size)

    def copy_from(self, uint64_t address, Py_ssize_t start, Py_ssize_t size):
        """Copy `size` bytes from an address, which the caller answers for, to `start`."""
        Host_check(self, start, size)
        if self.view.readonly:
            raise ValueError("the memory is read-only")
        Host_copy(<char *>self.view.buf + start, <const void *>address, size)

    def tobytes(self):
        """Return a copy of the bytes."""
        return (<char *>self.view.buf)[:self.view.len]


cdef int Host_check(HostMemory self, Py_ssize_t start, Py_ssize_t size) except -1:
    if start < 0 or size < 0 or start + size > self.view.len:
        raise IndexError(f"{size} bytes at {start} of {self.view.len}")
    return 0


cdef void Host_copy(void *dst, const void *src, Py_ssize_t size) noexcept:
    if size <= KEEP_GIL:
        memcpy(dst, src, size)
    else:
        with nogil:
            memcpy(dst, src, size)
