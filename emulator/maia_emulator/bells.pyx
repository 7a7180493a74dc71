"""Bells: how a device that sleeps is woken, by its driver, by its tiles and by peers, in this process or another.

The files behind BAR 2 and BAR 4 are a page longer than the BARs. That page names the device, and behind BAR 2 it holds
the word that the device's thread sleeps on. A peer has both files mapped, because its driver gave them to it as
memory for DMA; so a device that writes to a peer's semaphores or HBM can tell whether that peer sleeps and waits for
such a thing, and wake it with one system call. Drivers know nothing of this, and the contract says nothing: hardware
needs no bells.

    sleeper                                     writer
    seen = rings; wants = what it waits for     store the semaphore, or the bytes
    full fence                                  full fence
    look at every queue once more               wants has it? clear that, rings += 1, wake
    sleep while rings = seen

A client may write what it likes into its own device's bell, or send us a file that looks like one: it oversleeps, or we
ring where nobody listens.
"""

import os
import struct

from libc.stdint cimport uint32_t

from maia_emulator.support cimport add32, and32, full_fence, load32

cdef extern from "futex.h" nogil:
    void futex_wake(uint32_t *word)

HEAD = struct.Struct("<Q16sI")
MAGIC = 0x6c6c65622061696d     # "mia bell"


def imprint(fd, size_t size, int part, bytes id not None):
    """Write a bell's head into the page behind the first ``size`` bytes of a file, which must be that long."""
    os.pwrite(fd, HEAD.pack(MAGIC, id, part), size)


def recognise(fd, size_t size):
    """Which part of a device a file of ``size`` bytes is: 0 none."""
    if size <= BELL_BYTES:
        return 0
    raw = os.pread(fd, HEAD.size, size - <size_t> BELL_BYTES)
    if len(raw) < HEAD.size:
        return 0
    magic, _, part = HEAD.unpack(raw)
    return part if magic == MAGIC and part in (PART_DOORBELLS, PART_HBM) else 0


cdef void ring(bell_t *bell, uint32_t part) noexcept nogil:
    """After a store to that part of a device: wake it if it sleeps and waits for one."""
    full_fence()
    # Cleared first, so that of many stores one pays for the wake; whoever sleeps anew since is woken by it too.
    if load32(&bell.wants) & part and and32(&bell.wants, ~part) & part:
        rouse(bell)


cdef void rouse(bell_t *bell) noexcept nogil:
    """Wake a device, or keep it from going to sleep."""
    add32(&bell.rings, 1)
    futex_wake(&bell.rings)
