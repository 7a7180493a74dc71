"""One device for several programs: a broker holds it and serves each of them a share that is a device of its own."""

from maia_rt.share.broker import Broker
from maia_rt.share.partition import Partition, divide

__all__ = ["Broker", "Partition", "divide"]
