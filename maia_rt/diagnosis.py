"""What a queue is at, in words: the facts of a fault, and the text of a time-out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from maia_rt._fast.ring import Ring
from maia_rt.contract.commands import INDIRECT, Opcode, decode
from maia_rt.errors import DeviceTimeout, FaultCode, MaiaError
from maia_rt.observe.sites import describe
from maia_rt.queue_port import QueuePort

_AT_ADDRESSES: Final = (FaultCode.ADDRESS, FaultCode.CONTEXT, FaultCode.ECC, FaultCode.LINK)


def fault_facts(ring: Ring, port: QueuePort, queue: int, sequence: int,
                look_up: Callable[[int], str]) -> dict[str, Any]:
    """Collect what `DeviceFault` says about the command at which a queue stopped.

    Parameters
    ----------
    ring, port : Ring, QueuePort
    queue, sequence : int
    look_up : callable
        Says what lies at a device address.
    """
    _, code, _ = ring.state
    facts: dict[str, Any] = {"code": code, "device": port.device, "queue": queue, "sequence": sequence}
    raw: bytes | npt.NDArray[Any] | None = ring.command_at(sequence)
    details = []
    try:
        log = port.faults()
    except MaiaError as error:
        details.append(f"the fault log could not be read: {error.what}")
    else:
        found = log[(log["queue"] == queue) & (log["sequence"] == sequence)]
        if len(found):
            entry = found[-1]
            facts["address"] = int(entry["address"])
            if raw is not None and raw[0] == Opcode.INDIRECT:
                place = int(entry["detail"])
                facts["node"] = port.listed(int(np.frombuffer(bytes(raw), INDIRECT)[0]["list"]), place)
                details.append(f"command {place} of the list")
            elif entry["detail"]:
                details.append(f"detail {entry['detail']}")
            raw = bytes(entry["command"])
    if raw is not None:
        facts["command"] = decode(raw)
    if code in _AT_ADDRESSES and facts.get("address"):
        facts["buffer"] = look_up(facts["address"])
    facts["where"] = describe(ring.site(sequence))
    facts["detail"] = ", ".join(details)
    return facts


def timeout_error(ring: Ring, port: QueuePort, queue: int, sequence: int, seconds: float) -> DeviceTimeout:
    """Return the error for a command that was not done in time; it says what the queue is at."""
    at = ring.poll() + 1
    raw, where = ring.command_at(at), describe(ring.site(at))
    what = f"{ring.name}: command {sequence} was not done within {seconds:g} s"
    if raw is None:
        return DeviceTimeout(what, cause="it was never submitted", hint="wait for what was submitted")
    what += f"; the device is at command {at}: {decode(raw)}" + (f", submitted at {where}" if where else "")
    report = port.explain(queue) if port.explain else None
    error = DeviceTimeout(what, cause=report.sentence if report else "the device hangs, or has more to do",
                          hint="print the error's report, wait longer, or abort the command: stream.abort()")
    error.report = report
    return error
