"""The embedded device: an emulator of our own, in a process of its own, at the other end of a socket pair."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Final

from maia_rt.errors import DeviceLost, DeviceNotFound
from maia_rt.transport import Transport
from maia_rt.transport.vfio_user import VfioUserClient

START_SECONDS: Final = 20.0
END_SECONDS: Final = 1.0


class EmbeddedEmulator:
    """A private emulator process. It ends when its socket closes: with its owner, however that ends.

    Raises
    ------
    DeviceNotFound
        The emulator does not start; its own words are on stderr.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                # A session of its own: an interrupt typed at the terminal is for the program, not for its device.
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "maia_emulator", "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
            except BaseException:
                ours.close()
                raise
        try:
            self.transport: Transport = VfioUserClient.from_socket(ours, "emulated", START_SECONDS)
        except BaseException as error:
            self.close()
            if isinstance(error, DeviceLost):
                raise DeviceNotFound("the embedded emulator did not start", cause=error.what,
                                     hint=f"run {sys.executable} -m maia_emulator --help") from error
            raise

    @property
    def pid(self) -> int:
        """The emulator's process id."""
        return self._process.pid

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None and process.returncode is None and self._pid == os.getpid():
            process.kill()
            process.wait()

    def close(self) -> None:
        """Wait for the process, whose socket is closed by now; end it where it does not end by itself. Idempotent."""
        for stop in (None, self._process.terminate, self._process.kill):
            if stop is not None:
                stop()
            try:
                self._process.wait(END_SECONDS)
                return
            except subprocess.TimeoutExpired:
                continue
