"""In a guest: our device as software sees it that nobody here wrote: lspci, and the kernel's PCI core and VFIO."""

import mmap
import re
import subprocess
from pathlib import Path

import pytest
from guest.inside.kernel_devices import INTERFACES, MAIA, eventfds, find, fired, opened, switch_on, unbind

from maia_rt.transport.uapi import PciIrq

ID, SERIAL, CONTROL, STATUS, ERRORS, ADMIN_SIZE, SCRATCH = 0x00, 0x10, 0x80, 0x84, 0x8C, 0xB0, 0xCC
MAGIC = 0x4149414D
COMMAND, MSIX_CONTROL = 0x04, 0x52
QUIET = 0.3
"""Seconds in which nothing may come."""


@pytest.fixture
def address():
    return find(MAIA)


@pytest.fixture
def sysfs(address):
    """The function without a driver, its memory on as the kernel's PCI core does it."""
    unbind(address)
    path = Path("/sys/bus/pci/devices", address)
    (path / "enable").write_text("1")
    yield path
    (path / "enable").write_text("0")


@pytest.fixture(params=INTERFACES)
def device(request):
    with opened(MAIA, request.param) as device:
        yield device


def lspci(address):
    """What lspci says of the function, words parted by single spaces."""
    done = subprocess.run(["lspci", "-vvv", "-nn", "-s", address], capture_output=True, text=True, check=True)
    return " ".join(done.stdout.split())


def from_config(address, offset, size):
    """The kernel's own view of configuration space."""
    with Path("/sys/bus/pci/devices", address, "config").open("rb", buffering=0) as file:
        file.seek(offset)
        return int.from_bytes(file.read(size), "little")


@pytest.fixture
def registers(sysfs):
    """BAR 0 through sysfs, with no driver and no VFIO between: read(offset), write(offset, value)."""
    with (sysfs / "resource0").open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0x1000) as bar:
        words = memoryview(bar).cast("I")
        yield words
        words.release()


# --- lspci -----------------------------------------------------------------------------------------------------------


def test_lspci_shows_identity_and_bars(address, sysfs):
    said = lspci(address)
    assert "Processing accelerators [1200]" in said
    assert said.count("[1af4:10f0]") == 2, "device and subsystem"
    assert re.search(r"Region 0: Memory at \w+ \(64-bit, non-prefetchable\) \[size=64K\]", said)
    assert re.search(r"Region 2: Memory at \w+ \(64-bit, non-prefetchable\) \[size=512K\]", said)
    assert re.search(r"Region 4: Memory at \w+ \(64-bit, prefetchable\) \[size=1G\]", said)
    assert said.count("Region ") == 3
    assert "Expansion ROM" not in said
    assert "I/O ports" not in said
    assert "Interrupt: pin A" in said


def test_lspci_shows_the_capabilities_as_meant(address, sysfs):
    said = lspci(address)
    found = re.findall(r"Capabilities: \[(\w+)(?: v\d)?\] (Power Management|MSI-X|Express|Device Serial Number)", said)
    assert found == [("40", "Power Management"), ("50", "MSI-X"), ("60", "Express"), ("100", "Device Serial Number")]
    assert said.count("Capabilities: ") == 4
    assert "Power Management version 3" in said
    assert "D1- D2-" in said
    assert "PME(D0-,D1-,D2-,D3hot-,D3cold-)" in said
    assert "NoSoftRst+" in said
    assert "MSI-X: Enable- Count=65 Masked-" in said
    assert "Vector table: BAR=0 offset=00008000" in said
    assert "PBA: BAR=0 offset=0000c000" in said
    assert "Express (v2) Endpoint" in said
    assert "FLReset+" in said
    assert re.search(r"LnkCap: .*Speed 32GT/s, Width x8", said)
    assert re.search(r"LnkSta: Speed 32GT/s(?: \(ok\))?, Width x8(?: \(ok\))?", said)
    assert "DevCap2: Completion Timeout: Not Supported, TimeoutDis+" in said


def test_lspci_shows_nothing_wrong(address, sysfs):
    said = lspci(address)
    assert "<access denied>" not in said
    assert "!!!" not in said
    assert "[disabled]" not in said
    assert re.search(r"Status: Cap\+ .*>TAbort- <TAbort- <MAbort- >SERR- <PERR- INTx-", said)


def test_serial_number_is_the_one_in_the_register(address, registers):
    number = registers[SERIAL // 4] | registers[SERIAL // 4 + 1] << 32
    text = "-".join(f"{byte:02x}" for byte in number.to_bytes(8, "big"))
    assert f"Device Serial Number {text}" in lspci(address)


# --- function level reset --------------------------------------------------------------------------------------------


def test_the_kernel_resets_by_flr_and_restores_what_it_had(address, sysfs, registers):
    methods = (sysfs / "reset_method").read_text().split()
    assert methods[0] == "flr"
    bars = [from_config(address, 0x10 + 4 * n, 4) for n in range(6)]
    command = from_config(address, COMMAND, 2)
    assert registers[ID // 4] == MAGIC
    registers[SCRATCH // 4] = 77
    registers[CONTROL // 4] = 0
    (sysfs / "reset_method").write_text("flr")
    try:
        (sysfs / "reset").write_text("1")
    finally:
        (sysfs / "reset_method").write_text("default")
    assert registers[ID // 4] == MAGIC
    assert registers[SCRATCH // 4] == 0
    assert registers[STATUS // 4] == 0
    assert [from_config(address, 0x10 + 4 * n, 4) for n in range(6)] == bars
    assert from_config(address, COMMAND, 2) == command
    assert "Express (v2) Endpoint" in lspci(address)


def test_five_resets_in_a_row(sysfs, registers):
    for number in range(5):
        registers[SCRATCH // 4] = number + 1
        (sysfs / "reset").write_text("1")
        assert registers[ID // 4] == MAGIC
        assert registers[SCRATCH // 4] == 0


# --- MSI-X under the kernel's VFIO -----------------------------------------------------------------------------------


def fire(device):
    """Make the device fire vector 0: firmware cannot start with an impossible ring, which sets a bit of ERRORS."""
    device.write(0, CONTROL, 4, 0)
    device.write(0, ERRORS, 4, device.read(0, ERRORS, 4))
    device.write(0, ADMIN_SIZE, 4, 99)
    device.write(0, CONTROL, 4, 1)


def test_msix_is_enabled_for_its_vectors_and_disabled_with_the_last(device, address):
    assert not from_config(address, MSIX_CONTROL, 2) >> 15
    with eventfds(3) as fds:
        device.irq_enable(PciIrq.MSIX, 0, fds)
        assert from_config(address, MSIX_CONTROL, 2) >> 14 == 0b10, "enabled, function not masked"
        assert "MSI-X: Enable+ Count=65 Masked-" in lspci(address)
        fire(device)
        assert fired(fds[0]) == 1
        assert not fired(fds[1], QUIET)
        assert not fired(fds[2], 0)
        device.irq_disable(PciIrq.MSIX)
        assert not from_config(address, MSIX_CONTROL, 2) >> 15
        fire(device)
        assert not fired(fds[0], QUIET)


def test_msix_enabled_again_after_it_was_disabled(device):
    for _ in range(3):
        with eventfds(1) as (fd,):
            device.irq_enable(PciIrq.MSIX, 0, [fd])
            fired(fd, 0)  # one of the time in between may have waited for us
            fire(device)
            assert fired(fd) == 1
            device.irq_disable(PciIrq.MSIX)


def test_all_vectors_at_once(device, address):
    with eventfds(65) as fds:
        device.irq_enable(PciIrq.MSIX, 0, fds)
        fire(device)
        assert fired(fds[0]) == 1
        assert from_config(address, MSIX_CONTROL, 2) >> 14 == 0b10
        device.irq_disable(PciIrq.MSIX)


def test_interrupts_and_registers_after_a_reset_under_vfio(device):
    with eventfds(1) as (fd,):
        device.irq_enable(PciIrq.MSIX, 0, [fd])
        device.write(0, SCRATCH, 4, 5)
        device.reset()
        switch_on(device)
        assert device.read(0, SCRATCH, 4) == 0
        device.irq_enable(PciIrq.MSIX, 0, [fd])
        fired(fd, 0)
        fire(device)
        assert fired(fd) == 1
        device.irq_disable(PciIrq.MSIX)
