"""Captures: what streams are told becomes a graph, forks and joins included; what cannot be captured is refused."""

import numpy as np
import pytest

from maia_rt.errors import CaptureError, InvalidArgument, InvalidType
from tests.helpers import tiny_program

COUNT = 64


@pytest.fixture
def other(device):
    with device.create_stream() as opened:
        yield opened


@pytest.fixture
def words(device):
    """Device memory and pinned memory, of 64 words each."""
    with device.allocate(COUNT, np.uint32) as buffer, device.allocate_host(COUNT, np.uint32) as host:
        yield buffer, host


def test_captured_commands_run_at_the_launch_and_not_before(device, stream, words):
    buffer, host = words
    host.array[:] = 0
    before = stream.statistics().submitted
    with stream.capture() as capture:
        stream.fill(buffer, 7, 4)
        stream.copy(host, buffer)
        stream.write_value(host, 1)
    assert stream.statistics().submitted == before
    with capture.instantiate() as graph:
        assert [node.name for node in graph] == ["fill of 256 bytes", "copy of 256 bytes", "write of 1"]
        assert all("test_graph_capture.py" in node.where for node in graph)
        graph.launch(stream)
        stream.synchronize()
        assert host.array.tolist() == [1] + [7] * (COUNT - 1)


def test_a_fork_and_a_join_over_events_become_branches(device, stream, other):
    x = np.arange(COUNT, dtype=np.float32)
    with device.load(tiny_program.image(COUNT)) as program, device.upload(x) as a, \
            device.allocate((2, COUNT), np.float32) as parts, device.allocate(COUNT, np.float32) as out:
        axpy = program["axpy"]
        with stream.capture() as capture:
            stream.fill(out, 0)
            other.wait(stream.record())
            stream.launch(axpy, a, a, parts[0], 1.0)
            other.launch(axpy, a, a, parts[1], 2.0)
            stream.wait(other.record())
            stream.launch(axpy, parts[0], parts[1], out, 1.0)
        first, left, right, last = capture.builder.nodes
        assert (left.after, right.after) == ((first,), (first,))
        assert set(last.after) == {left, right}
        with capture.instantiate() as graph:
            graph.launch(stream)
            assert np.array_equal(out.copy_to_host(stream), 5 * x)
            other.fill(out, 0)
            other.synchronize()


def test_a_graph_launched_in_a_capture_becomes_its_child(device, stream, words):
    buffer, host = words
    builder = device.create_graph()
    builder.fill(buffer, 5, 4)
    with builder.instantiate() as inner:
        with stream.capture() as capture:
            inner.launch(stream)
            stream.copy(host, buffer)
        with capture.instantiate() as graph:
            graph.launch(stream)
            stream.synchronize()
            assert (host.array == 5).all()


def test_semaphores_are_captured(device, stream, words):
    buffer, _ = words
    with device.create_semaphore() as semaphore:
        with stream.capture() as capture:
            stream.wait(semaphore, 1)
            stream.fill(buffer, 2, 4)
            stream.signal(semaphore, 1)
        with capture.instantiate() as graph:
            graph.launch(stream)
            assert not stream.query()
            semaphore.set(1)
            stream.synchronize()
            assert semaphore.value == 2


def test_a_fork_that_does_not_come_back_is_an_error_and_the_streams_go_on(device, stream, other, words):
    buffer, host = words
    capture = stream.capture()
    with pytest.raises(CaptureError, match=rf"while {other.name} had not come back"), capture:
        stream.fill(buffer, 1, 4)
        other.wait(stream.record())
        other.copy(host, buffer)
    with pytest.raises(CaptureError, match="the capture is failed"):
        capture.instantiate()
    for each in (stream, other):
        each.fill(buffer, 3, 4)
        each.synchronize()
    assert (buffer.copy_to_host(stream) == 3).all()


def test_what_cannot_be_captured_is_refused_and_the_capture_goes_on(device, stream, other, words):
    buffer, host = words
    outside = other.record()
    timed = device.create_event(timing=True)
    refused = [
        (stream.synchronize, CaptureError, "synchronize.. is not possible.*nothing has been submitted"),
        (stream.query, CaptureError, "query"),
        (lambda: stream.wait(outside), CaptureError, "recorded outside of the capture"),
        (lambda: stream.wait(other), CaptureError, "that stream is not in the capture"),
        (lambda: stream.record(timing=True), CaptureError, "timed event"),
        (lambda: stream.record(timed), CaptureError, "timed event"),
        (lambda: stream.copy(buffer, np.zeros(COUNT, np.uint32)), InvalidType, "allocate a HostBuffer"),
        (lambda: stream.copy(host, buffer, checksum=True), CaptureError, "checksum"),
        (lambda: stream.allocate(64), CaptureError, "allocate before the capture"),
        (lambda: stream.free(buffer), CaptureError, "free"),
        (lambda: stream.fill(buffer, 1, 3), InvalidArgument, "1, 2 or 4"),
        (lambda: stream.wait(3), InvalidType, "waits for is int"),
        (device.synchronize, CaptureError, "synchronize"),
        (lambda: stream.capture().__enter__(), CaptureError, "captured already"),
    ]
    with stream.capture() as capture:
        stream.fill(buffer, 6, 4)
        event = stream.record()
        for call, error, text in refused:
            with pytest.raises(error, match=text):
                call()
        for call in (event.query, event.synchronize):
            with pytest.raises(CaptureError, match="a place in a graph"):
                call()
        stream.copy(host, buffer)
    with pytest.raises(CaptureError, match="a capture that has ended"):
        other.wait(event)
    assert len(capture.builder) == 2
    with capture.instantiate() as graph:
        graph.launch(stream)
        stream.synchronize()
        assert (host.array == 6).all()
    stream.record(event)
    other.wait(event)
    event.synchronize()


def test_an_exception_in_the_block_ends_the_capture(device, stream, words):
    buffer, _ = words
    capture = stream.capture()
    with pytest.raises(ZeroDivisionError), capture:
        stream.fill(buffer, 1)
        raise ZeroDivisionError
    with pytest.raises(CaptureError):
        capture.instantiate()
    stream.fill(buffer, 0)
    stream.synchronize()


def test_a_stream_closed_while_it_is_captured_ends_the_capture(device, words):
    buffer, _ = words
    with device.create_stream() as stream:
        capture = stream.capture()
        capture.__enter__()
        stream.fill(buffer, 1)
    with pytest.raises(CaptureError, match="ended by the close"):
        capture.instantiate()
