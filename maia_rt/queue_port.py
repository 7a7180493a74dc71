"""What a queue pair asks of its device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt


@dataclass(frozen=True)
class QueuePort:
    """What a queue pair needs to know of its device.

    Attributes
    ----------
    device : str
        For error texts.
    event_fd, liveness_fd : int
        The device's event vector and the transport, -1 for none.
    wake : callable or None
        Wakes a device that sleeps; None where it never does.
    service, on_event : callable
        Called when the transport, or the device's event vector, wants attention.
    check_alive : callable
        Raises DeviceLost where the device is gone.
    doorbell_page : callable
        Maps ``(offset, size)`` of BAR 2.
    faults : callable
        Reads the fault log, as an array of FAULT records.
    look : callable
        Serves the device's event vector if it has fired; for those who only ask, and do not wait.
    explain : callable or None
        Given a queue's number: what it hangs at, as an object with a ``sentence``, or None.
    listed : callable
        Given the address of a list and a place in it: which node of a graph that is; empty for lists of nobody's.
    """

    device: str
    event_fd: int
    liveness_fd: int
    wake: Callable[[], object] | None
    service: Callable[[], object]
    on_event: Callable[[], object]
    check_alive: Callable[[], object]
    doorbell_page: Callable[[int, int], memoryview]
    faults: Callable[[], npt.NDArray[Any]]
    look: Callable[[], object]
    explain: Callable[[int], Any] | None = None
    listed: Callable[[int, int], str] = lambda address, place: ""


class QueueAdmin(Protocol):
    """The admin commands a queue pair lives by."""

    def create_queue(self, params: npt.NDArray[Any]) -> int:
        """Create a queue from a CREATE_QUEUE structure; return its id."""

    def reset_queue(self, queue: int, initial: int) -> None:
        """Empty a queue and let it run from index `initial`."""

    def abort(self, queue: int, sequence: int) -> None:
        """Fail one command with ABORTED. InvalidArgument where it is done already."""

    def delete_queue(self, queue: int) -> None:
        """Delete a queue. The device no longer touches its memory when this returns."""
