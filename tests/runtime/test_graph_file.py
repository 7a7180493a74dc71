"""Graphs in files: what was saved runs again, here and elsewhere; a file that is not right is refused."""

import contextlib
import hashlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maia_rt.errors import ContractMismatch, InvalidArgument, InvalidType, MaiaError
from maia_rt.runtime.graph_file import _HEAD, MAGIC
from tests.helpers import tiny_program

COUNT = 64


@pytest.fixture
def saved(device, stream, tmp_path):
    """A file with a graph that has a launch, a loop, a condition and a copy; `x`, `out` and `flag` are its buffers."""
    path = tmp_path / "graph.maia"
    with device.load(tiny_program.image(COUNT)) as program, device.allocate(COUNT, np.float32) as x, \
            device.allocate((2, COUNT), np.float32) as out, device.allocate_host(1, np.uint32) as flag:
        builder = device.create_graph()
        filled = builder.fill(out, 0)
        with builder.loop(3, after=[filled]) as body:
            body.launch(program["axpy"], out[0], x, out[0], 1.0)
        with builder.condition(flag, 1, condition="eq", after=[body.node]) as guarded:
            guarded.copy(out[1], out[0])
        with builder.instantiate() as graph:
            graph.save(path, {"x": x, "out": out, "flag": flag})
            graph.launch(stream)
            stream.synchronize()
    return path


def edited(path, change):
    """Write the file anew with a change to its header, and a checksum that is right."""
    data = path.read_bytes()
    _, version, size, _ = _HEAD.unpack_from(data)
    header = json.loads(data[_HEAD.size:_HEAD.size + size])
    change(header)
    text = json.dumps(header).encode()
    rest = text + data[_HEAD.size + size:]
    path.write_bytes(_HEAD.pack(MAGIC, version, len(text), hashlib.sha256(rest).digest()) + rest)


def test_a_saved_graph_runs_on_another_device_with_other_buffers(saved, other_device):
    x = np.arange(COUNT, dtype=np.float32)
    with other_device.upload(x) as a, other_device.allocate((2, COUNT), np.float32) as out, \
            other_device.allocate_host(1, np.uint32) as flag, other_device.create_stream() as stream, \
            other_device.load_graph(saved, {"x": a, "out": out, "flag": flag}) as graph:
        assert all("test_graph_file.py" in node.where for node in graph)
        flag.array[0] = 1
        for _ in range(2):
            graph.launch(stream)
            assert np.array_equal(out.copy_to_host(stream), np.stack([3 * x, 3 * x]))


def test_semaphores_and_words_are_saved_too(device, stream, tmp_path):
    path = tmp_path / "graph.maia"
    with device.create_semaphore() as first, device.create_semaphore() as second, \
            device.allocate_host(2, np.uint32) as host:
        builder = device.create_graph()
        waited = builder.wait(first, 1)
        written = builder.write_value(host, 5, after=[waited])
        builder.signal(second, 2, after=[builder.wait_value(host[1:], 0, condition="eq", after=[written])])
        with builder.instantiate() as graph:
            graph.save(path)
        host.array[:] = 0
        first.set(1)
        with device.load_graph(path, {"buffer0": host}, [first, second]) as graph:
            graph.launch(stream)
            stream.synchronize()
        assert (host.array[0], second.value) == (5, 2)
        with pytest.raises(InvalidArgument, match="takes 2 semaphores, not 1"):
            device.load_graph(path, {"buffer0": host}, [first])


def test_buffers_that_do_not_fit_are_refused_by_name(device, saved, other_device):
    with device.allocate(COUNT, np.float32) as x, device.allocate((2, COUNT), np.float32) as out, \
            device.allocate_host(1, np.uint32) as flag, other_device.allocate(COUNT, np.float32) as foreign:
        right = {"x": x, "out": out, "flag": flag}
        cases = [
            ({"x": None}, InvalidType, "buffer 'x' is NoneType"),
            ({"y": x}, InvalidArgument, "has no buffer 'y'"),
            ({"x": x[:3]}, InvalidArgument, "buffer 'x' has 12 bytes, 256 are needed"),
            ({"x": out}, InvalidArgument, r"buffer 'x' is float32 \(2, 64\), not float32 \[64\]"),
            ({"x": foreign}, InvalidArgument, "buffer 'x' belongs to another device"),
            ({"x": out.view(None, None, 4)}, InvalidArgument, "'x' is at 0x[0-9a-f]*, not a multiple of 64"),
        ]
        for change, error, text in cases:
            with pytest.raises(error, match=text):
                device.load_graph(saved, right | change)
        with pytest.raises(InvalidArgument, match="buffer 'x' is not given"):
            device.load_graph(saved, {"out": out, "flag": flag})
        with pytest.raises(OSError, match="No such file"):
            device.load_graph(saved.with_name("none"), right)


def test_damaged_files_are_refused_with_the_reason(device, saved):
    whole = saved.read_bytes()
    with device.allocate(COUNT, np.float32) as x, device.allocate((2, COUNT), np.float32) as out, \
            device.allocate_host(1, np.uint32) as flag:
        right = {"x": x, "out": out, "flag": flag}
        cases = [
            (b"", "is no graph"),
            (b"PK" + whole[2:], "is no graph"),
            (whole[:8] + b"\2" + whole[9:], "has version 2"),
            (whole[:100], "cut off"),
            (whole[:-1], "the checksum is wrong"),
            (whole[:200] + bytes([whole[200] ^ 1]) + whole[201:], "the checksum is wrong"),
        ]
        for data, text in cases:
            saved.write_bytes(data)
            with pytest.raises(InvalidArgument, match=text):
                device.load_graph(saved, right)
        changes = [
            (lambda h: h.update(contract=[9, 0]), ContractMismatch, "saved for contract 9.0"),
            (lambda h: h.update(contract=[1, 99]), ContractMismatch, "saved for contract 1.99"),
            (lambda h: h.update(contract="1.1"), InvalidArgument, "contract is '1.1'"),
            (lambda h: h.update(needs=["wings"]), InvalidArgument, "needs 'wings'"),
            (lambda h: h["programs"][0].update(bytes=1 << 60), InvalidArgument, "program 0 is not what"),
            (lambda h: h["programs"][0].update(bytes=-4), InvalidArgument, "program 0 is not what"),
            (lambda h: h["nodes"][0].update(after=[0]), InvalidArgument, "node 0: a node to come after is number 0"),
            (lambda h: h["nodes"][0]["dst"].update(buffer=7), InvalidArgument, "a buffer is number 7; there are 3"),
            (lambda h: h["nodes"][0]["dst"].update(offset=1 << 40), InvalidArgument, "node 0: an offset is"),
            (lambda h: h["nodes"][0]["dst"].update(shape=[1 << 62, 8]), InvalidArgument, "node 0: a view of shape"),
            (lambda h: h["nodes"][0]["dst"].update(dtype="object"), InvalidArgument, "node 0: a dtype of Python"),
            (lambda h: h["nodes"][0].update(do="explode"), InvalidArgument, "node 0: there is no 'explode'"),
            (lambda h: h["nodes"][1]["body"][0].update(kernel=[0, "no"]), InvalidArgument, "node 2: no kernel 'no'"),
            (lambda h: h["nodes"][1]["body"][0].update(args=[1]), InvalidArgument, "node 2: kernel 'axpy' takes 4"),
            (lambda h: h.update(nodes=[]), InvalidArgument, "empty"),
        ]
        for change, error, text in changes:
            saved.write_bytes(whole)
            edited(saved, change)
            with pytest.raises(error, match=text):
                device.load_graph(saved, right)


def test_whatever_stands_in_a_file_gets_a_typed_error_or_a_graph(device, saved):
    whole = saved.read_bytes()
    values = st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), st.floats(), st.text(max_size=5),
                       st.lists(st.integers(-2, 9), max_size=3), st.just({}))
    with device.allocate(COUNT, np.float32) as x, device.allocate((2, COUNT), np.float32) as out, \
            device.allocate_host(1, np.uint32) as flag:

        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def load(data):
            def change(header):
                at = header
                while True:
                    keys = list(at) if isinstance(at, dict) else list(range(len(at)))
                    key = data.draw(st.sampled_from(keys))
                    if not at[key] or not isinstance(at[key], dict | list) or data.draw(st.integers(0, 4)) == 0:
                        at[key] = data.draw(values)
                        return
                    at = at[key]

            saved.write_bytes(whole)
            edited(saved, change)
            with contextlib.suppress(MaiaError):
                device.load_graph(saved, {"x": x, "out": out, "flag": flag}).close()

        load()
