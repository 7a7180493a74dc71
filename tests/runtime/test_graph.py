"""Graphs built by hand: order, replays, updates, times, stale addresses, faults, and what wrong nodes get."""

import threading

import numpy as np
import pytest

from maia_rt.errors import BufferInUse, ClosedError, DeviceFault, FaultCode, InvalidArgument, InvalidType
from tests.helpers import tiny_program

COUNT = 64


@pytest.fixture
def axpy(device):
    with device.load(tiny_program.image(COUNT)) as loaded:
        yield loaded["axpy"]


@pytest.fixture
def words(device):
    """Device memory and pinned memory, of 64 words each."""
    with device.allocate(COUNT, np.uint32) as buffer, device.allocate_host(COUNT, np.uint32) as host:
        yield buffer, host


def test_a_replay_runs_every_node_in_order_with_one_command(device, stream, words):
    buffer, host = words
    builder = device.create_graph()
    filled = builder.fill(buffer, 7, 4)
    builder.copy(host, buffer, after=[filled])
    with builder.instantiate() as graph:
        for _ in range(3):
            host.array[:] = 0
            before = stream.statistics().submitted
            graph.launch(stream)
            assert stream.statistics().submitted == before + 1
            stream.synchronize()
            assert (host.array == 7).all()


def test_launches_of_one_level_and_their_join_compute_what_a_stream_computes(device, stream, axpy):
    x = np.arange(COUNT, dtype=np.float32)
    with device.upload(x) as a, device.allocate((4, COUNT), np.float32) as parts, \
            device.allocate(COUNT, np.float32) as out:
        builder = device.create_graph()
        level = [builder.launch(axpy, a, a, parts[i], float(i)) for i in range(4)]
        total = builder.launch(axpy, parts[2], parts[3], out, 2.0, after=level)
        with builder.instantiate() as graph:
            assert graph.nodes[-1] is total
            graph.launch(stream)
            assert np.array_equal(out.copy_to_host(stream), 2 * (3 * x) + 4 * x)
            times = {time.node: time for time in graph.times()}
            assert times[total].start_ns >= max(times[node].end_ns for node in level)


def test_a_loop_runs_its_body_as_often_as_it_was_told(device, stream, axpy):
    with device.upload(np.ones(COUNT, np.float32)) as one, device.upload(np.zeros(COUNT, np.float32)) as total:
        builder = device.create_graph()
        with builder.loop(5) as body:
            body.launch(axpy, total, one, total, 1.0)
        with builder.instantiate() as graph:
            graph.launch(stream)
            assert (total.copy_to_host(stream) == 5).all()
            graph.update(body.node, count=2)
            graph.launch(stream)
            assert (total.copy_to_host(stream) == 7).all()


def test_loops_nest_and_a_body_has_branches_of_its_own(device, stream, axpy):
    with device.upload(np.ones(COUNT, np.float32)) as one, device.upload(np.zeros((2, COUNT), np.float32)) as total:
        builder = device.create_graph()
        with builder.loop(3) as outer:
            with outer.loop(4) as inner:
                inner.launch(axpy, total[0], one, total[0], 1.0)
            outer.launch(axpy, total[1], one, total[1], 1.0, after=[inner.node])
        with builder.instantiate() as graph:
            graph.launch(stream)
            assert (total.copy_to_host(stream)[:, 0] == [12, 3]).all()


def test_a_loop_runs_while_a_word_says_so_and_not_at_all_where_it_does_not(device, stream, words):
    buffer, flag = words
    builder = device.create_graph()
    with builder.loop(while_=flag) as body:
        done = body.fill(buffer, 3, 4)
        body.write_value(flag, 0, after=[done])
    with builder.instantiate() as graph:
        for wanted in (1, 0):
            flag.array[0] = wanted
            stream.fill(buffer, 0)
            graph.launch(stream)
            assert (buffer.copy_to_host(stream) == 3 * wanted).all()


def test_a_condition_runs_its_body_only_where_the_word_meets_it_and_times_say_so(device, stream, words):
    buffer, flag = words
    builder = device.create_graph()
    first = builder.fill(buffer, 1, 4)
    with builder.condition(flag, 5, condition="ge", after=[first]) as body:
        guarded = body.fill(buffer, 2, 4)
    with builder.instantiate() as graph:
        for value, expected in ((5, 2), (4, 1), (6, 2)):
            flag.array[0] = value
            graph.launch(stream)
            assert (buffer.copy_to_host(stream) == expected).all()
            ran = next(time for time in graph.times() if time.node is guarded)
            assert bool(ran.start_ns) is (expected == 2)


def test_a_child_graph_is_inlined_in_its_place(device, stream, words):
    buffer, host = words
    child = device.create_graph()
    child.copy(host, buffer, after=[child.fill(buffer, 9, 4)])
    builder = device.create_graph()
    before = builder.fill(buffer, 1, 4)
    node = builder.child(child, after=[before])
    builder.fill(host[:4], 2, 4, after=[node])
    with builder.instantiate() as graph:
        assert len(graph) == 4
        graph.launch(stream)
        stream.synchronize()
        assert host.array.tolist() == [2] * 4 + [9] * (COUNT - 4)
    with pytest.raises(InvalidArgument, match="cannot be part of itself"):
        builder.child(builder)
    with pytest.raises(InvalidArgument, match="cannot be part of itself"):
        child.child(builder)


def test_semaphores_and_words_join_graphs_with_other_streams(device, stream, words):
    buffer, host = words
    with device.create_semaphore() as ready, device.create_semaphore() as done, device.create_stream() as other:
        host.array[:] = 0
        builder = device.create_graph()
        waited = builder.wait(ready, 1)
        word = builder.wait_value(host, 1, after=[waited])
        builder.signal(done, 1, after=[builder.fill(buffer, 4, 4, after=[word])])
        with builder.instantiate() as graph:
            graph.launch(stream)
            assert not stream.query()
            other.write_value(host, 1)
            other.signal(ready)
            done.wait(1)
            assert (buffer.copy_to_host(stream) == 4).all()


def test_an_update_holds_for_later_launches_and_not_for_those_in_flight(device, stream, words):
    buffer, host = words
    with device.create_semaphore() as go:
        builder = device.create_graph()
        filled = builder.fill(buffer, 1, 4)
        copied = builder.copy(host, buffer, after=[filled])
        with builder.instantiate() as graph:
            with device.allocate_host(COUNT, np.uint32) as elsewhere:
                stream.wait(go, 1)
                graph.launch(stream)
                graph.update(filled, value=2)
                graph.update(copied, dst=elsewhere)
                graph.launch(stream)
                go.set(1)
                stream.synchronize()
                assert (host.array == 1).all()
                assert (elsewhere.array == 2).all()
                graph.update(copied, dst=host)
            graph.launch(stream)
            stream.synchronize()
            assert (host.array == 2).all()


def test_updates_of_a_launch_survive_the_copy_of_the_list(device, stream, axpy):
    x = np.ones(COUNT, np.float32)
    with device.upload(x) as a, device.allocate((2, COUNT), np.float32) as out, device.create_semaphore() as go:
        builder = device.create_graph()
        node = builder.launch(axpy, a, a, out[0], 1.0)
        with builder.instantiate() as graph:
            stream.wait(go, 1)
            graph.launch(stream)
            graph.update(node, args=(a, a, out[1], 4.0))
            graph.launch(stream)
            go.set(1)
            assert (out.copy_to_host(stream)[:, 0] == [2, 5]).all()
            for wrong, error, text in (
                ({"args": (a,)}, InvalidArgument, "takes 4 arguments"),
                ({"dst": a}, InvalidArgument, "a launch has no 'dst'; |has no 'dst'"),
                ({"args": 3}, InvalidType, "args is int, not a tuple"),
            ):
                with pytest.raises(error, match=text):
                    graph.update(node, **wrong)
            with pytest.raises(InvalidArgument, match="is no node of"):
                graph.update(builder.fill(out, 0), value=1)


def test_replays_on_two_streams_run_one_after_the_other(device, stream, axpy):
    with device.upload(np.ones(COUNT, np.float32)) as one, device.upload(np.zeros(COUNT, np.float32)) as total, \
            device.create_stream() as other:
        builder = device.create_graph()
        with builder.loop(3) as body:
            body.launch(axpy, total, one, total, 1.0)
        with builder.instantiate() as graph:
            for number in range(20):
                graph.launch((stream, other)[number % 2])
            device.synchronize()
            assert (total.copy_to_host() == 60).all()


def test_a_launch_after_a_buffer_was_closed_names_node_line_and_buffer(device, stream, words):
    _, host = words
    stale = device.allocate(COUNT, np.uint32)
    builder = device.create_graph()
    node = builder.copy(host, stale)
    with builder.instantiate() as graph:
        graph.launch(stream)
        stream.synchronize()
        stale.close()
        for _ in range(2):
            with pytest.raises(ClosedError, match=r"copy of 256 bytes, a node made at .*graph.py:\d+: src, <Buffer"):
                graph.launch(stream)
        with device.upload(np.full(COUNT, 3, np.uint32)) as fresh:
            graph.update(node, src=fresh)
            graph.launch(stream)
            stream.synchronize()
            assert (host.array == 3).all()


def test_a_launch_after_its_program_was_closed_is_refused(device, stream):
    with device.allocate(COUNT, np.float32) as x:
        with device.load(tiny_program.image(COUNT)) as program:
            builder = device.create_graph()
            builder.launch(program["axpy"], x, x, x, 1.0)
            graph = builder.instantiate()
        with graph, pytest.raises(ClosedError, match="kernel 'axpy': its program has been closed"):
            graph.launch(stream)


@pytest.mark.parametrize("kind", ["loop", "condition", "write", "signal"])
def test_a_node_whose_word_or_semaphore_has_been_closed_is_refused_by_name(device, stream, words, kind):
    buffer, _ = words
    flag, semaphore = device.allocate(4), device.create_semaphore()
    stream.write_value(flag, 0)
    stream.synchronize()
    builder = device.create_graph()
    for number in range(20):
        builder.write_value(buffer[:4], number)
    if kind == "loop":
        with builder.loop(while_=flag) as body:
            body.write_value(flag, 0)
    elif kind == "condition":
        with builder.condition(flag) as body:
            body.write_value(buffer[:4], 1)
    elif kind == "write":
        builder.write_value(flag, 1)
    else:
        builder.signal(semaphore)
    with builder.instantiate() as graph:
        graph.launch(stream)
        stream.synchronize()
        flag.close()
        semaphore.close()
        for _ in range(2):
            with pytest.raises(ClosedError, match=r"made at .*test_graph\.py:\d+: .*closed"):
                graph.launch(stream)
        stream.fill(buffer, 0)
        stream.synchronize()



def test_a_buffer_that_a_replay_in_flight_uses_is_not_closed(device, stream, words):
    buffer, host = words
    with device.create_semaphore() as go:
        builder = device.create_graph()
        builder.wait(go, 1)
        builder.copy(host, buffer)
        with builder.instantiate() as graph:
            graph.launch(stream)
            with pytest.raises(BufferInUse, match="INDIRECT"):
                buffer.close()
            go.set(1)
            stream.synchronize()


def test_a_fault_names_the_node_its_line_and_its_buffers(device, stream, words, monkeypatch):
    buffer, host = words
    builder = device.create_graph()
    first = builder.fill(buffer, 1, 4)
    node = builder.copy(host, buffer, after=[first])
    # An address beyond all memory, past the checks that would not let it in.
    with builder.instantiate() as graph:
        view = graph._list.view()
        view[64 + 40:64 + 48] = (1 << 60).to_bytes(8, "little")
        graph.launch(stream)
        with pytest.raises(DeviceFault) as fault:
            stream.synchronize()
        assert fault.value.code == FaultCode.ADDRESS
        assert node.where in fault.value.node
        assert f"src={buffer!r}" in fault.value.node
        assert "copy of 256 bytes" in str(fault.value)
        assert len(stream.recover()) == 1
        graph.update(node, src=buffer)
        graph.launch(stream)
        stream.synchronize()
        assert (host.array == 1).all()


def test_times_are_those_of_the_newest_replay_that_has_finished(device, stream, words):
    buffer, host = words
    with device.create_semaphore() as go:
        builder = device.create_graph()
        builder.copy(host, buffer, after=[builder.fill(buffer, 1, 4)])
        with builder.instantiate() as graph:
            with pytest.raises(InvalidArgument, match=r"no replay of .* has finished"):
                graph.times()
            graph.launch(stream)
            stream.synchronize()
            first = graph.times()
            assert [time.node.name for time in first] == ["fill of 256 bytes", "copy of 256 bytes"]
            assert all(0 < time.start_ns <= time.end_ns for time in first)
            stream.wait(go, 1)
            graph.launch(stream)
            graph.launch(stream)
            assert graph.times() == first
            go.set(1)
            stream.synchronize()
            assert graph.times()[0].start_ns > first[1].end_ns


def test_wrong_nodes_are_refused_and_the_graph_stays_as_it_was(device, stream, words, axpy, other_device):
    buffer, host = words
    builder = device.create_graph()
    node = builder.fill(buffer, 1)
    with other_device.allocate(COUNT, np.uint32) as foreign:
        cases = [
            (lambda: builder.copy(np.zeros(COUNT, np.uint32), buffer), InvalidType, "allocate a HostBuffer"),
            (lambda: builder.copy(host, foreign), InvalidArgument, "src belongs to another device"),
            (lambda: builder.copy(host[:3], buffer), InvalidArgument, "dst has 12 bytes, src 256"),
            (lambda: builder.copy(host[::2], buffer[::2]), InvalidArgument, "dst is a strided view"),
            (lambda: builder.fill(buffer, 1, 3), InvalidArgument, "1, 2 or 4 bytes"),
            (lambda: builder.fill(buffer, 256), InvalidArgument, "a pattern of 1 bytes"),
            (lambda: builder.fill(buffer, "1"), InvalidType, "not a whole number"),
            (lambda: builder.launch(axpy, buffer), InvalidArgument, "takes 4 arguments"),
            (lambda: builder.launch("axpy", buffer), InvalidType, "what is launched is str"),
            (lambda: builder.write_value(host.view(np.uint8, 3), 1), InvalidArgument, "a word has 4 bytes"),
            (lambda: builder.wait_value(host, 1, condition="le"), InvalidArgument, "a condition is one of 'ge'"),
            (lambda: builder.loop(0), InvalidArgument, "the count of a loop is 1"),
            (builder.loop, InvalidArgument, "one of the two"),
            (lambda: builder.loop(2, while_=host), InvalidArgument, "one of the two"),
            (lambda: builder.signal(3), InvalidType, "a semaphore is int"),
            (lambda: builder.child(4), InvalidType, "a child is int"),
            (lambda: builder.child(other_device.create_graph()), InvalidArgument, "another device"),
            (lambda: builder.fill(buffer, 1, after=[4]), InvalidType, "a node to come after is int"),
            (lambda: builder.fill(buffer, 1, after=4), InvalidType, "after is int"),
            (lambda: builder.fill(buffer, 1, after=[device.create_graph().fill(buffer, 1)]), InvalidArgument,
             "is no node of this graph"),
            (lambda: device.create_graph().instantiate(), InvalidArgument, "the graph is empty"),
        ]
        for call, error, text in cases:
            with pytest.raises(error, match=text):
                call()
    assert builder.nodes == [node]
    with builder.instantiate() as graph:
        for wrong, error in ((None, InvalidType), (device, InvalidType)):
            with pytest.raises(error):
                graph.launch(wrong)
        with other_device.create_stream() as foreign_stream, pytest.raises(InvalidArgument, match="another device"):
            graph.launch(foreign_stream)
        graph.launch(stream)
        stream.synchronize()
    graph.close()
    for call in (lambda: graph.launch(stream), graph.times, lambda: graph.update(node, value=1)):
        with pytest.raises(ClosedError):
            call()


def test_a_graph_ends_with_its_device_and_with_a_reset(embedded):
    with embedded.allocate(64) as buffer:
        builder = embedded.create_graph()
        builder.fill(buffer, 1)
        graph = builder.instantiate()
        embedded.reset()
        assert graph.closed
        with embedded.create_stream() as stream, pytest.raises(ClosedError):
            graph.launch(stream)


def test_conditions_and_loops_look_at_semaphores_and_go_through_files(device, stream, tmp_path):
    with device.create_semaphore() as flag, device.create_semaphore(3) as left, device.allocate_host(2, np.uint32) as x:
        builder = device.create_graph()
        with builder.condition(flag, 5, condition="eq") as body:
            body.write_value(x, 77)
        with builder.loop(while_=left, after=[body.node]) as turn:
            # One less each time, modulo 2^32: an ADD adds at most 2^31 - 1.
            half = turn.signal(left, (1 << 31) - 1)
            turn.signal(left, (1 << 31) - 1, after=[turn.signal(left, 1, after=[half])])
            turn.write_value(x[1:], 9)
        graph = builder.instantiate()
        graph.save(tmp_path / "graph", {"x": x})
        loaded = device.load_graph(tmp_path / "graph", {"x": x}, [flag, left])
        for each in (graph, loaded):
            x.array[:] = 0
            flag.set(4)
            left.set(3)
            each.launch(stream)
            stream.synchronize(10)
            assert (list(x.array), left.value) == ([0, 9], 0)
            flag.set(5)
            each.launch(stream)
            stream.synchronize(10)
            assert list(x.array) == [77, 9]
        flag.close()
        with pytest.raises(ClosedError):
            graph.launch(stream)
        with pytest.raises(ClosedError):
            builder.condition(flag)
        graph.close()
        loaded.close()


def test_threads_launch_one_graph_on_one_stream_and_others_while_it_is_updated(device):
    with (device.create_stream() as here, device.create_stream() as there, device.create_semaphore() as launched,
          device.upload(np.zeros(1, np.uint32)) as word):
        with here.capture() as capture:
            here.write_value(word, 1)
            here.signal(launched)
        with capture.instantiate() as graph:
            def launch(stream):
                for _ in range(100):
                    graph.launch(stream)

            def update():
                for value in range(20):
                    graph.update(graph.nodes[0], value=value)

            threads = [threading.Thread(target=launch, args=(stream,)) for stream in (here, here, there)]
            threads.append(threading.Thread(target=update))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            graph.launch(here)
            here.synchronize()
            there.synchronize()
            assert launched.value == 301
            assert word.copy_to_host(here)[0] == 19
