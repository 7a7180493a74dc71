"""One rank's handle, for programs with a thread a rank; where the ranks meet before anything is submitted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from maia_rt.collectives import requests
from maia_rt.collectives.call import Call, require_agreement
from maia_rt.errors import ClosedError, DeviceTimeout, MismatchedRanks

if TYPE_CHECKING:
    from maia_rt.collectives.collective import Collective
    from maia_rt.collectives.communicator import Communicator

Submit = Callable[[Sequence[Call], Any], "Collective"]


class Rank:
    """One rank of a communicator; made by :meth:`Communicator.rank`.

    Each call waits until all ranks have made theirs, at most the communicator's time-out, and then returns the
    collective that all of them have submitted.

    Attributes
    ----------
    communicator : Communicator
    rank : int
    """

    def __init__(self, communicator: Communicator, rank: int) -> None:
        self.communicator = communicator
        self.rank = rank

    def all_reduce(self, send: Any, recv: Any = None, op: Any = "sum", *, stream: Any = None, algorithm: Any = None
                   ) -> Collective:
        """As :meth:`Communicator.all_reduce`, with this rank's buffers and stream.

        Raises
        ------
        MismatchedRanks
            Another rank asked for something else; raised on all of them, and nothing was submitted.
        DeviceTimeout
            A rank did not call in time; the text names it.
        InvalidArgument, InvalidType, ClosedError
            Of this rank's arguments; the others wait on.
        """
        return self._meet(requests.one_all_reduce(self._devices, self.rank, send, recv, op, stream), algorithm)

    def reduce_scatter(self, send: Any, recv: Any, op: Any = "sum", *, stream: Any = None, algorithm: Any = None
                       ) -> Collective:
        """As :meth:`Communicator.reduce_scatter`; raises as :meth:`all_reduce`."""
        return self._meet(requests.one_reduce_scatter(self._devices, self.rank, send, recv, op, stream), algorithm)

    def all_gather(self, send: Any, recv: Any, *, stream: Any = None, algorithm: Any = None) -> Collective:
        """As :meth:`Communicator.all_gather`; raises as :meth:`all_reduce`."""
        return self._meet(requests.one_all_gather(self._devices, self.rank, send, recv, stream), algorithm)

    def broadcast(self, buffer: Any, root: int = 0, *, stream: Any = None, algorithm: Any = None) -> Collective:
        """As :meth:`Communicator.broadcast`; raises as :meth:`all_reduce`."""
        return self._meet(requests.one_broadcast(self._devices, self.rank, buffer, root, stream), algorithm)

    def reduce(self, send: Any, recv: Any = None, root: int = 0, op: Any = "sum", *, stream: Any = None,
               algorithm: Any = None) -> Collective:
        """As :meth:`Communicator.reduce`; `recv` is the root's, by default its send. Raises as :meth:`all_reduce`."""
        return self._meet(requests.one_reduce(self._devices, self.rank, send, recv, root, op, stream), algorithm)

    def all_to_all(self, send: Any, recv: Any, *, stream: Any = None, algorithm: Any = None) -> Collective:
        """As :meth:`Communicator.all_to_all`; raises as :meth:`all_reduce`."""
        return self._meet(requests.one_all_to_all(self._devices, self.rank, send, recv, stream), algorithm)

    def barrier(self, *, stream: Any = None) -> Collective:
        """As :meth:`Communicator.barrier`; raises as :meth:`all_reduce`."""
        return self._meet(requests.one_barrier(self._devices, self.rank, stream), None)

    def send(self, buffer: Any, to: int, *, stream: Any = None) -> Collective:
        """Send a buffer to another rank, which calls :meth:`recv`; only the two of them meet."""
        to = requests.peer(self._devices, to)
        call = requests.one_send(self._devices, self.rank, to, self.rank, buffer, stream)
        return self._meet(call, None, (self.rank, to))

    def recv(self, buffer: Any, source: int, *, stream: Any = None) -> Collective:
        """Receive what another rank sends."""
        source = requests.peer(self._devices, source)
        call = requests.one_send(self._devices, source, self.rank, self.rank, buffer, stream)
        return self._meet(call, None, (source, self.rank))

    def __repr__(self) -> str:
        return f"<Rank {self.rank} of {self.communicator!r}>"

    @property
    def _devices(self) -> requests.Devices:
        self.communicator._require_open()
        return self.communicator.devices

    def _meet(self, call: Call, algorithm: Any, pair: tuple[int, int] | None = None) -> Collective:
        if algorithm is not None:
            requests.algorithm(algorithm)
        return self.communicator._rendezvous.meet(call, algorithm, pair, self.communicator._call)


class _Meeting:
    """Calls that belong together, and what came of them."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self.calls: dict[int, Call] = {}
        self.algorithms: dict[int, Any] = {}
        self.result: Collective | None = None
        self.error: BaseException | None = None

    @property
    def over(self) -> bool:
        return self.result is not None or self.error is not None


class Rendezvous:
    """Where the ranks' threads wait for each other.

    Parameters
    ----------
    count : int
        Ranks.
    timeout : float
        In seconds.
    """

    def __init__(self, count: int, timeout: float) -> None:
        self._count = count
        self._timeout = timeout
        self._changed = threading.Condition()
        self._open: dict[Hashable, _Meeting] = {}
        self._refusal: BaseException | None = None

    def meet(self, call: Call, algorithm: Any, pair: tuple[int, int] | None, submit: Submit) -> Collective:
        """Wait for the others, have the last one to come submit, and return what came of it."""
        deadline = time.monotonic() + self._timeout
        with self._changed:
            while call.rank in (meeting := self._at(pair)).calls and not meeting.over:
                self._pause(meeting, call, deadline)  # another thread of this rank is here
            if self._refusal is not None:
                raise self._refusal
            meeting.calls[call.rank], meeting.algorithms[call.rank] = call, algorithm
            self._find_strays(meeting, call)
            if len(meeting.calls) == len(meeting.ranks):
                self._conclude(meeting, submit)
            while not meeting.over:
                self._pause(meeting, call, deadline)
        if meeting.error is not None:
            raise meeting.error
        assert meeting.result is not None
        return meeting.result

    def fail(self, error: BaseException) -> None:
        """End every meeting, and refuse new ones."""
        with self._changed:
            self._refusal = error
            for meeting in list(self._open.values()):
                self._end(meeting, error)

    def close(self) -> None:
        """End every meeting because the communicator is closed."""
        self.fail(ClosedError("the communicator has been closed"))

    def _at(self, pair: tuple[int, int] | None) -> _Meeting:
        if pair not in self._open:
            self._open[pair] = _Meeting(range(self._count) if pair is None else pair)
        return self._open[pair]

    def _pause(self, meeting: _Meeting, call: Call, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            missing = [rank for rank in meeting.ranks if rank not in meeting.calls]
            self._end(meeting, DeviceTimeout(
                f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} did not call within "
                f"{self._timeout:g} s; waiting: "
                + "; ".join(f"rank {rank}: {one.said}" for rank, one in sorted(meeting.calls.items())),
                cause="its thread is elsewhere, or has ended",
                hint="every rank makes the same calls in the same order"))
            return
        self._changed.wait(left)

    def _find_strays(self, meeting: _Meeting, call: Call) -> None:
        """End this meeting and another one, where each waits for a rank that is in the other."""
        for other in list(self._open.values()):
            if other is not meeting and not other.over and any(
                    rank in other.ranks and rank not in other.calls for rank in meeting.calls) and any(
                    rank in meeting.ranks and rank not in meeting.calls for rank in other.calls):
                calls = {**other.calls, **meeting.calls}
                error = MismatchedRanks.between({rank: one.said for rank, one in calls.items()})
                self._end(other, error)
                self._end(meeting, error)
                return

    def _conclude(self, meeting: _Meeting, submit: Submit) -> None:
        calls = [meeting.calls[rank] for rank in meeting.ranks]
        chosen = {rank: "" if one is None else f", algorithm {one}" for rank, one in meeting.algorithms.items()}
        # Whoever calls now begins another meeting. Submitting may take its time, and the news of a failure must get in.
        self._forget(meeting)
        self._changed.release()
        try:
            require_agreement(calls)
            if len(set(chosen.values())) > 1:
                raise MismatchedRanks.between({call.rank: call.said + chosen[call.rank] for call in calls})
            meeting.result = submit(calls, meeting.algorithms[meeting.ranks[0]])
        except BaseException as error:
            meeting.error = error
        finally:
            self._changed.acquire()
        self._changed.notify_all()

    def _end(self, meeting: _Meeting, error: BaseException) -> None:
        if not meeting.over:
            meeting.error = error
        self._forget(meeting)
        self._changed.notify_all()

    def _forget(self, meeting: _Meeting) -> None:
        for key, one in list(self._open.items()):
            if one is meeting:
                del self._open[key]
