"""Priorities: the urgent stream's commands start first, and nobody starves."""

import contextlib

import numpy as np
import pytest

from maia_rt.errors import InvalidArgument, InvalidType

WORK = 20


@pytest.fixture
def highest(attached):
    if attached.capabilities.priorities < 2:
        pytest.skip("the device has one priority: take one whose SCHEDULING_CAPS.PRIORITIES is larger")
    return attached.capabilities.priorities - 1


def released_at_once(device, priorities, work):
    """Give streams of these priorities work, release all at one moment, and return each one's first and last time."""
    with contextlib.ExitStack() as stack:
        mine, gate = (stack.enter_context(device.create_semaphore()) for _ in range(2))
        # The device looks at this one last: when it opens the gate, all others are looked at again, in their order.
        opener = stack.enter_context(device.create_stream(priority=0))
        streams = [stack.enter_context(device.create_stream(priority=priority)) for priority in priorities]
        for stream in streams:
            stream.wait(gate, 1)
        marks = []
        for number, stream in enumerate(streams):
            first = stream.record(timing=True)
            work(number, stream)
            marks.append((first, stream.record(timing=True)))
        opener.wait(mine, 1)
        opener.signal(gate, 1)
        mine.set(1)
        for stream in streams:
            stream.synchronize(10)
        return [(first.time_ns, last.time_ns) for first, last in marks]


def test_the_urgent_streams_commands_start_first_whoever_came_first(attached, highest):
    priorities = [1] * 6 + [highest] + [1] * 5
    with attached.allocate((len(priorities), 4096), np.uint8) as buffer:
        def work(number, stream):
            for value in range(WORK):
                stream.fill(buffer[number], value)

        times = released_at_once(attached, priorities, work)
    urgent = times.pop(6)
    assert all(urgent[0] <= first for first, _ in times)
    assert all(urgent[1] <= last for _, last in times)


def test_streams_are_served_in_the_order_of_their_priorities(attached, highest):
    priorities = [p for _ in range(2) for p in range(1, highest + 1)]
    times = released_at_once(attached, priorities, lambda number, stream: None)
    order = sorted(range(len(times)), key=lambda number: times[number][0])
    assert sorted((priorities[number] for number in order), reverse=True) == [priorities[number] for number in order]


def test_a_stream_of_no_urgency_is_served_all_the_same(attached, highest):
    with attached.create_stream() as slow, attached.create_stream(priority=highest) as urgent, \
            attached.allocate(1 << 22, np.uint8) as buffer:
        for value in range(10):
            urgent.fill(buffer[1 << 21:], value)
            slow.fill(buffer[:1 << 12], value)
        slow.synchronize(10)
        urgent.synchronize(10)
        assert (buffer[:1 << 12].copy_to_host() == 9).all()


def test_a_stream_that_shares_gets_its_priority_with_a_queue_of_its_own(crowded):
    if crowded.capabilities.priorities < 2:
        pytest.skip("the device has one priority: take one whose SCHEDULING_CAPS.PRIORITIES is larger")
    with crowded.create_stream(), crowded.create_stream() as second, crowded.create_stream(priority=1) as urgent, \
            crowded.allocate(64, np.uint8) as buffer:
        urgent.fill(buffer, 1)
        shared, start = urgent.queue, urgent.record(timing=True)
        second.close()
        urgent.fill(buffer, 2)
        end = urgent.record(timing=True)
        assert urgent.queue is not shared
        assert crowded._queues._places[urgent.queue].priority == 1
        assert end - start >= 0  # an event's time outlives the move
        assert (buffer.copy_to_host(urgent) == 2).all()


@pytest.mark.parametrize(("priority", "error"), [(-1, InvalidArgument), (1000, InvalidArgument), ("high", InvalidType),
                                                 (1.0, InvalidType), (None, InvalidType)])
def test_a_priority_that_there_is_none_of_is_refused(attached, priority, error):
    with pytest.raises(error):
        attached.create_stream(priority=priority)
