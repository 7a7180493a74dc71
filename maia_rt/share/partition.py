"""What each share of a device consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from maia_rt.capabilities import Capabilities
from maia_rt.contract.commands import CONTEXT_BOUNDS
from maia_rt.errors import InvalidArgument, Unsupported

WINDOW_BITS: Final = 36
"""Each share has so much of the device's host addresses; the broker itself the lowest of these windows."""
_HBM_STEP: Final = 2 << 20


@dataclass(frozen=True)
class Partition:
    """A share of a device, in the device's own numbers.

    Attributes
    ----------
    first_queue, queues, first_semaphore, semaphores, first_cluster, clusters : int
    hbm_base, hbm_bytes : int
        The HBM, as a device address and bytes.
    host_first, host_last : int
        The host addresses, inclusive.
    kernels : int
        How many may be loaded at one time.
    """

    first_queue: int
    queues: int
    first_semaphore: int
    semaphores: int
    first_cluster: int
    clusters: int
    hbm_base: int
    hbm_bytes: int
    host_first: int
    host_last: int
    kernels: int

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """What CREATE_CONTEXT is given: HBM and host addresses, each a start and bytes."""
        return [(self.hbm_base, self.hbm_bytes), (self.host_first, self.host_last + 1 - self.host_first)]

    @property
    def bounds(self) -> npt.NDArray[Any]:
        """A CONTEXT_BOUNDS structure."""
        row = np.zeros((), CONTEXT_BOUNDS)
        for name in CONTEXT_BOUNDS.names or ():
            row[name] = getattr(self, name, 0)
        return row

    def place_semaphore(self, index: int) -> int | None:
        """The device's number of a free semaphore of the share; None for mirrors and what is not there."""
        at = index - self.queues
        return self.first_semaphore + at if 0 <= at < self.semaphores else None

    def number_of(self, semaphore: int) -> int | None:
        """The share's number of the device's semaphore, a mirror too; None where it is not the share's."""
        if 0 <= semaphore - self.first_queue < self.queues:
            return semaphore - self.first_queue
        if 0 <= semaphore - self.first_semaphore < self.semaphores:
            return semaphore - self.first_semaphore + self.queues
        return None


def divide(name: str, capabilities: Capabilities, ranges: Sequence[tuple[int, int]], count: int) -> list[Partition]:
    """Divide a device into equal shares.

    Parameters
    ----------
    name : str
        For error texts.
    capabilities : Capabilities
    ranges : sequence of (first, last)
        The usable host addresses, as ``Transport.iova_ranges``.
    count : int
        How many shares.

    Raises
    ------
    Unsupported
        The device cannot keep programs apart.
    InvalidArgument
        It is too small for so many.
    """
    if not (capabilities.bounded_contexts and capabilities.host_doorbells):
        raise Unsupported(f"{name}: the device cannot keep programs apart",
                          cause="CAPS.BOUNDED_CONTEXTS or CAPS.HOST_DOORBELLS is clear: its contract is older than 1.2 "
                          "or it does not watch doorbells in host memory", hint="give each program a device of its own")
    most = min(capabilities.clusters, capabilities.max_queues, capabilities.max_contexts - 1)
    if not 1 <= count <= most:
        raise InvalidArgument(f"{name}: the device can be shared by 1 to {most} programs, not {count}",
                              cause=f"it has {capabilities.clusters} clusters, and SRAM is divided by the cluster")
    queues, clusters = capabilities.max_queues // count, capabilities.clusters // count
    semaphores = (capabilities.semaphores - capabilities.max_queues) // count
    hbm = capabilities.hbm_bytes // count // _HBM_STEP * _HBM_STEP
    shares = []
    for i in range(count):
        first = (i + 1) << WINDOW_BITS
        last = first + (1 << WINDOW_BITS) - 1
        if last >> capabilities.host_address_bits or not any(low <= first and last <= high for low, high in ranges):
            raise InvalidArgument(f"{name}: the host's IOMMU leaves room for {i} shares, not {count}",
                                  cause=f"each takes {1 << WINDOW_BITS - 30} GiB of I/O addresses")
        shares.append(Partition(
            i * queues, queues, capabilities.max_queues + i * semaphores, semaphores, i * clusters, clusters,
            capabilities.hbm_base + i * hbm, hbm, first, last, capabilities.max_kernels // count))
    return shares
