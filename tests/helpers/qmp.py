"""A client of QEMU's monitor protocol (QMP): commands, their answers, and events."""

import collections
import json
import socket
import time

from helpers.emulator import eventually


class QmpError(Exception):
    """QEMU refused a command; the text is its own."""


class Qmp:
    """A connection to a QMP socket. A context manager.

    Parameters
    ----------
    path : str
    seconds : float
        How long one answer or event may take.
    """

    def __init__(self, path, seconds=20):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(seconds)
        self._seconds = seconds
        self._lines = None
        try:
            assert eventually(lambda: self._socket.connect_ex(path) == 0, seconds), f"no QMP on {path}"
            self._lines = self._socket.makefile("rb")
            self._events = collections.deque()
            assert "QMP" in self._receive()
            self("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the connection."""
        if self._lines is not None:
            self._lines.close()
        self._socket.close()

    def __call__(self, execute, **arguments):
        """Run a command and return its answer; QmpError where it is refused. ``_`` in a name stands for ``-``."""
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = self._receive()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QmpError(answer["error"]["desc"])
            self._events.append(answer)

    def wait(self, event):
        """Wait for an event, past others; returns its data."""
        deadline = time.monotonic() + self._seconds
        while time.monotonic() < deadline:
            message = self._events.popleft() if self._events else self._receive()
            if message["event"] == event:
                return message.get("data", {})
        raise AssertionError(f"no {event} within {self._seconds} s")

    def _receive(self):
        line = self._lines.readline()
        if not line:
            raise EOFError("QEMU closed the monitor")
        return json.loads(line)
