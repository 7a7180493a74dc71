"""The address of a PCI function: domain, bus, device, function."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from maia_rt.errors import InvalidArgument

# Some hosts number domains beyond 16 bits (VMD, Hyper-V), so the domain may have up to 8 digits.
_PATTERN: Final = re.compile(r"(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})\.([0-7])\Z")


class PciAddress(NamedTuple):
    """Where a function sits, as in ``0000:3b:00.0``. Sorts in bus order.

    Examples
    --------
    >>> PciAddress.parse("3b:00.1")
    PciAddress(domain=0, bus=59, device=0, function=1)
    >>> str(_)
    '0000:3b:00.1'
    """

    domain: int
    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> PciAddress:
        """Parse ``[domain:]bus:device.function``, hexadecimal; the domain is 0 where it is left out.

        Raises
        ------
        InvalidArgument
            The text is not such an address.
        """
        match = _PATTERN.match(text.strip())
        if match is None or int(match[3], 16) > 0x1F:
            raise InvalidArgument(f"{text!r} is not a PCI address", hint="write it as lspci -D does: 0000:3b:00.0")
        return cls(int(match[1] or "0", 16), int(match[2], 16), int(match[3], 16), int(match[4]))

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function}"
