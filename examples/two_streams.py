"""Two streams side by side: one brings data, the other computes, and an event keeps them in order on the device."""

import numpy as np

import maia_rt
from maia_rt import kernels
from maia_rt.contract import program

ROUNDS, SIZE = 8, 1 << 18
rng = np.random.default_rng(0)
inputs = [rng.standard_normal(SIZE, np.float32) for _ in range(ROUNDS)]

with maia_rt.open() as device, device.create_stream() as copies, device.create_stream() as compute:
    gelu = device.load(program.write([kernels.gelu(device.capabilities.program, SIZE)]))["gelu"]
    # Pinned memory: the device reads and writes it by itself, so that a copy is one command and returns at once.
    hosts = [device.allocate_host(SIZE, np.float32) for _ in range(2)]
    arrived = [device.allocate(SIZE, np.float32) for _ in range(2)]
    results = [device.allocate(SIZE, np.float32) for _ in range(ROUNDS)]
    copied, computed = [device.create_event() for _ in range(2)], [device.create_event() for _ in range(2)]
    for number, values in enumerate(inputs):
        turn = number % 2
        copied[turn].synchronize()  # the copy that used this pinned memory two rounds ago
        hosts[turn].array[:] = values
        copies.wait(computed[turn])  # on the device: until the launch that read this buffer is done
        copies.copy(arrived[turn], hosts[turn])
        copies.record(copied[turn])
        compute.wait(copied[turn])
        compute.launch(gelu, arrived[turn], results[number])
        compute.record(computed[turn])
    outputs = [result.copy_to_host(compute) for result in results]
    print(f"{ROUNDS} rounds, {device.counters()['vector_elements']:,} elements, "
          f"{device.counters()['interrupts']} interrupts")

assert all(np.all(np.abs(y - x) <= 0.17 + np.abs(np.minimum(x, 0))) for x, y in zip(inputs, outputs, strict=True))
