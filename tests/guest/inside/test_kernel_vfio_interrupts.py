"""In a guest: interrupts under the kernel's VFIO, and its notices that a function is wanted back or failed."""

import errno
import logging
import os
import select
import threading
import time

import pytest
from guest.inside.kernel_devices import EDU, INTERFACES, NVME, XHCI, Edu, eventfds, find, fired, opened, unbind

from maia_rt.errors import InvalidArgument, MaiaError, TransportError, Unsupported
from maia_rt.transport import open_device
from maia_rt.transport.uapi import IRQ_FLAG_NORESIZE, PciIrq

QUIET = 0.3
"""Seconds in which nothing may come."""


@pytest.fixture(params=INTERFACES)
def interface(request):
    return request.param


@pytest.fixture
def edu(interface):
    with opened(EDU, interface) as device:
        yield Edu(device)


@pytest.fixture
def nvme(interface):
    with opened(NVME, interface) as device:
        yield device


def test_msi_comes_from_the_device(edu):
    with eventfds(2) as (first, second):
        edu.device.irq_enable(PciIrq.MSI, 0, [first])
        for _ in range(3):
            edu.raise_interrupt()
            assert fired(first) == 1
            edu.acknowledge()
        edu.device.irq_enable(PciIrq.MSI, 0, [second])
        edu.raise_interrupt()
        assert fired(second) == 1
        assert not fired(first, 0)
        edu.acknowledge()
        edu.device.irq_disable(PciIrq.MSI)
        edu.device.irq_disable(PciIrq.MSI)
        edu.raise_interrupt()
        assert not fired(second, QUIET)
        edu.acknowledge()


def test_intx_holds_itself_back_until_it_is_let_through(edu):
    device = edu.device
    with eventfds(1) as (fd,):
        device.irq_enable(PciIrq.INTX, 0, [fd])
        edu.raise_interrupt()
        assert fired(fd) == 1
        edu.acknowledge()
        edu.raise_interrupt()
        assert not fired(fd, QUIET), "INTx masks itself"
        device.irq_unmask(PciIrq.INTX)
        assert fired(fd) == 1, "a line that is still up comes through"
        edu.acknowledge()
        device.irq_unmask(PciIrq.INTX)
        device.irq_mask(PciIrq.INTX)
        edu.raise_interrupt()
        assert not fired(fd, QUIET), "masked"
        device.irq_unmask(PciIrq.INTX)
        assert fired(fd) == 1
        edu.acknowledge()
        device.irq_trigger(PciIrq.INTX)
        assert fired(fd) == 1
        device.irq_disable(PciIrq.INTX)
        for call in (device.irq_mask, device.irq_unmask, device.irq_trigger):
            with pytest.raises(InvalidArgument, match="no vector of interrupt index 0 is enabled"):
                call(PciIrq.INTX)


def test_intx_is_let_through_by_an_eventfd(edu):
    device = edu.device
    with eventfds(2) as (fd, unmask):
        device.irq_enable(PciIrq.INTX, 0, [fd])
        device.irq_unmask_by(PciIrq.INTX, unmask)
        for _ in range(3):
            edu.raise_interrupt()
            assert fired(fd) == 1
            edu.acknowledge()
            os.eventfd_write(unmask, 1)
        edu.raise_interrupt()
        assert fired(fd) == 1
        device.irq_unmask_by(PciIrq.INTX, -1)
        edu.acknowledge()
        os.eventfd_write(unmask, 1)
        edu.raise_interrupt()
        assert not fired(fd, QUIET)
        edu.acknowledge()
        device.irq_disable(PciIrq.INTX)


def test_one_kind_of_interrupt_is_enabled_at_a_time(edu):
    with eventfds(1) as fds:
        edu.device.irq_enable(PciIrq.MSI, 0, fds)
        with pytest.raises(InvalidArgument, match="MSI is enabled, so INTX cannot be"):
            edu.device.irq_enable(PciIrq.INTX, 0, fds)
        edu.device.irq_disable(PciIrq.MSI)
        edu.device.irq_enable(PciIrq.INTX, 0, fds)


def test_vectors_are_added_one_by_one_and_the_others_stay(nvme):
    assert not nvme.irqs[PciIrq.MSIX].flags & IRQ_FLAG_NORESIZE, "Linux 6.5 adds vectors to an enabled set"
    with eventfds(4) as fds:
        nvme.irq_enable(PciIrq.MSIX, 0, fds[:2])
        nvme.irq_enable(PciIrq.MSIX, 9, fds[2:3])
        nvme.irq_enable(PciIrq.MSIX, 64, fds[3:])
        assert not any(fired(fd, 0) for fd in fds), "nobody was disturbed"
        nvme.irq_trigger(PciIrq.MSIX, 0, 65)
        assert [fired(fd) for fd in fds] == [1, 1, 1, 1]
        nvme.irq_trigger(PciIrq.MSIX, 9)
        assert [fired(fd, 0) for fd in fds] == [0, 0, 1, 0]
        nvme.irq_enable(PciIrq.MSIX, 1, [-1])
        nvme.irq_trigger(PciIrq.MSIX, 0, 65)
        assert [fired(fd, 0) for fd in fds] == [1, 0, 1, 1]
        nvme.irq_disable(PciIrq.MSIX)
        nvme.irq_enable(PciIrq.MSIX, 0, fds[:1])
        nvme.irq_trigger(PciIrq.MSIX)
        assert fired(fds[0]) == 1


def test_a_set_that_cannot_grow_is_enabled_anew_without_losing_any(interface):
    with opened(XHCI, interface) as device, eventfds(6) as fds:
        assert device.irqs[PciIrq.MSI].count >= 6
        assert device.irqs[PciIrq.MSI].flags & IRQ_FLAG_NORESIZE
        kept = [os.dup(fd) for fd in fds[:2]]
        device.irq_enable(PciIrq.MSI, 0, kept)
        for fd in kept:
            os.close(fd)  # the user's numbers may go: the eventfds must not
        device.irq_enable(PciIrq.MSI, 2, fds[2:])
        for fd in fds:
            fired(fd, 0)  # those enabled before are told to look: one may have fired in between
        device.irq_trigger(PciIrq.MSI, 0, 6)
        assert [fired(fd) for fd in fds] == [1] * 6


def test_vectors_that_were_enabled_survive_a_request_that_fails(nvme):
    reader, writer = os.pipe()
    with eventfds(3) as fds:
        nvme.irq_enable(PciIrq.MSIX, 0, fds[:2])
        for start, wrong, kind in ((1, [fds[2], reader], MaiaError), (0, [fds[2], -1, 99], InvalidArgument),
                                   (64, [fds[2], fds[2]], InvalidArgument), (0, [reader], TransportError)):
            with pytest.raises(kind):
                nvme.irq_enable(PciIrq.MSIX, start, wrong)
        nvme.irq_trigger(PciIrq.MSIX, 0, 2)
        assert [fired(fd, 0) for fd in fds] == [1, 1, 0]
    for fd in (reader, writer):
        os.close(fd)


def test_what_a_device_has_not_is_unsupported(edu, interface):
    with eventfds(1) as fds:
        with pytest.raises(Unsupported, match="no interrupt of index 2"):
            edu.device.irq_enable(PciIrq.MSIX, 0, fds)
        with pytest.raises(InvalidArgument, match="not within the 1"):
            edu.device.irq_enable(PciIrq.MSI, 1, fds)
        with pytest.raises(InvalidArgument):
            edu.device.irq_enable(PciIrq.MSI, 0, [])
        with pytest.raises(Unsupported, match="cannot be masked"):
            edu.device.irq_mask(PciIrq.MSI)


def test_no_descriptor_is_left_behind(interface):
    before = sorted(os.listdir("/proc/self/fd"))
    with opened(NVME, interface) as device, eventfds(8) as fds:
        device.irq_enable(PciIrq.MSIX, 0, fds)
        device.irq_enable(PciIrq.MSIX, 2, fds[:2])
    assert sorted(os.listdir("/proc/self/fd")) == before


# --- notices ---------------------------------------------------------------------------------------------------------


def test_a_function_that_the_host_wants_back_says_so_and_goes_when_it_is_closed(interface, caplog):
    with opened(EDU, interface) as device:
        assert not device.release_requested
        assert not select.select([device.liveness_fd], [], [], 0)[0]
        assert device.service() == 0
        taking = threading.Thread(target=unbind, args=(device.name,))
        taking.start()
        assert select.select([device.liveness_fd], [], [], 10)[0]
        with caplog.at_level(logging.WARNING):
            assert device.service() == 1
        assert device.release_requested
        assert "wants the device back" in caplog.text
        assert device.service() == 0
        assert device.read(0, 0, 4) == 0x0100_00ED, "it works on until it is closed"
        assert taking.is_alive()
    taking.join(10)
    assert not taking.is_alive()
    assert device.liveness_fd is None
    with pytest.raises(MaiaError, match="no driver holds"):
        open_device(find(EDU))


def test_an_error_of_pci_express_is_raised_by_service(nvme):
    nvme.irq_trigger(PciIrq.ERR)
    assert select.select([nvme.liveness_fd], [], [], 5)[0]
    with pytest.raises(TransportError, match="uncorrectable error") as caught:
        nvme.service()
    assert caught.value.errno == errno.EIO
    assert nvme.service() == 0
    nvme.reset()


def test_whoever_takes_a_notice_himself_gets_it_and_gives_it_back(nvme):
    with eventfds(1) as (fd,):
        nvme.irq_enable(PciIrq.REQ, 0, [fd])
        nvme.irq_trigger(PciIrq.REQ)
        assert fired(fd) == 1
        assert nvme.service() == 0
        nvme.irq_disable(PciIrq.REQ)
        nvme.irq_trigger(PciIrq.REQ)
        assert nvme.service() == 1
        assert nvme.release_requested


def test_interrupts_arrive_while_another_thread_reads_registers(edu):
    with eventfds(1) as (fd,):
        edu.device.irq_enable(PciIrq.MSI, 0, [fd])
        stop = threading.Event()
        reader = threading.Thread(target=lambda: [edu.device.read(0, 0, 4) for _ in iter(stop.is_set, True)])
        reader.start()
        try:
            for _ in range(10):
                edu.raise_interrupt()
                assert fired(fd) == 1
                edu.acknowledge()
                time.sleep(0.001)
        finally:
            stop.set()
            reader.join()
