"""In a guest without an IOMMU: functions open by explicit wish only, and reach memory by its physical address."""

import os
from pathlib import Path

import pytest
from guest.inside.kernel_devices import EDU, NVME, XHCI, Edu, eventfds, find, fired, give, in_child, switch_on

from maia_rt.errors import DevicePermission, InvalidArgument, ResourceExhausted, Unsupported
from maia_rt.memory import DmaRegion, physical_ranges
from maia_rt.transport import open_device
from maia_rt.transport.uapi import PciIrq, PciRegion

MODE = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")
pytestmark = [pytest.mark.no_iommu, pytest.mark.filterwarnings("ignore:.*without an IOMMU:RuntimeWarning")]


@pytest.fixture(autouse=True, scope="module")
def unsafe_mode():
    MODE.write_text("1")


def test_a_function_without_iommu_is_not_opened_unless_asked_for():
    address = give(find(EDU))
    for interface in (None, "group"):
        with pytest.raises(Unsupported) as caught:
            open_device(address, interface=interface)
        assert caught.value.cause
        assert "no_iommu=True" in caught.value.hint
    with pytest.raises(InvalidArgument, match="cdev interface needs an IOMMU"):
        open_device(address, interface="cdev", no_iommu=True)


def test_it_warns_and_drives_registers_interrupts_and_configuration_space():
    address = give(find(EDU))
    with pytest.warns(RuntimeWarning, match="all of the host's memory"):
        device = open_device(address, no_iommu=True)
    with device, eventfds(1) as (fd,):
        assert device.info.kind == "vfio-noiommu"
        switch_on(device)
        edu = Edu(device)
        view = device.map(0)
        words = view.cast("I")
        words[1] = 1
        assert device.read(0, 4, 4) == 0xFFFF_FFFE
        words.release()
        view.release()
        device.irq_enable(PciIrq.MSI, 0, [fd])
        edu.raise_interrupt()
        assert fired(fd) == 1
        edu.acknowledge()
        assert device.read(PciRegion.CONFIG, 0, 4) == EDU[1] << 16 | EDU[0]


def test_memory_has_no_io_address_but_a_physical_one():
    with open_device(give(find(EDU)), no_iommu=True) as device, DmaRegion(8192, huge_pages=False) as region:
        assert device.iova_ranges == []
        assert device.max_dma_maps == 0
        with pytest.raises(Unsupported, match="without an IOMMU"):
            device.dma_map(1 << 20, region)
        switch_on(device)
        ranges = physical_ranges(region)
        assert sum(size for _, size in ranges) == region.size
        data = os.urandom(4096)
        view = region.view()
        view[:4096] = data
        first, second = (start + at for start, size in ranges for at in range(0, size, 4096))
        edu = Edu(device)
        edu.fetch(first)
        edu.store(second)
        assert bytes(view[4096:]) == data
        view.release()


def test_only_privileged_users_open_it_and_see_physical_addresses():
    address = give(find(EDU))
    group = (Path("/sys/bus/pci/devices") / address / "iommu_group").resolve().name
    node = Path(f"/dev/vfio/noiommu-{group}")
    os.chown(node, 1000, 1000)
    said = in_child(lambda: open_device(address, no_iommu=True), uid=1000)
    os.chown(node, 0, 0)
    assert said.startswith("DevicePermission"), said
    assert "CAP_SYS_RAWIO" in said

    def addresses():
        with DmaRegion(4096, huge_pages=False) as region, pytest.raises(DevicePermission, match="hidden"):
            physical_ranges(region)
        return "hidden"

    assert in_child(addresses, uid=1000) == "'hidden'"


def test_vectors_that_the_host_has_not_are_counted():
    with open_device(give(find(XHCI)), no_iommu=True) as device, eventfds(4) as fds:
        switch_on(device)
        with pytest.raises(ResourceExhausted, match="the host can give it 1"):
            device.irq_enable(PciIrq.MSI, 0, fds)
        device.irq_enable(PciIrq.MSI, 0, fds[:1])
        device.irq_trigger(PciIrq.MSI)
        assert fired(fds[0]) == 1


def test_flr_works_without_an_iommu():
    with open_device(give(find(NVME)), no_iommu=True) as device:
        switch_on(device)
        device.write(0, 0x0C, 4, 7)
        device.reset()
        assert device.read(0, 0x0C, 4) == 0
