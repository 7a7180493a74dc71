"""What a communicator refuses, and that the next call works."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import maia_rt
from maia_rt.errors import (
    ClosedError,
    DeviceTimeout,
    InvalidArgument,
    InvalidType,
    MismatchedRanks,
    Unsupported,
)
from maia_rt.runtime.peer import PeerPath


@pytest.fixture
def buffers(pair):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(device.upload(np.full(64, 1, np.float32))) for device in pair.devices]


def works(pair, buffers):
    pair.all_reduce(buffers).synchronize(10)
    return True


def test_devices_that_make_no_communicator(open_devices):
    first, second = open_devices(2)
    for wrong, error in ((None, InvalidType), (first, InvalidType), ("emulated", InvalidType), (3, InvalidType),
                         ([], InvalidArgument), ([first], InvalidArgument), ([first, first], InvalidArgument),
                         ([first, object()], InvalidType)):
        with pytest.raises(error):
            maia_rt.Communicator(wrong)
    for options, error in (({"timeout": -1}, InvalidArgument), ({"timeout": "long"}, InvalidType),
                           ({"algorithm": "tree"}, InvalidArgument), ({"algorithm": None}, InvalidArgument)):
        with pytest.raises(error):
            maia_rt.Communicator([first, second], **options)
    second.close()
    with pytest.raises(ClosedError):
        maia_rt.Communicator([first, second])


def test_more_ranks_than_there_are_are_refused_by_name(open_devices):
    with pytest.raises(InvalidArgument, match="2 devices or more, each once"):
        maia_rt.Communicator(open_devices(1) * 4)


def test_buffers_that_cannot_take_part(pair, buffers):
    first, second = pair.devices
    with contextlib.ExitStack() as stack:
        short = stack.enter_context(second.allocate(63, np.float32))
        plain = stack.enter_context(second.allocate(256))
        whole = stack.enter_context(first.allocate((64, 2), np.float32))
        host = stack.enter_context(second.allocate_host(64, np.float32))
        sram = stack.enter_context(second.allocate(64, np.float32, space=maia_rt.Space.cluster(0)))
        closed = second.allocate(64, np.float32)
        closed.close()
        for wrong, error, text in (
                ([buffers[1], buffers[0]], InvalidArgument, "belongs to"), (buffers[:1], InvalidArgument, "2 ranks"),
                ([buffers[0], short], MismatchedRanks, "rank 1: all_reduce of 63"), (None, InvalidType, "sequence"),
                ([buffers[0], plain], InvalidType, "uint8 is not reduced"), (buffers[0], InvalidType, "sequence"),
                ([buffers[0], np.zeros(64, np.float32)], InvalidType, "ndarray"),
                ([buffers[0], None], InvalidType, "None"),
                ([whole[:, 0], buffers[1]], InvalidArgument, "strided"),
                ([buffers[0], host], InvalidType, "HostBuffer"),
                ([buffers[0], sram], InvalidArgument, "lies in"), ([buffers[0], closed], ClosedError, "closed"),
                ([buffers[0], buffers[1].view(np.int32)], MismatchedRanks, "rank 1: all_reduce of 64 x int32")):
            with pytest.raises(error, match=text):
                pair.all_reduce(wrong)
        with pytest.raises(InvalidArgument, match="overlap"):
            pair.all_reduce([buffers[0][:32], buffers[1][:32]], [buffers[0][16:48], buffers[1][16:48]])
        with pytest.raises(InvalidArgument, match="needs 128 x float32"):
            pair.all_gather(buffers, buffers)
        with pytest.raises(InvalidArgument, match="equal parts"):
            pair.all_to_all([b[:63] for b in buffers], [b[:63] for b in buffers])
        with pytest.raises(InvalidArgument, match="overlap"):
            pair.all_to_all(buffers, buffers)
        with pytest.raises(InvalidArgument, match="itself"):
            pair.send(buffers[0][:8], buffers[0][8:16])
    assert works(pair, buffers)


def test_arguments_that_are_wrong(pair, buffers, eight_sockets):
    with contextlib.ExitStack() as stack:
        third = stack.enter_context(maia_rt.open(eight_sockets[7]))
        foreign, one = (stack.enter_context(device.create_stream()) for device in (third, pair.devices[0]))
        with third.allocate(64, np.float32) as outside:
            for options, error in (({"op": "mean"}, InvalidArgument), ({"op": None}, InvalidArgument),
                                   ({"op": 3}, InvalidArgument), ({"algorithm": "tree"}, InvalidArgument),
                                   ({"streams": [one]}, InvalidArgument), ({"streams": one}, InvalidType),
                                   ({"streams": [one, foreign]}, InvalidArgument),
                                   ({"streams": [one, "stream"]}, InvalidType)):
                with pytest.raises(error):
                    pair.all_reduce(buffers, **options)
            for root in (-1, 2, "0", None):
                with pytest.raises((InvalidArgument, InvalidType)):
                    pair.broadcast(buffers, root)
                with pytest.raises((InvalidArgument, InvalidType)):
                    pair.reduce(buffers, buffers[0], root)
            with pytest.raises(InvalidArgument, match="no rank's device"):
                pair.send(buffers[0], outside)
            with pytest.raises(MismatchedRanks):
                pair.send(buffers[0], buffers[1][:8])
            for rank in (-1, 2, "0", None):
                with pytest.raises((InvalidArgument, InvalidType)):
                    pair.rank(rank)
    assert works(pair, buffers)


def test_a_closed_communicator_says_so(open_devices):
    devices = open_devices(2)
    with maia_rt.Communicator(devices) as pair:
        handle = pair.rank(0)
    pair.close()
    with devices[0].allocate(4, np.float32) as a, devices[1].allocate(4, np.float32) as b:
        for call in (lambda: pair.all_reduce([a, b]), pair.barrier, lambda: handle.all_reduce(a), lambda: pair.rank(1)):
            with pytest.raises(ClosedError):
                call()


def test_a_device_whose_memory_no_peer_can_map_is_refused(open_devices, monkeypatch):
    devices = open_devices(2)
    monkeypatch.setattr(PeerPath, "_map", refuse)
    with pytest.raises(Unsupported, match="this region cannot be mapped"):
        maia_rt.Communicator(devices)


def refuse(_):
    raise Unsupported("this region cannot be mapped")


# --- a thread a rank -------------------------------------------------------------------------------------------------


def in_threads(*functions):
    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(function) for function in functions]
        return [future.exception(30) or future.result() for future in futures]


def test_ranks_in_threads_reduce_together(ranks):
    total = sum(range(1, len(ranks) + 1))

    def work(rank):
        handle, device = ranks.rank(rank), ranks.devices[rank]
        with (device.create_stream() as stream, device.upload(np.full(500, rank + 1, np.float32)) as mine,
              device.allocate(500 * len(ranks), np.float32) as all_of_them):
            for _ in range(5):
                handle.all_gather(mine, all_of_them, stream=stream)
            handle.all_reduce(mine, stream=stream)
            handle.barrier(stream=stream)
            handle.broadcast(mine, 1, stream=stream)
            return all_of_them.copy_to_host(stream), mine.copy_to_host(stream)

    for gathered, reduced in in_threads(*(lambda rank=rank: work(rank) for rank in range(len(ranks)))):
        np.testing.assert_array_equal(gathered, np.repeat(np.arange(1, len(ranks) + 1), 500))
        np.testing.assert_array_equal(reduced, total)


@pytest.mark.parametrize("case", ["size", "dtype", "op", "order", "root", "algorithm"])
def test_ranks_that_disagree_are_named_to_all_of_them(pair, buffers, case):
    one, other = pair.rank(0), pair.rank(1)
    a, b = buffers
    calls = {
        "size": (lambda: one.all_reduce(a), lambda: other.all_reduce(b[:63]), "rank 1: all_reduce of 63 x float32"),
        "dtype": (lambda: one.all_reduce(a), lambda: other.all_reduce(b.view(np.int32)), "rank 1: .* int32"),
        "op": (lambda: one.all_reduce(a), lambda: other.all_reduce(b, op="prod"), "rank 1: .* prod"),
        "order": (lambda: one.all_reduce(a), other.barrier, "rank 1: barrier"),
        "root": (lambda: one.broadcast(a, 0), lambda: other.broadcast(b, 1), "rank 1: .* root 1"),
        "algorithm": (lambda: one.all_reduce(a), lambda: other.all_reduce(b, algorithm="direct"), "rank 1: .* direct"),
    }
    first, second, text = calls[case]
    for error in in_threads(first, second):
        assert isinstance(error, MismatchedRanks) and sorted(error.said) == [0, 1]
        with pytest.raises(MismatchedRanks, match=text):
            raise error
    assert works(pair, buffers), "nothing was submitted, and the communicator goes on"


def test_a_send_meets_its_receive_and_nobody_else(pair, buffers):
    one, other = pair.rank(0), pair.rank(1)
    a, b = buffers
    a.device.default_stream.fill(a, 7)
    for result in in_threads(lambda: one.send(a, 1), lambda: other.recv(b, 0)):
        result.synchronize(10)
    np.testing.assert_array_equal(a.copy_to_host(), b.copy_to_host())
    for error in in_threads(lambda: one.send(a, 1), lambda: other.all_reduce(b)):
        assert isinstance(error, MismatchedRanks)
    for error in in_threads(lambda: one.send(a, 1), lambda: other.send(b, 0)):
        assert isinstance(error, MismatchedRanks)
    assert works(pair, buffers)


def test_a_rank_that_does_not_come_is_named_when_the_time_is_up(open_devices):
    devices = open_devices(4)
    with maia_rt.Communicator(devices, timeout=0.5) as ranks, contextlib.ExitStack() as stack:
        buffers = [stack.enter_context(device.allocate(8, np.float32)) for device in devices]
        errors = in_threads(*(lambda rank=rank: ranks.rank(rank).all_reduce(buffers[rank]) for rank in (0, 2)))
        for error in errors:
            assert isinstance(error, DeviceTimeout | MismatchedRanks)
            assert "ranks 1, 3 did not call within 0.5 s" in str(error)
        ranks.all_reduce(buffers).synchronize(10)


def test_closing_ends_the_wait_of_a_rank(open_devices):
    devices = open_devices(2)
    ranks = maia_rt.Communicator(devices)
    with devices[0].allocate(8, np.float32) as mine:
        waiting = threading.Event()

        def call():
            handle = ranks.rank(0)
            waiting.set()
            return handle.all_reduce(mine)

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(call)
            waiting.wait(10)
            ranks.close()
            assert isinstance(future.exception(10), ClosedError)
