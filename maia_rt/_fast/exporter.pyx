# cython: language_level=3, boundscheck=False, wraparound=False, binding=False
"""The buffer protocol for a Python class, on every version of Python: before 3.12 only an extension can serve it."""

from cpython.buffer cimport Py_buffer, PyObject_GetBuffer
from cpython.ref cimport Py_DECREF
from libc.string cimport memcpy

from maia_rt._fast.extent cimport Extent


cdef class BufferExporter(Extent):
    """A base class of memory: whoever asks for the buffer gets that of attribute ``array``.

    Raises
    ------
    BufferError
        The array has none: its dtype is one that the protocol cannot name, such as bfloat16.
    """

    def __getbuffer__(self, Py_buffer *view, int flags):
        cdef Py_buffer found
        array = self.array
        try:
            PyObject_GetBuffer(array, &found, flags)
        except ValueError as error:
            raise BufferError(f"{error}") from None
        # Cython has put None there, with a reference. The array's buffer is passed on whole, and released by the array.
        Py_DECREF(None)
        memcpy(view, &found, sizeof(Py_buffer))
