"""Semaphores: what streams and the program wait for and post to, beside events; and how streams are confined."""

import gc
import threading
import time

import numpy as np
import pytest

from maia_rt.errors import ClosedError, DeviceTimeout, InvalidArgument, InvalidType, OutOfSemaphores
from tests.helpers import tiny_program

HALF = 1 << 31
LAST = (1 << 32) - 1


@pytest.fixture
def semaphore(device):
    with device.create_semaphore() as made:
        yield made


def test_a_stream_waits_for_a_semaphore_that_the_program_signals(device, stream, semaphore):
    with device.allocate(64) as buffer:
        stream.wait(semaphore, 2)
        stream.fill(buffer, 1)
        semaphore.add()
        assert not stream.query()
        semaphore.add()
        stream.synchronize(10)
        assert semaphore.value == 2


def test_one_stream_signals_another_before_and_after_it_waits(device, semaphore):
    with device.create_stream() as first, device.create_stream() as second, device.allocate(4, np.uint32) as buffer:
        for value in range(1, 40):
            if value % 2:
                second.wait(semaphore, value)
                first.fill(buffer, value, 4)
                first.signal(semaphore)
            else:
                first.fill(buffer, value, 4)
                first.signal(semaphore, value, op="set")
                second.wait(semaphore, value, op="eq")
            assert (buffer.copy_to_host(second) == value).all()


def test_acquire_takes_what_it_waited_for(device, stream, semaphore):
    stream.wait(semaphore, 3, op="acquire")
    stream.wait(semaphore, 2, op="acquire")
    semaphore.add(4)
    time.sleep(0.01)
    assert not stream.query()
    semaphore.add(2)
    stream.synchronize(10)
    assert semaphore.value == 1


def test_values_are_compared_serially_past_2_to_the_32(device, stream):
    with device.create_semaphore(LAST - 1) as semaphore:
        stream.wait(semaphore, 1)
        stream.signal(semaphore, 5)
        with pytest.raises(DeviceTimeout):
            stream.synchronize(0.01)
        assert semaphore.value == LAST - 1
        semaphore.add(2)
        assert semaphore.value == 0
        semaphore.add(1)
        stream.synchronize(10)
        assert semaphore.value == 6
        semaphore.wait(LAST)
        semaphore.wait(6, 1, op="eq")


def test_the_program_waits_with_a_deadline_that_says_what_it_holds(device, stream, semaphore):
    with pytest.raises(DeviceTimeout, match=rf"semaphore {semaphore.index} was not >= 1 within 0.02 s; it holds 0"):
        semaphore.wait(1, 0.02)
    seen = []
    waiter = threading.Thread(target=lambda: seen.append(semaphore.wait(3, 10)))
    waiter.start()
    stream.signal(semaphore, 3)
    waiter.join()
    assert seen == [None]


def test_a_semaphore_costs_and_gives_back_one(attached):
    made = []
    with pytest.raises(OutOfSemaphores, match="semaphores are in use"):
        while True:
            made.append(attached.create_semaphore())
    assert len(made) == attached.capabilities.semaphores - attached.capabilities.max_queues
    assert len({semaphore.index for semaphore in made}) == len(made)
    index = made[-1].index
    made[-1].set(77)
    made.pop().close()
    with attached.create_semaphore() as again:
        assert (again.index, again.value) == (index, 0)
    for semaphore in made:
        semaphore.close()
        semaphore.close()
    with pytest.raises(ClosedError):
        made[0].add()
    with pytest.warns(ResourceWarning, match="semaphore .* was not closed"):
        attached.create_semaphore()
        gc.collect()


def test_a_semaphore_in_use_is_not_dealt_out_again(attached):
    with attached.create_stream() as stream:
        semaphore = attached.create_semaphore()
        stream.wait(semaphore, 1)
        index = semaphore.index
        semaphore.close()
        with attached.create_semaphore() as other:
            assert other.index != index
        attached._firmware.post_semaphore(index, 1, 1)
        stream.synchronize(10)
        with attached.create_semaphore() as other:
            assert other.index == index


def test_a_stream_waits_for_all_of_another(device):
    with device.create_semaphore() as held, device.create_stream() as first, device.create_stream() as second, \
            device.allocate(64) as buffer:
        first.wait(held, 1)
        first.fill(buffer, 3)
        second.wait(first)
        assert not second.query()
        held.add()
        assert (buffer.copy_to_host(second) == 3).all()


def test_a_fence_orders_all_streams(device):
    streams = [device.create_stream() for _ in range(3)]
    with device.create_semaphore() as held, device.allocate(64) as buffer:
        streams[0].wait(held, 1)
        streams[0].fill(buffer, 1)
        device.fence()
        streams[1].fill(buffer, 2)
        device.fence()
        assert not any(stream.query() for stream in streams)
        held.add()
        assert (buffer.copy_to_host(streams[2]) == 2).all()
        for stream in streams:
            stream.close()


def test_wrong_semaphores_values_and_words_are_refused(attached, other_device):
    with attached.create_stream() as stream, attached.create_semaphore() as semaphore, \
            other_device.create_semaphore() as foreign, attached.allocate(64) as buffer:
        closed = attached.create_semaphore()
        closed.close()
        for call, error in ((lambda: stream.wait(semaphore), InvalidArgument),
                            (lambda: stream.wait(semaphore, -1), InvalidArgument),
                            (lambda: stream.wait(semaphore, 1 << 32), InvalidArgument),
                            (lambda: stream.wait(semaphore, 1.5), InvalidType),
                            (lambda: stream.wait(semaphore, 1, op="lt"), InvalidArgument),
                            (lambda: stream.wait(foreign, 1), InvalidArgument),
                            (lambda: stream.wait(closed, 1), ClosedError),
                            (lambda: stream.wait(3), InvalidType),
                            (lambda: stream.wait(stream.record(), 1), InvalidArgument),
                            (lambda: stream.signal(foreign, HALF), InvalidArgument),
                            (lambda: stream.signal(closed), ClosedError),
                            (lambda: stream.signal(buffer), InvalidType),
                            (lambda: stream.signal(semaphore, HALF), InvalidArgument),
                            (lambda: stream.signal(semaphore, 1, op="sub"), InvalidArgument),
                            (lambda: semaphore.add(HALF), InvalidArgument),
                            (lambda: semaphore.set("x"), InvalidType),
                            (lambda: semaphore.wait(0, -1), InvalidArgument),
                            (lambda: attached.create_semaphore(-1), InvalidArgument),
                            (lambda: stream.wait_value(buffer[:3], 1), InvalidArgument),
                            (lambda: stream.wait_value(buffer[1:], 1), InvalidArgument),
                            (lambda: stream.wait_value(buffer, 1 << 32), InvalidArgument),
                            (lambda: stream.wait_value(buffer, 1, condition="lt"), InvalidArgument),
                            (lambda: stream.wait_value(np.zeros(4, np.uint8), 1), InvalidType),
                            (lambda: stream.write_value(buffer, -1), InvalidArgument),
                            (lambda: stream.write_value(None, 1), InvalidType)):
            with pytest.raises(error):
                call()
        assert stream.statistics().submitted == 0
        assert semaphore.value == 0


def test_a_reset_device_closes_its_semaphores(attached):
    semaphore = attached.create_semaphore(5)
    attached.reset()
    with pytest.raises(ClosedError):
        semaphore.add()
    with attached.create_semaphore() as fresh:
        assert fresh.value == 0


def test_a_launch_keeps_to_the_clusters_of_its_stream(attached):
    with attached.create_stream(clusters=0b10) as stream, attached.load(tiny_program.image(8)) as loaded, \
            attached.allocate(8, np.float32) as x:
        stream.launch(loaded["axpy"], x, x, x, 1.0)
        stream.launch(loaded["axpy"], x, x, x, 1.0, clusters=0b10)
        with pytest.raises(InvalidArgument, match="are not all among the stream's"):
            stream.launch(loaded["axpy"], x, x, x, 1.0, clusters=0b01)
        stream.synchronize()
    for wrong in (-1, 1 << attached.capabilities.clusters, "x"):
        with pytest.raises((InvalidArgument, InvalidType)):
            attached.create_stream(clusters=wrong)


def test_a_stream_has_one_of_the_devices_priorities(attached):
    most = attached.capabilities.priorities - 1
    with attached.create_stream(priority=most) as stream, attached.allocate(64) as buffer:
        assert stream.priority == most
        stream.fill(buffer, 1)
        stream.synchronize()
    for wrong in (-1, most + 1, 1.5):
        with pytest.raises((InvalidArgument, InvalidType)):
            attached.create_stream(priority=wrong)
