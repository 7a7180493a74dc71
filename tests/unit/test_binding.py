"""Plans, refusals and the way back, on a copy of a machine's tree; that a kernel obeys is shown in tests/guest."""

import errno
import json
import os
import stat
import subprocess
import sys
import time

import pytest

from maia_rt.errors import (
    DeviceBusy,
    DeviceNotFound,
    DevicePermission,
    DeviceTimeout,
    InvalidArgument,
    TransportError,
    Unsupported,
)
from maia_rt.pci import PciAddress, bind, binding, iommu, plan, read_function, record, release, usage
from maia_rt.pci.attribute import Attributes
from maia_rt.pci.class_code import class_name, is_endpoint
from maia_rt.pci.host import Host
from tests.helpers.stopwatch import promptly

CARD, SISTER, DISK, BRIDGE, ALONE = "0000:3b:00.0", "0000:3b:00.1", "0000:3c:00.0", "0000:00:01.0", "0000:3d:00.0"


class Tree:
    """A copy of a tree: what is written to it stays as it is written, for there is no kernel behind it."""

    def __init__(self, folder):
        self.host = Host(folder / "sys", folder / "dev", folder / "proc", folder / "run/maia-rt/binding")
        for path in (self.host.pci / "devices", self.host.proc / "self", self.host.dev / "vfio",
                     self.host.module("vfio_iommu_type1"), self.host.sys / "class/block"):
            path.mkdir(parents=True)
        (self.host.pci / "drivers_probe").touch()
        for name in ("vfio-pci", "nvme", "uio_pci_generic"):
            self.driver(name)

    def driver(self, name):
        path = self.host.pci / "drivers" / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "bind").touch()
        (path / "unbind").touch()
        return path

    def add(self, address, class_code, *, group=None, driver=None, override="(null)", ids=(0x1AF4, 0x10F0)):
        path = self.host.pci / "devices" / address
        path.mkdir()
        for name, text in {"vendor": f"{ids[0]:#06x}", "device": f"{ids[1]:#06x}", "class": f"{class_code:#08x}",
                           "revision": "0x01", "driver_override": override, "resource": ""}.items():
            (path / name).write_text(text + "\n")
        if driver:
            (path / "driver").symlink_to(self.driver(driver))
        if group is not None:
            members = self.host.sys / "kernel/iommu_groups" / str(group) / "devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(path)
            (path / "iommu_group").symlink_to(members.parent)
        return path

    def process(self, pid, name, **links):
        """A process with these open: number -> path."""
        folder = self.host.proc / str(pid) / "fd"
        folder.mkdir(parents=True)
        (folder.parent / "comm").write_text(name + "\n")
        for number, target in links.items():
            (folder / number.strip("_")).symlink_to(target)


@pytest.fixture
def tree(tmp_path):
    found = Tree(tmp_path)
    found.add(BRIDGE, 0x060400, group=1, driver="pcieport")
    found.add(CARD, 0x120000, group=7)
    found.add(SISTER, 0x120000, group=7)
    found.add(DISK, 0x010802, group=8, driver="nvme")
    found.add(ALONE, 0x020000)
    return found


def lines(planned, tree):
    """The steps, without the tree's own path."""
    return [str(step).replace(str(tree.host.sys), "/sys").replace(str(tree.host.dev), "/dev") for step in planned.steps]


# --- plans -----------------------------------------------------------------------------------------------------------


def test_the_plan_is_the_writes_in_their_order(tree):
    assert lines(binding.plan_bind(DISK, host=tree.host), tree) == [
        f"echo vfio-pci > /sys/bus/pci/devices/{DISK}/driver_override",
        f"echo {DISK} > /sys/bus/pci/drivers/nvme/unbind",
        f"echo {DISK} > /sys/bus/pci/drivers/vfio-pci/bind"]
    assert lines(binding.plan_bind([CARD, CARD, "3b:00.0"], driver="uio_pci_generic", host=tree.host), tree) == [
        f"echo uio_pci_generic > /sys/bus/pci/devices/{CARD}/driver_override",
        f"echo {CARD} > /sys/bus/pci/drivers/uio_pci_generic/bind"]


def test_modules_that_are_missing_are_loaded_first(tree):
    for path in (tree.host.pci / "drivers/vfio-pci").iterdir():
        path.unlink()
    (tree.host.pci / "drivers/vfio-pci").rmdir()
    tree.host.module("vfio_iommu_type1").rmdir()
    steps = lines(binding.plan_bind(CARD, host=tree.host), tree)
    assert steps[:2] == ["modprobe vfio-pci", "modprobe vfio_iommu_type1"]
    (tree.host.dev / "iommu").touch()
    assert "modprobe vfio_iommu_type1" not in lines(binding.plan_bind(CARD, host=tree.host), tree)


def test_a_user_gets_the_nodes_that_will_be(tree):
    planned = binding.plan_bind([CARD, SISTER], user="0", host=tree.host)
    assert "chown 0 /dev/vfio/7" in lines(planned, tree)
    assert any("memlock" in note for note in planned.changes[0].notes)
    (tree.host.dev / "iommu").touch(0o600)
    steps = lines(binding.plan_bind([CARD, SISTER], user="0", host=tree.host), tree)
    assert f"chown 0 /dev/vfio/devices/$(ls /sys/bus/pci/devices/{CARD}/vfio-dev)" in steps
    assert steps.count("chmod 0666 /dev/iommu") == 1


def test_a_bound_function_needs_nothing(tree):
    tree.add("0000:40:00.0", 0x120000, group=9, driver="vfio-pci", override="vfio-pci")
    assert binding.plan_bind("40:00.0", host=tree.host).steps == ()
    assert lines(binding.plan_bind("40:00.0", user="0", host=tree.host), tree) == ["chown 0 /dev/vfio/9"]


def test_release_follows_the_record_and_without_one_leaves_it_to_the_kernel(tree):
    address = PciAddress.parse("0000:40:00.0")
    tree.add(str(address), 0x010802, group=9, driver="vfio-pci", override="vfio-pci")
    clear, unbind = (f"echo > /sys/bus/pci/devices/{address}/driver_override",
                     f"echo {address} > /sys/bus/pci/drivers/vfio-pci/unbind")
    assert lines(binding.plan_release(str(address), host=tree.host), tree) == [
        clear, unbind, f"echo {address} > /sys/bus/pci/drivers_probe"]
    tree.host.state.mkdir(parents=True)
    record.store(address, record.Record(0x1AF4, 0x10F0, "nvme", None, "vfio-pci"), tree.host)
    back = f"echo {address} > /sys/bus/pci/drivers/nvme/bind"
    assert lines(binding.plan_release(str(address), host=tree.host), tree) == [clear, unbind, back]
    record.store(address, record.Record(0x1AF4, 0x10F0, "gone", None, "vfio-pci"), tree.host)
    planned = binding.plan_release(str(address), host=tree.host)
    assert lines(planned, tree)[-1].endswith("drivers_probe")
    assert "not loaded" in planned.changes[0].notes[0]
    record.store(address, record.Record(0x1AF4, 0x10F0, "nvme", "nvme", "vfio-pci"), tree.host)
    assert lines(binding.plan_release(str(address), host=tree.host), tree)[0].startswith("echo nvme > ")


def test_release_without_anything_to_release(tree):
    assert binding.plan_release([CARD, DISK], host=tree.host).steps == ()
    (tree.host.pci / "devices" / CARD / "driver_override").write_text("vfio-pci\n")
    assert lines(binding.plan_release(CARD, host=tree.host), tree) == [
        f"echo > /sys/bus/pci/devices/{CARD}/driver_override", f"echo {CARD} > /sys/bus/pci/drivers_probe"]
    with pytest.raises(InvalidArgument, match=r"nothing to release.*maia bind"):
        binding.plan_release(DISK, driver="uio_pci_generic", host=tree.host)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("addresses", "error", "words"), [
    ("99:00.0", DeviceNotFound, "99:00.0"), (BRIDGE, InvalidArgument, "PCI bridge"), ([], InvalidArgument, "no PCI"),
    ("x", InvalidArgument, "lspci"), (ALONE, Unsupported, "though this machine has one"),
])
def test_what_cannot_be_bound_is_refused(tree, addresses, error, words):
    with pytest.raises(error, match=words):
        binding.plan_bind(addresses, host=tree.host)


@pytest.mark.parametrize("name", ["", "..", "../nvme", "a b", "-x", "a\nb"])
def test_names_that_are_no_driver_are_refused(tree, name):
    with pytest.raises(InvalidArgument):
        binding.plan_bind(CARD, driver=name, host=tree.host)
    with pytest.raises(InvalidArgument):
        binding.plan_release(CARD, driver=name, host=tree.host)


def test_a_group_that_the_kernel_partly_drives_is_refused_or_taken_whole(tree):
    (tree.host.pci / "devices" / SISTER / "driver").symlink_to(tree.driver("mlx5_core"))
    with pytest.raises(DeviceBusy, match=rf"{SISTER} \(processing accelerator, mlx5_core\).*--group"):
        binding.plan_bind(CARD, host=tree.host)
    assert [str(c.address) for c in binding.plan_bind(CARD, group=True, host=tree.host).changes] == [CARD, SISTER]
    assert binding.plan_bind([CARD, SISTER], host=tree.host).steps
    assert "mlx5_core" in plan.obstacle(read_function(PciAddress.parse(CARD), root=tree.host.pci), tree.host)
    tree.add("0000:3b:1f.0", 0x060100, group=7, driver="lpc_ich")
    with pytest.raises(DeviceBusy, match="slot"):
        binding.plan_bind([CARD, SISTER], host=tree.host)
    # Not for a driver that has nothing to do with VFIO.
    assert binding.plan_bind(CARD, driver="uio_pci_generic", host=tree.host).steps


def test_physical_functions_with_virtual_ones_stay(tree):
    (tree.host.pci / "devices" / CARD / "virtfn0").symlink_to(tree.host.pci / "devices" / SISTER)
    with pytest.raises(DeviceBusy, match="sriov_numvfs"):
        binding.plan_bind(CARD, host=tree.host)


def test_no_iommu_is_explained_for_this_machines_maker(tree):
    for group in list((tree.host.sys / "kernel/iommu_groups").iterdir()):
        group.rename(tree.host.sys / f"moved-{group.name}")
    for vendor, words in (("GenuineIntel", "intel_iommu=on"), ("AuthenticAMD", "amd_iommu=on"), ("", "or amd_iommu")):
        (tree.host.proc / "cpuinfo").write_text(f"vendor_id : {vendor}\n")
        with pytest.raises(Unsupported, match=f"has no IOMMU that is on.*{words}.*--no-iommu"):
            binding.plan_bind(ALONE, host=tree.host)


def test_the_no_iommu_mode_is_never_turned_on_here(tree):
    address = PciAddress.parse(ALONE)
    with pytest.raises(Unsupported, match="VFIO is not loaded"):
        iommu.check_no_iommu_mode(address, tree.host)
    switch = tree.host.module("vfio") / "parameters/enable_unsafe_noiommu_mode"
    switch.parent.mkdir(parents=True)
    with pytest.raises(Unsupported, match="CONFIG_VFIO_NOIOMMU"):
        iommu.check_no_iommu_mode(address, tree.host)
    switch.write_text("N\n")
    with pytest.raises(Unsupported, match="echo 1 >"):
        binding.plan_bind(ALONE, no_iommu=True, host=tree.host)
    switch.write_text("Y\n")
    with pytest.raises(Unsupported):
        binding.plan_bind(ALONE, host=tree.host)
    planned = binding.plan_bind(ALONE, no_iommu=True, user="0", host=tree.host)
    assert "WARNING" in planned.changes[0].notes[0]
    assert any("/dev/vfio/noiommu-$(" in line for line in lines(planned, tree))
    assert "changes nothing" in binding.plan_bind(CARD, no_iommu=True, host=tree.host).changes[0].notes[0]
    assert switch.read_text() == "Y\n"


# --- what is in use --------------------------------------------------------------------------------------------------


def test_mounts_swap_and_members_of_raids_are_seen(tree):
    disk = tree.host.pci / "devices" / DISK / "nvme/nvme0/nvme0n1"
    disk.mkdir(parents=True)
    (disk / "dev").write_text("259:3\n")
    (tree.host.sys / "class/block/x").mkdir(parents=True)
    (disk / "subsystem").symlink_to(tree.host.sys / "class/block")
    address = PciAddress.parse(DISK)

    def seen():
        return [use.text for use in usage.kernel_uses(address, tree.host)]

    assert seen() == []
    (tree.host.proc / "self/mountinfo").write_text("36 35 259:3 / /data rw - ext4 /dev/nvme0n1 rw\n")
    assert seen() == ["/dev/nvme0n1 is mounted at /data"]
    (tree.host.proc / "swaps").write_text("Filename\tType\n/dev/nvme0n1   partition 1 0 -2\n")
    (tree.host.sys / "class/block/nvme0n1/holders/md0").mkdir(parents=True)
    assert seen()[1:] == ["/dev/nvme0n1 is swap space", "/dev/nvme0n1 is part of /dev/md0"]
    with pytest.raises(DeviceBusy, match=r"through nvme.*mounted at /data.*--force"):
        binding.plan_bind(DISK, host=tree.host)
    assert "in use" in plan.obstacle(read_function(address, root=tree.host.pci), tree.host)
    assert binding.plan_bind(DISK, force=True, host=tree.host).steps


def test_interfaces_that_are_up_are_seen(tree):
    interface = tree.host.pci / "devices" / DISK / "net/eth7"
    interface.mkdir(parents=True)
    for flags, expected in (("0x1002", []), ("0x1003", ["network interface eth7 is up"]), ("x", [])):
        (interface / "flags").write_text(flags)
        assert [use.text for use in usage.kernel_uses(PciAddress.parse(DISK), tree.host)] == expected


def test_processes_with_nodes_open_are_named(tree):
    # Any character device will do as the group's node.
    node = tree.host.dev / "vfio/7"
    node.symlink_to("/dev/zero")
    tree.process(41, "qemu", _3="/dev/zero", _4="/dev/null")
    tree.process(42, "python", _9="anon_inode:[vfio-device]")
    (tree.host.pci / "devices" / CARD / "driver").symlink_to(tree.driver("vfio-pci"))
    with pytest.raises(DeviceBusy, match=r"process 41 \(qemu\).*kill 41"):
        binding.plan_release(CARD, host=tree.host)
    with pytest.raises(DeviceBusy, match="process 41"):  # by force neither
        binding.plan_release(CARD, force=True, host=tree.host)
    assert usage.open_nodes(tree.host).vfio == (usage.Process(42, "python"),)


# --- attributes, records, the lock -----------------------------------------------------------------------------------


def test_attributes_are_read_and_written_and_errors_keep_their_number(tmp_path):
    (tmp_path / "a").write_text("old\nmore\n")
    with Attributes(20) as attributes:
        assert attributes.read(tmp_path / "a") == "old"
        attributes.write(tmp_path / "a", "new")
        assert (tmp_path / "a").read_text() == "new\n"
        attributes.write(tmp_path / "a", "")
        assert (tmp_path / "a").read_text() == "\n"
        with pytest.raises(TransportError) as caught:
            attributes.write(tmp_path / "none", "x")
        assert caught.value.errno == errno.ENOENT
        assert not (tmp_path / "none").exists()
        assert attributes.read(tmp_path / "a") == ""
    attributes.close()


def test_an_attribute_that_blocks_is_left_after_the_time(tmp_path):
    os.mkfifo(tmp_path / "stuck")
    with Attributes(0.5) as attributes:
        started = time.monotonic()
        with pytest.raises(DeviceTimeout, match=r"within 0\.5 s"):
            attributes.write(tmp_path / "stuck", "x")
        promptly(started, 10)
        # It goes on with a fresh process.
        attributes.seconds = 20
        (tmp_path / "a").write_text("1\n")
        assert attributes.read(tmp_path / "a") == "1"


def test_records_are_whole_or_absent(tree):
    function = read_function(PciAddress.parse(CARD), root=tree.host.pci)
    tree.host.state.mkdir(parents=True)
    path = tree.host.state / f"{CARD}.json"
    written = record.Record(0x1AF4, 0x10F0, "nvme", None, "vfio-pci")
    assert record.load(function, tree.host) is None
    record.store(function.address, written, tree.host)
    assert record.load(function, tree.host) == written
    assert sorted(os.listdir(tree.host.state)) == [path.name]
    good = json.loads(path.read_text())
    for bad in ("", "{", "[]", "{}", json.dumps(good | {"schema": 99}), json.dumps(good | {"more": 1}),
                json.dumps(good | {"device": 1})):
        path.write_text(bad)
        assert record.load(function, tree.host) is None
    record.store(function.address, None, tree.host)
    record.store(function.address, None, tree.host)
    assert not path.exists()


def test_the_lock_says_who_holds_it(tree):
    code = ("import sys; from pathlib import Path; from maia_rt.pci import record; from maia_rt.pci.host import Host\n"
            "with record.locked(Host(state=Path(sys.argv[1])), 1): print('held', flush=True); input()")
    holder = subprocess.Popen([sys.executable, "-c", code, str(tree.host.state)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DeviceBusy, match=f"process {holder.pid} holds"), record.locked(tree.host, 0.2):
            pass
        holder.kill()
    with record.locked(tree.host, 5):
        assert stat.S_IMODE(tree.host.state.stat().st_mode) & 0o022 == 0


# --- the way back ----------------------------------------------------------------------------------------------------


def test_a_kernel_that_does_nothing_is_noticed_and_all_is_put_back(tree):
    # Writes to this tree move no function: the first that should is noticed.
    with pytest.raises(TransportError, match=f"has driver nvme, not none.*{DISK} is as before: driver nvme"):
        bind(DISK, host=tree.host)
    assert (tree.host.pci / "devices" / DISK / "driver_override").read_text() == "\n"
    assert os.listdir(tree.host.state) == ["lock"]


def test_a_bind_file_that_is_not_there_is_an_error_with_its_number(tree):
    (tree.host.pci / "drivers/vfio-pci/bind").unlink()
    with pytest.raises(TransportError, match="does not take the function") as caught:
        bind(CARD, host=tree.host)
    assert caught.value.errno == errno.ENOENT
    assert (tree.host.pci / "devices" / CARD / "driver_override").read_text() == "\n"


def test_a_step_that_blocks_leaves_the_record_and_says_what_to_do(tree):
    unbind = tree.host.pci / "drivers/nvme/unbind"
    unbind.unlink()
    os.mkfifo(unbind)
    with pytest.raises(DeviceTimeout, match=f"run maia release {DISK}"):
        bind(DISK, timeout=2, host=tree.host)
    assert record.load(read_function(PciAddress.parse(DISK), root=tree.host.pci), tree.host).driver == "nvme"


def test_a_driver_without_a_module_is_refused_before_anything_changes(tree):
    with pytest.raises(InvalidArgument, match="no kernel driver maia_no_such_module"):
        bind(CARD, driver="maia_no_such_module", host=tree.host)
    assert (tree.host.pci / "devices" / CARD / "driver_override").read_text() == "(null)\n"
    assert os.listdir(tree.host.state) == ["lock"]


def test_without_a_bus_or_without_rights_nothing_is_tried(tree, tmp_path):
    with pytest.raises(DeviceNotFound, match="no PCI bus"):
        bind(CARD, host=Host(sys=tmp_path / "none"))
    (tree.host.pci / "drivers_probe").chmod(0o400)
    if os.geteuid():
        with pytest.raises(DevicePermission, match="sudo"):
            release(CARD, host=tree.host)


@pytest.mark.parametrize(("code", "name", "endpoint"), [
    (0x010802, "NVMe", True), (0x120000, "processing accelerator", True), (0x060000, "host bridge", False),
    (0x068000, "bridge", True), (0x080600, "IOMMU", False), (0x00FF00, "unclassified", True),
    (0x770000, "class 770000", True),
])
def test_classes_have_names(code, name, endpoint):
    assert class_name(code) == name
    assert is_endpoint(code) == endpoint
