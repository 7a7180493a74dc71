"""What a call returns: when it is done, and how fast it was."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from maia_rt.errors import InvalidArgument

if TYPE_CHECKING:
    from maia_rt.collectives.communicator import Communicator
    from maia_rt.runtime.event import Event


class Collective:
    """A collective that was submitted; the ranks' streams go on behind it.

    Attributes
    ----------
    name : str
        ``all_reduce``, ...
    algorithm : str
        ``direct`` or ``ring``.
    bytes_moved : int
        What must be read and written again over all devices, at the least: see docs/collectives.md.
    """

    def __init__(self, communicator: Communicator, name: str, algorithm: str, bytes_moved: int,
                 starts: Sequence[Event], ends: Sequence[Event]) -> None:
        self.name = name
        self.algorithm = algorithm
        self.bytes_moved = bytes_moved
        self._communicator = communicator
        self._starts = tuple(starts)
        self._ends = tuple(ends)

    @property
    def events(self) -> tuple[Event, ...]:
        """The end of each rank's part, by rank."""
        return self._ends

    def query(self) -> bool:
        """Say whether all ranks are done. Raises as :meth:`synchronize`."""
        self._require_submitted()
        return sum(event.query() for event in self._ends) == len(self._ends)

    def synchronize(self, timeout: float | None = None) -> None:
        """Wait until all ranks are done.

        Parameters
        ----------
        timeout : float, optional
            In seconds; the communicator's by default.

        Raises
        ------
        RankFailed
            Another rank cannot take part; the text names it.
        DeviceFault, DeviceLost, DeviceTimeout
            Of a rank itself.
        InvalidArgument
            It was captured.
        """
        self._require_submitted()
        deadline = time.monotonic() + (self._communicator.timeout if timeout is None else timeout)
        for event in self._ends:
            event.synchronize(max(deadline - time.monotonic(), 0))

    @property
    def seconds(self) -> float:
        """Device time of the slowest rank, from the moment its stream was ready for it.

        Raises
        ------
        InvalidArgument
            The communicator does not take times.
        """
        return self.seconds_since(self)

    def seconds_since(self, first: Collective) -> float:
        """Device time of the slowest rank, from the moment its stream was ready for an earlier collective.

        Parameters
        ----------
        first : Collective
            Of the same communicator and streams: what was submitted from it on to this one is timed as a whole.

        Raises
        ------
        InvalidArgument
            The communicator does not take times, or is another one.
        """
        if first._communicator is not self._communicator or len(first._starts) != len(self._ends):
            raise InvalidArgument(f"there is no time from {first!r} to {self!r}",
                                  hint="both are of all ranks of one communicator, made with timing=True")
        return max((end - start) / 1e3 for start, end in zip(first._starts, self._ends, strict=True))

    @property
    def bandwidth(self) -> float:
        """Bytes a second: :attr:`bytes_moved` over :attr:`seconds`."""
        return self.bytes_moved / max(self.seconds, 1e-9)

    @property
    def bound_fraction(self) -> float:
        """The bound's share of the time it took: :attr:`bandwidth` over the communicator's rate of copies.

        That rate is measured at the first use; see :meth:`Communicator.measure`.
        """
        return self.bandwidth / self._communicator.rate

    def _require_submitted(self) -> None:
        if not self._ends:
            raise InvalidArgument(f"this {self.name} was captured",
                                  hint="launch the graphs, and wait for their streams")

    def __repr__(self) -> str:
        return f"<Collective {self.name}, {self.algorithm}, {self.bytes_moved} bytes>"
