"""The least that a transport accepts as DMA memory: a memfd, mapped."""

import ctypes
import mmap
import os


class Memory:
    """Plays no part of ``maia_rt``: ``maia_rt.memory.DmaRegion`` is tested by itself and with the emulator."""

    def __init__(self, size=4096, *, fd=True):
        self.fd = os.memfd_create("dma test") if fd else -1
        if fd:
            os.ftruncate(self.fd, size)
        self.bytes = mmap.mmap(self.fd, size)
        self.size = size
        self.offset = 0
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))

    def view(self):
        return memoryview(self.bytes)[self.offset:self.offset + self.size]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bytes.close()
        if self.fd >= 0:
            os.close(self.fd)
