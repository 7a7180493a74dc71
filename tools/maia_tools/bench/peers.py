"""Several devices: copies to a peer, events of a peer, collectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from maia_tools.bench.measurement import Measurement, each
from maia_tools.bench.subject import Subject
from maia_tools.bench.transfers import memcpy, rounds
from maia_tools.output import bytes_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from maia_rt import Communicator
    from maia_rt.runtime.device import Device

COPY_SIZES = (4 << 10, 256 << 10, 1 << 20, 16 << 20, 64 << 20)
COLLECTIVE_SIZES = (4 << 10, 1 << 20, 16 << 20)
EXCHANGES = 20


def peers(subject: Subject) -> list[Measurement]:
    """Between the device and a second one, where it is embedded; nothing elsewhere."""
    import maia_rt

    if subject.device.emulator_pid is None:
        return []
    other = subject.stack.enter_context(maia_rt.open("emulated"))
    subject.cores.add(other)
    found = [memcpy(size) for size in (*COPY_SIZES, *COLLECTIVE_SIZES)]
    found += [_copy(subject, other, size) for size in COPY_SIZES]
    found.append(_exchange(subject, other))
    ranks = subject.stack.enter_context(maia_rt.Communicator([subject.device, other]))
    for size in COLLECTIVE_SIZES:
        found += _collectives(subject, ranks, size)
    return found


def _copy(subject: Subject, other: Device, size: int) -> Measurement:
    stream = subject.stream
    near, far = (subject.stack.enter_context(device.allocate(size)) for device in (subject.device, other))
    stream.copy(far, near)
    stream.synchronize()

    def once() -> None:
        stream.copy(far, near)
        stream.synchronize()

    kind, count = other.peer(subject.device).kind, rounds(size)
    return Measurement(f"copy {bytes_text(size)} to a peer ({kind})", count, lambda: each(count, once), subject.settle,
                       nbytes=size, reference=f"memcpy {bytes_text(size)}", series=("device to peer", size))


def _exchange(subject: Subject, other: Device) -> Measurement:
    """Two hops of order between devices, no host in between."""
    here, there = subject.stream, subject.stack.enter_context(other.create_stream())

    def once() -> None:
        there.wait(here.record())
        here.wait(there.record())
        here.synchronize()

    return Measurement("wait for a peer that waits for this device", EXCHANGES, lambda: each(EXCHANGES, once),
                       subject.settle, reference="socket, round trip")


def _collectives(subject: Subject, ranks: Communicator, size: int) -> list[Measurement]:
    def buffers(nbytes: int) -> list[Any]:
        return [subject.stack.enter_context(device.upload(np.ones(nbytes // 4, np.float32)))
                for device in ranks.devices]

    halves, sends, recvs = buffers(size // 2), buffers(size), buffers(size)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: ranks.all_reduce(sends, recvs), "all_gather": lambda: ranks.all_gather(halves, recvs)}
    count = rounds(size)
    return [Measurement(f"{name} {bytes_text(size)}, 2 devices, and wait", count,
                        lambda call=call: each(count, lambda: call().synchronize()),
                        subject.settle, nbytes=size, reference=f"memcpy {bytes_text(size)}", series=(name, size))
            for name, call in calls.items()]
