"""Which device a command means, and how it is opened to look without booting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from maia_rt.errors import InvalidArgument
from maia_rt.pci.config import set_memory_space
from maia_rt.transport import Transport, open_device
from maia_rt.transport.uapi import PciRegion

if TYPE_CHECKING:
    from maia_rt.runtime.embedded import EmbeddedEmulator


def selector(text: str | None) -> int | str | None:
    """What `maia_rt.open` takes, from the command line's word: digits are an index."""
    return int(text) if text is not None and text.isdecimal() else text


def _connect(text: str | None) -> tuple[Transport, EmbeddedEmulator | None]:
    if text is not None and not text.isdecimal():
        # An address or a socket: the runtime, which takes most of the start, is of no use here.
        with suppress(InvalidArgument):
            return open_device(text), None
    from maia_rt.runtime.discovery import connect

    return connect(selector(text))


@contextmanager
def open_transport(text: str | None) -> Iterator[Transport]:
    """Connect to a device and make its BARs readable, no more; disconnect at the end."""
    transport, emulator = _connect(text)
    try:
        if transport.info.is_pci:
            config = PciRegion.CONFIG
            set_memory_space(partial(transport.read, config), partial(transport.write, config), True)
        yield transport
    finally:
        transport.close()
        if emulator is not None:
            emulator.close()
