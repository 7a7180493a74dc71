"""An emulated device in this process: beside one in another process it shows what the way between the two costs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from maia_emulator.function import Function
from maia_emulator.profiles import PROFILES
from maia_emulator.server import Server

from maia_rt.runtime.device import Device
from maia_rt.transport.vfio_user import VfioUserClient
from maia_tools.bench.subject import Cores


@contextmanager
def device_here(cores: Cores) -> Iterator[Device]:
    """Serve a device on threads of this process, which run where others' emulators do."""
    before = set(os.listdir("/proc/self/task"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    server = Server(Function(PROFILES["small"]), theirs, ended=lambda: None)
    try:
        server.start()
        with Device(VfioUserClient.from_socket(ours, "in this process")) as device:
            cores.add_threads(set(os.listdir("/proc/self/task")) - before)
            yield device
    finally:
        server.stop()
