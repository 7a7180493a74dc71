"""What a device says of itself, asked in a way that does not hang with it."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from maia_rt.contract.commands import Feature
from maia_rt.errors import MaiaError, Unsupported
from maia_rt.firmware import Firmware

PATIENCE_SECONDS: Final = 0.5
"""Who hangs wants to know why, not to wait for what hangs as well."""


@dataclass(frozen=True)
class Insight:
    """What a device says of itself.

    Attributes
    ----------
    ailment : str
        Why it could not be asked, empty where it could.
    queues, semaphores : dict
        QUEUE_LOG and SEMAPHORE_LOG records, by number; empty for a device that has no such logs.
    """

    ailment: str
    queues: dict[int, Any] = field(default_factory=dict)
    semaphores: dict[int, Any] = field(default_factory=dict)


def look_inside(firmwares: Sequence[Firmware], patience: float = PATIENCE_SECONDS) -> list[Insight]:
    """Ask devices, all at once, what their queues and semaphores are at; takes `patience` seconds at most."""
    deadline = time.monotonic() + patience
    asked = [_begin(firmware, patience) for firmware in firmwares]
    for thread, _ in asked:
        if thread is not None:
            thread.join(max(deadline - time.monotonic(), 0))
    return [found[-1] for _, found in asked]


def _begin(firmware: Firmware, patience: float) -> tuple[threading.Thread | None, list[Insight]]:
    before = _asking.get(firmware)
    if before is not None and before.is_alive():
        return None, [Insight("it has not answered the last question yet")]
    found = [Insight(f"no answer within {patience:g} s")]
    # A server that stands still blocks whoever asks, for longer than that.
    thread = threading.Thread(target=lambda: found.append(_ask(firmware)), name="maia-asking", daemon=True)
    _asking[firmware] = thread
    thread.start()
    return thread, found


def _ask(firmware: Firmware) -> Insight:
    try:
        firmware.get_feature(Feature.WATCHDOG_MS)
        queues = {int(row["queue"]): row for row in firmware.queue_log()}
        return Insight("", queues, {int(row["index"]): row for row in firmware.semaphore_log()})
    except Unsupported:
        return Insight("")
    except MaiaError as error:
        return Insight(error.what)


_asking: weakref.WeakKeyDictionary[Firmware, threading.Thread] = weakref.WeakKeyDictionary()
