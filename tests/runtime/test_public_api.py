"""Every public call, given what it cannot take: a typed error that says what to do, nothing left behind, and the next
correct call works.

Each row of `CALLS` says how a call is made and what each of its parameters is; what a parameter of that kind must
refuse is said once, in `KINDS`. A public call without a row fails the first test.
"""

import asyncio
import inspect
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

import maia_rt
from maia_rt import kernels
from maia_rt.contract import program
from maia_rt.errors import ClosedError, DeviceNotFound, ForkedError, MaiaError, OutOfMemory

ELEMENTS = 64
MX = maia_rt.Dtype.MXFP8_E4M3


class World:
    """A device with one good object of each kind, a closed one and one of another device."""

    def __init__(self, device, other):
        self.device, self.other = device, other
        self.stream, self.others_stream = device.create_stream(), other.create_stream()
        self.closed_stream = device.create_stream()
        self.closed_stream.close()
        self.buffer, self.second, self.third = (device.allocate(ELEMENTS, np.float32) for _ in range(3))
        self.host = device.allocate_host(ELEMENTS, np.float32)
        self.others_buffer = other.allocate(ELEMENTS, np.float32)
        self.closed_buffer = device.allocate(ELEMENTS, np.float32)
        self.closed_buffer.close()
        self.array = np.ones(ELEMENTS, np.float32)
        self.image = program.write([kernels.add(device.capabilities.program, ELEMENTS)])
        self.program, self.others_program = device.load(self.image), other.load(self.image)
        self.closed_program = device.load(self.image)
        self.closed_kernel = self.closed_program["add"]
        self.closed_program.close()
        self.kernel, self.others_kernel = self.program["add"], self.others_program["add"]
        self.semaphore, self.others_semaphore = device.create_semaphore(8), other.create_semaphore()
        self.closed_semaphore = device.create_semaphore()
        self.closed_semaphore.close()
        self.pool, self.others_pool, self.closed_pool = device.create_pool(), other.create_pool(), device.create_pool()
        self.closed_pool.close()
        self.words = device.allocate_host(4, np.uint32)
        self.words.array[:] = 9
        self.builder = device.create_graph()
        self.builder.fill(self.third, 0)
        self.graph = self.builder.instantiate()
        self.graph.launch(self.stream)
        self.event, self.others_event = self.stream.record(timing=True), self.others_stream.record()
        self.stream.synchronize()

    def close(self):
        for thing in (self.stream, self.others_stream, self.program, self.others_program, self.buffer, self.second,
                      self.third, self.host, self.others_buffer, self.semaphore, self.others_semaphore, self.words,
                      self.pool, self.others_pool, self.graph):
            thing.close()


@dataclass(frozen=True)
class Kind:
    """What a parameter takes, and what it must refuse."""

    good: Callable[[World], Any]
    bad: dict[str, Callable[[World], Any]]


def kind(good, **bad):
    return Kind(good, {name: value if callable(value) else lambda _, value=value: value for name, value in bad.items()})


REFUSALS = (ValueError, TypeError, LookupError, OutOfMemory, DeviceNotFound)
OBJECTS = {"an object": object(), "text": "text", "a number": 3}
KINDS = {
    "memory": kind(lambda w: w.buffer, none=None, closed=lambda w: w.closed_buffer, foreign=lambda w: w.others_buffer,
                   array=lambda w: w.array, **OBJECTS),
    "target": kind(lambda w: w.buffer, none=None, closed=lambda w: w.closed_buffer, foreign=lambda w: w.others_buffer,
                   short=lambda w: w.buffer[:3], objects=lambda _: np.array([object()]), **OBJECTS),
    "source": kind(lambda w: w.array, none=None, closed=lambda w: w.closed_buffer, short=lambda w: w.array[:3],
                   objects=lambda _: np.array([object()]), **OBJECTS),
    "stream": kind(lambda w: w.stream, closed=lambda w: w.closed_stream, foreign=lambda w: w.others_stream, **OBJECTS),
    "awaited": kind(lambda w: w.event, none=None, closed_stream=lambda w: w.closed_stream,
                    foreign_semaphore=lambda w: w.others_semaphore,
                    semaphore=lambda w: w.semaphore, **OBJECTS),
    "semaphore": kind(lambda w: w.semaphore, none=None, closed=lambda w: w.closed_semaphore,
                      foreign=lambda w: w.others_semaphore, **OBJECTS),
    "signalled": kind(lambda w: w.semaphore, none=None, closed=lambda w: w.closed_semaphore, **OBJECTS),
    "pool": kind(lambda w: w.pool, closed=lambda w: w.closed_pool, foreign=lambda w: w.others_pool, **OBJECTS),
    "space": kind(lambda _: maia_rt.Space.cluster(0), absent=lambda _: maia_rt.Space.tile(99_999), **OBJECTS),
    "count": kind(lambda _: 1, negative=-1, huge=1 << 70, text="text", none=None, fraction=1.5),
    "limit": kind(lambda _: 1 << 20, negative=-1, text="text", fraction=1.5),
    "word": kind(lambda w: w.words, none=None, closed=lambda w: w.closed_buffer, foreign=lambda w: w.others_buffer,
                 array=lambda w: w.array, short=lambda w: w.words.view(None, 3), odd=lambda w: w.words.view(None, 4, 1),
                 **OBJECTS),
    "value": kind(lambda _: 3, negative=-1, huge=1 << 32, text="text", none=None, fraction=1.5),
    "mask": kind(lambda _: 0xFFFFFFFF, negative=-1, huge=1 << 32, text="text", none=None, fraction=1.5),
    "function": kind(lambda _: int, none=None, **OBJECTS),
    "replayed": kind(lambda w: w.host, none=None, closed=lambda w: w.closed_buffer, array=lambda w: w.array, **OBJECTS),
    "mx": kind(lambda _: maia_rt.to_mx(np.ones((2, 32), np.float32), MX), none=None, **OBJECTS),
    "mx source": kind(lambda _: np.ones((2, 32), np.float32), none=None, ragged=lambda _: np.ones((2, 31), np.float32),
                      **OBJECTS),
    "mx dtype": kind(lambda _: MX, none=None, plain=lambda _: maia_rt.Dtype.FP32, **OBJECTS),
    "wait op": kind(lambda _: "ge", unknown="lt", none=None, number=3),
    "post op": kind(lambda _: "set", unknown="sub", none=None, number=3),
    "condition": kind(lambda _: "ge", unknown="lt", none=None, number=3),
    "targets": kind(lambda w: [w.buffer], none=None, number=3, closed=lambda w: [w.closed_buffer],
                    foreign=lambda w: [w.others_buffer], short=lambda w: [w.buffer[:3]], objects=lambda _: [object()]),
    "registered": kind(lambda _: np.zeros(4096, np.uint8), none=None, objects=lambda _: np.array([object()]),
                       strided=lambda _: np.zeros((64, 64))[:, ::2], **OBJECTS),
    "dlpack": kind(lambda w: w.array, none=None, **OBJECTS),
    "peer": kind(lambda w: w.other, none=None, itself=lambda w: w.device, **OBJECTS),
    "devices": kind(lambda w: [w.device, w.other], none=None, twice=lambda w: [w.device, w.device],
                    inside=lambda _: [None], **OBJECTS),
    "device": kind(lambda w: w.device, none=None, **OBJECTS),
    "event": kind(lambda w: w.event, none=None, foreign=lambda w: w.others_event, **OBJECTS),
    "own stream": kind(lambda w: w.stream, none=None, closed=lambda w: w.closed_stream,
                       foreign=lambda w: w.others_stream, **OBJECTS),
    "own event": kind(lambda w: w.device.create_event(), foreign=lambda w: w.others_event, **OBJECTS),
    "kernel": kind(lambda w: w.kernel, none=None, closed=lambda w: w.closed_kernel, foreign=lambda w: w.others_kernel,
                   **OBJECTS),
    "index": kind(lambda _: 0, negative=-1, huge=1 << 70, text="text", none=None, fraction=1.5),
    "clusters": kind(lambda _: 0, negative=-1, huge=1 << 70, text="text", none=None, fraction=1.5, absent=1 << 31),
    "entries": kind(lambda _: 16, negative=-1, zero=0, odd=3, huge=1 << 70, text="text", none=None, fraction=1.5),
    "queues": kind(lambda _: 2, negative=-1, zero=0, text="text", fraction=1.5),
    "bytes": kind(lambda _: 1, negative=-1, text="text", none=None, fraction=1.5),
    "alignment": kind(lambda _: 256, negative=-1, zero=0, odd=3, huge=1 << 70, text="text", none=None, fraction=1.5),
    "seconds": kind(lambda _: 5.0, negative=-1, not_a_number=math.nan, endless=math.inf, text="text", pair=(1, 2)),
    "shape": kind(lambda _: (2, 3), negative=-1, inside=(2, -1), huge=(1 << 40, 1 << 40), text="text", none=None,
                  fraction=1.5),
    "dtype": kind(lambda _: np.float32, nonsense="nonsense", objects=lambda _: object, number=3),
    "width": kind(lambda _: 4, three=3, zero=0, negative=-1, text="text", none=None),
    "pattern": kind(lambda _: 7, huge=1 << 40, text="text", none=None, fraction=1.5),
    "array": kind(lambda w: w.array, objects=lambda _: np.array([object()]), an_object=object()),
    "image": kind(lambda w: w.image, none=None, text="text", empty=b"", zeros=bytes(4096), number=3,
                  cut=lambda w: w.image[:100]),
    "name": kind(lambda _: "add", absent="absent", none=None),
    "slice": kind(lambda _: slice(1, 3), none=None, text="text", fraction=slice(0.5, None), beyond=1 << 20,
                  deep=(1, 2)),
    "selector": kind(lambda _: "emulated", absent="/absent/socket", no_address="0000:7f:1f.7", number=99,
                     pair=("a", "b")),
}


@dataclass(frozen=True)
class Call:
    """How a public call is made. A parameter that `OPEN` holds is not tried: anything is right."""

    function: Callable[[World], Callable[..., Any]]
    parameters: dict[str, str] = field(default_factory=dict)
    undo: Callable[[Any], None] = lambda _: None
    after_close: bool = False
    after_fork: bool = False

    def __call__(self, world, **instead):
        good = {name: KINDS[kind].good(world) for name, kind in self.parameters.items()}
        self.undo(self.function(world)(**(good | instead)))


def of(owner, name, /, **parameters):
    """A method of the good object `owner`; special ones take their parameters by position."""
    def function(world):
        method = getattr(getattr(world, owner), name)
        return (lambda **given: method(*given.values())) if name.startswith("__") else method

    return Call(function, parameters)


def made(call):
    """What it returns is closed."""
    return replace(call, undo=lambda result: result.close())


def lasting(call):
    """It may be called after its device has been closed, and in a forked child."""
    return replace(call, after_close=True, after_fork=True)


def harmless(call):
    """It does not touch the device, and may be called in a forked child."""
    return replace(call, after_fork=True)


def launch(world):
    return lambda kernel, a, b, c, clusters: world.stream.launch(kernel, a, b, c, clusters=clusters)


CALLS: dict[str, Call] = {
    "open": made(lasting(Call(lambda _: maia_rt.open, {"selector": "selector", "timeout": "seconds",
                                                       "max_queues": "queues", "peer_checks": "limit"}))),
    "devices": lasting(Call(lambda _: maia_rt.devices)),
    "topology": Call(lambda _: maia_rt.topology, {"devices": "devices"}),
    "from_dlpack": made(Call(lambda _: maia_rt.from_dlpack, {"obj": "dlpack", "device": "device"})),
    "Device.allocate": made(of("device", "allocate", shape="shape", dtype="dtype", alignment="alignment",
                               space="space")),
    "Device.create_pool": made(of("device", "create_pool", max_bytes="limit", release_threshold="count")),
    "Device.create_semaphore": made(of("device", "create_semaphore", initial="value")),
    "Device.create_graph": of("device", "create_graph"),
    "Device.clear_injections": of("device", "clear_injections"),
    "Device.fence": of("device", "fence"),
    "Device.hang_report": of("device", "hang_report"),
    "Device.peer": of("device", "peer", other="peer"),
    "Device.register": made(of("device", "register", array="registered")),
    "Device.allocate_host": made(of("device", "allocate_host", shape="shape", dtype="dtype")),
    "Device.create_event": of("device", "create_event"),
    "Device.create_stream": made(of("device", "create_stream", priority="index", clusters="clusters",
                                    entries="entries", timeout="seconds", first_index="count")),
    "Device.load": made(of("device", "load", image="image")),
    "Device.synchronize": of("device", "synchronize", timeout="seconds"),
    "Device.upload": made(of("device", "upload", array="array", stream="stream")),
    "Device.counters": of("device", "counters"),
    "Device.faults": of("device", "faults"),
    "Device.memory": of("device", "memory", space="space"),
    "Stream.abort": of("stream", "abort", event="event"),
    "Stream.allocate": made(of("stream", "allocate", shape="shape", dtype="dtype", pool="pool")),
    "Stream.multicast": of("stream", "multicast", dsts="targets", src="memory"),
    "Stream.recover": of("stream", "recover"),
    "Stream.signal": of("stream", "signal", semaphore="signalled", value="value", op="post op"),
    "Stream.wait_value": of("stream", "wait_value", memory="word", value="value", condition="condition", mask="mask"),
    "Stream.write_value": of("stream", "write_value", memory="word", value="value"),
    "MemoryPool.allocate": made(of("pool", "allocate", stream="own stream", shape="shape", dtype="dtype")),
    "MemoryPool.statistics": lasting(of("pool", "statistics")),
    "MemoryPool.reset_peaks": lasting(of("pool", "reset_peaks")),
    "MemoryPool.trim": of("pool", "trim", min_bytes="bytes"),
    "Semaphore.add": of("semaphore", "add", value="count"),
    "Semaphore.set": of("semaphore", "set", value="value"),
    "Semaphore.wait": of("semaphore", "wait", value="value", timeout="seconds", op="wait op"),
    "Buffer.map": of("buffer", "map"),
    "Stream.call": of("stream", "call", function="function"),
    "Stream.synchronize_async": Call(lambda w: lambda timeout: asyncio.run(w.stream.synchronize_async(timeout)),
                                     {"timeout": "seconds"}),
    "Stream.copy": of("stream", "copy", dst="target", src="source"),
    "Stream.fill": of("stream", "fill", dst="memory", value="pattern", width="width"),
    "Stream.launch": Call(launch, {"kernel": "kernel", "a": "memory", "b": "memory", "c": "memory",
                                   "clusters": "clusters"}),
    "Stream.query": of("stream", "query"),
    "Stream.record": of("stream", "record", event="own event"),
    "Stream.statistics": lasting(of("stream", "statistics")),
    "Stream.synchronize": of("stream", "synchronize", timeout="seconds"),
    "Stream.wait": of("stream", "wait", what="awaited"),
    "Event.query": lasting(of("event", "query")),
    "Event.synchronize": lasting(of("event", "synchronize", timeout="seconds")),
    "Event.synchronize_async": lasting(Call(
        lambda w: lambda timeout: asyncio.run(w.event.synchronize_async(timeout)), {"timeout": "seconds"})),
    "Event.__sub__": lasting(of("event", "__sub__", start="event")),
    "Buffer.view": harmless(of("buffer", "view", dtype="dtype", shape="shape", offset="index")),
    "Buffer.__getitem__": harmless(of("buffer", "__getitem__", item="slice")),
    "Buffer.copy_to_host": of("buffer", "copy_to_host", stream="stream"),
    "HostBuffer.view": harmless(of("host", "view", dtype="dtype", shape="shape", offset="index")),
    "HostBuffer.__getitem__": harmless(of("host", "__getitem__", item="slice")),
    "Graph.launch": of("graph", "launch", stream="own stream"),
    "Graph.times": of("graph", "times"),
    "GraphBuilder.copy": lasting(of("builder", "copy", dst="memory", src="replayed")),
    "GraphBuilder.fill": lasting(of("builder", "fill", dst="memory", value="pattern", width="width")),
    "GraphBuilder.write_value": lasting(of("builder", "write_value", memory="word", value="value")),
    "GraphBuilder.wait_value": lasting(of("builder", "wait_value", memory="word", value="value", condition="condition",
                                          mask="mask")),
    "GraphBuilder.signal": lasting(of("builder", "signal", semaphore="signalled", value="value", op="post op")),
    "GraphBuilder.wait": lasting(of("builder", "wait", semaphore="semaphore", value="value", op="wait op")),
    "from_mx": lasting(Call(lambda _: maia_rt.from_mx, {"raw": "mx", "dtype": "mx dtype"})),
    "to_mx": lasting(Call(lambda _: maia_rt.to_mx, {"array": "mx source", "dtype": "mx dtype"})),
    "Kernel.encode": harmless(Call(lambda w: lambda a, b, c: w.kernel.encode((a, b, c)),
                                   {"a": "memory", "b": "memory", "c": "memory"})),
    "Program.__getitem__": lasting(of("program", "__getitem__", name="name")),
}
TRIED_ELSEWHERE = {
    "Device.reset": "it closes all of the device's things: test_device.py",
    "Device.close": "idempotent: test_promises.py", "Stream.close": "likewise", "Program.close": "likewise",
    "Buffer.close": "likewise", "HostBuffer.close": "likewise",
    "Semaphore.close": "likewise", "MemoryPool.close": "likewise",
    "Stream.free": "it ends what it is given: test_pool.py",
    **dict.fromkeys(["Capture.instantiate", "Stream.capture"], "test_graph_capture.py"),
    **dict.fromkeys(["Device.load_graph", "Graph.save"], "test_graph_file.py"),
    **dict.fromkeys(["Graph.close", "Graph.update", "GraphBuilder.child", "GraphBuilder.condition", "GraphBuilder.join",
                     "GraphBuilder.instantiate", "GraphBuilder.launch", "GraphBuilder.loop"], "test_graph.py"),
    **dict.fromkeys([f"SpanningGraph.{name}" for name in ("close", "launch", "save", "times", "update")],
                    "test_spanning_graph.py"),
    **dict.fromkeys(["Device.inject"], "test_injection.py"),
    **dict.fromkeys(["PeerPath.address", "PeerPath.semaphore"], "test_peer.py"),
    "MemoryPool.free": "what Stream.free calls: test_pool.py",
    "Kernel.accesses": "for validation: test_validation.py",
    "HangReport.to_json": "takes nothing, needs no device: test_hang.py",
}
SPECIAL = {"__getitem__", "__sub__"}


def public_calls():
    for name in maia_rt.__all__:
        value = getattr(maia_rt, name)
        if inspect.isfunction(value):
            yield name
        elif inspect.isclass(value) and value.__module__.startswith("maia_rt.runtime"):
            for member, method in inspect.getmembers(value, callable):
                if (member in SPECIAL or not member.startswith("_")) and "maia_rt" in (method.__module__ or ""):
                    yield f"{name}.{member}"


def test_every_public_call_is_tried():
    assert set(public_calls()) == set(CALLS) | set(TRIED_ELSEWHERE)


@pytest.fixture
def world(attached, other_device):
    world = World(attached, other_device)
    yield world
    world.close()


GROUPS = sorted({name.rpartition(".")[0] for name in CALLS})


@pytest.mark.parametrize("group", GROUPS)
def test_bad_input_is_a_typed_error_and_the_next_call_works(world, group):
    wrong = []
    for name, call in CALLS.items():
        if name.rpartition(".")[0] != group:
            continue
        call(world)
        for parameter, what in call.parameters.items():
            for label, make in KINDS[what].bad.items():
                value = make(world)
                if value is None and defaults_to_none(call, world, parameter):
                    continue
                said = f"{name}({parameter}={label}: {value!r:.60})"
                try:
                    call(world, **{parameter: value})
                except MaiaError as error:
                    if not (error.what and (isinstance(error, REFUSALS))):
                        wrong.append(f"{said}: {error!r}")
                except Exception as error:  # any other is what this test looks for
                    wrong.append(f"{said}: {type(error).__name__}: {error}")
                else:
                    wrong.append(f"{said}: no error")
        call(world)
    assert not wrong, "\n".join(wrong)


def defaults_to_none(call, world, parameter):
    found = inspect.signature(call.function(world)).parameters.get(parameter)
    return found is not None and found.default is None


def test_every_call_works_from_any_thread(world):
    errors = []

    def run():
        for name, call in CALLS.items():
            try:
                call(world)
            except Exception as error:  # told by the main thread
                errors.append((name, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors


def refusals(world, expected, but):
    """Make every call, but for those that are left out; what did not raise the expected error."""
    wrong = []
    for name, call in CALLS.items():
        if but(call):
            continue
        try:
            call(world)
        except expected:
            continue
        except Exception as error:  # any other is what these tests look for
            wrong.append(f"{name}: {type(error).__name__}: {error}")
        else:
            wrong.append(f"{name}: no error")
    return wrong


def test_every_call_on_something_closed_says_so(world):
    world.device.close()
    assert not refusals(world, ClosedError, lambda call: call.after_close)


def test_every_call_in_a_forked_child_says_so(world):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        wrong = ["the child did not get that far"]
        try:
            wrong = refusals(world, ForkedError, lambda call: call.after_fork)
        finally:
            os.write(writer, "\n".join(wrong).encode()[:60_000])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert not pipe.read().decode()
    os.waitpid(child, 0)
    world.stream.synchronize()
