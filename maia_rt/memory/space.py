"""Which of the device's memories a buffer lies in."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from maia_rt.errors import InvalidArgument, InvalidType


@dataclass(frozen=True)
class Space:
    """One of the device's memories: HBM, the SRAM of a cluster, the SRAM of a tile.

    Attributes
    ----------
    kind : str
        ``hbm``, ``cluster`` or ``tile``.
    index : int
        Which cluster or tile. Tiles count over clusters: tile t of cluster c is ``c * tiles_per_cluster + t``.

    Examples
    --------
    >>> print(Space.tile(3))
    tile 3
    """

    kind: str
    index: int = 0

    @classmethod
    def hbm(cls) -> Space:
        """Return the device memory, where buffers are by default."""
        return _HBM

    @classmethod
    def cluster(cls, index: int) -> Space:
        """Return the SRAM of a cluster."""
        return cls("cluster", _whole(index))

    @classmethod
    def tile(cls, index: int) -> Space:
        """Return the SRAM of a tile."""
        return cls("tile", _whole(index))

    def __str__(self) -> str:
        return "HBM" if self.kind == "hbm" else f"{self.kind} {self.index}"


def _whole(index: int) -> int:
    try:
        number = operator.index(index)
    except TypeError:
        raise InvalidType(f"the number of a cluster or tile is {type(index).__name__}, not a whole number") from None
    if number < 0:
        raise InvalidArgument(f"the number of a cluster or tile is not negative: {number}")
    return number


_HBM = Space("hbm")
