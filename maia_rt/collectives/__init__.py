"""Collectives: what several devices do together, over peer paths and semaphores, the host only submits."""

from maia_rt.collectives.collective import Collective
from maia_rt.collectives.communicator import Communicator
from maia_rt.collectives.rank import Rank

__all__ = ["Collective", "Communicator", "Rank"]
