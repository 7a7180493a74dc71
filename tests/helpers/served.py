"""The emulator's own server in threads of the test's process, so that a test can change what a register reads as."""

from maia_emulator.function import Function
from maia_emulator.profiles import PROFILES
from maia_emulator.server import ListeningSocket, Server


class Served:
    """A device on a socket, served by threads of this process."""

    def __init__(self, path):
        self.path = path
        self.function = Function(PROFILES["small"], workers=1)
        self._server = Server(self.function, ListeningSocket(path), ended=lambda: None)
        self._server.start()

    def keep(self, name, value):
        """Let a register read as `value`, whatever resets do."""
        self.function.registers.on_read(name, lambda: value)

    def close(self):
        self._server.stop()
        self.function = self._server = None
