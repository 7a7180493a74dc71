"""One neighbour, in a process of its own: ``python -m maia_tools.bench.neighbour NAME``.

Prints what it has as a JSON list of pairs, a name and what of ours does like work; nothing where it is not installed.
Then, for each number on stdin, runs that item once and prints how many nanoseconds each of its operations took.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import platform
import struct
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

SMALL, LARGE = 4096, 64 << 20
Item = tuple[str, str, int, Callable[[], object]]
"""A name, the name of what of ours does like work, how often the call does it, and the call."""


def _serve(items: Sequence[Item]) -> None:
    for _, _, _, call in items:
        call()
    print(json.dumps([(name, ours) for name, ours, _, _ in items]), flush=True)
    for line in sys.stdin:
        _, _, count, call = items[int(line)]
        begin = time.perf_counter_ns()
        call()
        print((time.perf_counter_ns() - begin) / count, flush=True)


def _repeat(count: int, once: Callable[[], object], after: Callable[[], object] = lambda: None) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            once()
        after()
    return run


class Uring:
    """io_uring by its system calls: NOPs, whose entries are written once, for all of them are the same."""

    ENTRIES = 64
    _SETUP, _ENTER, _GETEVENTS = 425, 426, 1

    def __init__(self) -> None:
        self._call = ctypes.CDLL(None, use_errno=True).syscall
        parameters = ctypes.create_string_buffer(120)
        self._fd = self._call(self._SETUP, self.ENTRIES, parameters)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "io_uring_setup")
        sq, cq = struct.unpack_from("<8I", parameters, 40), struct.unpack_from("<8I", parameters, 80)
        size = max(sq[6] + 4 * self.ENTRIES, cq[5] + 16 * 2 * self.ENTRIES)
        self._rings = mmap.mmap(self._fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=0)
        words = memoryview(self._rings).cast("I")
        for index in range(self.ENTRIES):
            words[sq[6] // 4 + index] = index
        self._words, self._tail, self._head, self._done = words, sq[1] // 4, cq[0] // 4, cq[1] // 4

    def nops(self, count: int) -> None:
        """Submit so many, and wait for them."""
        words = self._words
        words[self._tail] = (words[self._tail] + count) & 0xFFFFFFFF
        if self._call(self._ENTER, self._fd, count, count, self._GETEVENTS, None, 0) != count:
            raise OSError(ctypes.get_errno(), "io_uring_enter")
        words[self._head] = words[self._done]


def _io_uring() -> list[Item]:
    if platform.machine() != "x86_64":
        raise ImportError("system calls of another machine")
    ring = Uring()
    return [(f"io_uring: {count} NOP{'s' if count > 1 else ''} and wait, by ctypes, each", ours, 100 * count,
             _repeat(100, lambda count=count: ring.nops(count)))
            for count, ours in ((1, "submit and wait, NOP"), (32, "submit, numpy batch of 32"))]


def _pyopencl() -> list[Item]:
    import pyopencl as cl

    device = next(p for p in cl.get_platforms() if "ortable" in p.name).get_devices()[0]
    context = cl.Context([device])
    queue = cl.CommandQueue(context)
    program = cl.Program(context, "__kernel void e() {} __kernel void f(__global int *p, int v) "
                                  "{ if (get_global_id(0) == 0) p[0] = v; }").build()
    empty, two = cl.Kernel(program, "e"), cl.Kernel(program, "f")
    flags = cl.mem_flags.READ_WRITE
    small, large = cl.Buffer(context, flags, SMALL), cl.Buffer(context, flags, LARGE)
    few, many = np.ones(SMALL, np.uint8), np.ones(LARGE, np.uint8)
    value = np.int32(1)

    def enqueue() -> None:
        cl.enqueue_nd_range_kernel(queue, empty, (1,), (1,))

    def wait() -> None:
        enqueue()
        queue.finish()

    who = "PyOpenCL on PoCL"
    return [
        (f"{who}: empty kernel and wait", "launch, 0 arguments, and wait", 50, _repeat(50, wait)),
        (f"{who}: empty kernel, of 200", "launch, 0 arguments", 200, _repeat(200, enqueue, queue.finish)),
        (f"{who}: kernel of 2 arguments, of 200", "launch, 2 arguments", 200,
         _repeat(200, lambda: two(queue, (1,), (1,), small, value), queue.finish)),
        (f"{who}: write 4 KiB", "copy 4 KiB host to device, plain (staged)", 50,
         _repeat(50, lambda: cl.enqueue_copy(queue, small, few, is_blocking=True))),
        (f"{who}: write 64 MiB", "copy 64 MiB host to device, plain (staged)", 1,
         lambda: cl.enqueue_copy(queue, large, many, is_blocking=True)),
        (f"{who}: read 64 MiB", "copy 64 MiB device to host, plain (staged)", 1,
         lambda: cl.enqueue_copy(queue, many, large, is_blocking=True)),
    ]


def _tinygrad() -> list[Item]:
    from tinygrad import Device, Tensor, TinyJit

    device = Device["CPU"]
    start = Tensor([1.0] * 4, device="CPU").realize()

    def replay(count: int) -> Callable[[], None]:
        @TinyJit
        def chain(x: Tensor) -> Tensor:
            for _ in range(count):
                x = (x + 1).contiguous()
            return x.realize()

        for _ in range(4):
            chain(start)
        device.synchronize()
        return _repeat(5, lambda: (chain(start), device.synchronize()))

    return [(f"tinygrad: TinyJit of {count} kernels and wait", f"graph of {count} nodes, launch and wait", 5,
             replay(count)) for count in (1, 10, 100)]


def _torch() -> list[Item]:
    import torch

    torch.set_num_threads(1)
    one, other, third = torch.ones(1), torch.ones(1), torch.ones(1)
    source, target = torch.ones(LARGE, dtype=torch.uint8), torch.ones(LARGE, dtype=torch.uint8)
    return [
        ("PyTorch: add(out=) of one element", "launch, 4 arguments", 1000,
         _repeat(1000, lambda: torch.add(one, other, out=third))),
        ("PyTorch: copy_ of 64 MiB", "copy 64 MiB host to device, pinned (direct)", 1, lambda: target.copy_(source)),
    ]


def _main(name: str) -> None:
    warnings.simplefilter("ignore")
    try:
        items = {"io_uring": _io_uring, "pyopencl": _pyopencl, "tinygrad": _tinygrad, "torch": _torch}[name]()
    except (ImportError, OSError, StopIteration):  # not there, or what it needs is not
        return
    with suppress(KeyboardInterrupt):
        _serve(items)


if __name__ == "__main__":
    _main(sys.argv[1])
