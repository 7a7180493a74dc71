"""Waiting in asyncio: beside everything else that a loop does, without threads, and with nothing left behind."""

import asyncio
import os
import signal
import threading
import time

import numpy as np
import pytest

from maia_rt.contract.commands import Opcode
from maia_rt.errors import ClosedError, DeviceFault, DeviceLost, DeviceTimeout, InvalidArgument, InvalidType
from maia_rt.runtime.queue_watch import QueueWatch
from tests.helpers.stopwatch import promptly

SOON = 1.0
"""Seconds within which who waits hears of a failure."""


@pytest.fixture
def gate(attached):
    with attached.create_semaphore() as semaphore:
        yield semaphore


def held_fds():
    return sorted(os.listdir("/proc/self/fd"))


class WatchedLoop(asyncio.SelectorEventLoop):
    """Says what is read, and has no executor: as little as a loop of another make may offer."""

    def __init__(self):
        super().__init__()
        self.read = set()

    def add_reader(self, fd, callback, *args):
        self.read.add(fd)
        return super().add_reader(fd, callback, *args)

    def remove_reader(self, fd):
        self.read.discard(fd)
        return super().remove_reader(fd)

    def run_in_executor(self, executor, func, *args):
        raise AssertionError("no threads")


def run(coroutine, loop=None):
    loop = loop or WatchedLoop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def test_an_event_is_awaited_while_the_loop_goes_on(device, stream):
    async def main():
        async def tick_and_let_go(semaphore):
            for _ in range(5):
                await asyncio.sleep(0.002)
            semaphore.set(1)

        with device.create_semaphore() as semaphore, device.allocate(1024, np.uint8) as buffer:
            stream.wait(semaphore, 1)
            stream.fill(buffer, 7)
            event = stream.record(timing=True)
            ticking = asyncio.create_task(tick_and_let_go(semaphore))
            assert not event.query()
            await event
            await ticking
            assert event.query()
            assert event.time_ns > 0
            await event
            await device.create_event()
            stream.fill(buffer, 8)
            await stream.synchronize_async()
            assert stream.query()
            assert (buffer.copy_to_host() == 8).all()

    run(main())


def test_one_reader_a_queue_serves_every_wait_of_a_loop_and_no_thread(attached, gate):
    streams = [attached.create_stream() for _ in range(3)]

    async def main(loop):
        threads, fds = threading.active_count(), held_fds()
        events = []
        for stream in streams:
            stream.wait(gate, 1)
            for _ in range(5):
                stream._submit(Opcode.NOP)
                events.append(stream.record())

        async def wait(event):
            await event

        waits = [asyncio.create_task(wait(event)) for event in events]
        await asyncio.sleep(0.02)
        assert threading.active_count() == threads
        assert len(loop.read) == 2 * len(streams)
        gate.set(1)
        await asyncio.gather(*waits)
        assert not loop.read
        assert held_fds() == fds

    loop = WatchedLoop()
    run(main(loop), loop)
    for stream in streams:
        stream.close()


def test_loops_in_several_threads_and_threads_that_wait_share_a_queue(attached, gate):
    with attached.create_stream() as stream:
        stream.wait(gate, 1)
        events = []
        for _ in range(12):
            stream._submit(Opcode.NOP)
            events.append(stream.record())
        heard = []

        def loop(mine):
            async def main():
                async def wait(event):
                    await event
                    heard.append(event)

                await asyncio.gather(*(wait(event) for event in mine))

            run(main())

        def wait(event):
            event.synchronize()
            heard.append(event)

        threads = [threading.Thread(target=loop, args=(events[i::4],)) for i in range(3)]
        threads += [threading.Thread(target=wait, args=(event,)) for event in events[3::4]]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        assert not heard
        gate.set(1)
        for thread in threads:
            thread.join(10)
        assert set(heard) == set(events)


def test_loops_and_threads_take_turns_for_a_long_time(attached):
    with attached.create_stream() as stream:
        failures = []

        def thread():
            try:
                for _ in range(100):
                    stream._submit(Opcode.NOP)
                    stream.record().synchronize(10)
            except BaseException as error:
                failures.append(error)

        async def main():
            for _ in range(100):
                stream._submit(Opcode.NOP)
                await stream.record().synchronize_async(10)

        other = threading.Thread(target=thread)
        other.start()
        run(main())
        other.join()
        assert not failures


def test_a_fault_is_raised_where_the_event_is_awaited(attached, gate):
    with attached.create_stream() as stream:
        async def main():
            stream.wait(gate, 1)
            before = stream.record()
            stream._submit(Opcode.TRAP, payload=(77, 0, 0))
            after = stream.record()
            asyncio.get_running_loop().call_later(0.02, gate.set, 1)
            waits = [asyncio.create_task(event.synchronize_async()) for event in (before, after, after)]
            results = await asyncio.gather(*waits, return_exceptions=True)
            assert results[0] is None
            assert all(isinstance(result, DeviceFault) and result.stream == stream.name for result in results[1:])
            with pytest.raises(DeviceFault):
                await stream.synchronize_async()
            with pytest.raises(DeviceFault):
                await after

        run(main())
        stream.recover()


def test_a_time_out_is_raised_and_says_what_the_stream_is_at(attached, gate):
    with attached.create_stream() as stream:
        async def main():
            stream.wait(gate, 1)
            event = stream.record()
            with pytest.raises(DeviceTimeout, match=f"waits for {gate.name}"):
                await event.synchronize_async(0.02)
            with pytest.raises(DeviceTimeout):
                await stream.synchronize_async(timeout=0)
            gate.set(1)
            await event

        run(main())


def test_cancelling_leaves_nothing_behind_and_does_not_disturb_others(attached, gate):
    with attached.create_stream() as stream:
        async def main():
            fds = held_fds()
            stream.wait(gate, 1)
            event = stream.record()
            tasks = [asyncio.create_task(event.synchronize_async()) for _ in range(3)]
            await asyncio.sleep(0.01)
            tasks[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(event.synchronize_async(), 0.01)
            assert not tasks[1].done()
            gate.set(1)
            await asyncio.gather(*tasks[1:])
            assert held_fds() == fds

        run(main())


def test_a_loop_that_closes_in_the_middle_leaves_nothing_behind(attached, gate):
    with attached.create_stream() as stream:
        fds = held_fds()
        stream.wait(gate, 1)
        event = stream.record()
        loop = WatchedLoop()
        waiting = event.synchronize_async()
        with pytest.raises(RuntimeError, match="stopped before"):
            loop.call_later(0.02, loop.stop)
            task = loop.create_task(waiting)
            loop.run_until_complete(task)
        assert len(held_fds()) > len(fds)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()
        assert held_fds() == fds
        gate.set(1)
        event.synchronize()


def test_closing_a_stream_ends_those_who_await_it(attached, gate):
    async def main():
        stream = attached.create_stream(timeout=0.05)
        stream.wait(gate, 1)
        waiting = asyncio.create_task(stream.record().synchronize_async())
        await asyncio.sleep(0.01)
        with pytest.raises(DeviceTimeout):
            stream.close()
        with pytest.raises((ClosedError, DeviceFault)):
            await waiting
        with pytest.raises(ClosedError):
            await stream.synchronize_async()

    run(main())


@pytest.mark.emulator_process
def test_who_awaits_hears_within_a_second_that_the_device_is_gone(embedded):
    stream, gate = embedded.create_stream(), embedded.create_semaphore()

    async def main():
        stream.wait(gate, 1)
        waiting = [asyncio.create_task(stream.record().synchronize_async()) for _ in range(2)]
        await asyncio.sleep(0.02)
        start = time.monotonic()
        os.kill(embedded.emulator_pid, signal.SIGKILL)
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, DeviceLost)
        promptly(start, SOON)

    run(main())


@pytest.mark.emulator_process
def test_who_waits_for_a_device_that_died_in_its_sleep_is_told_once(embedded):
    stream, gate = embedded.create_stream(), embedded.create_semaphore()
    stream.wait(gate, 1)
    queue, sequence = stream._mark()
    watch = QueueWatch(queue)
    time.sleep(0.3)
    os.kill(embedded.emulator_pid, signal.SIGKILL)
    os.waitid(os.P_PID, embedded.emulator_pid, os.WEXITED | os.WNOWAIT)
    told = []
    watch.add(sequence, told.append)        # has to wake the device, which cannot be
    watch.look()
    assert not told
    watch.check()
    watch.check()
    assert [type(error) for error in told] == [DeviceLost]
    watch.close()


def test_a_wait_that_sleeps_makes_no_descriptor(attached, gate):
    with attached.create_stream() as stream:
        fds = held_fds()
        stream.wait(gate, 1)
        with pytest.raises(DeviceTimeout):
            stream.synchronize(0.05)
        assert held_fds() == fds
        gate.set(1)
        stream.synchronize()


def test_wrong_times_are_refused(attached):
    with attached.create_stream() as stream:
        async def main():
            for wait in (stream.synchronize_async, stream.record().synchronize_async):
                with pytest.raises(InvalidArgument):
                    await wait(-1)
                with pytest.raises(InvalidType):
                    await wait("soon")

        run(main())


def test_outside_of_a_loop_nothing_is_awaited(attached, gate):
    with attached.create_stream() as stream:
        stream.wait(gate, 1)
        waiting = stream.record().synchronize_async()
        with pytest.raises(RuntimeError, match="no running event loop"):
            waiting.send(None)
        gate.set(1)
