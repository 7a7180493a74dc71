"""From the arguments of a call to what each rank asks for: one function a collective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maia_rt.collectives.call import Call, require_agreement, require_buffer
from maia_rt.errors import ClosedError, InvalidArgument, InvalidType
from maia_rt.runtime import check
from maia_rt.runtime.buffer import Buffer
from maia_rt.runtime.device import Device
from maia_rt.runtime.stream import Stream

Devices = tuple[Device, ...]
_BYTES = np.dtype(np.uint8)
ALGORITHMS = ("auto", "direct", "ring")


def devices(given: Any) -> Devices:
    """Return the devices of a communicator, checked."""
    if isinstance(given, str | Device):
        raise InvalidType(f"devices is {type(given).__name__}, not a sequence of devices")
    try:
        found = tuple(given)
    except TypeError:
        raise InvalidType(f"devices is {type(given).__name__}, not a sequence of devices") from None
    for device in found:
        check.instance(device, Device, "a rank's device", "open it with maia_rt.open()")
        device._require_open()
    if len(found) < 2 or len(set(map(id, found))) < len(found):
        raise InvalidArgument(f"a communicator has 2 devices or more, each once, not {len(found)}: "
                              f"{', '.join(device.name for device in found) or 'none'}",
                              hint="maia emulate --devices N serves several")
    return found


def algorithm(name: Any) -> Any:
    """Return an algorithm's name, checked."""
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise InvalidArgument(f"an algorithm is one of {', '.join(map(repr, ALGORITHMS))}, not {name!r:.40}")
    return name


def operation(name: Any) -> str:
    """Return the name of a reduction; whether there is such a one is checked with the call."""
    if not isinstance(name, str) or not name:
        raise InvalidArgument(f"a reduction is named 'sum' or 'prod', not {name!r:.40}")
    return name


# --- one rank's part -------------------------------------------------------------------------------------------------


def one_all_reduce(devices: Devices, rank: int, send: Any, recv: Any, op: Any, stream: Any) -> Call:
    """A rank's part of an all-reduce."""
    sent = require_buffer(send, f"rank {rank}: send")
    got = sent if recv is None else require_buffer(recv, f"rank {rank}: recv")
    call = Call("all_reduce", rank, _stream(devices[rank], stream), sent, got, _elements(sent), _dtype(sent),
                operation(op))
    return _checked(call, devices, (1, 1))


def one_reduce_scatter(devices: Devices, rank: int, send: Any, recv: Any, op: Any, stream: Any) -> Call:
    """Likewise; `count` is that of recv."""
    sent, got = require_buffer(send, f"rank {rank}: send"), require_buffer(recv, f"rank {rank}: recv")
    call = Call("reduce_scatter", rank, _stream(devices[rank], stream), sent, got, _elements(got), _dtype(got),
                operation(op))
    return _checked(call, devices, (len(devices), 1), -rank * call.nbytes)


def one_all_gather(devices: Devices, rank: int, send: Any, recv: Any, stream: Any) -> Call:
    """Likewise; `count` is that of send."""
    sent, got = require_buffer(send, f"rank {rank}: send"), require_buffer(recv, f"rank {rank}: recv")
    call = Call("all_gather", rank, _stream(devices[rank], stream), sent, got, _elements(sent), _dtype(sent))
    return _checked(call, devices, (1, len(devices)), rank * call.nbytes)


def one_broadcast(devices: Devices, rank: int, buffer: Any, root: Any, stream: Any) -> Call:
    """Likewise."""
    memory = require_buffer(buffer, f"rank {rank}: the buffer")
    call = Call("broadcast", rank, _stream(devices[rank], stream), memory, memory, _elements(memory), _dtype(memory),
                root=check.integer(root, "a root", 0, len(devices) - 1))
    return _checked(call, devices, (1, 1))


def one_reduce(devices: Devices, rank: int, send: Any, recv: Any, root: Any, op: Any, stream: Any) -> Call:
    """Likewise; only the root has a recv."""
    sent = require_buffer(send, f"rank {rank}: send")
    root = check.integer(root, "a root", 0, len(devices) - 1)
    got = None
    if rank == root:
        got = sent if recv is None else require_buffer(recv, f"rank {rank}: recv")
    call = Call("reduce", rank, _stream(devices[rank], stream), sent, got, _elements(sent), _dtype(sent),
                operation(op), root)
    return _checked(call, devices, (1, 1))


def one_all_to_all(devices: Devices, rank: int, send: Any, recv: Any, stream: Any) -> Call:
    """Likewise; `count` is that of one part."""
    sent, got = require_buffer(send, f"rank {rank}: send"), require_buffer(recv, f"rank {rank}: recv")
    total = _elements(sent)
    if total % len(devices):
        raise InvalidArgument(f"rank {rank}: {total} elements are not {len(devices)} equal parts")
    call = Call("all_to_all", rank, _stream(devices[rank], stream), sent, got, total // len(devices), _dtype(sent))
    return _checked(call, devices, (len(devices), len(devices)), None)


def one_send(devices: Devices, source: int, target: int, rank: int, memory: Any, stream: Any) -> Call:
    """One end of a send: `rank` is the source or the target."""
    what = "send" if rank == source else "recv"
    found = require_buffer(memory, f"rank {rank}: {what}")
    if source == target:
        raise InvalidArgument(f"rank {rank} cannot send to itself", hint="copy with stream.copy")
    sent, got = (found, None) if rank == source else (None, found)
    call = Call("send", rank, _stream(devices[rank], stream), sent, got, _elements(found), _dtype(found))
    return _checked(call, devices, (1, 1))


def one_barrier(devices: Devices, rank: int, stream: Any) -> Call:
    """Likewise."""
    return Call("barrier", rank, _stream(devices[rank], stream), None, None, 0, _BYTES)


# --- all ranks' parts ------------------------------------------------------------------------------------------------


def all_reduce(devices: Devices, sends: Any, recvs: Any, op: Any, streams: Any) -> list[Call]:
    """Every rank's part of an all-reduce."""
    sends, streams = _list(devices, sends, "sends"), _streams(devices, streams)
    recvs = sends if recvs is None else _list(devices, recvs, "recvs")
    return _agreed(devices, lambda r: one_all_reduce(devices, r, sends[r], recvs[r], op, streams[r]))


def reduce_scatter(devices: Devices, sends: Any, recvs: Any, op: Any, streams: Any) -> list[Call]:
    """Likewise."""
    sends, recvs, streams = _list(devices, sends, "sends"), _list(devices, recvs, "recvs"), _streams(devices, streams)
    return _agreed(devices, lambda r: one_reduce_scatter(devices, r, sends[r], recvs[r], op, streams[r]))


def all_gather(devices: Devices, sends: Any, recvs: Any, streams: Any) -> list[Call]:
    """Likewise."""
    sends, recvs, streams = _list(devices, sends, "sends"), _list(devices, recvs, "recvs"), _streams(devices, streams)
    return _agreed(devices, lambda r: one_all_gather(devices, r, sends[r], recvs[r], streams[r]))


def broadcast(devices: Devices, buffers: Any, root: Any, streams: Any) -> list[Call]:
    """Likewise."""
    buffers, streams = _list(devices, buffers, "buffers"), _streams(devices, streams)
    return _agreed(devices, lambda r: one_broadcast(devices, r, buffers[r], root, streams[r]))


def reduce(devices: Devices, sends: Any, recv: Any, root: Any, op: Any, streams: Any) -> list[Call]:
    """Likewise."""
    sends, streams = _list(devices, sends, "sends"), _streams(devices, streams)
    return _agreed(devices, lambda r: one_reduce(devices, r, sends[r], recv, root, op, streams[r]))


def all_to_all(devices: Devices, sends: Any, recvs: Any, streams: Any) -> list[Call]:
    """Likewise."""
    sends, recvs, streams = _list(devices, sends, "sends"), _list(devices, recvs, "recvs"), _streams(devices, streams)
    return _agreed(devices, lambda r: one_all_to_all(devices, r, sends[r], recvs[r], streams[r]))


def send(devices: Devices, send: Any, recv: Any, streams: Any) -> list[Call]:
    """The sender's part and the receiver's."""
    ranks = []
    for what, memory in (("send", require_buffer(send, "send")), ("recv", require_buffer(recv, "recv"))):
        rank = next((rank for rank, device in enumerate(devices) if device is memory.device), None)
        if rank is None:
            raise InvalidArgument(f"{what} belongs to {memory.device.name}, which is no rank's device")
        ranks.append(rank)
    source, target = ranks
    if streams is None:
        streams = None, None
    elif isinstance(streams, Stream) or len(streams) != 2:
        raise InvalidArgument("a send has two streams, the sender's and the receiver's")
    calls = [one_send(devices, source, target, source, send, streams[0]),
             one_send(devices, source, target, target, recv, streams[1])]
    require_agreement(calls)
    return calls


def barrier(devices: Devices, streams: Any) -> list[Call]:
    """Every rank's part of a barrier."""
    streams = _streams(devices, streams)
    return [one_barrier(devices, rank, streams[rank]) for rank in range(len(devices))]


def bytes_moved(calls: Sequence[Call]) -> int:
    """What must be read once and written once at the least, over all devices; docs/collectives.md derives it."""
    first, n = calls[0], len(calls)
    in_place = first.send is not None and first.recv is not None and (
        first.recv.address <= first.send.address < first.recv.address + max(first.recv.nbytes, 1))
    return {
        "all_reduce": n * first.nbytes,
        "reduce_scatter": n * n * first.nbytes,
        "reduce": n * first.nbytes,
        "all_gather": n * (n - in_place) * first.nbytes,
        "broadcast": (n - 1) * first.nbytes,
        "all_to_all": n * n * first.nbytes,
        "send": first.nbytes,
        "barrier": 0,
    }[first.name]


# ---------------------------------------------------------------------------------------------------------------------


def _agreed(devices: Devices, one: Callable[[int], Call]) -> list[Call]:
    calls = [one(rank) for rank in range(len(devices))]
    require_agreement(calls)
    return calls


def _checked(call: Call, devices: Devices, parts: tuple[int, int], apart: int | None = 0) -> Call:
    call.check(devices[call.rank], parts)
    call.check_overlap(apart)
    return call


def _list(devices: Devices, given: Any, what: str) -> list[Any]:
    if isinstance(given, str | bytes | Buffer):
        raise InvalidType(f"{what} is {type(given).__name__}, not a sequence with one entry a rank")
    try:
        found = list(given)
    except TypeError:
        raise InvalidType(f"{what} is {type(given).__name__}, not a sequence with one entry a rank") from None
    if len(found) != len(devices):
        raise InvalidArgument(f"{what} has {len(found)} entries; there are {len(devices)} ranks")
    return found


def _streams(devices: Devices, given: Any) -> list[Any]:
    return [None] * len(devices) if given is None else _list(devices, given, "streams")


def _stream(device: Device, given: Any) -> Stream:
    if given is None:
        device._require_open()
        return device.default_stream
    return device._require_stream(given)


def _dtype(memory: Buffer) -> np.dtype[Any]:
    return memory.dtype or _BYTES


def _elements(memory: Buffer) -> int:
    if memory.closed:
        raise ClosedError(f"{memory!r} has been closed")
    return memory.nbytes // max(_dtype(memory).itemsize, 1)


def peer(devices: Devices, rank: Any) -> int:
    """Return the rank of a peer, checked."""
    return check.integer(rank, "a rank", 0, len(devices) - 1)
