"""What a device said of itself when it was opened, which does not change while it is open."""

from __future__ import annotations

from collections.abc import Sequence

from maia_rt.errors import InvalidArgument
from maia_rt.transport.protocol import DeviceInfo, IrqInfo, RegionInfo


class Described:
    """The part of a :class:`maia_rt.transport.protocol.Transport` that every kind answers from memory."""

    _name: str
    _info: DeviceInfo
    _regions: tuple[RegionInfo, ...]
    _irqs: tuple[IrqInfo, ...]

    @property
    def name(self) -> str:
        """What error texts call the device: a PCI address or a socket path."""
        return self._name

    @property
    def info(self) -> DeviceInfo:
        """The device's flags and counts."""
        return self._info

    @property
    def regions(self) -> Sequence[RegionInfo]:
        """Every region, by index."""
        return self._regions

    def region(self, index: int) -> RegionInfo:
        """Return one region."""
        if not 0 <= index < len(self._regions):
            raise InvalidArgument(f"{self._name}: there is no region {index}; the last is {len(self._regions) - 1}")
        return self._regions[index]

    @property
    def irqs(self) -> Sequence[IrqInfo]:
        """Every interrupt index."""
        return self._irqs
