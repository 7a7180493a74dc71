"""What it means when a device reads as all ones."""

from __future__ import annotations

from maia_rt.errors import DeviceLost
from maia_rt.pci.config import COMMAND, COMMAND_MEMORY, power_management
from maia_rt.transport import Transport
from maia_rt.transport.uapi import PciRegion
from maia_tools.reg.place import Place, of_register
from maia_tools.reg.space import CONFIG, Space

WITNESSES = 4
"""How many other registers are asked before a device is said not to answer."""


def check(transport: Transport, spaces: list[Space], place: Place) -> bool:
    """Find out whether a device is alive after `place` read as all ones.

    Returns
    -------
    bool
        True where something else shows that it answers, False where nothing can show it.

    Raises
    ------
    DeviceLost
        It does not; the text says why, as far as the device lets one know.
    """
    if transport.info.is_pci:
        _check_configuration(transport, place)
    if place.space.name == CONFIG:
        return True
    asked = 0
    for witness in _witnesses(spaces, place):
        value = transport.read(witness.space.region, witness.offset, witness.access_size)
        if value != (1 << 8 * witness.access_size) - 1:
            return True
        asked += 1
    if asked:
        raise DeviceLost(f"{transport.name}: {place.name} and {asked} other registers read as all ones",
                         cause="the link is down, the device hangs, or the program that serves it has ended",
                         hint="maia reg read 'config.*'; reset the device; look for errors of the link in dmesg")
    return False


def _check_configuration(transport: Transport, place: Place) -> None:
    def read(offset: int, size: int) -> int:
        return transport.read(PciRegion.CONFIG, offset, size)

    what = f"{transport.name}: {place.name} reads as all ones"
    if read(0, 2) == 0xFFFF:
        raise DeviceLost(f"{what}, and so does configuration space",
                         cause="the link is down, the device is in reset, or it has no power",
                         hint="reset the device, or remove it and rescan the bus")
    if place.space.name == CONFIG:
        return
    if not read(COMMAND, 2) & COMMAND_MEMORY:
        raise DeviceLost(what, cause="its memory space is disabled: config.command.memory_space is 0",
                         hint="maia reg write config.command.memory_space 1 --yes")
    power = power_management(read)
    if power is not None and power.state:
        raise DeviceLost(what, cause=f"it is in power state D{power.state}",
                         hint="maia reg write config.pm.control.state 0 --yes")


def _witnesses(spaces: list[Space], place: Place) -> list[Place]:
    found: list[Place] = []
    for space in sorted(spaces, key=lambda s: s is not place.space):
        if space.name == CONFIG or not space.described:
            continue
        for register in space.registers:
            if (register.readable and not register.changed_by_reading and not register.dimensions
                    and (space is not place.space or register is not place.register)):
                found.append(of_register(space, register))
            if len(found) == WITNESSES:
                return found
    return found
