"""DMA behind a virtual IOMMU: QEMU maps page by page what the guest's page tables say, and unmaps it again."""

import struct

import pytest
from helpers.admin_queue import BAD_ADDRESS, IDENTIFY, MEMORY, OK
from helpers.emulator import eventually
from helpers.qtest_device import QtestDriver

PAGE = 4096
VTD = ["-device", "intel-iommu,intremap=on,caching-mode=on"]
REGISTERS = 0xFED9_0000
GCMD, GSTS, RTADDR, CCMD, IOTLB = 0x18, 0x1C, 0x20, 0x28, 0xF8
TRANSLATE, SET_ROOT = 1 << 31, 1 << 30
TABLES = 0x200_0000
"""Page tables, in guest memory."""
IOVA, BUFFER = 0x10_0000_0000, 0x40_0000
HBM = 1 << 48
DOMAIN = 1
ADDRESS = 4
NEVER_MAPPED = r"(vfio_container_dma_unmap\(|error reply on async request:? command 3 ).*No such file or directory"
"""At each switch of the IOMMU QEMU unmaps all ranges that might be mapped, as the kernel's VFIO lets it, and says where
nothing was. Other reasons would be unmaps that failed, and with them mappings that stayed."""


class Iommu:
    """Intel's VT-d, driven as an operating system does (VT-d 3.0, sections 9 and 10): four levels, one domain."""

    def __init__(self, machine, devfn=0x10):
        self._machine = machine
        self._free = TABLES
        root, context, self._top = self._page(), self._page(), self._page()
        machine.write(root, struct.pack("<QQ", context | 1, 0))
        machine.write(context + devfn * 16, struct.pack("<QQ", self._top | 1, DOMAIN << 8 | 2))
        machine.store(REGISTERS + RTADDR, 8, root)
        self._command(SET_ROOT)
        self.invalidate(contexts=True)

    def enable(self, on=True):
        self._command(TRANSLATE if on else 0)

    def map(self, iova, address, size, access=3):
        """Write page table entries; they count from the next `invalidate` on. `access` is 1 read, 2 write."""
        for at in range(0, size, PAGE):
            table = self._top
            for shift in (39, 30, 21):
                entry = table + (iova + at >> shift & 511) * 8
                if not self._machine.load(entry, 8):
                    self._machine.store(entry, 8, self._page() | 3)
                table = self._machine.load(entry, 8) & ~0xFFF
            self._machine.store(table + (iova + at >> 12 & 511) * 8, 8, (address + at | access) if access else 0)

    def unmap(self, iova, size):
        self.map(iova, 0, size, access=0)

    def unmap_2m(self, iova):
        """Take away all pages of 2 MiB with the table they are in."""
        table = self._top
        for shift in (39, 30):
            table = self._machine.load(table + (iova >> shift & 511) * 8, 8) & ~0xFFF
        self._machine.store(table + (iova >> 21 & 511) * 8, 8, 0)

    def invalidate(self, contexts=False):
        """Make hardware look at the tables again, all of them."""
        if contexts:
            self._act(CCMD, 1 << 63 | 1 << 61)
        self._act(IOTLB, 1 << 63 | 1 << 60)

    def _page(self):
        self._free += PAGE
        return self._free - PAGE

    def _act(self, register, value):
        self._machine.store(REGISTERS + register, 8, value)
        assert eventually(lambda: not self._machine.load(REGISTERS + register, 8) >> 63)

    def _command(self, bits):
        kept = self._machine.load(REGISTERS + GSTS, 4) & TRANSLATE if bits == SET_ROOT else 0
        self._machine.store(REGISTERS + GCMD, 4, kept | bits)
        assert eventually(lambda: self._machine.load(REGISTERS + GSTS, 4) & (TRANSLATE | SET_ROOT) >= bits)


@pytest.fixture(params=["mapped memory", "messages"])
def device(request, attach):
    """The device in a machine with an IOMMU."""
    return attach(options=VTD, shared=request.param == "mapped memory", machine="kernel-irqchip=split",
                  may_say=NEVER_MAPPED).enable()


@pytest.fixture
def iommu(device):
    iommu = Iommu(device.machine)
    iommu.map(IOVA, 0x100000, MEMORY)
    iommu.enable()
    return iommu


@pytest.fixture
def driver(device, iommu):
    """A booted device whose rings lie behind the IOMMU, and a buffer of 16 pages, backwards in memory."""
    with QtestDriver(device, base=IOVA, memory=0x100000) as driver:
        yield driver.boot().open_queue()


SCATTERED = IOVA + (1 << 30)


@pytest.fixture
def scattered(iommu, device):
    """Sixteen pages that follow each other for the device, and lie the other way round in memory."""
    for page in range(16):
        iommu.map(SCATTERED + page * PAGE, BUFFER + (15 - page) * PAGE, PAGE)
        device.machine.write(BUFFER + (15 - page) * PAGE, bytes([page + 1]) * PAGE)
    iommu.invalidate()
    return b"".join(bytes([page + 1]) * PAGE for page in range(16))


def test_rings_and_data_go_through_the_page_tables(driver, scattered):
    assert driver.command(IDENTIFY, IOVA + 0x20000)[0] == OK
    driver.copy(SCATTERED + 100, HBM, 16 * PAGE - 200)
    driver.done(driver.copy(HBM, IOVA + 0x40000, 16 * PAGE - 200))
    assert driver.get(IOVA + 0x40000, 16 * PAGE - 200) == scattered[100:-100]


def test_address_that_is_not_mapped_is_blocked(driver, scattered):
    assert driver.failed(driver.copy(SCATTERED + 15 * PAGE, HBM, 2 * PAGE)) == ADDRESS
    assert driver.command(IDENTIFY, BUFFER)[0] == BAD_ADDRESS, "where memory is, without the IOMMU"


def test_read_only_page_is_read_and_not_written(driver, iommu):
    iommu.map(SCATTERED, BUFFER, PAGE, access=1)
    iommu.invalidate()
    driver.machine.write(BUFFER, b"precious")
    driver.done(driver.copy(SCATTERED, HBM, 8))
    assert driver.failed(driver.copy(HBM + 4096, SCATTERED, 8)) == ADDRESS
    assert driver.machine.read(BUFFER, 8) == b"precious"


def test_page_that_is_unmapped_is_blocked_from_then_on(driver, iommu, scattered):
    driver.done(driver.copy(SCATTERED, HBM, 4 * PAGE))
    iommu.unmap(SCATTERED + 2 * PAGE, PAGE)
    iommu.invalidate()
    driver.done(driver.copy(SCATTERED, HBM, 2 * PAGE))
    driver.done(driver.copy(SCATTERED + 3 * PAGE, HBM, PAGE))
    assert driver.failed(driver.copy(SCATTERED, HBM, 4 * PAGE)) == ADDRESS


def test_all_pages_of_two_megabytes_taken_away_at_once(driver, iommu, scattered):
    """QEMU sends one unmap for what it has mapped page by page."""
    driver.done(driver.copy(SCATTERED, HBM, 16 * PAGE))
    iommu.unmap_2m(SCATTERED)
    iommu.invalidate()
    assert driver.command(IDENTIFY, SCATTERED)[0] == BAD_ADDRESS
    assert driver.command(IDENTIFY, SCATTERED + 15 * PAGE)[0] == BAD_ADDRESS
    iommu.map(SCATTERED, BUFFER + (1 << 20), 4 * PAGE)
    iommu.invalidate()
    driver.machine.write(BUFFER + (1 << 20) + 3 * PAGE, b"other memory")
    driver.done(driver.copy(SCATTERED + 3 * PAGE, IOVA + 0x40000, 12))
    assert driver.get(IOVA + 0x40000, 12) == b"other memory"


def test_page_that_is_moved_is_found_at_its_new_place(driver, iommu, scattered):
    driver.done(driver.copy(SCATTERED, HBM, PAGE))
    driver.machine.write(BUFFER + (1 << 20), b"\xee" * PAGE)
    iommu.unmap(SCATTERED, PAGE)
    iommu.invalidate()
    iommu.map(SCATTERED, BUFFER + (1 << 20), PAGE)
    iommu.invalidate()
    driver.done(driver.copy(SCATTERED, IOVA + 0x40000, 2 * PAGE))
    assert driver.get(IOVA + 0x40000, 2 * PAGE) == b"\xee" * PAGE + b"\2" * PAGE


def test_iommu_on_and_off_and_on(device, iommu):
    """Each switch takes all mappings away and brings the others: none may be left over, or be missing."""
    for _ in range(3):
        with QtestDriver(device, base=IOVA, memory=0x100000) as driver:
            driver.boot()
            assert driver.command(IDENTIFY, IOVA + 0x20000)[0] == OK
            assert driver.command(IDENTIFY, BUFFER)[0] == BAD_ADDRESS
            device.write32(0x80, 0)
        iommu.enable(False)
        with QtestDriver(device) as driver:
            driver.boot()
            assert driver.command(IDENTIFY, BUFFER)[0] == OK
            assert driver.command(IDENTIFY, IOVA + 0x20000)[0] == BAD_ADDRESS
            device.write32(0x80, 0)
        iommu.enable()
