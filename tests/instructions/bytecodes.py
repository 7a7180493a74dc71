"""What the runtime's calls cost in Python: the bytecode instructions of our own modules, counted by the interpreter.

On a device, since they need one. It runs by itself, so nothing that it does meanwhile is counted.
"""

import gc
import json
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import maia_rt
from maia_rt.contract.program import ArgKind, Dtype
from maia_rt.contract.program import write as write_program
from maia_rt.kernels.builder import KernelBuilder

OURS = str(Path(maia_rt.__file__).parent)
TRANSPORT = f"{OURS}/transport/"
"""Not counted: whoever finds the device asleep wakes it, and whether it is asleep is chance."""
REPEATS = 5
NODES = 10


def kernel_of(stack, device, count):
    """A kernel of so many arguments that does next to nothing, and its arguments."""
    builder = KernelBuilder(f"of_{count}", device.capabilities.program)
    for number in range(count):
        builder.argument(f"x{number}", ArgKind.IN, Dtype.FP32, (16,))
    tile = builder.tile(0)
    tile.fill(tile.allocate((16,), Dtype.FP32), 0)
    program = stack.enter_context(device.load(write_program([builder.build()])))
    return program[f"of_{count}"], [stack.enter_context(device.allocate(16, np.float32)) for _ in range(count)]


def paths(stack, device):
    """The calls by name."""
    stream, other = (stack.enter_context(device.create_stream()) for _ in range(2))
    here, there = (stack.enter_context(device.allocate(64)) for _ in range(2))
    pinned = stack.enter_context(device.allocate_host(64))
    far = stack.enter_context(stack.enter_context(maia_rt.open("emulated")).allocate(64))
    stream.copy(far, here)
    semaphore = stack.enter_context(device.create_semaphore())
    event = stream.record()
    with stream.capture() as capture:
        for number in range(NODES):
            stream.write_value(here, number)
    graph = stack.enter_context(capture.instantiate())
    found = {
        "copy, device to device": lambda: stream.copy(there, here),
        "copy, device to peer": lambda: stream.copy(far, here),
        "copy, pinned memory to device": lambda: stream.copy(here, pinned),
        "fill": lambda: stream.fill(here, 0),
        "record an event": lambda: stream.record(event),
        "wait for an event of another stream": lambda: other.wait(event),
        "signal a semaphore": lambda: stream.signal(semaphore),
        "ask an event": event.query,
        "ask a stream": stream.query,
        "synchronize a stream that is done": stream.synchronize,
        f"launch a graph of {NODES} nodes": lambda: graph.launch(stream),
    }
    for count in (0, 4, 16):
        kernel, arguments = kernel_of(stack, device, count)
        found[f"launch, {count} arguments"] = (
            lambda kernel=kernel, arguments=arguments: stream.launch(kernel, *arguments))
    return found, (stream, other)


def is_ours(code):
    """Whether a function's bytecodes count."""
    return code.co_filename.startswith(OURS) and not code.co_filename.startswith(TRANSPORT)


def bytecodes(call):
    """How many of our bytecode instructions a call executes in this thread."""
    return (_monitored if sys.version_info >= (3, 12) else _traced)(call)


def _monitored(call):
    monitoring, thread = sys.monitoring, threading.get_ident()
    total = 0

    def executed(code, _offset):
        nonlocal total
        total += is_ours(code) and threading.get_ident() == thread

    monitoring.use_tool_id(monitoring.PROFILER_ID, "instructions")
    monitoring.register_callback(monitoring.PROFILER_ID, monitoring.events.INSTRUCTION, executed)
    monitoring.set_events(monitoring.PROFILER_ID, monitoring.events.INSTRUCTION)
    try:
        call()
    finally:
        monitoring.set_events(monitoring.PROFILER_ID, 0)
        monitoring.free_tool_id(monitoring.PROFILER_ID)
    return total


def _traced(call):
    total = 0

    def step(_frame, what, _argument):
        nonlocal total
        total += what == "opcode"
        return step

    def enter(frame, _what, _argument):
        if not is_ours(frame.f_code):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return step

    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(None)
    return total


def main():
    """Print the counts as JSON."""
    found = {}
    with ExitStack() as stack:
        calls, streams = paths(stack, stack.enter_context(maia_rt.open("emulated")))
        gc.disable()
        for name, call in calls.items():
            call()
            counts = []
            for _ in range(REPEATS):
                for stream in streams:
                    stream.synchronize()
                counts.append(bytecodes(call))
            # What comes late, such as a close by another thread, adds to one of them.
            found[name] = min(counts)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
