"""In a guest: opening a function through the kernel's VFIO, and every reason why it may be refused."""

import contextlib
import os
import resource
from pathlib import Path

import pytest
from guest.inside.kernel_devices import (
    EDU,
    INTERFACES,
    MAIA,
    NVME,
    USER,
    Edu,
    eventfds,
    find,
    fired,
    give,
    in_child,
    mapped,
    node,
    open_vfio_nodes,
    opened,
    shared_slot,
    switch_on,
    unbind,
)

from maia_rt.errors import DeviceBusy, DeviceNotFound, InvalidArgument, MemlockLimit, Unsupported
from maia_rt.memory import DmaRegion
from maia_rt.transport import open_device
from maia_rt.transport.uapi import PciIrq, PciRegion

ENTRY_LIMIT = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")


@pytest.fixture(params=INTERFACES)
def interface(request):
    return request.param


@pytest.fixture(autouse=True)
def nothing_stays_open():
    assert not open_vfio_nodes()
    yield
    assert not open_vfio_nodes()


def three_parts(error):
    """Every refusal says what happened, why that is likely, and what to try."""
    assert error.what, error
    assert error.cause, error
    assert error.hint, error
    return str(error)


@pytest.mark.parametrize("ids", [EDU, NVME, MAIA], ids=["edu", "nvme", "maia"])
def test_a_function_opens_by_the_interface_asked_for(interface, ids):
    with opened(ids, interface) as device:
        assert device.info.kind == f"vfio-{interface}"
        assert device.info.is_pci
        assert device.read(PciRegion.CONFIG, 0, 4) == ids[1] << 16 | ids[0]
    assert device.closed


def test_the_newer_interface_is_chosen_where_the_host_has_it():
    with open_device(give(find(EDU))) as device:
        assert device.info.kind == f"vfio-{INTERFACES[-1]}"


def test_an_address_may_be_short():
    with open_device(give(find(EDU)).removeprefix("0000:")) as device:
        assert device.name == find(EDU)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_function_in_use_is_busy_whichever_interface_asks(interface):
    with opened(EDU, interface):
        for again in INTERFACES:
            with pytest.raises(DeviceBusy) as caught:
                open_device(find(EDU), interface=again)
            assert "fuser" in three_parts(caught.value)
        said = in_child(lambda: open_device(find(EDU), interface=interface))
        assert said.startswith("DeviceBusy"), said
        assert f"process {os.getpid()} " in said, "who has it is named"
    with opened(EDU, interface):
        pass


@contextlib.contextmanager
def two_functions():
    """The nvme with two functions, which share an IOMMU group; both go back to the kernel's driver."""
    first = shared_slot()
    second = first[:-1] + "1"
    try:
        yield first, second
    finally:
        for address in (first, second):
            give(address, "nvme")


def test_a_group_with_foreign_functions_names_them(interface):
    with two_functions() as (first, second):
        give(first)
        with pytest.raises(DeviceBusy) as caught:
            open_device(first, interface=interface)
        assert f"{second} (nvme)" in three_parts(caught.value)
        assert f"maia bind {first} --group" in caught.value.hint
        unbind(second)
        with open_device(first, interface=interface) as device:
            assert device.read(PciRegion.CONFIG, 0, 2) == NVME[0]


def test_a_function_whose_group_is_open_names_the_other(interface):
    with two_functions() as (first, second):
        give(first), give(second)
        with open_device(first, interface=interface):
            for again in INTERFACES:
                with pytest.raises(DeviceBusy) as caught:
                    open_device(second, interface=again)
                assert first in three_parts(caught.value)


def test_a_function_of_the_kernels_is_busy_and_one_of_nobody_is_not_bound(interface):
    address = find(NVME)
    give(address, "nvme")
    with pytest.raises(DeviceBusy) as caught:
        open_device(address, interface=interface)
    assert "with nvme" in three_parts(caught.value)
    unbind(address)
    with pytest.raises(DeviceNotFound) as caught:
        open_device(address, interface=interface)
    assert "maia bind" in three_parts(caught.value)


def test_what_is_not_there_or_no_pci_function_is_said_so():
    with pytest.raises(DeviceNotFound, match="no PCI function 0000:7f"):
        open_device("0000:7f:00.0")
    for text in ("0000:00:1f.9", "ttyS0", "", "00:zz.0"):
        with pytest.raises(InvalidArgument, match="not a PCI address"):
            open_device(text)


def test_a_guarded_function_is_not_opened_without_its_iommu():
    address = give(find(EDU))
    with pytest.warns(RuntimeWarning), pytest.raises(InvalidArgument, match="leave `no_iommu` out"):
        open_device(address, no_iommu=True)


if "cdev" not in INTERFACES:
    def test_an_interface_that_the_kernel_has_not_is_unsupported():
        with pytest.raises(Unsupported) as caught:
            open_device(give(find(EDU)), interface="cdev")
        assert "Linux 6.6" in three_parts(caught.value)


# --- without privileges ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def owned_by_user(address, interface):
    """The nodes that a udev rule would give the user."""
    paths = [node(address, interface)] + ([Path("/dev/iommu")] if interface == "cdev" else [])
    for path in paths:
        os.chown(path, USER, USER)
    try:
        yield paths
    finally:
        for path in paths:
            os.chown(path, 0, 0)


def memlock(size):
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (size, size))


def test_a_user_without_permission_is_told_which_node(interface):
    address = give(find(EDU))
    if interface == "cdev":
        os.chmod("/dev/iommu", 0o600)  # `maia bind --user` opens it to all
    said = in_child(lambda: open_device(address, interface=interface), uid=USER)
    assert said.startswith("DevicePermission"), said
    assert str(node(address, interface)) in said
    if interface == "cdev":
        os.chown(node(address, "cdev"), USER, USER)
        said = in_child(lambda: open_device(address, interface="cdev"), uid=USER)
        os.chown(node(address, "cdev"), 0, 0)
        assert said.startswith("DevicePermission"), said
        assert "/dev/iommu may not be opened" in said


def drive(address, interface):
    """Registers, DMA there and back, an interrupt."""
    with open_device(address, interface=interface) as device, eventfds(1) as (fd,):
        switch_on(device)
        edu = Edu(device)
        device.write(0, 4, 4, 0x1234)
        assert device.read(0, 4, 4) == 0xFFFFFFFF ^ 0x1234
        device.irq_enable(PciIrq.MSI, 0, [fd])
        with mapped(device, 1 << 20) as region:
            view = region.view()
            view[:] = bytes(range(256)) * 16
            edu.fetch(1 << 20)
            view[:] = bytes(4096)
            edu.store(1 << 20)
            assert bytes(view) == bytes(range(256)) * 16
            view.release()
        edu.raise_interrupt()
        assert fired(fd)
        edu.acknowledge()
        return "driven", os.getuid(), device.info.kind


def test_a_user_with_the_nodes_drives_the_device_without_privileges(interface):
    address = give(find(EDU))
    with owned_by_user(address, interface):
        said = in_child(lambda: (memlock(8 << 20), drive(address, interface))[1], uid=USER)
    assert said == f"('driven', {USER}, 'vfio-{interface}')"


def test_a_user_is_given_the_interface_whose_nodes_are_open_to_him(interface):
    address = give(find(EDU))
    with owned_by_user(address, interface):
        assert f"'vfio-{interface}'" in in_child(lambda: drive(address, None), uid=USER)


def test_a_memlock_limit_that_is_too_small_is_named(interface):
    address = give(find(EDU))

    def work():
        memlock(64 << 10)
        with open_device(address, interface=interface) as device:
            with mapped(device, 1 << 20, 32 << 10):
                pass
            with DmaRegion(1 << 20, huge_pages=False) as region:
                try:
                    device.dma_map(1 << 20, region)
                except MemlockLimit as error:
                    return three_parts(error)
                device.dma_unmap(1 << 20, region.size)
        return "mapped"

    with owned_by_user(address, interface):
        said = in_child(work, uid=USER)
    assert "RLIMIT_MEMLOCK is 65536 bytes" in said, said


def test_the_number_of_mappings_is_limited_by_the_number_named():
    before = ENTRY_LIMIT.read_text()
    ENTRY_LIMIT.write_text("4")
    try:
        with opened(EDU, "group") as device, DmaRegion(8 * 4096, huge_pages=False) as region:
            assert device.max_dma_maps == 4
            with contextlib.ExitStack() as stack:
                for number in range(4):
                    stack.enter_context(mapped(device, (1 + number) << 20))
                with pytest.raises(MemlockLimit) as caught:
                    device.dma_map(1 << 24, region)
                assert "all 4 DMA mappings" in three_parts(caught.value)
                assert "dma_entry_limit" in str(caught.value)
            device.dma_map(1 << 24, region)
            device.dma_unmap(1 << 24, region.size)
    finally:
        ENTRY_LIMIT.write_text(before)
