#include "site.h"

#include <string.h>

/*
 * The public way to the callers makes an object of every frame on the way: 100 ns each. So for the versions of CPython
 * whose frames are known they are read as they are, as debuggers do; for all others the public way stands below.
 */
#if !defined(PYPY_VERSION) && !defined(Py_GIL_DISABLED) && PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030E0000
#define MAIA_BARE_FRAMES 1
#define Py_BUILD_CORE 1
#include "internal/pycore_frame.h"
#elif PY_VERSION_HEX < 0x030B0000
#include <frameobject.h>    /* not of Python.h there */
#endif

static int is_below(PyCodeObject *code, PyObject *prefix)
{
    PyObject *file = code->co_filename;
    Py_ssize_t length = PyUnicode_GET_LENGTH(prefix);
    return PyUnicode_KIND(file) == PyUnicode_KIND(prefix) && PyUnicode_GET_LENGTH(file) > length
        && memcmp(PyUnicode_DATA(file), PyUnicode_DATA(prefix), (size_t)length * PyUnicode_KIND(prefix)) == 0;
}

/* Takes over a reference to the code. */
static void keep(maia_site_t *site, uint64_t sequence, PyCodeObject *code, int lasti)
{
    PyObject *before = site->code;
    site->code = (PyObject *)code;
    site->lasti = lasti;
    site->sequence = sequence;
    Py_XDECREF(before);
}

#ifdef MAIA_BARE_FRAMES

void maia_note_site(maia_site_t *site, uint64_t sequence, PyObject *prefix)
{
#if PY_VERSION_HEX < 0x030D0000
    _PyInterpreterFrame *frame = PyThreadState_Get()->cframe->current_frame;
#else
    _PyInterpreterFrame *frame = PyThreadState_Get()->current_frame;
#endif
    site->sequence = 0;
    for (; frame != NULL; frame = frame->previous) {
#if PY_VERSION_HEX < 0x030D0000
        PyCodeObject *code = frame->f_code;
#else
        PyCodeObject *code = (PyCodeObject *)frame->f_executable;
#endif
#if PY_VERSION_HEX >= 0x030C0000
        if (frame->owner == FRAME_OWNED_BY_CSTACK) /* a call from C into Python, no code of anybody's */
            continue;
#endif
        if (!PyCode_Check(code) || is_below(code, prefix))
            continue;
        Py_INCREF(code);
        keep(site, sequence, code, _PyInterpreterFrame_LASTI(frame) * (int)sizeof(_Py_CODEUNIT));
        return;
    }
}

#else

void maia_note_site(maia_site_t *site, uint64_t sequence, PyObject *prefix)
{
    PyFrameObject *frame = PyEval_GetFrame();
    Py_XINCREF(frame);
    site->sequence = 0;
    while (frame != NULL) {
        PyCodeObject *code = PyFrame_GetCode(frame);
        PyFrameObject *back;
        if (!is_below(code, prefix)) {
#if PY_VERSION_HEX >= 0x030B0000
            keep(site, sequence, code, PyFrame_GetLasti(frame));
#else
            keep(site, sequence, code, frame->f_lasti * 2); /* counted in instructions */
#endif
            Py_DECREF(frame);
            return;
        }
        back = PyFrame_GetBack(frame);
        Py_DECREF(code);
        Py_DECREF(frame);
        frame = back;
    }
}

#endif
