"""``maia bench``: what the host path costs, beside what the machine itself costs in the same run."""

from maia_tools.bench.command import bench

__all__ = ["bench"]
