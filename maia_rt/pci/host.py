"""Where a machine's kernel shows what it has: ``/sys``, ``/dev``, ``/proc``, and our own record under ``/run``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    """The roots of the trees. A copy of a tree, another machine's or a container's reads the same way.

    Attributes
    ----------
    sys, dev, proc : Path
    state : Path
        The folder that remembers what functions were before they were bound; gone with the next boot, as they are.
    """

    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    proc: Path = Path("/proc")
    state: Path = Path("/run/maia-rt/binding")

    @property
    def pci(self) -> Path:
        """What :mod:`maia_rt.pci.sysfs` takes as its root."""
        return self.sys / "bus/pci"

    def module(self, name: str) -> Path:
        """The folder of a kernel module, there when it is loaded or built in with parameters."""
        return self.sys / "module" / name
