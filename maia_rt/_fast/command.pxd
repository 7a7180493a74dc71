from maia_rt._fast.commands cimport command_t


cdef class Command:
    cdef command_t raw
