from libc.stdint cimport uint64_t


cdef class Extent:
    cdef public uint64_t _address
    cdef public Extent _parent
    cdef public bint _closed
    cdef public set _fits
    cdef public uint64_t _run
    cdef public bint readonly
    cdef public object device
