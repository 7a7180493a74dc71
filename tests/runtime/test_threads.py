"""Several threads at once, each with a stream, memory and a graph of its own, which wait for each other's streams.

``MAIA_MODEL_SEED`` repeats a run; its seed is in the text of a failure.
"""

import asyncio
import contextlib
import os
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from maia_rt import kernels
from maia_rt.contract import program
from maia_rt.contract.commands import Opcode
from maia_rt.errors import DeviceFault, OutOfQueues

ELEMENTS = 256
SIDE = 16
THREADS = 6
STEPS = 20 if "MAIA_TEST_DEVICE" in os.environ else 250
SEED = int(os.environ.get("MAIA_MODEL_SEED", "0")) or int.from_bytes(os.urandom(4), "little")
SECONDS = 60


class Worker:
    """One thread's things, and what its memory should hold."""

    def __init__(self, device, add, number):
        self.random = random.Random(SEED + number)
        self.device, self.add = device, add
        self.stream = device.create_stream(timeout=SECONDS)
        self.buffers = [device.allocate(ELEMENTS, np.float32) for _ in range(3)]
        self.model = np.zeros((3, ELEMENTS), np.float32)
        for buffer in self.buffers:
            self.stream.fill(buffer, 0)
        self.word = device.allocate_host(1, np.uint32)
        self.word.array[:] = 0
        self.called, self.calls = 0, 0
        with self.stream.capture() as capture:
            self.stream.launch(add, *self.buffers)
            self.stream.fill(self.buffers[0], 0)
        self.graph = capture.instantiate()
        self.others = []

    def run(self):
        steps = [getattr(self, name) for name in sorted(vars(Worker)) if name.startswith("step_")]
        for _ in range(STEPS):
            self.random.choice(steps)(*self.random.sample(range(3), 2))
        self.stream.synchronize()
        assert self.called == self.calls
        figures = self.stream.statistics()
        assert figures.submitted == figures.completed + figures.failed + figures.aborted
        for buffer, expected in zip(self.buffers, self.model, strict=True):
            assert (buffer.copy_to_host(self.stream) == expected).all()

    def close(self):
        for thing in (self.graph, self.stream, *self.buffers, self.word):
            thing.close()

    def step_fill(self, i, _):
        value = np.float32(self.random.randrange(1000))
        self.stream.fill(self.buffers[i], int(value.view(np.uint32)), 4)
        self.model[i] = value

    def step_copy(self, i, j):
        self.stream.copy(self.buffers[i], self.buffers[j])
        self.model[i] = self.model[j]

    def step_copy_checked(self, i, j):
        self.stream.copy(self.buffers[i], self.buffers[j], checksum=True)
        self.model[i] = self.model[j]

    def step_copy_strided(self, i, j):
        views = [buffer.view(np.float32, (SIDE, SIDE)) for buffer in self.buffers]
        planes = self.model.reshape(3, SIDE, SIDE)
        self.stream.copy(views[i][2:10, 1:16:3], views[j][4:12, 0:15:3])
        planes[i, 2:10, 1:16:3] = planes[j, 4:12, 0:15:3]

    def step_copy_from_program(self, i, _):
        array = np.array([self.random.randrange(1000) for _ in range(ELEMENTS)], np.float32)
        self.stream.copy(self.buffers[i], array)
        self.model[i] = array
        array[:] = -1  # the stream took it already

    def step_multicast(self, i, j):
        k = 3 - i - j
        self.stream.multicast([self.buffers[i], self.buffers[k]], self.buffers[j])
        self.model[[i, k]] = self.model[j]

    def step_launch(self, *_):
        self.stream.launch(self.add, *self.buffers)
        self.model[2] = self.model[0] + self.model[1]

    def step_graph(self, *_):
        self.graph.launch(self.stream)
        self.model[2] = self.model[0] + self.model[1]
        self.model[0] = 0

    def step_call(self, *_):
        def count():
            self.called += 1

        try:
            self.stream.call(count)
        except OutOfQueues:  # where others wait so too
            return
        self.calls += 1

    def step_wait_value(self, *_):
        value = int(self.word.array[0]) + 1
        try:
            self.stream.wait_value(self.word, value)
        except OutOfQueues:
            return
        self.word.array[0] = value

    def step_allocate(self, i, j):
        between = self.stream.allocate(ELEMENTS, np.float32)
        self.stream.copy(between, self.buffers[i])
        self.stream.copy(self.buffers[j], between)
        self.stream.free(between)
        self.model[j] = self.model[i]

    def step_await(self, *_):
        async def event():
            await self.stream.record()

        asyncio.run(event())

    def step_event(self, *_):
        self.stream.record(timing=True).synchronize()

    def step_fail(self, *_):
        if self.random.random() < 0.2:
            self.stream._submit(int(Opcode.TRAP), payload=(7, 0, 0))
            with pytest.raises(DeviceFault):
                self.stream.synchronize()
            self.stream.recover()

    def step_wait_for_another(self, *_):
        with contextlib.suppress(OutOfQueues):
            self.stream.wait(self.random.choice(self.others).stream)

    def step_synchronize_another(self, *_):
        with contextlib.suppress(DeviceFault):
            self.random.choice(self.others).stream.synchronize()

    def step_look(self, i, _):
        found = np.empty(ELEMENTS, np.float32)
        self.stream.copy(found, self.buffers[i])
        self.stream.synchronize()
        assert (found == self.model[i]).all()


@pytest.mark.parametrize("queues", ["of their own", "shared"])
def test_threads_with_a_stream_each_do_not_disturb_each_other(request, queues):
    device = request.getfixturevalue("crowded" if queues == "shared" else "attached")
    image = program.write([kernels.add(device.capabilities.program, ELEMENTS)])
    with device.load(image) as loaded, ThreadPoolExecutor(THREADS) as pool:
        workers = [Worker(device, loaded["add"], number) for number in range(THREADS)]
        for worker in workers:
            worker.others = [other for other in workers if other is not worker]
        try:
            for future in [pool.submit(worker.run) for worker in workers]:
                future.result()
        except Exception as error:
            raise AssertionError(f"MAIA_MODEL_SEED={SEED}") from error
        finally:
            for worker in workers:
                worker.close()
