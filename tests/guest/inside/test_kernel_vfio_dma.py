"""In a guest: what a function reaches of memory through the kernel's VFIO, and what the IOMMU keeps from it."""

import os
import time
from pathlib import Path

import pytest
from guest.inside.kernel_devices import (
    EDU,
    INTERFACES,
    MAIA,
    SHARED_MEMORY,
    Edu,
    kernel_log,
    mapped,
    open_vfio_nodes,
    opened,
)

from maia_rt.errors import ForkedError, InvalidArgument, Unsupported
from maia_rt.memory import DmaRegion, PeerMemory, PinnedPool
from maia_rt.transport.protocol import Access
from maia_rt.transport.uapi import PciRegion

HOLE = 0xFEE0_0000
"""Where x86 takes writes for interrupts."""


@pytest.fixture(params=INTERFACES)
def edu(request):
    with opened(EDU, request.param) as device:
        yield Edu(device)


def pattern(size=4096):
    return os.urandom(size)


def test_dma_goes_there_and_back(edu):
    data = pattern()
    with PinnedPool(edu.device, region_size=1 << 16, address_bits=28) as pool:
        with pool.allocate(4096, 4096) as source, pool.allocate(4096, 4096) as target:
            source.view()[:] = data
            edu.fetch(source.iova)
            edu.store(target.iova)
            assert bytes(target.view()) == data
        assert pool.trim() == 1 << 16


def test_many_mappings_next_to_each_other_are_one_range_to_the_device(edu):
    data = pattern()
    with mapped(edu.device, 0x10_0000) as first, mapped(edu.device, 0x10_1000) as second:
        first.view()[:], second.view()[:] = data, data[::-1]
        edu.fetch(0x10_0800)
        edu.store(0x10_0000)
        assert bytes(first.view()) == data[2048:] + data[:-2049:-1]


# --- what may be mapped ----------------------------------------------------------------------------------------------


def test_usable_addresses_leave_the_interrupt_window_out(edu):
    ranges = edu.device.iova_ranges
    assert ranges == sorted(ranges)
    assert ranges[0][0] == 0
    assert not any(first <= HOLE + 0xFFFFF and last >= HOLE for first, last in ranges)
    with DmaRegion(8192, huge_pages=False) as region:
        for iova in (HOLE, HOLE - 4096, HOLE + 0xFF000):
            with pytest.raises(InvalidArgument, match="usable are: 0x0 to 0xfedfffff"):
                edu.device.dma_map(iova, region)
        for iova in (HOLE - 8192, HOLE + 0x10_0000):
            edu.device.dma_map(iova, region)
            edu.device.dma_unmap(iova, region.size)


def test_page_sizes_begin_with_the_hosts(edu):
    assert edu.device.page_sizes & -edu.device.page_sizes == 4096
    if edu.device.info.kind == "vfio-group":
        assert edu.device.page_sizes & 1 << 21, "the virtual IOMMU has 2 MiB pages"


def test_only_whole_pages_within_64_bits_are_mapped_where_nothing_is(edu):
    device = edu.device
    with DmaRegion(16384, huge_pages=False) as region, DmaRegion(8192, huge_pages=False) as other:
        for iova in (1, 0x10_0800, 0x10_0001):
            with pytest.raises(InvalidArgument, match="page size 0x1000"):
                device.dma_map(iova, region)
        for iova in (-4096, (1 << 64) - 4096, 1 << 64):
            with pytest.raises(InvalidArgument, match="64 bits"):
                device.dma_map(iova, region)
        device.dma_map(0x10_0000, region)
        for iova in (0x10_0000, 0xF_F000, 0x10_1000, 0x10_3000):
            with pytest.raises(InvalidArgument, match="overlap the mapping of 0x4000 bytes at 0x100000"):
                device.dma_map(iova, other)
        for iova, size in ((0x10_0000, 8192), (0x10_1000, 4096), (0x10_0000, 32768), (0x20_0000, 16384)):
            with pytest.raises(InvalidArgument, match="no mapping of"):
                device.dma_unmap(iova, size)
        device.dma_unmap(0x10_0000, 16384)
        with pytest.raises(InvalidArgument, match="no mapping of"):
            device.dma_unmap(0x10_0000, 16384)


def test_the_kernels_own_word_on_an_overlap_is_understood(edu):
    refused = pytest.raises(InvalidArgument, match="mapped already")
    with DmaRegion(8192, huge_pages=False) as region, mapped(edu.device, 0x10_0000), refused:
        edu.device._iommu.dma_map(0x10_0000, region.address, region.size, Access.READ)


def test_mapped_memory_cannot_be_taken_away_and_close_unmaps_it():
    for interface in INTERFACES:
        region = DmaRegion(4096)
        with opened(EDU, interface) as device:
            device.dma_map(1 << 20, region)
            with pytest.raises(InvalidArgument, match="in use"):
                region.close()
        region.close()


# --- what the IOMMU keeps away ---------------------------------------------------------------------------------------


def faults(log):
    return [line for line in log.splitlines() if "DMAR" in line and "fault" in line.lower()]


def test_dma_to_an_address_that_is_not_mapped_is_blocked(edu):
    secret, mine = pattern(), pattern()
    with mapped(edu.device, 0x10_0000) as region:
        region.view()[:] = mine
        edu.fetch(0x10_0000)
    before = len(faults(kernel_log()))
    with DmaRegion(4096, huge_pages=False) as region:
        region.view()[:] = secret
        # Mapped and unmapped again: the memory is where the device would look for it, the way is gone.
        edu.device.dma_map(0x10_0000, region)
        edu.device.dma_unmap(0x10_0000, 4096)
        edu.store(0x10_0000)
        assert bytes(region.view()) == secret, "the device wrote to memory that was unmapped"
        edu.fetch(0x10_0000)
    with mapped(edu.device, 0x20_0000) as region:
        edu.store(0x20_0000)
        assert bytes(region.view()) != secret, "the device read memory that was unmapped"
    deadline = time.monotonic() + 10
    while len(faults(kernel_log())) <= before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(faults(kernel_log())) > before, kernel_log()[-2000:]


def test_memory_mapped_for_reading_cannot_be_written(edu):
    data = pattern()
    with DmaRegion(4096, huge_pages=False) as region, mapped(edu.device, 0x20_0000) as copy:
        region.view()[:] = data
        edu.device.dma_map(0x10_0000, region, Access.READ)
        edu.fetch(0x10_0000)
        edu.store(0x20_0000)
        assert bytes(copy.view()) == data
        copy.view()[:] = bytes(4096)
        edu.fetch(0x20_0000)
        edu.store(0x10_0000)
        assert bytes(region.view()) == data, "the device wrote to memory that was mapped for reading"
        edu.device.dma_unmap(0x10_0000, 4096)


def test_a_forked_child_has_neither_descriptors_nor_registers(edu):
    view = edu.device.map(0)
    registers = view.cast("I")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            try:
                edu.device.read(0, 0, 4)
            except ForkedError:
                maps = Path("/proc/self/maps").read_text()
                code = 2 if open_vfio_nodes() or "vfio" in maps or edu.device.liveness_fd is not None else 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert registers[0] == 0x0100_00ED
    registers.release()
    view.release()


# --- peers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[SHARED_MEMORY, MAIA], ids=["ivshmem", "maia"])
def peer(request):
    """A BAR that is memory, of a device that is open by the first interface: the peer's own does not matter."""
    with opened(request.param, "group") as device:
        region = PciRegion.BAR2 if request.param == SHARED_MEMORY else PciRegion.BAR4
        with PeerMemory(device, region, 0x4000, 0x8000) as memory:
            yield memory


def test_a_device_reads_and_writes_another_devices_memory(peer):
    data = pattern()
    with opened(EDU, "group") as device, mapped(device, 0x10_0000) as region:
        edu = Edu(device)
        region.view()[:] = data
        edu.fetch(0x10_0000)
        device.dma_map(0x40_0000, peer)
        edu.store(0x40_2000)
        assert bytes(peer.view()[0x2000:0x3000]) == data
        peer.view()[0x5000:0x6000] = data[::-1]
        edu.fetch(0x40_5000)
        edu.store(0x10_0000)
        assert bytes(region.view()) == data[::-1]
        device.dma_unmap(0x40_0000, peer.size)
        peer.view()[0x2000:0x3000] = bytes(4096)
        edu.store(0x40_2000)
        assert not any(peer.view()[0x2000:0x3000])


def test_a_device_reads_another_devices_registers():
    with opened(EDU, "group", 0) as device, opened(EDU, "group", 1) as other, mapped(device, 0x10_0000) as region:
        edu = Edu(device)
        with PeerMemory(other, 0, 0, 4096) as peer:
            device.dma_map(0x40_0000, peer)
            region.view()[:4] = (0x1357).to_bytes(4, "little")
            edu.fetch(0x10_0000, 4)
            edu.store(0x40_0004, 4)
            assert other.read(0, 4, 4) == 0xFFFFFFFF ^ 0x1357
            device.dma_unmap(0x40_0000, 4096)


if "cdev" in INTERFACES:
    def test_an_iommufd_says_that_it_maps_no_peers(peer):
        with opened(EDU, "cdev") as device:
            with pytest.raises(Unsupported, match="interface='group'"):
                device.dma_map(0x40_0000, peer)
            with mapped(device, 0x40_0000):
                pass


def test_a_peer_that_closes_first_stays_open_for_the_kernel_until_it_is_unmapped():
    with opened(EDU, "group") as device:
        with opened(SHARED_MEMORY, "group") as other, PeerMemory(other, PciRegion.BAR2, 0, 0x1000) as peer:
            data = pattern()
            peer.view()[:0x1000] = data
            device.dma_map(0x40_0000, peer)
        edu = Edu(device)
        with mapped(device, 0x10_0000) as region:
            edu.fetch(0x40_0000)
            edu.store(0x10_0000)
            assert bytes(region.view()) == data
        device.dma_unmap(0x40_0000, 0x1000)
    with opened(SHARED_MEMORY, "group"):
        pass
