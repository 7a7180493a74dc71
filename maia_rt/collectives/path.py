"""How one rank's device reaches another's memory and semaphores: a proven peer path, its addresses looked up once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maia_rt.errors import Unsupported

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device


class Path:
    """From a device to a peer.

    Raises
    ------
    Unsupported
        The device does not reach the peer by itself; the text says why.
    """

    def __init__(self, device: Device, peer: Device) -> None:
        self._path = device.peer(peer)
        self.require_direct()
        base = peer.capabilities.hbm_base
        self._memory = self._path.address(base) - base
        self._window = self._path.semaphore(0)

    def require_direct(self) -> None:
        """Raise Unsupported where the path is not, or no longer, a direct one."""
        path = self._path
        if path.kind != "direct":
            raise Unsupported(f"{path.device.name} does not reach {path.other.name} by itself", cause=path.why,
                              hint="collectives need direct paths; stream.copy goes through the host")

    def address(self, address: int) -> int:
        """Where the device sees an address of the peer's HBM."""
        return self._memory + address

    def semaphore(self, index: int) -> int:
        """Where it sees a semaphore of the peer."""
        return self._window + 4 * index
