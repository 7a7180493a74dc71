"""In a guest: regions, configuration space and resets of functions under the kernel's VFIO."""

from functools import partial

import pytest
from guest.inside.kernel_devices import (
    EDU,
    INTERFACES,
    MAIA,
    NVME,
    SHARED_MEMORY,
    eventfds,
    find,
    fired,
    give,
    opened,
    shared_slot,
    switch_on,
    unbind,
)

from maia_rt.errors import DeviceBusy, InvalidArgument, TransportError, Unsupported
from maia_rt.pci import config
from maia_rt.transport import open_device
from maia_rt.transport.uapi import PciIrq, PciRegion

NVME_CAP, NVME_VERSION, NVME_INTMS, NVME_AQA = 0x00, 0x08, 0x0C, 0x24
MSIX_TABLE = 0x2000


@pytest.fixture(params=INTERFACES)
def interface(request):
    return request.param


@pytest.fixture
def nvme(interface):
    with opened(NVME, interface) as device:
        yield device


@pytest.fixture
def edu(interface):
    with opened(EDU, interface) as device:
        yield device


# --- regions ---------------------------------------------------------------------------------------------------------


def test_regions_are_described_and_absent_ones_have_no_size(edu):
    assert [(r.index, r.size) for r in edu.regions if r.size] == [(0, 1 << 20), (PciRegion.CONFIG, 256)]
    assert edu.region(0).areas == ((0, 1 << 20),)
    assert edu.region(PciRegion.VGA).size == edu.region(PciRegion.ROM).size == 0
    for region in (PciRegion.VGA, PciRegion.ROM, PciRegion.BAR3):
        with pytest.raises(InvalidArgument, match="not within region"):
            edu.read(region, 0, 4)
        with pytest.raises(Unsupported, match="mappable areas are: none"):
            edu.map(region)


def test_our_devices_memory_and_doorbells_are_mappable(interface):
    with opened(MAIA, interface) as device:
        assert device.region(PciRegion.BAR4).areas == ((0, device.region(PciRegion.BAR4).size),)
        view = device.map(PciRegion.BAR4, 0x10_0000, 4096)
        view[:4] = b"maia"
        assert device.read(PciRegion.BAR4, 0x10_0000, 4) == int.from_bytes(b"maia", "little")
        device.write_bytes(PciRegion.BAR4, 0x10_0100, bytes(range(200)))
        assert bytes(view[0x100:0x1C8]) == bytes(range(200))
        assert device.read_bytes(PciRegion.BAR4, 0x10_0101, 99) == bytes(range(1, 100))
        view.release()


def test_mapped_and_traversed_registers_are_the_same(edu):
    view = edu.map(0)
    words = view.cast("I")
    assert words[0] == edu.read(0, 0, 4) == 0x0100_00ED
    edu.write(0, 4, 4, 0xF0F0)
    assert words[1] == 0xFFFF_0F0F
    words[1] = 0
    assert edu.read(0, 4, 4) == 0xFFFF_FFFF, "a register of ones is no lost device"
    words.release()
    view.release()


def test_the_table_of_msix_can_be_mapped_with_its_bar_and_is_ones_otherwise(nvme):
    msix = config.msix(partial(nvme.read, PciRegion.CONFIG))
    assert (msix.table_bar, msix.table_offset) == (0, MSIX_TABLE)
    assert nvme.region(0).areas == ((0, nvme.region(0).size),), "MSIX_MAPPABLE: the table is in the middle"
    assert nvme.read(0, MSIX_TABLE, 4) == 0xFFFF_FFFF
    nvme.write(0, MSIX_TABLE, 4, 0)
    view = nvme.map(0)
    assert int.from_bytes(view[MSIX_TABLE + 12:MSIX_TABLE + 16], "little") & 1, "vector 0 is masked"
    view.release()


def test_registers_of_every_width_are_one_access(nvme):
    value = nvme.read(0, NVME_CAP, 8)
    assert nvme.read(0, NVME_CAP, 4) == value & 0xFFFF_FFFF
    assert nvme.read(0, NVME_CAP + 4, 4) == value >> 32
    assert nvme.read(0, NVME_VERSION, 4) >> 16 == 1
    nvme.write(0, NVME_AQA, 4, 0x0007_0007)
    assert nvme.read(0, NVME_AQA, 4) == 0x0007_0007


def test_accesses_that_are_misaligned_or_outside_never_reach_the_device(edu):
    for region, offset, size, what in (
            (0, 2, 4, "not aligned"), (0, 4, 8, "not aligned"), (0, 1, 2, "not aligned"), (0, 0, 3, "1, 2, 4 or 8"),
            (0, 0, 16, "1, 2, 4 or 8"), (0, -4, 4, "not within"), (0, 1 << 20, 4, "not within"),
            (0, (1 << 20) - 4, 8, "not"), (PciRegion.CONFIG, 254, 4, "not within"),
            (PciRegion.CONFIG, 2, 4, "not aligned"), (9, 0, 4, "no region 9"), (-1, 0, 4, "no region -1")):
        with pytest.raises(InvalidArgument, match=what):
            edu.read(region, offset, size)
        with pytest.raises(InvalidArgument, match=what):
            edu.write(region, offset, size, 0)


def test_values_that_do_not_fit_and_maps_that_are_not_aligned_are_refused(edu):
    for value in (-1, 1 << 32):
        with pytest.raises(InvalidArgument, match="fit"):
            edu.write(0, 4, 4, value)
    with pytest.raises(InvalidArgument, match="page aligned"):
        edu.map(0, 0x80)
    for offset, size in ((0, (1 << 20) + 1), (1 << 20, None), (0, 0)):
        with pytest.raises(Unsupported, match="cannot be mapped"):
            edu.map(0, offset, size)


def test_a_function_whose_memory_space_is_off_raises_instead_of_killing(edu):
    reader, writer = partial(edu.read, PciRegion.CONFIG), partial(edu.write, PciRegion.CONFIG)
    config.set_memory_space(reader, writer, False)
    for access in (partial(edu.read, 0, 0, 4), partial(edu.write, 0, 4, 4, 0)):
        with pytest.raises(TransportError, match="memory space is off"):
            access()
    with pytest.raises(Unsupported, match="memory space is off"):
        edu.map(0)
    config.set_memory_space(reader, writer, True)
    assert edu.read(0, 0, 4) == 0x0100_00ED


# --- configuration space ---------------------------------------------------------------------------------------------


def test_configuration_space_is_the_functions_own(nvme):
    reader = partial(nvme.read, PciRegion.CONFIG)
    header = config.read_header(reader)
    assert (header.vendor, header.device, header.class_code) == (*NVME, 0x010802)
    ids = {cap.id for cap in config.capabilities(reader)}
    assert {config.CapabilityId.MSIX, config.CapabilityId.PCIE, config.CapabilityId.PM} <= ids
    assert config.pci_express(reader).can_flr
    assert config.msix(reader).vectors == nvme.irqs[PciIrq.MSIX].count == 65
    whole = nvme.read_bytes(PciRegion.CONFIG, 0, nvme.region(PciRegion.CONFIG).size)
    assert int.from_bytes(whole[:2], "little") == header.vendor


def test_close_turns_bus_mastering_off(interface):
    with opened(EDU, interface) as device:
        assert device.read(PciRegion.CONFIG, config.COMMAND, 2) & config.COMMAND_BUS_MASTER
    with open_device(find(EDU), interface=interface) as device:
        assert not device.read(PciRegion.CONFIG, config.COMMAND, 2) & config.COMMAND_BUS_MASTER


# --- resets ----------------------------------------------------------------------------------------------------------


def test_a_function_without_reset_says_what_else_there_is(edu):
    assert not edu.info.can_reset
    with pytest.raises(Unsupported) as caught:
        edu.reset()
    assert caught.value.cause
    assert "hot_reset()" in caught.value.hint
    for ask in (edu.hot_reset_info, edu.hot_reset):
        with pytest.raises(Unsupported, match="root bus"):
            ask()


def test_flr_clears_registers_and_keeps_interrupts(nvme):
    with eventfds(1) as (fd,):
        nvme.irq_enable(PciIrq.MSIX, 0, [fd])
        nvme.write(0, NVME_INTMS, 4, 0x0007_0007)
        nvme.reset()
        assert nvme.read(0, NVME_INTMS, 4) == 0
        nvme.irq_trigger(PciIrq.MSIX)
        assert fired(fd)


def test_a_hot_reset_clears_a_function_that_is_alone_in_its_slot(interface):
    with opened(SHARED_MEMORY, interface) as device:
        assert [str(one.address) for one in device.hot_reset_info()] == [device.name]
        device.write(0, 0, 4, 5)
        assert device.read(0, 0, 4) == 5
        device.hot_reset()
        assert device.read(0, 0, 4) == 0


@pytest.fixture
def both():
    """The nvme with two functions behind one port."""
    first = shared_slot()
    second = first[:-1] + "1"
    give(first), give(second)
    yield first, second
    for address in (first, second):
        give(address, "nvme")


def test_a_hot_reset_resets_every_function_of_its_slot(interface, both):
    first, second = both
    with open_device(first, interface=interface) as device:
        switch_on(device)
        affected = device.hot_reset_info()
        assert [(str(one.address), one.owned) for one in affected] == [(first, True), (second, True)]
        device.write(0, NVME_INTMS, 4, 0x0007_0007)
        device.hot_reset()
        assert device.read(0, NVME_INTMS, 4) == 0
        assert device.read(0, NVME_VERSION, 4) >> 16 == 1


def test_a_hot_reset_that_would_touch_a_foreign_function_names_it(interface, both):
    first, second = both
    unbind(second)
    with open_device(first, interface=interface) as device:
        switch_on(device)
        device.write(0, NVME_INTMS, 4, 0x0007_0007)
        with pytest.raises(DeviceBusy) as caught:
            device.hot_reset()
        assert second in str(caught.value)
        assert "vfio-pci" in caught.value.hint
        assert device.read(0, NVME_INTMS, 4) == 0x0007_0007
