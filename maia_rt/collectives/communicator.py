"""Communicators: several devices, by rank, and what they do together."""

from __future__ import annotations

import contextlib
import statistics
import threading
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Literal

from maia_rt.collectives import direct, requests, ring
from maia_rt.collectives.call import Call, require_agreement
from maia_rt.collectives.collective import Collective
from maia_rt.collectives.group import Group
from maia_rt.collectives.member import Member
from maia_rt.collectives.path import Path
from maia_rt.collectives.rank import Rank, Rendezvous
from maia_rt.collectives.watch import Part, Watch
from maia_rt.errors import CaptureError, ClosedError, MaiaError, RankFailure
from maia_rt.runtime import check
from maia_rt.runtime.buffer import Buffer
from maia_rt.runtime.device import Device
from maia_rt.runtime.stream import Stream

Buffers = Sequence[Buffer]
Streams = Sequence[Stream] | None
OperationName = Literal["sum", "prod"]
AlgorithmName = Literal["auto", "direct", "ring"]
_SUBMITTING: Final = threading.RLock()
"""One collective is submitted at a time in this process, to all of its ranks: so streams that several communicators
share see all collectives in one order, and none waits for one that is behind another which waits for it."""
_CLOSE_SECONDS: Final = 5.0
_RATE_BYTES: Final = 16 << 20
_RATE_ROUNDS: Final = 5
_RATE_COPIES: Final = 4


class Communicator:
    """Devices that compute together: collectives on buffers of each, on a stream of each.

    A group call takes lists with one entry a rank and submits for all. :meth:`rank` gives one rank's handle, for
    programs with a thread a rank. Calls return at once; they run in the order of the ranks' streams. Collectives of one
    communicator run one after the other on each rank, also on different streams.

    Parameters
    ----------
    devices : sequence of Device
        2 or more, by rank, each once. They reach each other's memory directly.
    timeout : float, optional
        How long ranks wait for each other to call, and :meth:`Collective.synchronize` waits, in seconds; by default the
        shortest of the devices'.
    algorithm : {'auto', 'direct', 'ring'}
        For calls that do not say; ``auto`` chooses by size and number of ranks.
    timing : bool
        Whether collectives take the devices' time, for :attr:`Collective.bandwidth`; costs two commands a rank.

    Attributes
    ----------
    devices : tuple of Device
    timeout : float

    Raises
    ------
    InvalidArgument
        Fewer than two devices, or one of them twice.
    Unsupported
        A device cannot reach another one's memory.
    ClosedError, InvalidType, OutOfSemaphores

    Examples
    --------
    >>> import numpy as np, maia_rt
    >>> with maia_rt.open("emulated") as a, maia_rt.open("emulated") as b:
    ...     with maia_rt.Communicator([a, b]) as ranks:
    ...         buffers = [a.upload(np.full(3, 1, np.float32)), b.upload(np.full(3, 2, np.float32))]
    ...         ranks.all_reduce(buffers).synchronize()
    ...         print([buffer.copy_to_host().tolist() for buffer in buffers])
    [[3.0, 3.0, 3.0], [3.0, 3.0, 3.0]]
    """

    def __init__(self, devices: Sequence[Device], *, timeout: float | None = None, algorithm: AlgorithmName = "auto",
                 timing: bool = False) -> None:
        self._closed = True
        self.devices = requests.devices(devices)
        self.timeout = min(device.timeout for device in self.devices) if timeout is None else check.seconds(timeout)
        self._algorithm = requests.algorithm(algorithm)
        self._timing = timing
        self._failure: RankFailure | None = None
        self._rate = 0.0
        self._group = Group([Member(rank, device) for rank, device in enumerate(self.devices)])
        self._rendezvous = Rendezvous(len(self.devices), self.timeout)
        self._watch = Watch(self._break)
        self._closed = False
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        members = self._group.members
        for member in members:
            for peer in members:
                if peer is not member:
                    member.paths[peer.rank] = Path(member.device, peer.device)
                    for lane in range(ring.LANES):
                        member.semaphores[peer.rank, lane] = member.device.create_semaphore()
        for member in members:
            member.connect(members, ring.LANES)

    # --- group calls -------------------------------------------------------------------------------------------------

    def all_reduce(self, sends: Buffers, recvs: Buffers | None = None, op: OperationName = "sum", *,
                   streams: Streams = None, algorithm: AlgorithmName | None = None) -> Collective:
        """Combine what all ranks have, element by element; every rank gets the result.

        Parameters
        ----------
        sends, recvs : sequence of Buffer
            One a rank, all of one dtype (float32, float16, bfloat16, int32, float8) and length. `recvs` may be `sends`,
            which is the default.
        op : {'sum', 'prod'}
        streams : sequence of Stream, optional
            One a rank; the devices' default streams otherwise.
        algorithm : {'auto', 'direct', 'ring'}, optional
            The communicator's by default.

        Returns
        -------
        Collective

        Raises
        ------
        MismatchedRanks
            Sizes or dtypes differ between ranks; nothing was submitted.
        InvalidArgument, InvalidType, ClosedError, QueueFull, DeviceFault, DeviceLost
        """
        return self._call(requests.all_reduce(self.devices, sends, recvs, op, streams), algorithm)

    def reduce_scatter(self, sends: Buffers, recvs: Buffers, op: OperationName = "sum", *, streams: Streams = None,
                       algorithm: AlgorithmName | None = None) -> Collective:
        """Combine what all ranks have; rank i gets the i-th of equal parts.

        Parameters
        ----------
        sends : sequence of Buffer
            One a rank.
        recvs : sequence of Buffer
            Of the length of a send divided by the number of ranks; ``sends[i]``'s i-th part is allowed.
        op, streams, algorithm
            As for :meth:`all_reduce`; raises as it does.
        """
        return self._call(requests.reduce_scatter(self.devices, sends, recvs, op, streams), algorithm)

    def all_gather(self, sends: Buffers, recvs: Buffers, *, streams: Streams = None,
                   algorithm: AlgorithmName | None = None) -> Collective:
        """Put what all ranks have one after the other, by rank; every rank gets it.

        Parameters
        ----------
        sends : sequence of Buffer
            One a rank, of any dtype.
        recvs : sequence of Buffer
            Of the length of all sends together; ``sends[i]`` may be ``recvs[i]``'s i-th part.
        streams, algorithm
            As for :meth:`all_reduce`; raises as it does.
        """
        return self._call(requests.all_gather(self.devices, sends, recvs, streams), algorithm)

    def broadcast(self, buffers: Buffers, root: int = 0, *, streams: Streams = None,
                  algorithm: AlgorithmName | None = None) -> Collective:
        """Copy the root's buffer to those of all other ranks.

        Parameters
        ----------
        buffers : sequence of Buffer
            One a rank, of one length and dtype.
        root : int
        streams, algorithm
            As for :meth:`all_reduce`; raises as it does.
        """
        return self._call(requests.broadcast(self.devices, buffers, root, streams), algorithm)

    def reduce(self, sends: Buffers, recv: Buffer, root: int = 0, op: OperationName = "sum", *, streams: Streams = None,
               algorithm: AlgorithmName | None = None) -> Collective:
        """Combine what all ranks have; the root alone gets the result.

        Parameters
        ----------
        sends : sequence of Buffer
            One a rank.
        recv : Buffer
            Of the root; the root's send is allowed.
        root : int
        op, streams, algorithm
            As for :meth:`all_reduce`; raises as it does.
        """
        return self._call(requests.reduce(self.devices, sends, recv, root, op, streams), algorithm)

    def all_to_all(self, sends: Buffers, recvs: Buffers, *, streams: Streams = None,
                   algorithm: AlgorithmName | None = None) -> Collective:
        """Send the j-th part of rank i's send to the i-th part of rank j's recv, for all i and j.

        Parameters
        ----------
        sends, recvs : sequence of Buffer
            One a rank, of as many equal parts as there are ranks; sends and recvs do not overlap.
        streams, algorithm
            As for :meth:`all_reduce`; raises as it does.
        """
        return self._call(requests.all_to_all(self.devices, sends, recvs, streams), algorithm)

    def send(self, send: Buffer, recv: Buffer, *, streams: Streams = None) -> Collective:
        """Copy a buffer of one rank to one of another, in the order of both ranks' streams.

        Parameters
        ----------
        send, recv : Buffer
            Of devices of the communicator; which ranks they are follows from that.
        streams : (Stream, Stream), optional
            The sender's and the receiver's.
        """
        return self._call(requests.send(self.devices, send, recv, streams), None)

    def barrier(self, streams: Streams = None) -> Collective:
        """Let every rank's stream go on only when all have come here."""
        return self._call(requests.barrier(self.devices, streams), None)

    # --- one rank at a time ------------------------------------------------------------------------------------------

    def rank(self, rank: int) -> Rank:
        """Return a rank's handle: the same calls with this rank's buffers, for a program with one thread a rank."""
        self._require_open()
        return Rank(self, check.integer(rank, "a rank", 0, len(self.devices) - 1))

    # --- how fast ----------------------------------------------------------------------------------------------------

    def measure(self, nbytes: int = _RATE_BYTES) -> float:
        """Measure how fast all ranks copy to the next rank at the same time, and remember it as :attr:`rate`.

        Each of a few rounds has several copies one behind the other, so that what begins late does not count.

        Parameters
        ----------
        nbytes : int
            How many each rank copies.

        Returns
        -------
        float
            Bytes a second over all ranks, the median of five rounds. Waits for what the default streams have.
        """
        nbytes = check.integer(nbytes, "what each rank copies", 1, 1 << 40)
        with contextlib.ExitStack() as stack:
            buffers = [[stack.enter_context(device.allocate(nbytes)) for _ in range(2)] for device in self.devices]
            streams = [device.default_stream for device in self.devices]
            rounds = [self._measure_round(streams, buffers) for _ in range(_RATE_ROUNDS + 1)]
        self._rate = len(self.devices) * _RATE_COPIES * nbytes / statistics.median(rounds[1:])
        return self._rate

    @property
    def rate(self) -> float:
        """Bytes a second that all ranks together copy; measured now where it was not before."""
        return self._rate or self.measure()

    def _measure_round(self, streams: Sequence[Stream], buffers: Sequence[Buffers]) -> float:
        self.barrier(streams).synchronize()
        members, size = self._group.members, buffers[0][0].nbytes
        starts = [stream.record(timing=True) for stream in streams]
        with _SUBMITTING:
            for member, stream in zip(members, streams, strict=True):
                peer = (member.rank + 1) % len(members)
                for _ in range(_RATE_COPIES):
                    member.copy(stream, member.at(peer, buffers[peer][1].address), buffers[member.rank][0].address,
                                size)
        ends = [stream.record(timing=True) for stream in streams]
        self.barrier(streams).synchronize()
        return max((end - start) / 1e3 for start, end in zip(starts, ends, strict=True))

    # --- life --------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._closed

    @property
    def failed(self) -> bool:
        """Whether a rank failed; the communicator is of no further use then."""
        return self._failure is not None

    def close(self) -> None:
        """Wait for what is under way, a few seconds at most, and give everything back. Idempotent."""
        if self._closed:
            return
        with _SUBMITTING:
            self._closed = True
            self._rendezvous.close()
            members = self._group.members
            for member in members:
                if member.last is not None and not self.failed and not member.device.closed:
                    with contextlib.suppress(MaiaError):
                        member.last.synchronize(min(self.timeout, _CLOSE_SECONDS))
            self._watch.close()
            for member in members:
                member.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn("a communicator was not closed", ResourceWarning, stacklevel=2, source=self)

    def __len__(self) -> int:
        return len(self.devices)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "failed" if self.failed else "open"
        return f"<Communicator of {len(self.devices)} devices, {state}>"

    # --- submission --------------------------------------------------------------------------------------------------

    def _call(self, calls: Sequence[Call], algorithm: AlgorithmName | None) -> Collective:
        """Submit a collective for all of its ranks."""
        name = self._algorithm if algorithm is None else requests.algorithm(algorithm)
        require_agreement(calls)
        run, name = self._choose(calls, name)
        members = self._group.members
        with _SUBMITTING:
            self._require_open()
            for call in calls:
                members[call.rank].require_ready(call.stream)
            captured = [call.stream._capture is not None for call in calls]
            if not any(captured):
                return self._submit(calls, run, name)
            if not all(captured):
                names = ", ".join(call.stream.name for call in calls)
                raise CaptureError(f"of {names} some are being captured, some are not",
                                   hint="capture the streams of all ranks")
            run(self._group, calls)
            return Collective(self, calls[0].name, name, requests.bytes_moved(calls), (), ())

    def _submit(self, calls: Sequence[Call], run: Callable[[Group, Sequence[Call]], None], name: str) -> Collective:
        members, starts = self._group.members, []
        marks = [call.stream._mark() for call in calls]
        try:
            for call in calls:
                members[call.rank].begin(call.stream)
                self._tell_validator(call)
            if self._timing:
                starts = [call.stream.record(timing=True) for call in calls]
            run(self._group, calls)
            ends = [call.stream.record(timing=self._timing) for call in calls]
        except BaseException as error:
            self._give_up(calls, marks, error)
            raise
        for call, end in zip(calls, ends, strict=True):
            members[call.rank].last = end
        spans = [(call.rank, call.stream, mark, end) for call, mark, end in zip(calls, marks, ends, strict=True)]
        spans += [(call.rank, *beside) for call in calls if (beside := members[call.rank].beside) is not None]
        self._watch.add([Part(rank, stream, mark, (end._queue, end._sequence))
                         for rank, stream, mark, end in spans if end._queue is not None])
        return Collective(self, calls[0].name, name, requests.bytes_moved(calls), starts, ends)

    def _give_up(self, calls: Sequence[Call], marks: Sequence[tuple[Any, int]], error: BaseException) -> None:
        """What was submitted of a collective waits for what was not: end it."""
        rank = next((call.rank for call in calls if call.stream.closed or call.stream.failed), calls[0].rank)
        failure = RankFailure(rank, self.devices[rank].name, error)
        parts = [Part(call.rank, call.stream, mark, call.stream._mark())
                 for call, mark in zip(calls, marks, strict=True)]
        parts += [Part(call.rank, beside[0], beside[1], beside[0]._mark())
                  for call in calls if (beside := self._group.members[call.rank].beside) is not None]
        self._watch.fail(failure, parts)

    def _choose(self, calls: Sequence[Call], name: str) -> tuple[Callable[[Group, Sequence[Call]], None], str]:
        found = getattr(ring, calls[0].name, None)
        if name == "ring" and found is not None:
            return found, name
        if name == "auto" and found is not None and ring.pays(self._group, calls):
            return found, "ring"
        return getattr(direct, calls[0].name), "direct"

    def _tell_validator(self, call: Call) -> None:
        validator = call.stream.device._validator
        if validator is not None:
            validator.command(call.stream, call.name, *([] if one is None else [(one.address, one.nbytes, one)]
                                                        for one in (call.send, call.recv)))

    def _break(self, failure: RankFailure) -> None:
        if self._failure is None:
            self._failure = failure
            self._rendezvous.fail(self._refusal())

    def _refusal(self) -> ClosedError:
        failure = self._failure
        assert failure is not None
        error = ClosedError(f"the communicator has failed: rank {failure.rank}, {failure.device}: {failure.reason}",
                            hint="close it, and make one of the devices that are left")
        error.__cause__ = failure.reason
        return error

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the communicator has been closed")
        if self._failure is not None:
            raise self._refusal()

