"""Sysfs attributes that can block: read and written by a small process, with a time limit.

The kernel holds a device's lock while it binds or unbinds a driver, and to unbind vfio-pci it waits, beyond the reach
of any signal, until the last process has closed the device (``vfio_unregister_group_dev``). Whoever writes ``unbind``
then, or only reads ``driver_override`` of the same device, hangs and cannot be ended. So another process does it: when
the time is up this one goes on, and that one ends when the kernel lets it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Final

from maia_rt.errors import DeviceTimeout, TransportError

# A request is a line: "r PATH", or "w PATH" and, after a tab, the value. The answer is a line: errno and what was read.
_PROGRAM: Final = """
import os, sys
for line in sys.stdin.buffer:
    word, path, value = line[:1], *(line[2:-1].split(b"\\t") + [b""])[:2]
    number, answer = 0, b""
    try:
        fd = os.open(path, os.O_RDONLY if word == b"r" else os.O_WRONLY | os.O_TRUNC)
        try:
            if word == b"r":
                answer = os.read(fd, 4096).split(b"\\n")[0]
            else:
                os.write(fd, value + b"\\n")
        finally:
            os.close(fd)
    except OSError as error:
        number = error.errno
    os.write(1, b"%d %s\\n" % (number, answer))
"""

_END_SECONDS: Final = 0.5
"""How long a process that was killed may take to end, where the kernel does not hold it."""

_stuck: list[subprocess.Popen[bytes]] = []
"""Processes that the kernel has not let go yet; looked at again whenever an attribute is."""


class Attributes:
    """Reads and writes attributes, each within `seconds`.

    Parameters
    ----------
    seconds : float
        The limit for each single read or write.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, path: Path) -> str:
        """Read the first line of an attribute, without its newline.

        Raises
        ------
        TransportError
            The kernel refused; ``errno`` says why.
        DeviceTimeout
            It did not answer in time.
        """
        return self._ask(f"r {path}\n", f"reading {path}")

    def write(self, path: Path, value: str) -> None:
        """Write one line; an empty `value` writes the newline alone, which is how ``driver_override`` is cleared.

        Raises
        ------
        TransportError
            The kernel refused; ``errno`` says why.
        DeviceTimeout
            It did not answer in time, and may still do what was asked.
        """
        self._ask(f"w {path}\t{value}\n", f"writing {value!r} to {path}")

    def _ask(self, request: str, what: str) -> str:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + self.seconds
        answer = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request.encode())
            process.stdin.flush()
        while not answer.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                self._abandon()
                raise DeviceTimeout(f"{what}: the kernel has not come back within {self.seconds:g} s",
                                    cause="a process has the device open, or a driver hangs",
                                    hint="end what uses the device; dmesg may say what the kernel waits for")
            part = os.read(process.stdout.fileno(), 4096)
            if not part:
                self.close()
                raise TransportError(f"{what}: the process that does it has ended", errno=errno.ECHILD)
            answer += part
        number, _, text = answer[:-1].decode(errors="replace").partition(" ")
        if int(number):
            raise TransportError(f"{what}: {os.strerror(int(number))}", errno=int(number))
        return text

    def _running(self) -> subprocess.Popen[bytes]:
        _stuck[:] = [process for process in _stuck if process.poll() is None]
        if self._process is None:
            # A session of its own: an interrupt from the terminal must not end it between two steps.
            self._process = subprocess.Popen([sys.executable, "-I", "-S", "-c", _PROGRAM], stdin=subprocess.PIPE,
                                             stdout=subprocess.PIPE, start_new_session=True)
        return self._process

    def _abandon(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        process.kill()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            _stuck.append(process)

    def close(self) -> None:
        """End the process. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            process.wait(self.seconds)
        except subprocess.TimeoutExpired:
            self._process = process
            self._abandon()

    def __enter__(self) -> Attributes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
