"""Interrupts as eventfds: chosen, counted, waited for with a deadline, let go of at the end."""

import os
import signal
import threading
import time

import pytest
from helpers.emulator import running
from helpers.stopwatch import promptly

from maia_rt.errors import ClosedError, DeviceLost, DeviceTimeout, ForkedError, InvalidArgument, Unsupported
from maia_rt.transport import ConfigSpace, Interrupts, PciIrq, open_device


@pytest.fixture
def device(emulator):
    with open_device(emulator[1]) as opened:
        yield opened


def test_the_best_kind_that_has_enough_vectors_is_taken(device):
    with Interrupts(device, 3) as interrupts:
        assert interrupts.kind is PciIrq.MSIX
        assert len(interrupts) == len(interrupts.fds) == 3


def test_each_vector_has_a_count_of_its_own(device):
    with Interrupts(device, 4) as interrupts:
        interrupts.trigger(1)
        interrupts.trigger(3)
        assert interrupts.wait(3, timeout=2) == 1
        assert interrupts.wait(1, timeout=2) == 1
        interrupts.trigger(1)
        interrupts.trigger(0, 4)
        assert interrupts.wait(3, timeout=2) == 1
        assert interrupts.wait(1, timeout=2) == 2
        assert interrupts.take(1) == 0


def test_a_wait_sleeps_until_the_vector_fires(device):
    with Interrupts(device) as interrupts:
        timer = threading.Timer(0.1, interrupts.trigger)
        timer.start()
        began = time.monotonic()
        assert interrupts.wait(timeout=5) == 1
        assert promptly(began, 4) > 0.05
        timer.join()


def test_a_wait_ends_at_its_deadline(device):
    with Interrupts(device, 2) as interrupts:
        interrupts.trigger(0)
        began = time.monotonic()
        with pytest.raises(DeviceTimeout, match=r"MSIX vector 1 did not fire within 0\.05 s"):
            interrupts.wait(1, timeout=0.05)
        promptly(began, 2)
        with pytest.raises(DeviceTimeout):
            interrupts.wait(1, timeout=0)
        assert interrupts.wait(0, timeout=0) == 1


def test_vectors_are_added_while_others_are_in_use(device):
    with Interrupts(device) as interrupts:
        interrupts.trigger(0)
        assert interrupts.add(2) == 1
        interrupts.trigger(2)
        assert interrupts.wait(0, timeout=2) == 1
        assert interrupts.wait(2, timeout=2) == 1


def test_too_many_vectors_are_refused_and_nothing_changes(device):
    most = device.irqs[PciIrq.MSIX].count
    with pytest.raises(Unsupported, match=f"not the {most + 1} vectors asked for.*{most} of MSIX"):
        Interrupts(device, most + 1)
    with Interrupts(device, most - 1) as interrupts:
        with pytest.raises(InvalidArgument):
            interrupts.add(2)
        assert len(interrupts) == most - 1
        interrupts.trigger(most - 2)
        assert interrupts.wait(most - 2, timeout=2) == 1


def test_a_kind_the_device_lacks_is_refused(device):
    with pytest.raises(Unsupported, match="1 MSI vector asked for"):
        Interrupts(device, kind=PciIrq.MSI)
    for count in (0, -1):
        with pytest.raises(InvalidArgument):
            Interrupts(device, count)


def test_the_pin_works_like_the_others_and_wants_rearming(device):
    with Interrupts(device, kind=PciIrq.INTX) as interrupts:
        for _ in range(3):
            interrupts.trigger()
            assert interrupts.wait(timeout=2) == 1
            interrupts.rearm()


def test_rearming_messages_does_nothing(device):
    with Interrupts(device) as interrupts:
        interrupts.rearm()
        interrupts.trigger()
        assert interrupts.wait(timeout=2) == 1


def test_vectors_that_are_not_enabled_are_refused(device):
    with Interrupts(device, 2) as interrupts:
        for vector in (2, -1):
            for verb in (interrupts.wait, interrupts.take, interrupts.trigger):
                with pytest.raises(InvalidArgument, match="not among the 2"):
                    verb(vector)


def test_closed_interrupts_refuse_and_can_be_enabled_again(device):
    interrupts = Interrupts(device)
    fds = interrupts.fds
    interrupts.close()
    interrupts.close()
    assert interrupts.closed
    assert not interrupts.fds
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.eventfd_read(fd)
    with pytest.raises(ClosedError):
        interrupts.wait()
    with pytest.raises(ClosedError):
        interrupts.add()
    with Interrupts(device) as again:
        again.trigger()
        assert again.wait(timeout=2) == 1


def test_interrupts_close_after_their_device(emulator):
    with open_device(emulator[1]) as device:
        interrupts = Interrupts(device)
    interrupts.close()


def test_dropped_interrupts_warn_and_leave_no_descriptors(device):
    interrupts = Interrupts(device)
    with pytest.warns(ResourceWarning, match="not closed"):
        del interrupts


def test_a_forked_child_is_refused_and_keeps_no_descriptors(device):
    with Interrupts(device) as interrupts:
        fd = interrupts.fds[0]
        child = os.fork()
        if child == 0:
            code = 1
            try:
                interrupts.wait()
            except ForkedError:
                code = 0
            try:
                os.eventfd_read(fd)
                code += 2
            except BlockingIOError:
                code += 4
            except OSError:
                pass
            interrupts.close()
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        interrupts.trigger()
        assert interrupts.wait(timeout=2) == 1


def test_a_server_that_dies_ends_the_wait():
    with running() as (process, paths), open_device(paths[0]) as device, Interrupts(device) as interrupts:
        timer = threading.Timer(0.1, process.send_signal, [signal.SIGTERM])
        timer.start()
        began = time.monotonic()
        with pytest.raises(DeviceLost):
            interrupts.wait(timeout=20)
        promptly(began, 10)
        timer.join()


def test_other_threads_use_the_device_while_one_waits(device):
    space = ConfigSpace(device)
    with Interrupts(device, 2) as interrupts:
        got = []
        waiter = threading.Thread(target=lambda: got.append(interrupts.wait(1, timeout=10)))
        waiter.start()
        for _ in range(200):
            assert space.header.vendor == 0x1AF4
        interrupts.trigger(1)
        waiter.join(10)
        assert got == [1]


def test_configuration_space_by_name(device):
    space = ConfigSpace(device)
    assert (space.header.vendor, space.header.device) == (0x1AF4, 0x10F0)
    assert space.size == 4096
    assert space.msix.vectors == device.irqs[PciIrq.MSIX].count
    assert space.msi is None
    assert space.pci_express.can_flr
    assert space.power_management.state == 0
    assert space.serial_number
    assert {c.id for c in space.capabilities} >= {0x01, 0x10, 0x11}
    assert [c.id for c in space.extended_capabilities][:1]
    space.enable()
    assert space.read(4, 2) & 6 == 6
    space.enable(bus_master=False)
    assert space.read(4, 2) & 6 == 2
    space.enable(memory=False)
    assert space.read(4, 2) & 6 == 4
