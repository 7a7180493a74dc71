"""A host that cannot give a function away says why; none of this needs hardware."""

import ctypes
import errno
import os
import struct

import pytest

from maia_rt.errors import (
    DeviceBusy,
    DeviceLost,
    DeviceNotFound,
    DevicePermission,
    InvalidArgument,
    MemlockLimit,
    ProtocolError,
    TransportError,
    Unsupported,
)
from maia_rt.transport import kernel_uapi as k
from maia_rt.transport.kernel import KernelDevice
from maia_rt.transport.kernel_group import parse_type1_caps
from maia_rt.transport.kernel_ioctl import open_node, refusal

ADDRESS = "0000:3b:00.0"


@pytest.fixture
def host(tmp_path):
    """A sysfs with one function, and an empty /dev; returns what :meth:`KernelDevice.open` takes."""
    root, dev = tmp_path / "pci", tmp_path / "dev"
    path = root / "devices" / ADDRESS
    path.mkdir(parents=True)
    dev.mkdir()
    for name, text in {"vendor": "0x1af4", "device": "0x10f0", "class": "0x120000", "revision": "0x00"}.items():
        (path / name).write_text(text)
    return {"root": root, "dev": dev}


def give(host, *, driver=None, group=None, cdev=None, nodes=()):
    path = host["root"] / "devices" / ADDRESS
    for name, target in (("driver", driver), ("iommu_group", group)):
        if target is not None:
            where = host["root"].parent / name / target
            where.mkdir(parents=True)
            (path / name).symlink_to(where)
    if cdev:
        (path / "vfio-dev" / cdev).mkdir(parents=True)
    for node in nodes:
        (host["dev"] / node).parent.mkdir(parents=True, exist_ok=True)
        (host["dev"] / node).write_text("")


def refused(host, **options):
    with pytest.raises(Exception) as caught:
        KernelDevice.open(ADDRESS, **host, **options)
    return caught.value


def test_this_machine_without_vfio_says_how_to_load_it(host):
    give(host, driver="vfio-pci", group="7")
    error = refused(host)
    assert isinstance(error, DeviceNotFound)
    assert "the host has no VFIO" in str(error)
    assert "modprobe vfio-pci" in error.hint
    assert "emulated" in error.hint


def test_a_function_that_does_not_exist_is_not_found(host):
    with pytest.raises(DeviceNotFound, match="no PCI function"):
        KernelDevice.open("0000:99:00.0", **host)
    with pytest.raises(InvalidArgument):
        KernelDevice.open("not an address", **host)


def test_a_function_without_iommu_is_refused_unless_asked_for(host):
    give(host, driver="vfio-pci", nodes=["vfio/vfio"])
    error = refused(host)
    assert isinstance(error, Unsupported)
    assert "intel_iommu=on" in error.hint


def test_a_function_that_the_kernel_drives_is_busy(host):
    give(host, driver="nvme", group="7", nodes=["vfio/vfio"])
    error = refused(host)
    assert isinstance(error, DeviceBusy)
    assert "nvme" in str(error)


def test_a_function_that_nobody_drives_is_not_bound(host):
    give(host, group="7", nodes=["vfio/vfio"])
    error = refused(host)
    assert isinstance(error, DeviceNotFound)
    assert "bind it to vfio-pci" in str(error)


def test_a_node_that_is_not_vfio_is_refused_and_closed(host):
    give(host, driver="vfio-pci", group="7", nodes=["vfio/vfio", "vfio/7"])
    error = refused(host)
    assert isinstance(error, TransportError)
    assert error.errno == errno.ENOTTY
    assert "VFIO_GET_API_VERSION" in str(error)


def test_iommufd_is_chosen_where_both_its_ends_exist(host):
    give(host, driver="vfio-pci", group="7", cdev="vfio0", nodes=["vfio/vfio", "vfio/7", "vfio/devices/vfio0", "iommu"])
    assert "VFIO_DEVICE_BIND_IOMMUFD" in str(refused(host))
    (host["dev"] / "iommu").unlink()
    assert "VFIO_GET_API_VERSION" in str(refused(host))


def test_without_an_iommu_the_group_is_used_only_on_request(host):
    give(host, driver="vfio-pci", group="7", nodes=["vfio/vfio", "vfio/noiommu-7"])
    error = refused(host)
    assert isinstance(error, Unsupported)
    assert "no_iommu=True" in error.hint
    with pytest.warns(RuntimeWarning, match="all of the host's memory"):
        assert "VFIO_GET_API_VERSION" in str(refused(host, no_iommu=True))


def test_a_function_with_an_iommu_is_not_opened_without(host):
    give(host, driver="vfio-pci", group="7", nodes=["vfio/vfio", "vfio/7"])
    with pytest.warns(RuntimeWarning):
        error = refused(host, no_iommu=True)
    assert isinstance(error, InvalidArgument)
    assert "leave `no_iommu` out" in error.hint


def test_the_interface_can_be_chosen(host):
    give(host, driver="vfio-pci", group="7", cdev="vfio0", nodes=["vfio/vfio", "vfio/7", "vfio/devices/vfio0", "iommu"])
    assert "VFIO_GET_API_VERSION" in str(refused(host, interface="group"))
    assert "VFIO_DEVICE_BIND_IOMMUFD" in str(refused(host, interface="cdev"))
    assert "is not an interface" in str(refused(host, interface="iommufd"))


def test_an_interface_that_the_kernel_has_not_is_unsupported(host):
    give(host, driver="vfio-pci", group="7", nodes=["vfio/vfio", "vfio/7"])
    error = refused(host, interface="cdev")
    assert isinstance(error, Unsupported)
    assert "Linux 6.6" in error.cause
    with pytest.warns(RuntimeWarning):
        assert isinstance(refused(host, interface="cdev", no_iommu=True), InvalidArgument)


def test_a_node_of_another_user_names_the_node(tmp_path):
    node = tmp_path / "node"
    node.write_text("")
    node.chmod(0)
    if os.geteuid():
        with pytest.raises(DevicePermission, match="udev"):
            open_node(node, "test", hint="")
    assert isinstance(refusal(OSError(errno.EACCES, ""), "test"), TransportError)
    node.unlink()
    with pytest.raises(DeviceNotFound, match="do this"):
        open_node(node, "test", hint="do this")
    with pytest.raises(TransportError, match="Is a directory"):
        open_node(tmp_path, "test", hint="")


@pytest.mark.parametrize(("code", "kind"), [
    (errno.ENODEV, DeviceLost), (errno.EBUSY, DeviceBusy), (errno.ENOMEM, MemlockLimit),
    (errno.EINVAL, TransportError)])
def test_the_kernels_refusals_have_types(code, kind):
    error = refusal(OSError(code, "x"), "0000:3b:00.0: mapping")
    assert isinstance(error, kind)
    assert str(error).startswith("0000:3b:00.0: mapping")


# --- VFIO_IOMMU_GET_INFO ---------------------------------------------------------------------------------------------


def type1_info(*capabilities):
    """The structure and a chain of (id, body)."""
    head = bytearray(24)
    at, chain = 24, b""
    for number, (cap_id, body) in enumerate(capabilities):
        following = at + 8 + len(body) if number + 1 < len(capabilities) else 0
        chain += struct.pack("<HHI", cap_id, 1, following) + body
        at += 8 + len(body)
    return head + chain + bytes(64)


def ranges(*pairs):
    return struct.pack("<II", len(pairs), 0) + b"".join(struct.pack("<QQ", *pair) for pair in pairs)


def test_iova_ranges_and_the_number_of_maps_are_read():
    usable = [(0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 39) - 1)]
    info = type1_info((2, bytes(24)), (1, ranges(*usable)), (3, struct.pack("<II", 65535, 0)))
    assert parse_type1_caps(info, 24, [], 0) == (usable, 65535)


def test_absent_capabilities_leave_what_is_assumed():
    assert parse_type1_caps(type1_info(), 0, [(0, 9)], 5) == ([(0, 9)], 5)
    assert parse_type1_caps(type1_info((2, bytes(24))), 24, [(0, 9)], 5) == ([(0, 9)], 5)


@pytest.mark.parametrize(("info", "at"), [
    (type1_info((1, ranges())), 8), (type1_info((1, ranges())), 4096),
    (type1_info((1, struct.pack("<II", 1 << 30, 0))), 24),
    (bytearray(24) + struct.pack("<HHIII", 9, 1, 24, 0, 0), 24),
    (bytearray(24) + struct.pack("<HHIII", 9, 1, 4096, 0, 0), 24),
])
def test_a_chain_that_makes_no_sense_is_refused(info, at):
    with pytest.raises(ProtocolError):
        parse_type1_caps(info, at, [], 0)


def test_the_range_structure_is_shared_by_both_interfaces():
    assert ctypes.sizeof(k.IommuIovaRange) == 16
