"""Which line of the program calls into the package: for error texts. Taken at every command, so it has to be quick."""

from cpython.object cimport PyObject
from libc.stdint cimport uint64_t


cdef extern from *:
    """
    typedef struct {
        uint64_t sequence;
        PyObject *code;
        int lasti;
    } maia_site_t;

    /* Whether a code object's file lies below the folder whose name, with its last slash, is `prefix`. */
    static inline int maia_is_below(PyCodeObject *code, PyObject *prefix) {
        PyObject *file = code->co_filename;
        Py_ssize_t length = PyUnicode_GET_LENGTH(prefix);
        return PyUnicode_KIND(file) == PyUnicode_KIND(prefix) && PyUnicode_GET_LENGTH(file) > length
            && memcmp(PyUnicode_DATA(file), PyUnicode_DATA(prefix), (size_t)length * PyUnicode_KIND(prefix)) == 0;
    }

    /* The innermost frame outside of the package: its code object and the byte offset of what it runs. */
    static inline void maia_note_site(maia_site_t *site, uint64_t sequence, PyObject *prefix) {
        PyFrameObject *frame = PyEval_GetFrame();
        Py_XINCREF(frame);
        site->sequence = 0;
        while (frame != NULL) {
            PyCodeObject *code = PyFrame_GetCode(frame);
            PyFrameObject *back;
            if (!maia_is_below(code, prefix)) {
                PyObject *before = site->code;
    #if PY_VERSION_HEX >= 0x030B0000
                site->lasti = PyFrame_GetLasti(frame);
    #else
                site->lasti = frame->f_lasti * 2;  /* counted in instructions */
    #endif
                site->code = (PyObject *)code;
                site->sequence = sequence;
                Py_XDECREF(before);
                Py_DECREF(frame);
                return;
            }
            back = PyFrame_GetBack(frame);
            Py_DECREF(code);
            Py_DECREF(frame);
            frame = back;
        }
    }
    """
    ctypedef struct site_t "maia_site_t":
        uint64_t sequence
        PyObject *code
        int lasti
    void note_site "maia_note_site"(site_t *site, uint64_t sequence, PyObject *prefix)
