"""Capture two streams into a graph, replay it, and print when each node ran."""

import numpy as np

import maia_rt

with maia_rt.open() as device, device.create_stream() as stream, device.create_stream() as other, \
        device.allocate_host((2, 1 << 16), np.float32) as given, device.allocate((2, 1 << 16), np.float32) as x, \
        device.allocate_host((2, 1 << 16), np.float32) as taken:
    with stream.capture() as capture:
        fork = stream.record()
        other.wait(fork)
        for number, each in enumerate((stream, other)):
            each.copy(x[number], given[number])
            each.copy(taken[number], x[number])
        stream.wait(other.record())
    with capture.instantiate() as graph:
        for value in range(3):
            given.array[:] = value
            graph.launch(stream)
            stream.synchronize()
            assert (taken.array == value).all()
        for time in graph.times():
            print(f"{time.duration_ns:8} ns  {time.node.name}")
