"""What a forked child must not inherit: whoever holds a device's descriptors is told in the child and lets go there."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """Something that must let go in a forked child."""

    def _after_fork(self) -> None:
        """Close the child's copies of descriptors, without a lock: another thread of the parent may have held it."""


_LIVE: weakref.WeakSet[Forkable] = weakref.WeakSet()


def follow(one: Forkable) -> None:
    """Have `one` told in every child that this process forks while `one` lives."""
    _LIVE.add(one)


def _in_child() -> None:
    for one in list(_LIVE):
        one._after_fork()


os.register_at_fork(after_in_child=_in_child)
