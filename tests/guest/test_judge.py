"""A guest's whole life with our device: reboot, hot unplug, a server that ends under it, and a device that comes back.

What lspci and the guest's kernel see of it while all is well is tested by inside/test_judge.py.
"""

import time

import pytest
from guest.lab import qemu
from guest.lab.debian import LabError
from guest.lab.guest import Guest

from tests.guest.conftest import may_be_said, past_qemus_abort
from tests.helpers.emulator import end, listening, running, spawn

SECONDS = 200
"""For one thing to happen in a guest on a busy machine."""
FIRST, SECOND = "0000:01:00.0", "0000:02:00.0"
# The slots themselves do hot plug, not ACPI, which the small kernel's guests do without. One of them is empty.
SLOTS = ["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off",
         "-device", "pcie-root-port,id=spare,chassis=50,bus=pcie.0"]
UNPLUG_ABORTS = "memory_region_del_subregion: Assertion `subregion->container == mr' failed"
"""QEMU 11.1.3 ends so when any vfio-user device with MSI-X has been let go: see tests/qemu/test_plugging.py."""


def start_work(guest, address):
    """Bind a function, and have a program use it through the runtime, in the background, until it is told to stop."""
    path = f"/sys/bus/pci/devices/{address}"
    guest.run(f"echo vfio-pci >{path}/driver_override; echo {address} >/sys/bus/pci/drivers_probe")
    guest.run(f"python3 /maia/tests/guest/inside/keep_working.py {address} >/tmp/work 2>&1 & echo $! >/tmp/worker")
    await_work(guest, "working")


def at_work(guest):
    """Start the program unless it runs: to start Python takes seconds."""
    if guest.run("kill -0 $(cat /tmp/worker) 2>/dev/null", check=False).returncode:
        start_work(guest, FIRST)


def await_work(guest, word):
    """Wait until the program has said it; returns all that it has said."""
    deadline = time.monotonic() + SECONDS
    while word not in (said := guest.run("cat /tmp/work").output):
        assert time.monotonic() < deadline, said
        time.sleep(0.3)
    return said


def complaints(guest):
    """What QEMU has said, without the lines that tell nothing of us."""
    return [line for line in guest.stderr().splitlines() if not may_be_said(line)]


@pytest.fixture(scope="module")
def guest(lab):
    """A guest for the tests up to the one that unplugs its device."""
    with running() as (_, sockets):
        guest = Guest(qemu.Machine(sockets=sockets, arguments=SLOTS))
        try:
            yield guest.boot()
        finally:
            guest.kill()


def test_guest_reboots_under_a_program_and_binds_the_device_again(guest):
    at_work(guest)
    guest.start("reboot -f")
    guest.wait_for_boot(seconds=SECONDS)
    assert guest.run("lspci -n -s " + FIRST).output.split()[1:] == ["1200:", "1af4:10f0", "(rev", "01)"]
    start_work(guest, FIRST)
    assert not complaints(guest)


def test_removed_device_is_asked_back_from_its_program_and_found_again(guest):
    at_work(guest)
    guest.run(f"echo 1 > /sys/bus/pci/devices/{FIRST}/remove", timeout=SECONDS)  # once it is closed
    said = await_work(guest, "closed")
    assert "wants the device back" in said
    assert "wanted back after" in said
    assert not guest.run("lspci -n -d 1af4:10f0").output
    guest.run("echo 1 > /sys/bus/pci/rescan")
    start_work(guest, FIRST)
    assert not complaints(guest)


def test_hot_unplug_asks_the_program_for_the_device_and_lets_it_go(guest):
    """The last one with this guest, which QEMU 11.1.3 takes with it once the slot is off."""
    at_work(guest)
    guest.qmp("device_del", id="maia0")
    said = ""
    try:
        said = await_work(guest, "wanted back after")
        deadline = time.monotonic() + SECONDS
        while guest.run("lspci -n -d 1af4:10f0").output and time.monotonic() < deadline:
            time.sleep(0.3)
        assert not guest.run("lspci -n -d 1af4:10f0").output
        assert not complaints(guest)
    except (LabError, OSError):
        deadline = time.monotonic() + SECONDS
        while not complaints(guest) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(complaints(guest)) == 1, complaints(guest)
        assert UNPLUG_ABORTS in complaints(guest)[0]
        assert not said or "wants the device back" in said


def test_server_that_ends_under_a_program_is_a_lost_device_and_another_takes_its_place(lab, tmp_path):
    """The guest lives: while its kernel waits a minute for the lost device to come back, it uses another."""
    past_qemus_abort(lambda: lose_a_device_and_use_another(f"{tmp_path}/s"))


def lose_a_device_and_use_another(path):
    process = spawn("--socket", path)
    listening(process, 1)
    guest = Guest(qemu.Machine(sockets=[path], arguments=SLOTS))
    try:
        guest.boot()
        start_work(guest, FIRST)
        assert end(process) == ("", "")
        said = await_work(guest, "DeviceLost after")
        assert "Traceback" not in said
        process = spawn("--socket", path)
        listening(process, 1)
        guest.qmp("device_add", driver="vfio-user-pci", id="maia1", bus="spare", socket={"type": "unix", "path": path})
        deadline = time.monotonic() + SECONDS
        while guest.run(f"test -e /sys/bus/pci/devices/{SECOND}", check=False).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.3)
        start_work(guest, SECOND)
    finally:
        guest.kill()
        end(process)
