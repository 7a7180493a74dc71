"""Validation at submit time: races between streams, and certain deadlocks."""

import re

import numpy as np
import pytest

import maia_rt
from maia_rt.contract.commands import PostOp, WaitOp
from maia_rt.errors import DeadlockError, InvalidType, RaceError
from tests.runtime.conftest import PCI_DEVICE

BYTES = 4096


@pytest.fixture
def checked(request, paths_for_the_embedded_emulator):
    """A device that validates."""
    with maia_rt.open(PCI_DEVICE or request.getfixturevalue("emulator")[1], validate=True) as device:
        yield device


@pytest.fixture
def two(checked):
    with checked.create_stream() as first, checked.create_stream() as second:
        yield first, second


def test_two_streams_that_write_the_same_bytes_are_a_race_and_nothing_is_submitted(checked, two):
    first, second = two
    with checked.allocate(BYTES) as buffer:
        first.fill(buffer, 1)
        with pytest.raises(RaceError, match=r"fill on stream \d+ writes <Buffer 4096 bytes.*test_validation.*fill on "
                                            r"stream \d+ writes it, submitted at .*test_validation.*nothing orders"
                           ) as caught:
            second.fill(buffer, 2)
        assert second.statistics().submitted == 0
        lines = [int(re.search(r":(\d+)$", where).group(1)) for where in caught.value.where]
        assert lines[1] - lines[0] == 4
        second.wait(first.record())
        second.fill(buffer, 2)
        assert (buffer.copy_to_host(second) == 2).all()


def test_a_read_and_a_write_race_whichever_comes_first(checked, two):
    first, second = two
    with checked.allocate(BYTES) as buffer, checked.allocate(BYTES) as copied:
        first.copy(copied, buffer)
        with pytest.raises(RaceError, match=r"fill .* writes .* copy .* reads it"):
            second.fill(buffer, 1)
        with pytest.raises(RaceError, match=r"copy .* reads .* copy .* writes it"):
            second.copy(buffer, copied)
        with pytest.raises(RaceError):
            copied.copy_to_host(second)


def test_two_streams_may_read_the_same_memory_and_write_beside_each_other(checked, two):
    first, second = two
    with checked.allocate(BYTES) as source, checked.allocate(BYTES) as target:
        first.copy(target[:1024], source[:1024])
        second.copy(target[1024:], source[:3072])
        with pytest.raises(RaceError, match=r"from 0x[0-9a-f]+ on"):
            first.fill(target[1023:1025], 0)
        first.fill(target[:1024], 0)


def test_what_the_host_has_waited_for_is_ordered(checked, two):
    first, second = two
    with checked.allocate(BYTES) as buffer:
        first.fill(buffer, 1)
        first.synchronize()
        second.fill(buffer, 2)
        second.record().synchronize()
        first.fill(buffer, 3)
        while not first.query():
            pass
        second.fill(buffer, 4)
        checked.synchronize()
        assert (buffer.copy_to_host() == 4).all()


def test_order_goes_through_third_streams_but_an_event_is_only_for_what_was_before_it(checked, two):
    first, second = two
    with checked.allocate(BYTES) as buffer, checked.create_stream() as third:
        first.fill(buffer, 1)
        third.wait(first.record())
        first.fill(buffer[:16], 2)
        second.wait(third.record())
        second.fill(buffer[16:], 3)
        with pytest.raises(RaceError):
            second.fill(buffer, 3)


def test_memory_handed_out_anew_has_no_past(checked, two):
    first, second = two
    buffer = checked.allocate(BYTES)
    address = buffer.address
    first.fill(buffer, 1)
    buffer.close()
    first.query()
    checked._reclaimer.collect()
    while True:
        with checked.allocate(BYTES) as another:
            if another.address != address:
                continue
            second.fill(another, 2)
            break


def test_a_copy_into_ordinary_memory_has_been_waited_for(checked, two):
    first, second = two
    with checked.allocate(BYTES) as buffer:
        first.fill(buffer, 1)
        first.copy(np.empty(BYTES, np.uint8), buffer)
        second.fill(buffer, 2)


def test_pinned_memory_counts_too(checked, two):
    first, second = two
    with checked.allocate_host(BYTES) as pinned, checked.allocate(BYTES) as buffer:
        first.copy(buffer, pinned)
        with pytest.raises(RaceError, match="HostBuffer"):
            second.fill(pinned, 1)


def test_nothing_is_compared_unless_it_was_asked_for(device):
    assert device._validator is None
    with device.create_stream() as first, device.create_stream() as second, device.allocate(16) as buffer:
        first.fill(buffer, 1)
        second.fill(buffer, 2)


def test_the_environment_asks_for_it(monkeypatch, paths_for_the_embedded_emulator, own_selector):
    monkeypatch.setenv("MAIA_VALIDATE", "1")
    with maia_rt.open(own_selector) as device:
        assert device._validator is not None
    with maia_rt.open(own_selector, validate=False) as device:
        assert device._validator is None


@pytest.mark.parametrize("odd", [1, "yes", []])
def test_whether_to_validate_is_yes_or_no(odd):
    with pytest.raises(InvalidType, match="validate is"):
        maia_rt.open("emulated", validate=odd)


def test_memory_of_the_past_is_bounded(checked, two):
    first, second = two
    with checked.allocate(1 << 20) as buffer:
        for at in range(0, 40_000, 2):
            checked._validator.command(first, "fill", writes=[(buffer.address + at, 1, buffer)])
        assert len(checked._validator._memory.starts) <= 1 << 14
        checked._validator.command(second, "fill", writes=[(buffer.address + 40_001, 1, buffer)])
        with pytest.raises(RaceError):
            checked._validator.command(second, "fill", writes=[(buffer.address + 39_998, 1, buffer)])


# Semaphores, by the validator's own calls: commands for them come from the streams.


def test_a_signal_orders_what_waits_for_it(checked, two):
    first, second = two
    validator = checked._validator
    with checked.allocate(BYTES) as buffer:
        first.fill(buffer, 1)
        validator.signal(first, 100, "semaphore 100", PostOp.SET, 1)
        validator.block(second, 100, "semaphore 100", WaitOp.GE, 1)
        second.fill(buffer, 2)
        first.wait(second.record())
        first.fill(buffer, 3)


def test_a_wait_submitted_before_its_signal_orders_what_comes_after_both(checked, two):
    first, second = two
    validator = checked._validator
    with checked.allocate(BYTES) as buffer, checked.allocate(BYTES) as other, checked.create_stream() as third:
        validator.block(second, 100, "semaphore 100", WaitOp.GE, 2)
        second.fill(buffer, 1)  # behind the open wait: compared with nobody yet
        first.fill(buffer, 2)
        first.fill(other, 2)
        validator.signal(first, 100, "semaphore 100", PostOp.ADD, 1)
        validator.signal(first, 100, "semaphore 100", PostOp.ADD, 1)
        second.fill(other, 1)
        with pytest.raises(RaceError):
            third.fill(other, 1)


def test_a_signal_that_another_one_can_stand_for_orders_nothing(checked, two):
    first, second = two
    validator = checked._validator
    with checked.allocate(BYTES) as buffer, checked.create_stream() as third:
        first.fill(buffer, 1)
        validator.signal(first, 100, "semaphore 100", PostOp.SET, 1)
        validator.signal(third, 100, "semaphore 100", PostOp.SET, 1)
        validator.block(second, 100, "semaphore 100", WaitOp.GE, 1)
        with pytest.raises(RaceError):
            second.fill(buffer, 2)


def test_acquires_count_what_others_have_taken(checked, two):
    first, second = two
    validator = checked._validator
    with checked.allocate(BYTES) as buffer:
        for half in (buffer[:2048], buffer[2048:]):
            first.fill(half, 1)
            validator.signal(first, 100, "semaphore 100", PostOp.ADD, 1)
            validator.block(second, 100, "semaphore 100", WaitOp.ACQUIRE, 1)
            second.fill(half, 2)


@pytest.mark.parametrize("members", [1, 2, 3])
def test_a_ring_of_streams_that_wait_for_each_other_is_a_deadlock(checked, members):
    validator = checked._validator
    streams = [checked.create_stream() for _ in range(members)]
    for number, stream in enumerate(streams):
        validator.block(stream, number, f"semaphore {number}", WaitOp.GE, 1)
        if number < members - 1:
            validator.signal(stream, number + 1, f"semaphore {number + 1}", PostOp.SET, 1)
    with pytest.raises(DeadlockError, match=r"waits for semaphore 0 >= 1, submitted at .*test_validation.*signals "
                                            r"semaphore 0, submitted at .*test_validation") as caught:
        validator.signal(streams[-1], 0, "semaphore 0", PostOp.SET, 1)
    assert all("test_validation.py:" in where for where in caught.value.where)
    # The program, or another stream, can still help: what was submitted is no deadlock by itself.
    with checked.create_stream() as free:
        validator.signal(free, 0, "semaphore 0", PostOp.SET, 1)
    validator.signal(streams[-1], 0, "semaphore 0", PostOp.SET, 1)
    for stream in streams:
        stream.close()


def test_a_semaphore_that_the_program_signals_itself_is_no_certain_deadlock(checked, two):
    validator = checked._validator
    validator.host_signal(100, "semaphore 100", PostOp.SET, 0)
    validator.block(two[0], 100, "semaphore 100", WaitOp.GE, 1)
    validator.signal(two[0], 100, "semaphore 100", PostOp.ADD, 1)


def test_semaphores_may_wrap(checked, two):
    first, second = two
    validator = checked._validator
    validator.host_signal(100, "semaphore 100", PostOp.SET, 2**32 - 1)
    with checked.allocate(BYTES) as buffer:
        first.fill(buffer, 1)
        validator.signal(first, 100, "semaphore 100", PostOp.ADD, 3)
        validator.block(second, 100, "semaphore 100", WaitOp.GE, 2)
        second.fill(buffer, 2)


# As programs use them.


def test_semaphores_of_streams_and_of_the_program_order_what_they_let_go_on(checked, two):
    first, second = two
    with checked.allocate(BYTES) as buffer, checked.create_semaphore(7) as semaphore:
        second.wait(semaphore, 8)
        first.fill(buffer, 1)
        first.signal(semaphore)
        second.fill(buffer, 2)
        second.signal(semaphore)
        semaphore.wait(9)
        first.fill(buffer, 3)
        first.synchronize()
        second.synchronize()


def test_a_semaphore_that_holds_the_value_already_orders_nothing(checked, two):
    first, second = two
    with checked.allocate(BYTES) as buffer, checked.create_semaphore(7) as semaphore:
        first.fill(buffer, 1)
        first.signal(semaphore)
        second.wait(semaphore, 7)
        with pytest.raises(RaceError):
            second.fill(buffer, 2)
        checked.synchronize()


def test_a_deadlock_is_refused_at_the_signal_that_would_complete_it(checked, two):
    first, second = two
    with checked.create_semaphore() as here, checked.create_semaphore() as there:
        first.wait(here, 1)
        first.signal(there)
        second.wait(there, 1)
        with pytest.raises(DeadlockError, match=rf"{first.name}.* waits for {here.name} >= 1, .*; .*{second.name}.* "
                                                rf"signals {here.name}"):
            second.signal(here)
        here.set(1)
        checked.synchronize()


def test_a_word_of_memory_orders_like_a_semaphore(checked, two):
    first, second = two
    with checked.allocate(BYTES) as buffer, checked.allocate_host(1, np.uint32) as word:
        word.array[:] = 0
        first.fill(buffer, 1)
        first.write_value(word, 5)
        second.wait_value(word, 5)
        second.fill(buffer, 2)
        checked.synchronize()
        word.array[:] = 0
        second.wait_value(word, 1, condition="and")
        second.fill(buffer, 3)
        word.array[:] = 1
        second.synchronize()
        first.fill(buffer, 4)
        checked.synchronize()


def test_memory_freed_while_another_stream_uses_it_is_a_race(checked, two):
    first, second = two
    buffer = first.allocate(BYTES)
    first.fill(buffer, 1)
    second.wait(first)
    second.fill(buffer, 2)
    with pytest.raises(RaceError, match=r"free on .* writes"):
        first.free(buffer)
    first.wait(second)
    first.free(buffer)
    checked.synchronize()


def test_a_fence_orders_all_streams(checked, two):
    first, second = two
    with checked.allocate(BYTES) as buffer:
        first.fill(buffer, 1)
        checked.fence()
        second.fill(buffer, 2)
        checked.synchronize()


def test_a_replay_of_a_graph_counts_as_what_its_nodes_do(checked, two):
    first, second = two
    with checked.allocate(BYTES) as source, checked.allocate(BYTES) as target:
        with first.capture() as capture:
            first.fill(source, 1)
            first.copy(target, source)
        with capture.instantiate() as graph:
            graph.launch(first)
            with pytest.raises(RaceError, match=r"fill on .* writes .*; launch of a graph .* writes it"):
                second.fill(source, 2)
            with pytest.raises(RaceError, match="launch of a graph"):
                graph.launch(second)
            second.wait(first)
            graph.launch(second)
            checked.synchronize()
