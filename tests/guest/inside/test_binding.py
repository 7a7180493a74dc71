"""In a guest: functions change hands between the kernel's drivers and vfio-pci, and come back whatever goes wrong."""

import contextlib
import errno
import fcntl
import functools
import io
import json
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from maia_tools import cli

from maia_rt.errors import DeviceBusy, DeviceTimeout, TransportError
from maia_rt.pci import bind, binding, functions, iommu, plan, record, release, usage
from maia_rt.pci.host import Host
from maia_rt.transport import open_device
from tests.helpers.stopwatch import promptly

USER = "user"  # /etc/passwd of the guest
HOST = Host()
PCI = HOST.pci


def of(vendor, device, *, nth=0):
    """The address of the nth function with these ids, as text."""
    return str(functions(vendor=vendor, device=device)[nth].address)


def edu():
    return of(0x1234, 0x11E8)


def nvme():
    return of(0x1B36, 0x0010)


def maia_device():
    return of(0x1AF4, 0x10F0)


def link(path):
    try:
        return os.path.basename(os.readlink(path))
    except FileNotFoundError:
        return None


def driver(address):
    return link(f"{PCI}/devices/{address}/driver")


def override(address):
    return (PCI / "devices" / address / "driver_override").read_text().strip()


def machine():
    """What a bind may change, of every function and of the machine."""
    return {
        "functions": {name: (driver(name), override(name), link(f"{PCI}/devices/{name}/iommu_group"))
                      for name in os.listdir(PCI / "devices")},
        "modules": os.listdir("/sys/module"),
        "nodes": {entry.path: (entry.stat().st_mode, entry.stat().st_uid)
                  for folder in ("/dev", "/dev/vfio") if os.path.isdir(folder)
                  for entry in os.scandir(folder) if os.path.exists(entry.path) and not entry.name.startswith("tty")},
        "records": sorted(path.name for path in HOST.state.glob("*.json")),
    }


def maia(*arguments):
    """Run maia in this process: a new one takes seconds to start in a guest without KVM."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


class Child:
    """A fork of this process that runs a function, as another user if need be, and ends when it is told to.

    Its result is what the function returned, or the name and text of what it raised.
    """

    def __init__(self, work, *, uid=None, stays=False):
        result, write = os.pipe()
        read, self._stop = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(result)
            os.close(self._stop)
            try:
                if uid is not None:
                    os.setgroups([])
                    os.setresuid(uid, uid, uid)
                try:
                    found = work()
                    text = json.dumps(None if stays else found)
                except BaseException as error:
                    text = json.dumps([type(error).__name__, str(error)])
                os.write(write, text.encode() + b"\n")
                if stays:
                    os.read(read, 1)
            finally:
                os._exit(0)
        os.close(read)
        os.close(write)
        self._answer = os.fdopen(result)

    @functools.cached_property
    def result(self):
        with self._answer as lines:
            return json.loads(lines.readline())

    def end(self):
        os.close(self._stop)
        os.waitpid(self.pid, 0)


def in_child(work, *, uid=None):
    """Run a function in a child; return what it returned."""
    child = Child(work, uid=uid)
    try:
        return child.result
    finally:
        child.end()


@contextlib.contextmanager
def holding(work):
    """A process that runs a function, and keeps what it opened until the end of the block."""
    child = Child(work, stays=True)
    try:
        assert child.result is None, child.result
        yield child
    finally:
        child.end()


def failed(done, code):
    """The three parts of a failure with this exit code."""
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["maia", "cause", "try"], done.stderr
    return [line.split(": ", 1)[1] for line in lines]


@pytest.fixture(autouse=True)
def everything_is_as_before():
    """Binds must leave no trace once they are released, and failed ones at once."""
    before = machine()
    yield
    for name in os.listdir(PCI / "devices"):
        if iommu.is_vfio(driver(name)):
            release(name)
    after = machine()
    after["modules"] = [name for name in after["modules"] if name in before["modules"]]
    # What was there before is as it was; /dev/vfio/devices and nodes of loaded modules may have come, and bind --user
    # opens /dev/iommu to all for good.
    after["nodes"] = {name: node for name, node in after["nodes"].items() if name in before["nodes"]}
    after["nodes"].pop("/dev/iommu", None)
    before["nodes"].pop("/dev/iommu", None)
    assert after == before


EVERY = [edu, nvme, maia_device]


@pytest.mark.parametrize("find", [edu, nvme])
def test_a_dry_run_changes_nothing_and_prints_the_writes(find):
    address, before = find(), machine()
    done = maia("bind", address, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"echo vfio-pci > {PCI}/devices/{address}/driver_override" in lines
    assert lines[-1] == f"echo {address} > {PCI}/drivers/vfio-pci/bind"
    held = driver(address)
    assert (f"echo {address} > {PCI}/drivers/{held}/unbind" in lines) == (held is not None)
    assert maia("release", address, "--dry-run").returncode == 0
    assert machine() == before


def test_the_lines_of_a_dry_run_do_the_same_in_a_shell():
    address = edu()
    script = maia("bind", address, "--dry-run", "--user", USER).stdout
    done = subprocess.run(["sh", "-e"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, script + done.stderr
    assert driver(address) == "vfio-pci"
    assert {node.stat().st_uid for node in binding.vfio_nodes(function(address))} == {1000}
    script = maia("release", address, "--dry-run").stdout
    subprocess.run(["sh", "-e"], input=script, check=True, text=True)
    assert driver(address) is None
    assert override(address) == "(null)"


def function(address):
    return next(f for f in functions() if str(f.address) == address)


@pytest.mark.parametrize("find", EVERY)
def test_bound_it_opens_and_released_it_is_with_its_driver_again(find):
    address = find()
    before = driver(address)
    done = maia("bind", address)
    assert done.returncode == 0, done.stderr
    assert f"{before or 'no driver'} -> vfio-pci, IOMMU group " in done.stdout
    assert driver(address) == override(address) == "vfio-pci"
    with open_device(address) as device:
        assert device.read(7, 0, 4) == function(address).vendor | function(address).device << 16
    done = maia("release", address)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{address}: vfio-pci -> {before or 'no driver'}\n"
    assert driver(address) == before
    assert override(address) == "(null)"


@pytest.mark.own_kernel
def test_a_second_bind_or_release_says_so_and_is_no_error():
    address = edu()
    assert maia("release", address).stdout == f"{address}: has no driver already\n"
    assert maia("bind", address).returncode == 0
    done = maia("bind", address)
    assert done.returncode == 0
    assert done.stdout.startswith(f"{address}: already with vfio-pci, IOMMU group ")
    assert maia("release", address).returncode == 0
    again = maia("release", address)
    assert (again.returncode, again.stdout) == (0, f"{address}: has no driver already\n")


@pytest.mark.own_kernel
def test_the_json_of_each_command_has_a_schema():
    address = edu()
    listed = json.loads(maia("ls", "--json").stdout)
    assert listed["schema"] == 1
    assert [row["bindable"] for row in listed["functions"] if row["address"] == address] == [True]
    planned = json.loads(maia("bind", address, "--dry-run", "--json").stdout)
    assert planned["kind"] == "bind plan"
    assert len(planned["steps"]) >= 2
    bound = json.loads(maia("bind", address, "--json").stdout)["functions"][0]
    assert (bound["changed"], bound["previous_driver"], bound["driver"]) == (True, None, "vfio-pci")
    row = next(row for row in json.loads(maia("ls", "--json").stdout)["functions"] if row["address"] == address)
    assert row["vfio_nodes"] == bound["vfio_nodes"] != []
    assert json.loads(maia("release", address, "--json").stdout)["functions"][0]["driver"] is None


@pytest.mark.own_kernel
def test_several_are_bound_all_or_none():
    first, second = edu(), maia_device()
    done = maia("bind", second, first, "ffff:ff:1f.7")
    failed(done, 3)
    assert driver(first) is driver(second) is None
    assert [str(one.address) for one in bind([second, first])] == [first, second]
    assert [one.driver for one in release([first, second])] == [None, None]


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.own_kernel
def test_what_cannot_be_bound_is_refused_in_three_lines():
    for arguments, code, words in (
        (["bind", "0000:00:00.0"], 2, "host bridge"), (["bind", "00:1f.0"], 2, "ISA bridge"),
        (["bind", "7f:1f.0"], 3, "no PCI function 0000:7f:1f.0"), (["bind", "/dev/nvme0"], 2, "not a PCI address"),
        (["release", "7f:1f.0"], 3, "no PCI function"), (["bind", edu(), "--user", "nobody-here"], 2, "no user"),
        (["bind", edu(), "--driver", "../../x"], 2, "no name of a driver"),
    ):
        assert words in failed(maia(*arguments), code)[0]


def test_a_driver_that_does_not_exist_is_named_and_nothing_changes():
    address, before = edu(), machine()
    what, cause, _ = failed(maia("bind", address, "--driver", "no_such_driver"), 2)
    assert "no kernel driver no_such_driver" in what
    assert cause
    assert machine() == before


@pytest.mark.own_kernel
def test_anybody_may_see_the_plan_and_only_root_may_bind():
    address = edu()

    def as_user(*arguments):
        return SimpleNamespace(**in_child(lambda: vars(maia(*arguments)), uid=1000))

    assert as_user("bind", address, "--dry-run").returncode == 0
    what, cause, hint = failed(as_user("bind", address), 4)
    assert "root" in what
    assert "1000" in cause
    assert "sudo" in hint
    failed(as_user("release", address), 4)
    assert as_user("ls").returncode == 0


# --- failures in the middle --------------------------------------------------------------------------------------


@pytest.mark.own_kernel
def test_a_driver_that_refuses_the_function_leaves_it_as_it_was():
    address = edu()
    with pytest.raises(TransportError, match=f"does not take .*{address} is as before: no driver") as caught:
        bind(address, driver="virtio-pci")
    assert caught.value.errno == errno.ENODEV
    assert driver(address) is None
    assert override(address) == "(null)"
    failed(maia("bind", address, "--driver", "virtio-pci"), 1)


@pytest.mark.own_kernel
def test_left_over_overrides_are_cleared_by_release():
    address = edu()
    (PCI / "devices" / address / "driver_override").write_text("vfio-pci\n")
    assert maia("release", address).stdout == f"{address}: no driver wants it\n"
    assert override(address) == "(null)"


@pytest.mark.own_kernel
def test_a_bind_that_was_killed_half_way_is_finished_by_release_or_bind():
    address = edu()
    bind(address)
    remembered = (HOST.state / f"{address}.json").read_text()
    release(address)
    for verb in (bind, release):
        (HOST.state / f"{address}.json").write_text(remembered)
        (PCI / "devices" / address / "driver_override").write_text("vfio-pci\n")
        verb(address)
    assert not (HOST.state / f"{address}.json").exists()


# --- devices in use ----------------------------------------------------------------------------------------------

KEPT = []
"""What a child has opened: it must not be collected."""


def opened(address, interface=None, how="as it is"):
    """Drive a function: with all descriptors, with a mapping alone, or with the function's descriptor alone."""
    device = open_device(address, interface=interface)
    KEPT.append(device)
    if how == "mapped only":
        KEPT.append(device.map(2, 0, 4096))
        device.close()
    elif how == "descriptor only":
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith("/dev/vfio/") and int(name) != device._fd:
                    os.close(int(name))


def interfaces():
    return ["group", *(["cdev"] if Path("/dev/iommu").exists() else [])]


@pytest.mark.parametrize("how", ["as it is", "mapped only", "descriptor only"])
def test_a_device_that_a_program_drives_is_not_taken_from_it(how):
    address = maia_device()
    bind(address)
    for interface in interfaces():
        with holding(functools.partial(opened, address, interface, how)) as process:
            what, cause, hint = failed(maia("release", address), 3)
            assert "in use" in what
            assert f"process {process.pid} (" in cause
            assert str(process.pid) in hint
            assert driver(address) == "vfio-pci"
    assert maia("release", address).returncode == 0


@pytest.mark.own_kernel
def test_ls_says_who_drives_a_function_and_to_bind_it_again_is_no_error():
    address = maia_device()
    bind(address, user=USER)
    with holding(lambda: opened(address)) as process:
        assert f"process {process.pid}" in maia("ls").stdout
        failed(maia("bind", address, "--driver", "virtio-pci"), 3)
        assert "already" in maia("bind", address).stdout


def test_the_kernels_wait_for_a_program_is_cut_off_and_finished_later(monkeypatch):
    address = maia_device()
    bind(address)
    with holding(lambda: opened(address)):
        with monkeypatch.context() as patch:
            # As if the program opened it between the check and the write.
            patch.setattr(usage, "vfio_uses", lambda *_: [])
            started = time.monotonic()
            with pytest.raises(DeviceTimeout, match=f"run maia release {address}"):
                release(address, timeout=2)
            promptly(started, 30)
        # The device's lock is held now: looking at the machine must not hang.
        assert maia("ls").returncode == 0
        with pytest.raises((DeviceTimeout, DeviceBusy)):
            release(address, timeout=2)
    deadline = time.monotonic() + 30
    while driver(address) is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert driver(address) is None
    release(address)
    assert override(address) == "(null)"


@pytest.mark.own_kernel
def test_two_binds_at_once_do_not_meet():
    address = edu()
    children = [Child(lambda: vars(maia("bind", address))) for _ in range(2)]
    done = [child.result for child in children]
    for child in children:
        child.end()
    assert [one["returncode"] for one in done] == [0, 0], done
    assert sorted("already" in one["stdout"] for one in done) == [False, True]


@pytest.mark.own_kernel
def test_a_bind_waits_for_another_only_so_long(monkeypatch):
    monkeypatch.setattr(binding, "LOCK_SECONDS", 0.2)
    with record.locked(HOST, 1), pytest.raises(DeviceBusy, match=f"process {os.getpid()}"):
        bind(edu())
    with (HOST.state / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- a user's device ---------------------------------------------------------------------------------------------


def test_the_user_who_was_given_it_opens_it_without_being_root():
    address = maia_device()
    done = maia("bind", address, "--user", USER)
    assert done.returncode == 0, done.stderr
    assert "memlock" in done.stderr
    for interface in interfaces():
        def read(interface=interface):
            with open_device(address, interface=interface) as device:
                return device.read(7, 0, 2)

        assert in_child(read, uid=1000) == 0x1AF4
        assert in_child(read, uid=1001)[0] == "DevicePermission"


# --- with a driver of the kernel's -------------------------------------------------------------------------------


@pytest.mark.own_kernel
class TestNvmeDriver:
    """The small kernel's own driver holds the disk."""

    def test_the_disk_goes_and_comes_back(self):
        address = nvme()
        assert driver(address) == "nvme"
        first = self.block()
        assert bind(address)[0].before == "nvme"
        assert not list(Path("/dev").glob("nvme0*"))
        row = next(row for row in json.loads(maia("ls", "--json").stdout)["functions"] if row["address"] == address)
        assert row["previous_driver"] == "nvme"
        assert release(address)[0].driver == "nvme"
        assert Path("/dev/nvme0").exists()
        assert self.block() == first

    @staticmethod
    def block():
        deadline = time.monotonic() + 30
        while not Path("/dev/nvme0n1").exists() and time.monotonic() < deadline:
            time.sleep(0.05)  # the driver finds namespaces by and by
        with Path("/dev/nvme0n1").open("rb", buffering=0) as disk:
            return disk.read(512)

    def test_a_step_that_fails_brings_the_disk_back(self):
        address = nvme()
        self.block()
        with pytest.raises(TransportError, match="as before: driver nvme"):
            bind(address, driver="virtio-pci")
        assert driver(address) == "nvme"
        assert override(address) == "(null)"
        assert self.block()

    def test_a_disk_that_a_program_reads_is_taken_only_by_force(self):
        address = nvme()
        self.block()
        with holding(lambda: KEPT.append(os.open("/dev/nvme0n1", os.O_RDONLY))) as process:
            _, cause, hint = failed(maia("bind", address), 3)
            assert f"process {process.pid}" in cause
            assert "/dev/nvme0n1" in cause
            assert "--force" in hint
            listed = json.loads(maia("ls", "--json").stdout)["functions"]
            assert "in use" in next(row["obstacle"] for row in listed if row["address"] == address)
            assert maia("bind", address, "--force").returncode == 0
        release(address)
        self.block()

    def test_a_disk_that_the_kernel_has_claimed_is_found(self):
        address = nvme()
        self.block()
        with holding(lambda: KEPT.append(os.open("/dev/nvme0n1", os.O_RDONLY | os.O_EXCL))):
            hidden = usage.OpenNodes({}, ())  # as it is where another mount namespace has it
            assert "claimed" in usage.kernel_uses(function(address).address, HOST, hidden)[0].text

    def test_releasing_to_another_driver_that_refuses_it_keeps_it_bound(self):
        address = nvme()
        bind(address)
        with pytest.raises(TransportError, match="as before: driver vfio-pci"):
            release(address, driver="virtio-pci")
        assert driver(address) == override(address) == "vfio-pci"
        assert release(address)[0].driver == "nvme"

    def test_going_over_a_second_driver_still_leads_back_to_the_first(self):
        address = nvme()
        bind(address)
        bind(address, driver="uio_pci_generic")
        assert driver(address) == "uio_pci_generic"
        assert release(address)[0].driver == "nvme"

    def test_release_of_what_the_kernel_drives_is_no_work(self):
        address = nvme()
        assert maia("release", address).stdout == f"{address}: already with nvme\n"
        (PCI / "devices" / address / "driver_override").write_text("vfio-pci\n")
        assert "driver_override cleared" in maia("release", address).stdout
        assert (driver(address), override(address)) == ("nvme", "(null)")

    def test_an_override_of_somebody_elses_is_put_back(self):
        address = nvme()
        path = PCI / "devices" / address / "driver_override"
        path.write_text("nvme\n")
        try:
            bind(address)
            release(address)
            assert (driver(address), override(address)) == ("nvme", "nvme")
        finally:
            path.write_text("\n")

    def test_a_record_of_another_card_or_another_owner_is_left_aside(self):
        address = nvme()
        bind(address)
        path = HOST.state / f"{address}.json"
        found = json.loads(path.read_text())
        path.write_text(json.dumps(found | {"device": 0x9999}))
        assert record.load(function(address), HOST) is None
        path.write_text(json.dumps(found))
        os.chown(path, 1000, -1)
        assert record.load(function(address), HOST) is None
        # Without a record the kernel chooses.
        assert release(address)[0].driver == "nvme"


@pytest.mark.own_kernel
class TestGroup:
    """Two edu devices and a virtio one behind a conventional bridge: one IOMMU group."""

    @staticmethod
    def members():
        random = of(0x1AF4, 0x1005)
        devices = Path(f"/sys/bus/pci/devices/{random}/iommu_group/devices")
        first, second = sorted(one.name for one in devices.iterdir() if (one / "vendor").read_text() == "0x1234\n")
        return first, second, random

    def test_one_is_refused_with_the_names_and_drivers_of_the_others(self):
        first, second, random = self.members()
        what, cause, hint = failed(maia("bind", first), 3)
        assert "IOMMU group" in what
        assert random in cause
        assert "virtio-pci" in cause
        assert second not in cause  # no driver has it, so it is in nobody's way
        assert "--group" in hint
        listed = {row["address"]: row for row in json.loads(maia("ls", "--json").stdout)["functions"]}
        assert random in listed[first]["obstacle"]
        assert {one["address"] for one in listed[first]["group_members"]} > {second, random}

    def test_the_whole_group_is_bound_usable_and_released(self):
        first, second, random = self.members()
        assert {str(one.address) for one in bind(first, group=True)} == {first, second, random}
        with open_device(second) as device:
            assert device.read(7, 0, 4) == 0x11E81234
            # A group that a program has open can take a member more, and give none away.
            with pytest.raises(DeviceBusy, match=f"process {os.getpid()} "):
                release(random)
        self.fail_at_the_last(random, second)
        back = {str(one.address): one.driver for one in release(second, group=True)}
        assert back == {first: None, second: None, random: "virtio-pci"}

    @staticmethod
    def fail_at_the_last(random, last):
        """The first function gets its new driver; the second is refused, so the first goes back."""
        bind(random, user=USER)
        with pytest.raises(TransportError, match=f"does not take .*{random} is as before: driver vfio-pci"):
            bind([random, last], driver="virtio-pci")
        assert [driver(random), override(random), driver(last)] == ["vfio-pci"] * 3
        assert record.load(function(random), HOST).driver == "virtio-pci"

    def test_a_bridge_is_no_obstacle(self):
        first = self.members()[0]
        assert not any(one.class_code >> 8 == 0x0604 for one in iommu.in_the_way(function(first).address, HOST))


@pytest.mark.no_iommu
class TestNoIommu:
    """A machine whose IOMMU is off."""

    SWITCH = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")

    def test_bind_explains_and_never_turns_the_mode_on_by_itself(self):
        address = maia_device()
        what, _, hint = failed(maia("bind", address), 1)
        assert "no IOMMU" in what
        assert "intel_iommu=on" in hint or "amd_iommu=on" in hint
        what, _, hint = failed(maia("bind", address, "--no-iommu"), 1)
        assert f"echo 1 > {self.SWITCH}" in hint
        assert self.SWITCH.read_text().strip() == "N"
        assert plan.obstacle(function(address)) == "no IOMMU group"

    def test_when_the_mode_is_on_it_still_takes_the_flag_and_warns(self):
        address = maia_device()
        self.SWITCH.write_text("1")
        try:
            failed(maia("bind", address), 1)
            script = maia("bind", address, "--no-iommu", "--dry-run", "--user", USER).stdout
            done = maia("bind", address, "--no-iommu", "--user", USER)
            assert done.returncode == 0, done.stderr
            assert "WARNING" in done.stderr
            assert "/dev/vfio/noiommu-" in done.stdout
            assert "noiommu-$(" in script
            assert "WITHOUT" in maia("ls").stdout
            assert {node.stat().st_uid for node in binding.vfio_nodes(function(address))} == {1000}
            with pytest.warns(RuntimeWarning, match="without an IOMMU"):
                device = open_device(address, no_iommu=True)
            with device:
                assert device.read(7, 0, 2) == 0x1AF4
                with pytest.raises(DeviceBusy):
                    release(address)
            assert "already" in maia("bind", address, "--no-iommu").stdout
            assert release(address)[0].driver is None
        finally:
            self.SWITCH.write_text("0")
