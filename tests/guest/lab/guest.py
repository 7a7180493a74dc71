"""A running guest: commands go in through its second serial port, their output and exit codes come back."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from helpers.qmp import Qmp, QmpError

from . import kernel, qemu, root
from .archive import Archive
from .debian import LabError

BOOT_SECONDS = 600
COMMAND_SECONDS = 300
_END = re.compile(rb"\0END (\d+)\r?\n")


class GuestError(LabError):
    """The guest did not boot, a command in it failed or did not end."""


@dataclass(frozen=True)
class Completed:
    """What a command printed, errors included, and how it ended."""

    command: str
    returncode: int
    output: str


@dataclass(frozen=True)
class TestRun:
    """A run of pytest in the guest: the tests by outcome, as ``file::name``, and what was printed.

    `transports` counts the tests that passed by the transport they say they ran on; `reasons` has what pytest said of
    those that did not pass.
    """

    passed: list[str]
    failed: list[str]
    skipped: list[str]
    transports: Counter
    reasons: dict[str, str]
    output: str
    seconds: float

    __test__ = False


class Guest:
    """A guest, booted by :meth:`boot` and ended by :meth:`close`.

    Parameters
    ----------
    machine : qemu.Machine
    environment : dict, optional
        For every command in the guest.
    weights : bool
        Whether the demo's model is in the guest.
    files : dict, optional
        More files: path in the guest -> path on the host.
    """

    def __init__(self, machine, *, environment=None, weights=False, files=None):
        self.machine = machine
        self._environment = environment or {}
        self._weights = weights
        self._files = files or {}
        self._lock = threading.Lock()
        self._pending = b""
        self._process = self._port = self._monitor = None
        self.folder = Path(tempfile.mkdtemp(prefix="maia-guest-"))

    # --- booting -----------------------------------------------------------------------------------------------------

    def _initrd(self, used, more):
        path = self.folder / "initrd"
        with path.open("wb") as file:
            for part in root.parts(used, weights=self._weights):
                with part.open("rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
            archive = Archive(file)
            root.add_project(archive)
            for name, source in self._files.items():
                archive.copy(name, source)
            lines = [f"export {name}={shlex.quote(str(value))}" for name, value in self._environment.items()]
            if used.modules is not None:
                lines.append('MAIA_MODULES="vfio_iommu_type1"')
            archive.text("etc/guest.env", "\n".join([*lines, *more, ""]))
            archive.text("etc/motd", _WELCOME)
            archive.close()
        return path

    def _command(self, used, initrd, *, quiet=True):
        line = self.machine.kernel_line() + (" quiet loglevel=3" if quiet else "")
        return [*qemu.command(), *self.machine.options(), "-kernel", str(used.image), "-initrd", str(initrd), "-append",
                line, "-qmp", f"unix:{self.folder}/qmp,server=on,wait=off"]

    def boot(self, *, seconds=BOOT_SECONDS):
        """Start QEMU and wait until the guest takes commands; returns itself."""
        used = kernel.KERNELS[self.machine.kernel]()
        command = self._command(used, self._initrd(used, []))
        command += ["-serial", f"file:{self.folder}/console", "-chardev",
                    f"socket,id=port,path={self.folder}/port,server=on,wait=off", "-serial", "chardev:port"]
        try:
            with (self.folder / "stderr").open("wb") as errors:
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
            self._port = self._connect("port")
            self._await_ready(time.monotonic() + seconds)
        except BaseException:
            self.kill()
            raise
        return self

    def _connect(self, name):
        deadline = time.monotonic() + 20
        while True:
            port = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                port.connect(str(self.folder / name))
            except OSError:
                port.close()
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise GuestError(f"QEMU did not start: {self.stderr()}") from None
                time.sleep(0.01)
            else:
                return port

    def _await_ready(self, deadline):
        while b"READY\n" not in self._pending.replace(b"\r", b""):
            self._receive(deadline, "the guest to boot")
        self._pending = b""

    def _receive(self, deadline, waiting_for):
        left = deadline - time.monotonic()
        self._port.settimeout(max(left, 0.001))
        try:
            data = self._port.recv(1 << 16)
        except TimeoutError:
            raise GuestError(f"waited in vain for {waiting_for}\n{self.report()}") from None
        if not data:
            raise GuestError(f"the guest ended while waiting for {waiting_for}\n{self.report()}")
        self._pending += data

    def wait_for_boot(self, *, seconds=BOOT_SECONDS):
        """Wait until a guest that was told to reboot takes commands again."""
        self._await_ready(time.monotonic() + seconds)

    # --- commands ----------------------------------------------------------------------------------------------------

    def run(self, command, *, timeout=COMMAND_SECONDS, check=True):
        """Run one line of shell in the guest.

        Parameters
        ----------
        command : str
            In a subshell; no line breaks.
        timeout : float
            Seconds. The guest is of no further use after a time-out.
        check : bool
            Raise GuestError where the exit code is not 0.

        Returns
        -------
        Completed
        """
        with self._lock:
            self.start(command)
            return self.finish(command, timeout=timeout, check=check)

    def start(self, command):
        """Start a command and return at once; :meth:`finish` waits for it. One command runs at a time."""
        assert "\n" not in command, "one line"
        self._port.settimeout(20)
        self._port.sendall(command.encode() + b"\n")

    def finish(self, command, *, timeout=COMMAND_SECONDS, check=True):
        """Wait for what :meth:`start` started."""
        deadline = time.monotonic() + timeout
        while not (end := _END.search(self._pending)):
            self._receive(deadline, f"`{command}`")
        output = self._pending[:end.start()].decode(errors="replace").replace("\r\n", "\n")
        self._pending = self._pending[end.end():]
        done = Completed(command, int(end[1]), output)
        if check and done.returncode:
            raise GuestError(f"`{command}` in the guest ended with {done.returncode}:\n{output}\n{self.report()}")
        return done

    def pytest(self, *arguments, timeout=600, environment=None):
        """Run tests of this project in the guest.

        Returns
        -------
        TestRun
            Raises GuestError only where pytest itself did not run; failed tests are in the result.
        """
        variables = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in (environment or {}).items())
        words = shlex.join(map(str, arguments))
        started = time.monotonic()
        # Without plugins of other packages: pytest would compile all of hypothesis anew, half a minute each time.
        done = self.run(f"cd /maia && rm -f /tmp/report.xml && PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 {variables} "
                        "python3 -m pytest -q -p no:cacheprovider -p pytest_timeout "
                        f"-o junit_family=xunit1 --junitxml=/tmp/report.xml {words}", timeout=timeout, check=False)
        seconds = time.monotonic() - started
        report = self.run("cat /tmp/report.xml", check=False)
        if report.returncode or done.returncode not in (0, 1):
            raise GuestError(f"pytest in the guest ended with {done.returncode}:\n{done.output}\n{self.report()}")
        outcomes = {"passed": [], "failed": [], "skipped": []}
        transports, reasons = Counter(), {}
        for case in ElementTree.fromstring(report.output).iter("testcase"):
            kinds = {child.tag for child in case}
            kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            name = f"{case.get('file') or case.get('classname')}::{case.get('name')}"
            outcomes[kind].append(name)
            for child in case:
                if child.tag in ("failure", "error", "skipped"):
                    reasons[name] = child.text or child.get("message", "")
            if kind == "passed":
                transports.update(p.get("value") for p in case.iter("property") if p.get("name") == "transport")
        return TestRun(**outcomes, transports=transports, reasons=reasons, output=done.output, seconds=seconds)

    # --- the machine -------------------------------------------------------------------------------------------------

    def qmp(self, execute, **arguments):
        """Give QEMU a command of its monitor protocol and return the answer: see :class:`helpers.qmp.Qmp`."""
        if self._monitor is None:
            self._monitor = Qmp(str(self.folder / "qmp"))
        try:
            return self._monitor(execute, **arguments)
        except (QmpError, EOFError) as error:
            raise GuestError(f"QEMU refused {execute}, or ended: {error}\n{self.report()}") from None

    @property
    def pid(self):
        """QEMU's process."""
        return self._process.pid

    def stderr(self):
        """What QEMU has said so far: nothing, where all is well."""
        return (self.folder / "stderr").read_text(errors="replace")

    def console(self):
        """The kernel's console so far."""
        path = self.folder / "console"
        return path.read_text(errors="replace") if path.exists() else ""

    def report(self):
        """The ends of what the guest and QEMU said, for error texts."""
        return (f"--- output so far\n{self._pending[-3000:].decode(errors='replace')}\n"
                f"--- console\n{self.console()[-3000:]}\n--- QEMU\n{self.stderr()[-2000:]}")

    def close(self):
        """Power the guest off; a guest that does not answer is killed. Returns what QEMU said."""
        with contextlib.suppress(OSError, LabError):
            if self._process is not None and self._process.poll() is None:
                self.start("poweroff -f")
                self._process.wait(20)
        return self.kill()

    def kill(self):
        """End QEMU at once and delete what belongs to the guest; returns what QEMU said."""
        if self._monitor is not None:
            self._monitor.close()
        if self._port is not None:
            self._port.close()
        self._monitor = self._port = None
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
        said = self.stderr() if (self.folder / "stderr").exists() else ""
        shutil.rmtree(self.folder, ignore_errors=True)
        return said

    def __enter__(self):
        return self.boot()

    def __exit__(self, *_):
        self.close()

    def shell(self):
        """Boot with the console on this terminal and a shell on it; returns when the guest is powered off."""
        used = kernel.KERNELS[self.machine.kernel]()
        columns, rows = shutil.get_terminal_size()
        more = ["GUEST_SHELL=1", f"GUEST_TERM={shlex.quote(os.environ.get('TERM', 'vt100'))}", f"GUEST_ROWS={rows}",
                f"GUEST_COLUMNS={columns}"]
        try:
            command = self._command(used, self._initrd(used, more))
            return subprocess.call([*command, "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"])
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


_WELCOME = """
A guest of maia_rt's lab, emulated by QEMU without KVM. This checkout is at /maia.
  lspci; maia ls                      what is there
  maia bind ADDRESS; maia info        take a device for VFIO and look at it
  python3 /maia/examples/edu.py ADDRESS
  exit                                powers the guest off

"""
