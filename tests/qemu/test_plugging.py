"""Attaching, detaching and losing the device while QEMU runs."""

import contextlib
import signal
import time

import pytest
from helpers.admin_queue import IDENTIFY
from helpers.emulator import end, eventually, fd_count, listening, running, spawn
from helpers.qmp import QmpError
from helpers.qtest import Machine, PciFunction, QemuError, vfio_user
from helpers.qtest_device import Device, QtestDriver, RootPort
from helpers.stopwatch import promptly

ALL_ONES = 0xFFFFFFFF
SCRATCH = 0xCC
BUFFER = 0x40_0000

ANYTHING = ""
"""What QEMU may say of a server that is gone: two lines for each access, and more when it resets or unplugs."""


def use(device):
    """Boot the device and run a command; it must be as new."""
    device.enable()
    assert device.read32(SCRATCH) == 0
    assert device.read64(0, region=4) == 0
    device.write32(SCRATCH, 77)
    device.write64(0, 77, region=4)
    with QtestDriver(device) as driver:
        driver.boot().open_queue()
        assert driver.command(IDENTIFY, BUFFER)[0] == 0


def plug(machine, path, port="rp0", devfn=0x18, bus=1):
    """Add a device as an operator does, and power its slot on as a guest does."""
    machine.qmp("device_add", driver="vfio-user-pci", id=f"in-{port}", bus=port, socket={"type": "unix", "path": path})
    RootPort(machine, devfn, bus).take()
    return Device(machine, 0, bus)


class Slot:
    """A machine with an empty slot, started again where QEMU has ended.

    QEMU 11.1.3 aborts at the end of the unplugging of any vfio-user device that has MSI-X: its object's children are
    gone before its own end, which takes one of them out of the BAR. The server has seen the device go by then, so what
    matters to it is tested all the same; a QEMU that is mended goes on with the same machine.
    """

    ABORTS = "memory_region_del_subregion: Assertion `subregion->container == mr' failed"

    def __init__(self):
        self.machine = None

    def plug(self, path):
        if self.machine is None:
            self.machine = Machine([*RootPort.NATIVE, *RootPort.OPTION])
        return plug(self.machine, path)

    def unplug(self):
        """Ask for the device as an operator does, and let it go as a guest does."""
        self.machine.qmp("device_del", id="in-rp0")
        assert Device(self.machine, 0, bus=1).read(0, 4) == 0x10F0_1AF4, "it stays until the guest has let go"
        try:
            RootPort(self.machine).let_go()
            assert self.machine.qmp.wait("DEVICE_DELETED")["device"] == "in-rp0"
            assert PciFunction(self.machine, 0, bus=1).read(0, 4) == ALL_ONES
        except (EOFError, ConnectionError):
            assert self.machine.process.wait(10) == -signal.SIGABRT
            said = self.machine.stderr()
            self.close()
            assert self.ABORTS in said
            assert len(said.splitlines()) == 1, said

    def close(self):
        if self.machine is not None:
            self.machine.kill()
        self.machine = None


@pytest.fixture
def slot():
    slot = Slot()
    yield slot
    slot.close()


def test_unplug_and_plug_again_on_the_same_socket(emulator, slot):
    process, path = emulator
    before = None
    for _ in range(3):
        use(slot.plug(path))
        slot.unplug()
        if before is None:
            time.sleep(0.2)
            before = fd_count(process)
        assert eventually(lambda most=before: fd_count(process) <= most), "descriptors of the last client"


def test_unplug_under_a_long_copy(emulator, slot):
    device = slot.plug(emulator[1]).enable()
    hbm = 1 << 48
    with QtestDriver(device) as driver:
        driver.boot().open_queue()
        for _ in range(6):
            driver.copy(hbm, hbm + (256 << 20), 256 << 20)
            driver.copy(BUFFER, hbm, 16 << 20)
        slot.unplug()
    start = time.monotonic()
    use(slot.plug(emulator[1]))
    promptly(start, 4)


@pytest.mark.parametrize("how", ["quit", "SIGTERM", "SIGKILL"])
def test_device_is_fresh_for_the_next_machine_however_the_last_one_ended(emulator, how):
    _, path = emulator
    for _ in range(2):
        machine = Machine(vfio_user(path))
        try:
            use(Device(machine))
            if how == "quit":
                machine.quit()
            else:
                machine.process.send_signal(getattr(signal, how))
                machine.process.wait(10)
        finally:
            machine.kill()
    with Machine(vfio_user(path)) as machine:
        use(Device(machine))


def test_machine_that_is_killed_under_a_long_copy(emulator, start_machine):
    _, path = emulator
    hbm = 1 << 48
    machine = Machine(vfio_user(path))
    try:
        with QtestDriver(Device(machine).enable()) as driver:
            driver.boot().open_queue()
            for _ in range(8):
                driver.copy(hbm, BUFFER, 16 << 20)
                driver.copy(hbm, hbm + (256 << 20), 256 << 20)
    finally:
        machine.kill()
    use(Device(start_machine(vfio_user(path))))


BUSY = r"version reply: Device or resource busy"
REFUSED = "failed to read header: EOF"
"""The server closes the connection of a client that it has refused; QEMU says so."""


def test_second_machine_is_refused_with_the_reason_and_the_first_goes_on(emulator, start_machine):
    _, path = emulator
    first = Device(start_machine(vfio_user(path)))
    use(first)
    start = time.monotonic()
    with pytest.raises(QemuError, match=BUSY):
        Machine(vfio_user(path))
    promptly(start, 5)
    assert first.read32(SCRATCH) == 77
    with QtestDriver(first) as driver:
        first.write32(0x80, 0)
        driver.boot()
        assert driver.command(IDENTIFY, BUFFER)[0] == 0


def test_running_machine_survives_the_refusal_and_gets_the_device_later(emulator, start_machine):
    _, path = emulator
    second = start_machine([*RootPort.NATIVE, *RootPort.OPTION], may_say=REFUSED)
    with Machine(vfio_user(path)) as first:
        use(Device(first))
        with pytest.raises(QmpError, match=BUSY):
            plug(second, path)
        assert Device(first).enable().read32(SCRATCH) == 77
    use(plug(second, path))


def test_machine_that_comes_a_moment_early_waits_for_its_turn(emulator):
    """As when a machine is replaced: the new one starts while the old one ends."""
    _, path = emulator
    old = Machine(vfio_user(path))
    try:
        use(Device(old))
        old.process.send_signal(signal.SIGTERM)
        with Machine(vfio_user(path)) as new:
            use(Device(new))
    finally:
        old.process.wait(10)
        old.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("state", ["idle", "booted", "copying"])
def test_server_that_is_gone_reads_as_all_ones_and_nothing_hangs(tmp_path, number, state):
    path = f"{tmp_path}/s"
    process = spawn("--socket", path)
    listening(process, 1)
    with Machine([*RootPort.OPTION, *vfio_user(path, bus="rp0")], may_say=ANYTHING) as machine:
        RootPort(machine)
        device = Device(machine, 0, bus=1).enable()
        with QtestDriver(device) as driver:
            if state != "idle":
                driver.boot().open_queue()
            if state == "copying":
                for _ in range(8):
                    driver.copy(BUFFER, 1 << 48, 16 << 20)
            process.send_signal(number)
            process.wait(10)
            start = time.monotonic()
            assert eventually(lambda: device.read32(0) == ALL_ONES)
            assert device.read(0, 4) == ALL_ONES
            device.write32(SCRATCH, 1)
            device.write32(0xC8, 1)
            device.write(4, 2, 6)
            device.set_msix()
            device.set_vector(0, 0x1000, 1)
            device.reset()
            device.read64(0, region=4)  # device memory stays mapped: there is still something, of no meaning
            promptly(start, 3)
        machine.qmp("system_reset")
        machine.qmp.wait("RESET")
        assert machine.qmp("query-status")["status"] != "internal-error"
        RootPort(machine)
        assert Device(machine, 0, bus=1).read(0, 4) == ALL_ONES
    end(process, code=-number if number == signal.SIGKILL else 0)


def test_device_of_a_new_server_beside_one_that_is_lost(tmp_path):
    path = f"{tmp_path}/s"
    process = spawn("--socket", path)
    listening(process, 1)
    ports = [*RootPort.NATIVE, *RootPort.OPTION, "-device", "pcie-root-port,id=rp1,chassis=2,addr=4"]
    with Machine(ports, may_say=ANYTHING) as machine:
        lost = plug(machine, path)
        use(lost)
        process.kill()
        process.communicate()
        assert eventually(lambda: lost.read(0, 4) == ALL_ONES)
        RootPort(machine).write(0x20, 4, 0x0000FFF0)  # its windows are closed for the one that takes its place
        RootPort(machine).write(4, 2, 0)
        process = spawn("--socket", path)
        listening(process, 1)
        use(plug(machine, path, port="rp1", devfn=0x20, bus=2))
        assert lost.read(0, 4) == ALL_ONES
    end(process)


def test_two_devices_of_one_process_in_one_machine():
    with running(devices=2) as (process, paths), contextlib.ExitStack() as stack:
        options = [*vfio_user(paths[0]), *vfio_user(paths[1], id="second", addr="4")]
        machine = stack.enter_context(Machine(options))
        first, second = Device(machine, 0x10), Device(machine, 0x20)
        use(first)
        serial = first.read64(0x10)
        first.write(4, 2, 0)
        use(second)
        assert second.read64(0x10) != serial
        assert process.poll() is None


def test_no_server_is_an_error_of_its_own(tmp_path):
    with pytest.raises(QemuError, match=r"Failed to connect|No such file"):
        Machine(vfio_user(f"{tmp_path}/nobody"))
