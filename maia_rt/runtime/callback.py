"""Host callbacks: functions of the program that run in a stream's order.

A call is one command: a NOP that waits for a semaphore of the stream's own. One thread a device waits until all before
it is done, calls the function, and sets the semaphore. Nothing is held meanwhile, no lock and not the GIL, that
submissions or waits of other threads need; so these cannot deadlock with it.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from maia_rt.contract.commands import COMMAND, Opcode, PostOp, WaitOp
from maia_rt.errors import DeadlockError, DeviceFault, InvalidType, MaiaError
from maia_rt.queue import QueuePair
from maia_rt.runtime.queue_watch import ALIVE_SECONDS, QueueWatch
from maia_rt.runtime.semaphore import WORD, Semaphore

if TYPE_CHECKING:
    from maia_rt.runtime.event import Event
    from maia_rt.runtime.stream import Stream

_NOP: Final = int(Opcode.NOP)
_JOIN_SECONDS: Final = 2.0


class StreamCalls:
    """What one stream has called; made with its first call.

    Attributes
    ----------
    semaphore : Semaphore
        Holds the number of the last call that has returned.
    count : int
        The number of the newest call, modulo 2^32.
    pending : deque of Call
        Those that have not returned, nor been lost, the oldest first.
    """

    def __init__(self, semaphore: Semaphore) -> None:
        self.semaphore = semaphore
        self.lock = threading.Lock()
        self.count = 0
        self.pending: deque[Call] = deque()


class Call:
    """One function to be called, once `event` is done."""

    def __init__(self, stream: Stream, calls: StreamCalls, ticket: int, event: Event, function: Callable[..., object],
                 args: tuple[Any, ...]) -> None:
        self.stream = stream
        self.calls = calls
        self.ticket = ticket
        self.event = event
        self.function = function
        self.args = args

    def run(self) -> None:
        """Call the function and let the stream go on, or fail it."""
        device = self.stream.device
        if device._validator is not None:
            device._validator.reached(self.event)
        try:
            self.function(*self.args)
        except BaseException as error:
            # Its frames, and this one, would keep whatever they used alive as long as the error is known.
            error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None
            traceback.clear_frames(error.__traceback__)
            if not self._fail(error):
                threading.excepthook(threading.ExceptHookArgs(
                    (type(error), error, error.__traceback__, threading.current_thread())))
            return
        with contextlib.suppress(MaiaError):
            # Not `closed`: while the device closes, its streams are given time to end what they have.
            if not self.calls.semaphore._closed:
                device._firmware.post_semaphore(self.calls.semaphore.index, PostOp.SET, self.ticket)

    def _fail(self, error: BaseException) -> bool:
        """Have the command that waits fail; say whether it still did."""
        number = self.stream.number
        with contextlib.suppress(MaiaError):
            for queue in list(self.stream._account.queues):
                for sequence in queue.ring.outstanding(number):
                    if self._is_wait(queue.ring.command_at(sequence)) and queue.abort(sequence, number, error):
                        # Whoever shares the queue waits for its repair.
                        with contextlib.suppress(DeviceFault):
                            queue.wait(sequence, 1.0)
                        return True
        return False

    def _is_wait(self, raw: bytes | None) -> bool:
        if raw is None:
            return False
        pre = np.frombuffer(raw, COMMAND)[0]["pre"][0]
        return bool(pre["op"] == WaitOp.GE and pre["index"] == self.calls.semaphore.index
                    and pre["value"] == self.ticket)


class Dispatcher:
    """The thread that calls a device's functions; started with the first one.

    Parameters
    ----------
    device : str
        For error texts.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._incoming: deque[Call] = deque()
        self._ready: deque[Call] = deque()
        self._watches: dict[QueuePair, QueueWatch] = {}
        self._running: Stream | None = None
        self._ending = False
        bell, self._rope = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._run, args=(bell,), name="maia-callbacks", daemon=True)
        self._thread.start()

    def call(self, stream: Stream, calls: StreamCalls, function: Callable[..., object], args: tuple[Any, ...]) -> None:
        """Submit the command that waits, and have the function called once all before it is done."""
        if not callable(function):
            raise InvalidType(f"a stream calls a function, not {type(function).__name__}",
                              hint="pass the function and its arguments: stream.call(print, 'done')")
        with calls.lock:
            event = stream.record()
            ticket = (calls.count + 1) & WORD
            stream._submit(_NOP, pre=((calls.semaphore.index, WaitOp.GE, ticket),), unbounded=True)
            calls.count = ticket
            call = Call(stream, calls, ticket, event, function, args)
            calls.pending.append(call)
            self._incoming.append(call)
        self._ring()

    def refuse_wait(self, stream: Stream | None) -> None:
        """Raise DeadlockError where a function that a stream called waits for what comes after itself."""
        if stream is None or threading.current_thread() is not self._thread:
            return
        calls = stream._calls
        if stream is self._running or (calls is not None and calls.pending):
            raise DeadlockError(
                f"{self._device}: a function that {self._running.name if self._running else 'a stream'} called waits "
                f"for {stream.name}, which waits until that function has returned",
                cause="functions are called one after the other, and their streams go on when they have returned",
                hint="return from the function, and wait elsewhere; a function may submit to any stream")

    def close(self) -> None:
        """End the thread, after the function that it is in, for which there are two seconds. Idempotent."""
        self.end()
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_SECONDS)

    def end(self) -> None:
        """Have the thread end, without waiting for it; functions not called yet never will be. Idempotent."""
        if not self._ending:
            self._ending = True
            os.close(self._rope)

    def _ring(self) -> None:
        if not self._ending:
            # A pipe that is full has been rung enough; one that nobody reads any more, too.
            with contextlib.suppress(OSError):
                os.write(self._rope, b"\0")

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self, bell: int) -> None:
        poll = select.poll()
        poll.register(bell, select.POLLIN)
        next_check = time.monotonic() + ALIVE_SECONDS
        try:
            while not self._ending:
                left = max(next_check - time.monotonic(), 0)
                poll.poll(int(left * 1000) + 1 if self._watches else None)
                with contextlib.suppress(BlockingIOError):
                    os.read(bell, 4096)
                while self._incoming:
                    self._accept(self._incoming.popleft(), poll)
                checks = time.monotonic() >= next_check
                for watch in list(self._watches.values()):
                    if checks:
                        watch.check()
                    else:
                        watch.look()
                if checks:
                    next_check = time.monotonic() + ALIVE_SECONDS
                self._drop_idle(poll)
                while self._ready and not self._ending:
                    self._call(self._ready.popleft())
        finally:
            os.close(bell)
            for watch in self._watches.values():
                watch.close()
            self._watches.clear()
            self._incoming.clear()
            self._ready.clear()

    def _accept(self, call: Call, poll: select.poll) -> None:
        queue, sequence = call.event._queue, call.event._sequence
        assert queue is not None
        watch = self._watches.get(queue)
        if watch is None:
            watch = self._watches[queue] = QueueWatch(queue)
            for fd in watch.fds:
                poll.register(fd, select.POLLIN)

        def heard(error: MaiaError | None) -> None:
            if error is None:
                self._ready.append(call)
            else:
                # What waits for it is lost, too.
                call.calls.pending.remove(call)

        watch.add(sequence, heard)

    def _drop_idle(self, poll: select.poll) -> None:
        for queue, watch in list(self._watches.items()):
            if not watch:
                for fd in watch.fds:
                    poll.unregister(fd)
                watch.close()
                del self._watches[queue]

    def _call(self, call: Call) -> None:
        self._running = call.stream
        try:
            call.run()
        finally:
            self._running = None
            call.calls.pending.remove(call)
