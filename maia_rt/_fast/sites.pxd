"""Which line of the program calls into the package: for error texts. See csrc/site.h."""

from cpython.object cimport PyObject
from libc.stdint cimport uint64_t


cdef extern from "site.h":
    ctypedef struct site_t "maia_site_t":
        uint64_t sequence
        PyObject *code
        int lasti
    void note_site "maia_note_site"(site_t *site, uint64_t sequence, PyObject *prefix)
