"""The devices of the guests of tests/guest/test_inside.py: where they are and how they work."""

import contextlib
import errno
import functools
import os
import select
import subprocess
import time
from pathlib import Path

from maia_rt.memory import DmaRegion
from maia_rt.pci import PciAddress, config, functions, read_function
from maia_rt.transport import open_device
from maia_rt.transport.uapi import PciRegion

EDU = (0x1234, 0x11E8)
NVME = (0x1B36, 0x0010)
XHCI = (0x1033, 0x0194)
SHARED_MEMORY = (0x1AF4, 0x1110)
MAIA = (0x1AF4, 0x10F0)

PCI = Path("/sys/bus/pci")
USER = 1000
INTERFACES = ["group"] + (["cdev"] if Path("/dev/iommu").exists() else [])
"""What this kernel has."""


@functools.cache
def find(ids, nth=0):
    """The address of the nth function with these ids, as text."""
    return str(functions(vendor=ids[0], device=ids[1])[nth].address)


def shared_slot():
    """The first of the two functions of the nvme that is behind a port of its own."""
    return next(address for address in (find(NVME, n) for n in range(3))
                if (PCI / "devices" / f"{address[:-1]}1").exists())


def unbind(address):
    """Leave a function without a driver."""
    with contextlib.suppress(FileNotFoundError):
        (PCI / "devices" / address / "driver" / "unbind").write_text(address)


def give(address, driver="vfio-pci"):
    """Give a function to a driver, by hand: what is in its group is the test's business."""
    path = PCI / "devices" / address
    link = path / "driver"
    if link.exists() and link.resolve().name == driver:
        return address
    if not (PCI / "drivers" / driver).exists():
        subprocess.run(["modprobe", driver], check=True)
    unbind(address)
    (path / "driver_override").write_text(driver)
    (PCI / "drivers_probe").write_text(address)
    (path / "driver_override").write_text("\n")
    assert link.resolve().name == driver
    return address


def node(address, interface):
    """What is opened for a function by that interface."""
    function = read_function(PciAddress.parse(address))
    return Path("/dev/vfio") / (str(function.iommu_group) if interface == "group" else f"devices/{function.vfio_cdev}")


def opened(ids, interface, nth=0):
    """Bind and open a function, its memory space and bus mastering on."""
    device = open_device(give(find(ids, nth)), interface=interface)
    switch_on(device)
    return device


def switch_on(device):
    """Let a device be reached and reach memory."""
    reader, writer = functools.partial(device.read, PciRegion.CONFIG), functools.partial(device.write, PciRegion.CONFIG)
    config.set_memory_space(reader, writer, True)
    config.set_bus_master(reader, writer, True)


def fired(fd, timeout=5.0):
    """How often an eventfd was signalled; 0 where it was not within `timeout` seconds."""
    if not select.select([fd], [], [], timeout)[0]:
        return 0
    return os.eventfd_read(fd)


@contextlib.contextmanager
def eventfds(count):
    """Eventfds, closed at the end."""
    fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)


class Edu:
    """QEMU's edu (docs/specs/edu.rst), as far as these tests use it."""

    RAISE, ACKNOWLEDGE = 0x60, 0x64
    BUFFER = 0x40000

    def __init__(self, device):
        self.device = device

    def copy(self, source, destination, size, *, to_memory):
        """Run the DMA engine and wait for its end."""
        for offset, value in ((0x80, source), (0x88, destination), (0x90, size), (0x98, 3 if to_memory else 1)):
            self.device.write(0, offset, 8, value)
        deadline = time.monotonic() + 20
        while self.device.read(0, 0x98, 8) & 1:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def fetch(self, iova, size=4096):
        """Memory -> the device's buffer."""
        self.copy(iova, self.BUFFER, size, to_memory=False)

    def store(self, iova, size=4096):
        """The device's buffer -> memory."""
        self.copy(self.BUFFER, iova, size, to_memory=True)

    def raise_interrupt(self):
        self.device.write(0, self.RAISE, 4, 1)

    def acknowledge(self):
        self.device.write(0, self.ACKNOWLEDGE, 4, 1)


@contextlib.contextmanager
def mapped(device, iova, size=4096):
    """Memory of `size` bytes, mapped."""
    with DmaRegion(size, huge_pages=False) as region:
        device.dma_map(iova, region)
        try:
            yield region
        finally:
            device.dma_unmap(iova, region.size)


def kernel_log():
    """The kernel's log so far."""
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    lines = []
    try:
        while True:
            try:
                lines.append(os.read(fd, 8192).decode(errors="replace"))
            except OSError as error:
                if error.errno == errno.EPIPE:  # overwritten meanwhile
                    continue
                return "".join(lines)
    finally:
        os.close(fd)


def open_vfio_nodes():
    """What this process has open of VFIO and iommufd."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(link for link in links if "vfio" in link or "iommu" in link)


def in_child(work, *, uid=None):
    """Run `work` in a forked process, as another user if so; return what it returned, or raise what it raised."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        result = b"died"
        try:
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            result = repr(work()).encode()
        except BaseException as error:
            import traceback

            result = f"{type(error).__name__}: {error}\n{traceback.format_exc()}".encode()
        finally:
            os.write(writer, result)
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read().decode()
    os.waitpid(pid, 0)
    return said
