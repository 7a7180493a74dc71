"""A QEMU without a guest: its machine and devices are driven through the qtest socket, so a test takes a second.

There is no CPU that runs, and no firmware: the test does what they would do, from the first configuration cycle on.

    with Machine(vfio_user(path)) as machine:
        device = PciFunction(machine, 0x10)
        device.config32(0)
"""

import contextlib
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile

from guest.lab import debian, qemu
from helpers.emulator import eventually
from helpers.qmp import Qmp

MEGABYTES = 64
"""Memory of a machine, from address 0 on."""
SECONDS = 20
"""How long QEMU may take for one access: more than the five seconds that it waits for a silent server."""
MMIO = 0xC000_0000
"""Free address space below the ECAM window and the interrupt controllers."""


class QemuError(Exception):
    """QEMU did not start; the text is what it said."""


class Machine:
    """QEMU's q35 with `options`, no CPU running. A context manager; what QEMU said on stderr is checked at its end.

    Parameters
    ----------
    options : list of str
        For QEMU: devices and whatever else a test needs.
    shared : bool
        Whether guest memory is a memfd, which a vfio-user server may map.
    machine : str
        More properties of the machine.
    may_say : str
        A regular expression: lines that QEMU may print on stderr. Any other line fails the test.
    """

    def __init__(self, options=(), *, shared=True, machine="", may_say="$^"):
        self._folder = tempfile.mkdtemp(prefix="maia-qtest-")
        self._stack = contextlib.ExitStack()
        self._may_say = may_say
        words = ["-m", f"{MEGABYTES}M", "-nodefaults", "-display", "none", "-accel", "qtest"]
        kind = "memfd,share=on" if shared else "ram"
        words += ["-object", f"memory-backend-{kind},id=mem,size={MEGABYTES}M"]
        words += ["-machine", f"q35,memory-backend=mem{machine and ','}{machine}"]
        words += ["-qtest", f"unix:{self._folder}/qtest", "-qtest-log", "none"]
        words += ["-qmp", f"unix:{self._folder}/qmp,server=on,wait=off"]
        self._start(words + list(options))

    def _start(self, words):
        # The accelerator for qtest is a module, looked for where Debian installs it unless told otherwise.
        environment = {**os.environ, "QEMU_MODULE_DIR": f"{qemu.installed()}/{debian.LIBRARIES}/qemu"}
        with socket.socket(socket.AF_UNIX) as listening, open(f"{self._folder}/stderr", "wb") as errors:
            listening.bind(f"{self._folder}/qtest")
            listening.listen(1)
            listening.settimeout(0.05)
            self.process = subprocess.Popen([*qemu.command(), *words], env=environment, stdin=subprocess.DEVNULL,
                                            stdout=errors, stderr=errors)
            try:
                accepted = eventually(lambda: self.process.poll() is not None or _accept(listening), SECONDS)
                if not isinstance(accepted, socket.socket):
                    raise EOFError
                self._socket = self._stack.enter_context(accepted)
                self._socket.settimeout(SECONDS)
                self._lines = self._stack.enter_context(self._socket.makefile("rb"))
                self.qmp = self._stack.enter_context(Qmp(f"{self._folder}/qmp"))
            except (EOFError, ConnectionError):
                self.process.wait(SECONDS)
                said = self.stderr()
                self.kill()
                raise QemuError(said) from None
            except BaseException:
                self.kill()
                raise

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.quit()
        finally:
            said = self.stderr()
            self.kill()
        if kind is None:
            complaints = [line for line in said.splitlines() if not re.search(self._may_say, line)]
            assert not complaints, "QEMU said:\n" + "\n".join(complaints)

    def stderr(self):
        """What QEMU has said so far."""
        with open(f"{self._folder}/stderr", errors="replace") as file:
            return file.read()

    def quit(self):
        """End QEMU in an orderly way; it must take less than SECONDS and exit with 0."""
        if self.process.poll() is None:
            with contextlib.suppress(EOFError, ConnectionError):
                self.qmp("quit")
            self.process.wait(SECONDS)
        assert self.process.returncode == 0, f"QEMU ended with {self.process.returncode}: {self.stderr()}"

    def kill(self):
        """End QEMU at once, and remove what belongs to it."""
        self._stack.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __call__(self, *words):
        """Send a command of the qtest protocol; returns its answer's words after ``OK``."""
        self._socket.sendall(" ".join(hex(w) if isinstance(w, int) else w for w in words).encode() + b"\n")
        while True:
            line = self._lines.readline().decode().split()
            if not line:
                raise EOFError(f"QEMU closed the qtest socket: {self.stderr()}")
            if line[0] == "IRQ":
                continue
            assert line[0] == "OK", f"{words}: {line}"
            return line[1:]

    def write(self, address, data):
        """Write guest memory, or a device's, as a CPU would."""
        self("write", address, len(data), "0x" + data.hex())

    def read(self, address, size):
        return bytes.fromhex(self("read", address, size)[0].removeprefix("0x"))

    def load(self, address, size):
        """Read 1, 2, 4 or 8 bytes with one access."""
        return int(self("read" + " bw l   q"[size], address)[0], 0)

    def store(self, address, size, value):
        self("write" + " bw l   q"[size], address, value)


def _accept(listening):
    with contextlib.suppress(TimeoutError):
        return listening.accept()[0]
    return None


class PciFunction:
    """A PCI function at device.function number `devfn` of a bus, reached by the classic configuration cycles."""

    def __init__(self, machine, devfn, bus=0):
        self.machine = machine
        self._address = 1 << 31 | bus << 16 | devfn << 8

    def _select(self, offset):
        self.machine("outl", 0xCF8, self._address | offset & 0xFC)
        return 0xCFC + (offset & 3)

    def read(self, offset, size):
        return int(self.machine("in" + " bw l"[size], self._select(offset))[0], 0)

    def write(self, offset, size, value):
        self.machine("out" + " bw l"[size], self._select(offset), value)

    def capability(self, wanted):
        """The offset of a capability, or 0."""
        return next((at for number, at in self.capabilities() if number == wanted), 0)

    def capabilities(self):
        """Pairs of id and offset in the order of the list, which must end."""
        at, found = self.read(0x34, 1), []
        while at:
            assert at >= 0x40 and at % 4 == 0 and len(found) < 48, f"a bad capability list: {found}, {at:#x}"
            found.append((self.read(at, 1), at))
            at = self.read(at + 1, 1)
        return found

    def place(self, bar, address):
        """Give a 64-bit BAR its address."""
        self.write(0x10 + 4 * bar, 4, address & 0xFFFFFFFF)
        self.write(0x14 + 4 * bar, 4, address >> 32)

    def sized(self, bar):
        """What a 64-bit BAR reads after a write of all ones; the BAR keeps its value."""
        at = 0x10 + 4 * bar
        old = [self.read(at + n, 4) for n in (0, 4)]
        for n in (0, 4):
            self.write(at + n, 4, 0xFFFFFFFF)
        value = self.read(at, 4) | self.read(at + 4, 4) << 32
        for n in (0, 4):
            self.write(at + n, 4, old[n // 4])
        return value


class Ecam:
    """The memory-mapped configuration space of the machine, which has the extended capabilities."""

    BASE = 0xB000_0000

    def __init__(self, machine):
        self._machine = machine
        # PCIEXBAR of the q35 host bridge: enabled, 256 MiB.
        PciFunction(machine, 0).write(0x60, 4, self.BASE | 1)

    def at(self, devfn, offset, bus=0):
        """The address of a function's configuration space."""
        return self.BASE + (bus << 20 | devfn << 12) + offset

    def read(self, devfn, offset, size, bus=0):
        return self._machine.read(self.at(devfn, offset, bus), size)

    def extended(self, devfn, bus=0):
        """Pairs of extended capability id and offset."""
        at, found = 0x100, []
        while at:
            head, = struct.unpack("<I", self.read(devfn, at, 4, bus))
            assert head not in (0, 0xFFFFFFFF) and len(found) < 16, f"a bad list: {found}, {head:#x}"
            found.append((head & 0xFFFF, at))
            at = head >> 20
        return found


def vfio_user(socket_path, **properties):
    """QEMU's option for our device on bus 0, slot 2, unless `properties` say otherwise."""
    return qemu.vfio_user(socket_path, **{"id": "maia", **({} if "bus" in properties else {"addr": "2"}), **properties})
