"""Every exception maia_rt raises, and the catalogue of device faults.

An error is three short parts: what happened, the likely cause, what to try. They are attributes as well as
text, so a program can show them its own way.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class MaiaError(Exception):
    """The root of the tree.

    Parameters
    ----------
    what : str
        What happened, one sentence without its full stop.
    cause : str
        The likely cause.
    hint : str
        What to try.
    """

    def __init__(self, what: str, *, cause: str = "", hint: str = "") -> None:
        self.what = what
        self.cause = cause
        self.hint = hint
        text = what
        if cause:
            text += f". Likely cause: {cause}"
        if hint:
            text += f". Try: {hint}"
        super().__init__(text)


class InvalidArgument(MaiaError, ValueError):
    """A value the call cannot take: out of range, wrong shape, misaligned."""


class InvalidType(MaiaError, TypeError):
    """An object of the wrong kind: not a buffer, wrong dtype, of another device."""


class IndexOutOfRange(InvalidArgument, IndexError):
    """An index outside its dimension."""


class ClosedError(MaiaError, ValueError):
    """The object, or one that it depends on, has been closed."""


class BufferInUse(MaiaError, BufferError):
    """Memory cannot be given back: commands that are not done use it. It stays open; the text names a command."""


class ForkedError(MaiaError):
    """A handle made before ``fork`` was used in the child. Open the device anew in the child."""


class DeviceNotFound(MaiaError):
    """No device matches the selector."""


class DeviceBusy(MaiaError):
    """Somebody else holds the device."""


class DevicePermission(MaiaError, PermissionError):
    """The device or its socket may not be opened by this user."""


class ContractMismatch(MaiaError):
    """The device speaks a contract that this version cannot drive."""


class Unsupported(MaiaError):
    """The device, the transport or the host lacks a capability. Nothing was changed."""


class TransportError(MaiaError, OSError):
    """The kernel or the vfio-user server refused a request; ``errno`` says with what."""

    def __init__(self, what: str, *, errno: int = 0, cause: str = "", hint: str = "") -> None:
        MaiaError.__init__(self, what, cause=cause, hint=hint)
        self.errno = errno

    def __str__(self) -> str:
        return str(self.args[0])


class ProtocolError(TransportError):
    """The peer broke the protocol. The connection is of no further use."""


class DeviceLost(MaiaError):
    """The device is gone: its server ended, its link is down, or it reads as all ones."""


class FirmwareError(MaiaError):
    """Firmware did not boot, died, or failed a command that it should carry out."""


class DeviceTimeout(MaiaError, TimeoutError):
    """A deadline passed. The text names what was waited for and who should have signalled.

    Attributes
    ----------
    report : HangReport or None
        What every queue of the device was at, for waits for commands.
    """

    report: Any = None


class CaptureError(MaiaError):
    """A call that a capture cannot take, or streams that a capture left apart. The streams go on as before it."""


class RaceError(MaiaError):
    """Validation: two streams touch the same memory, one of them writes, and nothing orders them.

    Attributes
    ----------
    where : tuple of str
        The two lines that submitted the commands, the earlier one first.
    """

    def __init__(self, what: str, *, cause: str = "", hint: str = "", where: tuple[str, str] = ("", "")) -> None:
        super().__init__(what, cause=cause, hint=hint)
        self.where = where


class DeadlockError(MaiaError):
    """A wait that would never end. Validation: every signal that it needs waits behind it. Callbacks: a function that a
    stream called waits for that stream.

    Attributes
    ----------
    where : tuple of str
        The lines that submitted the wait and its last signal.
    """

    def __init__(self, what: str, *, cause: str = "", hint: str = "", where: tuple[str, str] = ("", "")) -> None:
        super().__init__(what, cause=cause, hint=hint)
        self.where = where


class MismatchedRanks(MaiaError, ValueError):
    """Ranks of a communicator asked for different things; nothing was submitted. Raised on all of them.

    Attributes
    ----------
    said : dict of int to str
        What each rank asked for.
    """

    said: dict[int, str]

    @classmethod
    def between(cls, said: dict[int, str]) -> MismatchedRanks:
        """Make one of what each rank asked for."""
        by_text: dict[str, list[int]] = {}
        for rank, text in sorted(said.items()):
            by_text.setdefault(text, []).append(rank)
        parts = [f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {text}"
                 for text, ranks in by_text.items()]
        error = cls("the ranks do not agree: " + "; ".join(parts),
                    cause="they called with other sizes, dtypes or operations, or in another order",
                    hint="every rank calls the same collectives in the same order")
        error.said = dict(said)
        return error


class ResourceExhausted(MaiaError):
    """Something ran out; the text says what, how much there is and who holds it."""


class OutOfMemory(ResourceExhausted, MemoryError):
    """No room of that size in device memory or in a pool."""


class OutOfQueues(ResourceExhausted):
    """Every hardware queue is in use."""


class OutOfSemaphores(ResourceExhausted):
    """Every semaphore that is not a queue's mirror is in use."""


class QueueFull(ResourceExhausted):
    """The ring stayed full until the deadline."""


class MemlockLimit(ResourceExhausted):
    """RLIMIT_MEMLOCK, or the IOMMU's entry limit, is too low for the pinned memory asked for."""


class ProgramError(MaiaError, ValueError):
    """A program image was refused. The text names the kernel, the field and what is wrong with it."""


class KernelNotFound(MaiaError, KeyError):
    """A program has no kernel of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class FaultCode(enum.IntEnum):
    """Why a command failed, as in completion records, progress blocks and the fault log (contract, section Faults)."""

    NONE = 0
    BAD_OPCODE = 1
    BAD_FIELD = 2
    BAD_SEQUENCE = 3
    ADDRESS = 4
    CONTEXT = 5
    SEMAPHORE = 6
    SEMAPHORE_OVERFLOW = 7
    BAD_KERNEL = 8
    PROGRAM = 9
    TRAP = 10
    ENGINE_HANG = 11
    ECC = 12
    LINK = 13
    ABORTED = 14
    DOORBELL = 15
    RESET = 16
    CHECKSUM = 17


@dataclass(frozen=True)
class Fault:
    """One row of the catalogue: what a code means and the one action that recovers from it."""

    code: FaultCode
    meaning: str
    recovery: str


_RESET_QUEUE = "reset the queue, as stream.recover() does, and submit again what was lost"

FAULTS: dict[FaultCode, Fault] = {
    f.code: f
    for f in (
        Fault(FaultCode.BAD_OPCODE, "the command's opcode is not one this device knows",
              "check the contract version the commands were encoded for"),
        Fault(FaultCode.BAD_FIELD, "a field of the command holds a value it may not have",
              "correct the command; encode through maia_rt instead of by hand"),
        Fault(FaultCode.BAD_SEQUENCE, "the slot held an old command: the doorbell went past what was written",
              "write the slots before the doorbell"),
        Fault(FaultCode.ADDRESS, "an address is outside host mappings, HBM, SRAM and peer windows",
              "keep buffers open and mapped until the commands that use them are done"),
        Fault(FaultCode.CONTEXT, "an address is outside the ranges and clusters of the queue's context",
              "use memory allocated in the same context"),
        Fault(FaultCode.SEMAPHORE, "a semaphore index does not exist or is read-only",
              "use a semaphore that was allocated from this device"),
        Fault(FaultCode.SEMAPHORE_OVERFLOW, "an add moved a semaphore more than 2^31 - 1 past a waiter's value",
              "reset the semaphore before its distance to the waiters grows that far"),
        Fault(FaultCode.BAD_KERNEL, "the kernel handle is not loaded, or its units are outside the unit mask",
              "load the program before launching it and widen the unit mask"),
        Fault(FaultCode.PROGRAM, "a macro-operation failed at run time", "check the kernel's inputs, indices first"),
        Fault(FaultCode.TRAP, "a TRAP command ran", _RESET_QUEUE),
        Fault(FaultCode.ENGINE_HANG, "an engine made no progress within the watchdog's time", _RESET_QUEUE),
        Fault(FaultCode.ECC, "memory returned an uncorrectable error", "free the buffer, reset the device"),
        Fault(FaultCode.LINK, "the link to the host or a peer failed", "reset the device"),
        Fault(FaultCode.ABORTED, "the command was aborted on request", _RESET_QUEUE),
        Fault(FaultCode.DOORBELL, "the doorbell moved by more than the ring holds, or backwards", _RESET_QUEUE),
        Fault(FaultCode.RESET, "the queue or the device was reset before the command ran", "submit the command again"),
        Fault(FaultCode.CHECKSUM, "the bytes at an address do not have the checksum that was expected of them",
              "copy the data again; where it repeats, test the memory and the link"),
    )
}


class DeviceFault(MaiaError):
    """A command failed on the device.

    Attributes
    ----------
    code : FaultCode
    device, stream : str
        Where. The stream is empty for a command that none submitted.
    queue : int
        The hardware queue.
    sequence : int
        The failed command's sequence number in its queue.
    address : int
        The address that could not be reached, 0 where the fault has none.
    buffer : str
        What the address hits, nearly hits, or would have hit before that was closed; empty where nothing is known.
    command : str
        The command, decoded.
    where : str
        ``file:line`` that submitted it; empty where that is not known.
    node : str
        Of a graph's replay: which node it was, the line that made it, and its buffers. Empty for other commands.
    lost : tuple of maia_rt.LostCommand
        It and those that did not run because of it, as far as that was known when this was raised.
    """

    def __init__(self, code: int, *, device: str, queue: int, sequence: int, address: int = 0, command: str = "",
                 detail: str = "", stream: str = "", buffer: str = "", where: str = "", node: str = "",
                 lost: Sequence[Any] = ()) -> None:
        try:
            row = FAULTS[FaultCode(code)]
        except (ValueError, KeyError):
            row = Fault(FaultCode.NONE, f"the device reported the unknown fault code {code}", "update maia_rt")
        self.code = row.code
        self.device = device
        self.stream = stream
        self.queue = queue
        self.sequence = sequence
        self.address = address
        self.buffer = buffer
        self.command = command
        self.where = where
        self.node = node
        self.lost = tuple(lost)
        what = f"{device}: {stream + ' on ' if stream else ''}queue {queue}: command {sequence} failed: {row.code.name}"
        if address:
            what += f" at {address:#018x}"
        if buffer:
            what += f", {buffer},"
        if command:
            what += f" in {command}"
        notes = [note for note in (detail, node, f"submitted at {where}" if where else "") if note]
        if notes:
            what += f" ({', '.join(notes)})"
        super().__init__(what, cause=row.meaning, hint=row.recovery)


class CallbackError(DeviceFault):
    """A function that a stream called raised an exception: that is the ``__cause__``.

    What the stream was to do after it has not run; the stream goes on after :meth:`maia_rt.Stream.recover`.
    """

    def __init__(self, raised: BaseException, **facts: Any) -> None:
        super().__init__(**facts)
        at = f", called at {self.where}" if self.where else ""
        who = f"{self.device}: {self.stream or f'queue {self.queue}'}"
        MaiaError.__init__(self, f"{who}: a function raised {type(raised).__name__}: {raised}{at}",
                           cause="see the exception that this one was caused by",
                           hint="mend the function; stream.recover() lets the stream go on")
        self.__cause__ = raised


class RankFailed(DeviceFault):
    """A collective ended on this rank because another one cannot take part: its device, or its stream, failed.

    That rank's error is the ``__cause__``. The communicator is of no further use; other work of the stream goes on
    after :meth:`maia_rt.Stream.recover`.

    Attributes
    ----------
    rank : int
        The one that failed.
    culprit : str
        Its device.
    """

    def __init__(self, failure: RankFailure, **facts: Any) -> None:
        super().__init__(**facts)
        self.rank = failure.rank
        self.culprit = failure.device
        who = f"{self.device}: {self.stream or f'queue {self.queue}'}"
        MaiaError.__init__(self, f"{who}: a collective ended because rank {failure.rank}, {failure.device}, failed: "
                                 f"{failure.reason}",
                           cause="see the exception that this one was caused by",
                           hint="close the communicator, and make one of the devices that are left")
        self.__cause__ = failure.reason


class RankFailure(Exception):
    """Why a command of a collective is aborted: becomes a `RankFailed`."""

    def __init__(self, rank: int, device: str, reason: BaseException) -> None:
        super().__init__(rank, device)
        self.rank = rank
        self.device = device
        self.reason = reason


class PeerFault(DeviceFault):
    """What a stream waited for on another device will not come: why is the ``__cause__``.

    What the stream was to do after it has not run; the stream goes on after :meth:`maia_rt.Stream.recover`.

    Attributes
    ----------
    peer : str
        The other device.
    """

    def __init__(self, raised: BaseException, peer: str, **facts: Any) -> None:
        super().__init__(**facts)
        self.peer = peer
        at = f", submitted at {self.where}" if self.where else ""
        who = f"{self.device}: {self.stream or f'queue {self.queue}'}"
        why = raised.what if isinstance(raised, MaiaError) else str(raised)
        what = f"{who}: what it waits for on {peer}{at} will not come"
        MaiaError.__init__(self, f"{what}: {type(raised).__name__}: {why}",
                           cause=f"a command before it on {peer} failed, or the device was closed or is gone",
                           hint="mend what the error names that this one was caused by; stream.recover() lets the "
                                "stream go on")
        self.__cause__ = raised


def device_fault(facts: dict[str, Any]) -> DeviceFault:
    """Return the error for a fault's facts; with ``raised``, for what the program knows better than the device."""
    if isinstance(facts.get("raised"), RankFailure):
        return RankFailed(facts["raised"], **{name: value for name, value in facts.items() if name != "raised"})
    if "peer" in facts:
        return PeerFault(**facts)
    if "raised" in facts:
        return CallbackError(**facts)
    return DeviceFault(**facts)
