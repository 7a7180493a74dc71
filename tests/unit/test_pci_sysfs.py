"""Addresses parse and print as lspci writes them; sysfs is read from the machine's tree or a copy of one."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maia_rt.errors import DeviceLost, DeviceNotFound, InvalidArgument
from maia_rt.pci import PciAddress, functions, read_function, sysfs


@pytest.mark.parametrize(("text", "address"), [
    ("0000:3b:00.0", (0, 0x3B, 0, 0)), ("3b:1f.7", (0, 0x3B, 0x1F, 7)), (" 10000:E1:00.0\n", (0x10000, 0xE1, 0, 0)),
    ("0:0:0.0", (0, 0, 0, 0)),
])
def test_addresses_parse(text, address):
    assert PciAddress.parse(text) == address


@pytest.mark.parametrize("text", [
    "", "3b", "3b:00", "3b:20.0", "3b:00.8", "100:00.0", "0000:3b:00.0x", "0000:3b:00.0\n1", "g:00.0", "0000:3b:-1.0",
    "123456789:00:00.0", "::.", "٣b:00.0"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(InvalidArgument, match="lspci"):
        PciAddress.parse(text)


@given(st.tuples(st.integers(0, 0xFFFFFFFF), st.integers(0, 255), st.integers(0, 31), st.integers(0, 7)))
def test_addresses_survive_printing(fields):
    assert PciAddress.parse(str(PciAddress(*fields))) == fields


@pytest.fixture
def tree(tmp_path):
    """A copy of a small machine's tree: a bridge and two functions of one group, the first bound to vfio-pci."""
    root = tmp_path / "pci"

    def add(address, files, links=()):
        path = root / "devices" / address
        path.mkdir(parents=True)
        for name, text in files.items():
            (path / name).write_text(text + "\n")
        for name, target in links:
            (tmp_path / target).mkdir(parents=True, exist_ok=True)
            (path / name).symlink_to(tmp_path / target)
        return path

    ids = {"vendor": "0x1af4", "device": "0x10f0", "subsystem_vendor": "0x1af4", "subsystem_device": "0x0001",
           "class": "0x120000", "revision": "0x02", "numa_node": "1",
           "resource": "0x00000000fe000000 0x00000000fe00ffff 0x0000000000040200\n"
                       "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
                       "0x0000380000000000 0x000038003fffffff 0x000000000014220c"}
    path = add("0000:3b:00.0", ids, [("driver", "drivers/vfio-pci"), ("iommu_group", "iommu_groups/7")])
    (path / "vfio-dev" / "vfio3").mkdir(parents=True)
    add("0000:3b:00.1", ids | {"device": "0x10f1", "numa_node": "-1"}, [("iommu_group", "iommu_groups/7")])
    add("0000:00:01.0", {"vendor": "0x8086", "device": "0x3420", "class": "0x060400", "revision": "0x00"})
    for name in ("0000:3b:00.0", "0000:3b:00.1"):
        (tmp_path / "iommu_groups/7/devices" / name).mkdir(parents=True)
    return root


def test_functions_are_listed_in_bus_order(tree):
    assert [str(f.address) for f in functions(root=tree)] == ["0000:00:01.0", "0000:3b:00.0", "0000:3b:00.1"]
    assert [f.device for f in functions(vendor=0x1AF4, root=tree)] == [0x10F0, 0x10F1]
    assert len(functions(class_code=0x060400, root=tree)) == 1
    assert functions(vendor=0x1AF4, device=0x3420, root=tree) == []


def test_a_function_is_read_whole(tree):
    function = read_function(PciAddress.parse("3b:00.0"), root=tree)
    assert (function.vendor, function.device, function.class_code, function.revision) == (0x1AF4, 0x10F0, 0x120000, 2)
    assert (function.subsystem_vendor, function.subsystem) == (0x1AF4, 1)
    assert (function.driver, function.vfio_cdev) == ("vfio-pci", "vfio3")
    assert (function.iommu_group, function.numa_node) == (7, 1)
    first, second = function.resources
    assert (first.index, first.start, first.size, first.is_memory) == (0, 0xFE000000, 0x10000, True)
    assert (second.index, second.size, second.is_prefetchable, second.is_64bit) == (2, 1 << 30, True, True)
    assert not first.is_64bit
    assert not first.is_prefetchable


def test_what_a_function_lacks_is_none(tree):
    function = read_function(PciAddress.parse("00:01.0"), root=tree)
    assert (function.driver, function.iommu_group, function.numa_node, function.vfio_cdev) == (None, None, None, None)
    assert function.resources == ()
    assert read_function(PciAddress.parse("3b:00.1"), root=tree).numa_node is None


def test_a_group_has_all_its_functions(tree):
    assert [str(a) for a in sysfs.group_members(PciAddress.parse("3b:00.1"), root=tree)] == [
        "0000:3b:00.0", "0000:3b:00.1"]
    assert sysfs.group_members(PciAddress.parse("00:01.0"), root=tree) == []


def test_a_function_that_is_not_there_is_not_found(tree):
    with pytest.raises(DeviceNotFound, match=r"0000:99:00\.0"):
        read_function(PciAddress.parse("99:00.0"), root=tree)
    assert functions(root=tree / "nowhere") == []


def test_a_function_that_breaks_while_it_is_read_is_lost(tree):
    (tree / "devices/0000:3b:00.0/resource").write_text("garbage")
    with pytest.raises(DeviceLost):
        read_function(PciAddress.parse("3b:00.0"), root=tree)
    assert len(functions(root=tree)) == 2


def test_this_machines_own_tree_is_read():
    names = {path.name for path in Path("/sys/bus/pci/devices").iterdir()} if sysfs.ROOT.exists() else set()
    assert {str(f.address) for f in functions()} == names
