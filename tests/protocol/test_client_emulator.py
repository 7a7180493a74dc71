"""The vfio-user client drives the emulated device over a real socket: registers, maps, DMA, interrupts, death."""

import functools
import os
import signal
import threading
import time

import pytest
from helpers.emulator import eventually, fd_count, listening, running, spawn
from helpers.stopwatch import promptly

from maia_rt.contract import registers
from maia_rt.errors import DeviceBusy, DeviceLost, InvalidArgument, TransportError
from maia_rt.memory import DmaRegion, PinnedPool
from maia_rt.pci import config
from maia_rt.transport.uapi import PciIrq, PciRegion
from maia_rt.transport.vfio_user import VfioUserClient

SCRATCH = registers.Bar0.SCRATCH


@pytest.fixture(scope="module")
def server():
    """One emulator for the module, its engines' threads started: (process, path)."""
    with running() as (process, paths):
        yield process, paths[0]


@pytest.fixture
def device(server):
    with VfioUserClient.connect(server[1]) as client:
        yield client


@pytest.fixture
def read_config(device):
    return functools.partial(device.read, PciRegion.CONFIG)


def test_it_is_a_pci_function_with_the_capabilities_of_the_contract(device, read_config):
    assert device.info.is_pci
    assert device.info.can_reset
    header = config.read_header(read_config)
    assert (header.vendor, header.device, header.class_code) == (0x1AF4, 0x10F0, 0x120000)
    ids = {capability.id for capability in config.capabilities(read_config)}
    assert ids >= {config.CapabilityId.PM, config.CapabilityId.MSIX, config.CapabilityId.PCIE}
    assert config.msix(read_config).vectors == device.irqs[PciIrq.MSIX].count
    assert config.pci_express(read_config).can_flr
    assert config.serial_number(read_config) is not None


def test_configuration_space_reads_the_same_in_one_block_and_by_the_byte(device):
    size = device.region(PciRegion.CONFIG).size
    block = device.read_bytes(PciRegion.CONFIG, 0, size)
    assert block[:256] == bytes(device.read(PciRegion.CONFIG, at, 1) for at in range(256))


def test_a_register_keeps_what_is_written_posted_or_not(device):
    device.write(PciRegion.BAR0, SCRATCH, 4, 0x12345678)
    assert device.read(PciRegion.BAR0, SCRATCH, 4) == 0x12345678
    for value in range(100):
        device.write(PciRegion.BAR0, SCRATCH, 4, value, posted=True)
    assert device.read(PciRegion.BAR0, SCRATCH, 4) == 99


def test_what_is_written_through_a_map_is_read_by_message_and_the_other_way_round(device):
    info = device.region(PciRegion.BAR4)
    assert info.areas == ((0, info.size),)
    with device.map(PciRegion.BAR4, 0x10000, 0x10000) as view:
        view[:4] = b"maia"
        assert device.read_bytes(PciRegion.BAR4, 0x10000, 4) == b"maia"
        device.write(PciRegion.BAR4, 0x10008, 8, 0x1122334455667788)
        assert bytes(view[8:16]) == bytes.fromhex("8877665544332211")


def test_a_block_larger_than_a_message_arrives_whole(device):
    block = os.urandom((5 << 20) + 13)
    device.write_bytes(PciRegion.BAR4, 0x100003, block)
    assert device.read_bytes(PciRegion.BAR4, 0x100003, len(block)) == block


def test_all_vectors_reach_their_eventfds(device):
    count = device.irqs[PciIrq.MSIX].count
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
    try:
        device.irq_enable(PciIrq.MSIX, 0, fds)
        device.irq_trigger(PciIrq.MSIX, 0, count)
        assert [os.eventfd_read(fd) for fd in fds] == [1] * count
        device.irq_trigger(PciIrq.MSIX, 3, 2)
        assert [os.eventfd_read(fd) for fd in fds[3:5]] == [1, 1]
        device.irq_disable(PciIrq.MSIX)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fds[0])
    finally:
        for fd in fds:
            os.close(fd)


def test_memory_is_mapped_and_taken_back(device):
    with DmaRegion(1 << 20) as region:
        for _ in range(3):
            device.dma_map(0x10_0000_0000, region)
            with pytest.raises(InvalidArgument):
                device.dma_map(0x10_0000_0000, region)
            device.dma_unmap(0x10_0000_0000, region.size)


def test_a_pool_comes_and_goes_with_its_server_none_the_fuller(device, server):
    before = fd_count(server[0])
    with PinnedPool(device, region_size=64 << 10) as pool:
        blocks = [pool.allocate(size) for size in (64, 4096, 100_000, 1_000_000)]
        assert all(block.iova for block in blocks)
        for block in blocks:
            block.free()
    assert eventually(lambda: fd_count(server[0]) <= before)


def test_reset_restores_registers_and_keeps_the_connection(device):
    device.write(PciRegion.BAR0, SCRATCH, 4, 0xABCD)
    device.reset()
    assert device.read(PciRegion.BAR0, SCRATCH, 4) == 0


def test_a_refusal_of_the_server_is_an_error_with_its_errno(device):
    with DmaRegion(4096) as region:
        device.dma_map(0x10000, region)
        # What the client itself would refuse, said behind its back.
        device._dma.remove(0x10000)
        with pytest.raises(TransportError) as caught:
            device.dma_map(0x10000, region)
        assert caught.value.errno == 17
        with region.view() as view:
            device._dma.add(0x10000, region, 3)
            device.dma_unmap(0x10000, 4096)
            view[0] = 1


def test_threads_share_the_socket(device):
    wrong = []

    def worker(number):
        for value in range(200):
            at = 0x2000 * (number + 1) + 8 * value
            device.write(PciRegion.BAR4, at, 8, value << 32 | number)
            if device.read(PciRegion.BAR4, at, 8) != value << 32 | number:
                wrong.append((number, value))

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_second_client_is_told_that_the_device_is_busy_and_gets_it_later(server):
    with VfioUserClient.connect(server[1]) as first:
        with pytest.raises(DeviceBusy):
            VfioUserClient.connect(server[1], timeout=0.2)
        first.write(PciRegion.BAR0, SCRATCH, 4, 1)
        assert first.read(PciRegion.BAR0, SCRATCH, 4) == 1

    def reconnect():
        try:
            return VfioUserClient.connect(server[1], timeout=1)
        except DeviceBusy:
            return None

    with eventually(reconnect) as second:
        assert second.info.is_pci


def test_a_server_that_is_killed_is_a_lost_device_within_two_seconds(tmp_path):
    process = spawn("--socket", str(tmp_path / "s"))
    with VfioUserClient.connect(listening(process, 1)[0]) as client:
        failed = []

        def loop():
            try:
                while True:
                    client.read(PciRegion.BAR0, SCRATCH, 4)
            except DeviceLost as error:
                failed.append(error)

        thread = threading.Thread(target=loop)
        thread.start()
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        start = time.monotonic()
        thread.join(5)
        promptly(start, 2)
        assert len(failed) == 1
        with pytest.raises(DeviceLost):
            client.service()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
