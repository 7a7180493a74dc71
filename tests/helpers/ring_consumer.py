"""The device's end of one ring, in plain Python: enough to test the ring before and without a device.

It follows the contract's order of reads and writes and shares no code with the emulator.
"""

import mmap
import os
import struct
import threading
import time

from maia_rt._fast.ring import ARG_SLOT_BYTES, Ring

TAIL, REPORT_HEAD, ARM, NEEDS_WAKE = 0x00, 0x08, 0x10, 0x40


class RingConsumer:
    def __init__(self, entries=8, initial=0, **options):
        self.entries = entries
        self.memory = {name: mmap.mmap(-1, size) for name, size in
                       (("ring", entries * 64), ("progress", 4096), ("reports", entries * 64), ("doorbell", 4096),
                        ("args", entries * ARG_SLOT_BYTES))}
        self.index = initial
        self.report_tail = 0
        self.armed = 0
        self.seen = []
        self.batches = 0
        self.wakes = 0
        self.queue_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._put("progress", 0, "<Q", initial)
        self._put("doorbell", TAIL, "<I", initial & 0xFFFFFFFF)
        self._thread = None
        self._stop = threading.Event()
        views = {name: memoryview(m) for name, m in self.memory.items()}
        self.ring = Ring(views["ring"][: entries * 64], views["progress"], views["reports"][: entries * 64],
                         views["doorbell"], views["args"], 0x10000, initial=initial, queue_fd=self.queue_fd, **options)

    def _put(self, name, offset, code, value):
        struct.pack_into(code, self.memory[name], offset, value)

    def _get(self, name, offset, code):
        return struct.unpack_from(code, self.memory[name], offset)[0]

    @property
    def tail(self):
        return self._get("doorbell", TAIL, "<I")

    @property
    def pending(self):
        return (self.tail - self.index) & 0xFFFFFFFF

    def step(self, count=1):
        """Retire `count` commands."""
        for _ in range(count):
            assert self.pending
            raw = self.memory["ring"][(self.index % self.entries) * 64:][:64]
            self.index += 1
            assert struct.unpack_from("<H", raw, 2)[0] == self.index & 0xFFFF, "an old command in the slot"
            self.seen.append(raw)
            if raw[1] & 2:
                assert (self.report_tail - self._get("doorbell", REPORT_HEAD, "<I")) & 0xFFFFFFFF < 2 * self.entries
                struct.pack_into("<QQQII", self.memory["reports"], self.report_tail % (2 * self.entries) * 32,
                                 self.index, 100 * self.index, 100 * self.index + 7, 0, 0)
                self.report_tail = (self.report_tail + 1) & 0xFFFFFFFF
                self._put("progress", 24, "<I", self.report_tail)
            self._put("progress", 0, "<Q", self.index)
        self.check_arm()

    def check_arm(self):
        arm = self._get("doorbell", ARM, "<Q")
        if arm and arm != self.armed and self.index >= arm:
            self.armed = arm
            os.eventfd_write(self.queue_fd, 1)

    def fault(self, code=4):
        """Stop the queue at the next command."""
        self._put("progress", 12, "<I", code)
        self._put("progress", 16, "<Q", self.index + 1)
        self._put("progress", 8, "<I", 1)

    def sleep(self, asleep=True):
        self._put("doorbell", NEEDS_WAKE, "<I", int(asleep))

    def start(self):
        """Retire whatever comes, in a thread."""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._stop.is_set():
            if self.pending:
                self.batches += 1
                self.step(self.pending)
            else:
                self.check_arm()
                time.sleep(0.0002)

    def close(self):
        self._stop.set()
        if self._thread:
            self._thread.join()
        self.ring.close()
        os.close(self.queue_fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
