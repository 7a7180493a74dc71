"""The emulator's engine in this process, with host memory and a queue, driven by hand-encoded commands.

No driver of ours lies between: what the tests write is what the contract says.
"""

import mmap
import os
import time

import numpy as np
from maia_emulator.engine import Engine

from maia_rt.contract import commands as c

HOST = 0x10_0000
HOST_BYTES = 16 << 20
HBM = 1 << 48
QUEUE_AREA = 1 << 20
"""Bytes of host memory that each queue's rings take, from the start; data goes above 8 MiB."""
DATA = 8 << 20


class BareEngine:
    """An engine and the host's side of it."""

    def __init__(self, **options):
        shape = {"clusters": 2, "tiles_per_cluster": 2, "tile_sram_bytes": 1 << 20, "cluster_sram_bytes": 1 << 20,
                 "hbm_bytes": 64 << 20, "max_queues": 8, "semaphores": 64, "vectors": 9}
        self.engine = Engine(**(shape | options))
        self.engine.start()
        self.fd = os.memfd_create("host", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, HOST_BYTES)
        self.map = mmap.mmap(self.fd, HOST_BYTES)
        self.host = np.frombuffer(self.map, np.uint8)
        self.bar2_map = mmap.mmap(self.engine.bar2_fd, self.engine.bar2_bytes)
        self.bar2 = np.frombuffer(self.bar2_map, np.uint32)
        first = self.engine.semaphore_window_offset // 4
        self.semaphores = self.bar2[first:]
        self.engine.dma_map(HOST, HOST_BYTES, self.fd, 0, 3)
        self.queues = []

    def queue(self, **options):
        queue = BareQueue(self, len(self.queues), **options)
        self.queues.append(queue)
        return queue

    def address(self, offset):
        return HOST + offset

    def list(self, *rows, at=DATA):
        """Write a list of commands to host memory; returns the fields that an INDIRECT of them has."""
        raw = b"".join(row.tobytes() for row in rows)
        self.host[at : at + len(raw)] = np.frombuffer(raw, np.uint8)
        return {"list": self.address(at), "count": len(rows)}

    def word(self, offset):
        """A 32-bit word of host memory, to read and to write."""
        return self.host[offset : offset + 4].view(np.uint32)

    def close(self):
        self.engine.stop()
        self.engine = None
        for queue in self.queues:
            queue.ring = queue.block = queue.reports = queue.page = None
        self.host = self.bar2 = self.semaphores = None
        self.map.close()
        self.bar2_map.close()
        os.close(self.fd)


class BareQueue:
    """A queue written and read by hand."""

    def __init__(self, bare, number, *, entries_log2=6, reports_log2=6, initial=2**32 - 3, vector=c.NO_VECTOR,
                 context=0, priority=0, doorbell=False):
        self.bare = bare
        base = number * QUEUE_AREA
        params = np.zeros((), c.CREATE_QUEUE)
        params["ring"], params["progress"] = HOST + base, HOST + base + 0x80000
        params["reports"], params["initial"] = HOST + base + 0xC0000, initial
        params["entries_log2"], params["reports_log2"] = entries_log2, reports_log2
        params["vector"], params["queue"], params["context"] = vector, c.ANY_QUEUE, context
        params["priority"] = priority
        params["doorbell"] = HOST + base + 0xE0000 if doorbell else 0
        self.id = bare.engine.create_queue(params.tobytes())
        self.entries = 1 << entries_log2
        self.ring = bare.host[base : base + 64 * self.entries].view(c.COMMAND)
        self.block = bare.host[base + 0x80000 : base + 0x80040].view(c.PROGRESS)
        self.reports = bare.host[base + 0xC0000 : base + 0xC0000 + (32 << reports_log2)].view(c.REPORT)
        self.page = bare.bar2[self.id * 1024 : self.id * 1024 + 1024]
        if doorbell:
            self.page = bare.host[base + 0xE0000 : base + 0xE1000].view(np.uint32)
        self.index = initial

    @property
    def progress(self):
        return int(self.block["progress"][0])

    @property
    def stopped(self):
        return int(self.block["state"][0]) == c.QueueState.STOPPED

    def put(self, dtype, opcode, *, ring=True, **fields):
        """Write a command, and ring the doorbell unless told not to; returns its sequence."""
        row = command(dtype, opcode, **fields)
        if "sequence" not in fields:
            row["sequence"] = (self.index + 1) & 0xFFFF
        self.ring[self.index % self.entries] = row.view(c.COMMAND)
        self.index += 1
        if ring:
            self.doorbell(self.index)
        return self.index

    def doorbell(self, tail):
        self.page[0] = tail & 0xFFFFFFFF
        if self.page[0x10]:
            self.bare.engine.wake()

    def wait(self, sequence=None, seconds=10.0):
        """Wait until a command (the last) has retired or the queue has stopped; returns the fault code."""
        sequence = self.index if sequence is None else sequence
        until(lambda: self.progress >= sequence or self.stopped, seconds)
        return int(self.block["fault"][0])

    def reset(self, initial=0):
        self.bare.engine.reset_queue(self.id, initial)
        self.index = initial


def command(dtype, opcode, **fields):
    row = np.zeros((), dtype)
    row["opcode"] = opcode
    for name, value in fields.items():
        if name in ("pre", "post"):
            for slot, (index, op, operand) in enumerate(value):
                row[name][slot] = (index, op, 0, operand)
        else:
            row[name] = value
    return row


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("it did not happen in time")
        time.sleep(0.0002)
