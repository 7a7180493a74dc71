/* Which line of the program calls into the package. Taken at every command, so it has to be quick. */

#ifndef MAIA_SITE_H
#define MAIA_SITE_H

#include <Python.h>
#include <stdint.h>

typedef struct {
    uint64_t sequence;
    PyObject *code; /* owned */
    int lasti;      /* byte offset of what it runs */
} maia_site_t;

/* Note the innermost frame whose code is not below the folder `prefix` (with its last slash). The GIL is held. */
void maia_note_site(maia_site_t *site, uint64_t sequence, PyObject *prefix);

#endif
