"""Memory in the order of streams: pools, their figures, and what becomes of what was freed."""

import threading

import numpy as np
import pytest

import maia_rt
from maia_rt.errors import ClosedError, InvalidArgument, InvalidType, OutOfMemory
from tests.helpers.blocked import blocked

KIB = 1 << 10


@pytest.fixture
def pool(device):
    with device.create_pool(max_bytes=4 << 20) as made:
        yield made


@pytest.fixture
def other(device):
    with device.create_stream() as opened:
        yield opened


def test_what_a_stream_frees_it_may_have_again_at_once(stream, pool):
    with blocked(stream):
        first = stream.allocate((16, 16), np.float32, pool=pool)
        stream.fill(first, 1)
        address = first.address
        stream.free(first)
        again = stream.allocate(1000, pool=pool)
        assert again.address == address
        assert stream.statistics().in_flight == 2
        stream.free(again)


def test_another_stream_does_not_have_it_before(device, stream, other, pool):
    with blocked(stream):
        first = stream.allocate(64 * KIB, pool=pool)
        stream.fill(first, 1)
        address = first.address
        stream.free(first)
        second = other.allocate(64 * KIB, pool=pool)
        assert second.address != address
        other.fill(second, 2)
        other.synchronize()
        assert pool.statistics().waiting == 64 * KIB
    assert pool.statistics().waiting == 0
    other.free(second)


def test_where_nothing_else_is_left_the_other_stream_waits_for_it_on_the_device(device, stream, other):
    with device.create_pool(max_bytes=256 * KIB) as small:
        with blocked(stream):
            first = stream.allocate(256 * KIB, pool=small)
            stream.fill(first, 1)
            address = first.address
            stream.free(first)
            second = other.allocate(256 * KIB, pool=small)
            assert second.address == address
            other.fill(second, 2)
            assert not other.query()
        assert (second.copy_to_host(other) == 2).all()
        other.free(second)


def test_the_contents_are_those_of_the_new_owner(stream, pool):
    for value in range(20):
        with_value = stream.allocate(4 * KIB, pool=pool)
        stream.fill(with_value, value)
        found = with_value.copy_to_host(stream)
        stream.free(with_value)
        assert (found == value).all()
    assert pool.statistics().reserved <= maia_rt.runtime.pool.CHUNK_BYTES


def test_the_limit_names_the_largest_buffers(stream, pool):
    held = [stream.allocate((n, KIB), np.float32, pool=pool) for n in (200, 300, 100, 50)]
    with pytest.raises(OutOfMemory) as caught:
        stream.allocate(4 << 20, pool=pool)
    assert "its limit is 4194304" in caught.value.what
    assert "4 buffers" in caught.value.what
    largest = caught.value.cause
    assert largest.index("1228800 bytes of float32 (300, 1024) from") < largest.index("819200 bytes") < largest.index(
        "409600 bytes")
    assert "test_pool.py:" in largest
    assert "204800" not in largest
    for buffer in held:
        stream.free(buffer)
    stream.free(stream.allocate(4 << 20, pool=pool))


def test_freed_neighbours_join(device, stream):
    with device.create_pool(max_bytes=64 * KIB) as small, blocked(stream):
        parts = [stream.allocate(16 * KIB, pool=small) for _ in range(4)]
        for part in sorted(parts, key=lambda one: one.address):
            stream.free(part)
        whole = stream.allocate(64 * KIB, pool=small)
        stream.free(whole)


def test_the_figures_add_up(stream, pool):
    empty = pool.statistics()
    assert empty == maia_rt.PoolStatistics(0, 0, 0, 0, 0, 0, 0, 0, 0, 4 << 20)
    with blocked(stream):
        a, b = stream.allocate(1000, pool=pool), stream.allocate(256, pool=pool)
        full = pool.statistics()
        assert (full.used, full.allocations, full.total_bytes, full.total_allocations) == (1280, 2, 1280, 2)
        assert full.reserved >= full.used
        stream.free(a)
        freed = pool.statistics()
        assert (freed.used, freed.peak_used, freed.waiting, freed.allocations) == (256, 1280, 1024, 1)
        pool.reset_peaks()
        assert pool.statistics().peak_used == 256
        stream.free(b)
    after = pool.statistics()
    assert (after.used, after.waiting, after.reserved, after.peak_reserved) == (0, 0, 0, freed.peak_reserved)


def test_a_pool_keeps_its_threshold_and_trim_takes_it(device, stream):
    with device.create_pool(release_threshold=1 << 20) as keeping:
        before = device.memory().used
        stream.free(stream.allocate(1000, pool=keeping))
        stream.synchronize()
        assert keeping.statistics().reserved >= 1 << 20
        assert keeping.trim(1 << 20) == 0
        assert keeping.trim() >= 1 << 20
        assert keeping.statistics().reserved == 0
        assert device.memory().used == before


def test_memory_that_pools_keep_is_there_for_others(device, stream):
    whole = device.capabilities.hbm_bytes
    with device.create_pool(release_threshold=whole) as greedy:
        stream.free(stream.allocate(whole - (8 << 20), pool=greedy))
        stream.synchronize()
        with device.allocate(whole - (4 << 20)):
            assert greedy.statistics().reserved == 0


def test_a_buffer_of_a_pool_may_be_closed_instead(stream, pool):
    with stream.allocate(1000, pool=pool) as buffer:
        stream.fill(buffer, 1)
    stream.synchronize()
    assert pool.statistics().used == 0


def test_what_was_freed_is_not_used_and_the_text_says_where(stream, pool):
    buffer = stream.allocate((4, 4), np.float32, pool=pool)
    part = buffer[1:3]
    stream.free(buffer)
    for use in (lambda: stream.fill(buffer, 0), lambda: stream.free(buffer), lambda: part.address,
                lambda: stream.copy(part, np.zeros((2, 4), np.float32)), lambda: buffer[0]):
        with pytest.raises(ClosedError, match=r"closed, at .*test_pool.py:\d+"):
            use()
    buffer.close()


def test_memory_of_the_device_and_pinned_memory_are_freed_in_order_too(device, stream):
    before = device.memory().used
    with blocked(stream):
        buffer, host = device.allocate(1 << 16), device.allocate_host(1 << 16)
        host.array[:] = 7
        stream.copy(buffer, host)
        stream.free(buffer)
        stream.free(host)
        assert buffer.closed
        assert host.closed
        assert device.memory().used == before + (1 << 16)
    assert device.memory().used == before


def test_the_default_pool_serves_and_is_closed_with_the_device(device, stream):
    buffer = stream.allocate(100, np.int16)
    assert device.default_pool.statistics().allocations == 1
    stream.free(buffer)
    with pytest.raises(InvalidArgument, match="1 buffers that are not freed"):
        held = stream.allocate(100)
        device.default_pool.close()
    stream.free(held)
    default = device.default_pool
    default.close()
    assert device.default_pool is not default


def test_a_reset_empties_pools(device, pool):
    with device.create_stream() as stream:
        lost = stream.allocate(1000, pool=pool)
        device.reset()
        assert lost.closed
    assert pool.statistics().reserved == 0
    with device.create_stream() as stream:
        buffer = stream.allocate(1000, pool=pool)
        stream.free(buffer)


def test_what_a_stream_left_behind_is_somebody_elses(device, pool):
    with device.create_stream() as first:
        first.free(first.allocate(4 << 20, pool=pool))
    with device.create_stream() as second:
        second.free(second.allocate(4 << 20, pool=pool))


def test_a_stream_that_failed_does_not_keep_what_it_freed(device, stream, pool):
    with device.create_stream() as failing:
        buffer = failing.allocate(4 << 20, pool=pool)
        failing._submit(10)  # TRAP
        failing.free(buffer)
        with pytest.raises(maia_rt.errors.DeviceFault):
            failing.synchronize()
        stream.free(stream.allocate(4 << 20, pool=pool))
        failing.recover()


def test_threads_share_a_pool(device, pool):
    errors = []

    def work(value):
        try:
            with device.create_stream() as own:
                for _ in range(20):
                    buffer = own.allocate(8 * KIB, pool=pool)
                    own.fill(buffer, value)
                    assert (buffer.copy_to_host(own) == value).all()
                    own.free(buffer)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert pool.statistics().used == 0


def test_wrong_calls_are_refused(device, stream, pool, other_device):
    with other_device.create_pool() as foreign, other_device.create_stream() as elsewhere:
        with pytest.raises(InvalidArgument, match="another device"):
            stream.allocate(10, pool=foreign)
        with pytest.raises(InvalidArgument, match="another device"):
            pool.allocate(elsewhere, 10)
        buffer = elsewhere.allocate(10, pool=foreign)
        with pytest.raises(InvalidArgument, match="another device"):
            stream.free(buffer)
        elsewhere.free(buffer)
    buffer = stream.allocate(10, pool=pool)
    for call, error in [
        (lambda: stream.allocate(-1), InvalidArgument), (lambda: stream.allocate("x"), InvalidType),
        (lambda: stream.allocate(1, object), InvalidType), (lambda: stream.allocate(1, pool=3), InvalidType),
        (lambda: stream.free(buffer[2:4]), InvalidArgument), (lambda: stream.free(b"abc"), InvalidType),
        (lambda: pool.trim(-1), InvalidArgument), (lambda: device.create_pool(max_bytes=0), InvalidArgument),
        (lambda: device.create_pool(release_threshold=-1), InvalidArgument),
        (lambda: device.create_pool(max_bytes="x"), InvalidType),
    ]:
        with pytest.raises(error):
            call()
    stream.free(buffer)
    closed = device.create_pool()
    closed.close()
    closed.close()
    for call in (lambda: stream.allocate(1, pool=closed), closed.trim):
        with pytest.raises(ClosedError):
            call()
