"""The server's GET_IRQ_INFO and SET_IRQS (vfio-user: DEVICE_GET_IRQ_INFO, DEVICE_SET_IRQS), with loopback triggers."""

import errno
import os
import struct

import pytest
from helpers.emulator import fd_count
from helpers.raw_client import (
    BAR0,
    DEVICE_RESET,
    GET_IRQ_INFO,
    SET_IRQS,
    Descriptors,
    RawClient,
    fired,
    irq_set,
)

NONE, BOOL, EVENTFD, MASK, UNMASK, TRIGGER = 1, 2, 4, 8, 16, 32
INTX, MSI, MSIX, ERR, REQ = range(5)
VECTORS = 65
PBA = 0xC000


@pytest.fixture
def client(emulator):
    with RawClient(emulator[1]) as connected:
        yield connected


@pytest.fixture
def descriptors():
    with Descriptors() as kept:
        yield kept


def irq_info(index, argsz=16):
    return struct.pack("<IIII", argsz, 0, index, 0)


@pytest.mark.parametrize(("index", "flags", "count"), [
    (INTX, 7, 1), (MSI, 1, 0), (MSIX, 3, VECTORS), (ERR, 1, 1), (REQ, 1, 1),
])
def test_interrupt_indexes(client, index, flags, count):
    assert client.call(GET_IRQ_INFO, irq_info(index)).body == struct.pack("<IIII", 16, flags, index, count)


@pytest.mark.parametrize("body", [irq_info(5), irq_info(0xFFFFFFFF), irq_info(0, argsz=15), irq_info(0)[:15], b""])
def test_bad_get_irq_info_is_einval(client, body):
    assert client.refused(GET_IRQ_INFO, body) == errno.EINVAL
    assert client.alive()


def arm(client, index, start, fds):
    client.call(SET_IRQS, irq_set(EVENTFD | TRIGGER, index, start, len(fds)), fds)


def trigger(client, index, vector):
    client.call(SET_IRQS, irq_set(NONE | TRIGGER, index, vector, 1))


@pytest.mark.parametrize(("index", "vector"), [
    (INTX, 0), (MSIX, 0), (MSIX, 1), (MSIX, VECTORS - 1), (ERR, 0), (REQ, 0),
])
def test_loopback_trigger_fires_once(client, descriptors, index, vector):
    fd = descriptors.eventfd()
    arm(client, index, vector, [fd])
    assert fired(fd) == 0
    trigger(client, index, vector)
    assert fired(fd) == 1


def test_bool_data_triggers_the_chosen_ones(client, descriptors):
    fds = [descriptors.eventfd() for _ in range(8)]
    arm(client, MSIX, 3, fds)
    client.call(SET_IRQS, irq_set(BOOL | TRIGGER, MSIX, 3, 8, bytes([1, 0, 0, 255, 0, 0, 0, 1])))
    assert [fired(fd) for fd in fds] == [1, 0, 0, 1, 0, 0, 0, 1]


def test_all_vectors_may_be_armed_in_parts(client, descriptors):
    fds = [descriptors.eventfd() for _ in range(VECTORS)]
    for start in range(0, VECTORS, 16):
        arm(client, MSIX, start, fds[start : start + 16])
    client.call(SET_IRQS, irq_set(NONE | TRIGGER, MSIX, 0, VECTORS))
    assert [fired(fd) for fd in fds] == [1] * VECTORS


def test_new_eventfd_replaces_the_old_one(emulator, client, descriptors):
    process, _ = emulator
    before = fd_count(process)
    old, new = descriptors.eventfd(), descriptors.eventfd()
    for fd in (old, new, old, new):
        arm(client, MSIX, 2, [fd])
    trigger(client, MSIX, 2)
    assert (fired(old), fired(new)) == (0, 1)
    assert fd_count(process) == before + 1


def test_eventfd_form_without_descriptors_takes_a_range_away(emulator, client, descriptors):
    process, _ = emulator
    before = fd_count(process)
    fds = [descriptors.eventfd() for _ in range(4)]
    arm(client, MSIX, 0, fds)
    client.call(SET_IRQS, irq_set(EVENTFD | TRIGGER, MSIX, 1, 2))
    client.call(SET_IRQS, irq_set(NONE | TRIGGER, MSIX, 0, 4))
    assert [fired(fd) for fd in fds] == [1, 0, 0, 1]
    assert fd_count(process) == before + 2


@pytest.mark.parametrize("index", [INTX, MSI, MSIX, ERR, REQ])
def test_count_0_disables_the_index(emulator, client, descriptors, index):
    process, _ = emulator
    before = fd_count(process)
    fd = descriptors.eventfd()
    if index != MSI:
        arm(client, index, 0, [fd])
    client.call(SET_IRQS, irq_set(NONE | TRIGGER, index, 0, 0))
    assert fd_count(process) == before
    if index != MSI:
        trigger(client, index, 0)
    assert fired(fd) == 0


def test_qemus_msix_sequence(client, descriptors):
    client.call(SET_IRQS, irq_set(EVENTFD | TRIGGER, MSIX, 0, 1))
    fds = [descriptors.eventfd() for _ in range(3)]
    for vector, fd in enumerate(fds):
        arm(client, MSIX, vector, [fd])
        trigger(client, MSIX, vector)
    assert [fired(fd) for fd in fds] == [1, 1, 1]
    client.call(SET_IRQS, irq_set(NONE | TRIGGER, MSIX, 0, 0))


def test_masked_vector_is_pending_until_unmasked(client, descriptors):
    fd = descriptors.eventfd()
    arm(client, MSIX, 9, [fd])
    client.call(SET_IRQS, irq_set(NONE | MASK, MSIX, 9, 1))
    trigger(client, MSIX, 9)
    assert fired(fd) == 0
    assert client.read64(PBA) == 1 << 9
    client.call(SET_IRQS, irq_set(NONE | UNMASK, MSIX, 9, 1))
    assert fired(fd) == 1
    assert client.read64(PBA) == 0


def test_mask_by_bool_data(client, descriptors):
    fds = [descriptors.eventfd() for _ in range(3)]
    arm(client, MSIX, 0, fds)
    client.call(SET_IRQS, irq_set(BOOL | MASK, MSIX, 0, 3, b"\1\0\1"))
    client.call(SET_IRQS, irq_set(NONE | TRIGGER, MSIX, 0, 3))
    assert [fired(fd) for fd in fds] == [0, 1, 0]
    client.call(SET_IRQS, irq_set(BOOL | UNMASK, MSIX, 0, 3, b"\0\0\1"))
    assert [fired(fd) for fd in fds] == [0, 0, 1]


def test_vector_without_eventfd_is_pending_and_fires_when_armed(client, descriptors):
    trigger(client, MSIX, VECTORS - 1)
    assert client.read64(PBA + 8) == 1
    fd = descriptors.eventfd()
    arm(client, MSIX, VECTORS - 1, [fd])
    assert fired(fd) == 1
    assert client.read(BAR0, PBA, 16) == bytes(16)


def test_intx_masks_itself_and_comes_again_when_unmasked(client, descriptors):
    fd = descriptors.eventfd()
    arm(client, INTX, 0, [fd])
    trigger(client, INTX, 0)
    trigger(client, INTX, 0)
    assert fired(fd) == 1
    client.call(SET_IRQS, irq_set(NONE | UNMASK, INTX, 0, 1))
    assert fired(fd) == 1
    client.call(SET_IRQS, irq_set(NONE | UNMASK, INTX, 0, 1))
    assert fired(fd) == 0
    client.call(SET_IRQS, irq_set(NONE | MASK, INTX, 0, 1))
    trigger(client, INTX, 0)
    assert fired(fd) == 0


def test_eventfds_outlive_a_reset(client, descriptors):
    fd = descriptors.eventfd()
    arm(client, MSIX, 4, [fd])
    client.call(DEVICE_RESET)
    trigger(client, MSIX, 4)
    assert fired(fd) == 1


GOOD = EVENTFD | TRIGGER


@pytest.mark.parametrize(("flags", "index", "start", "count", "data", "fds"), [
    # not exactly one kind of data and one action
    (0, MSIX, 0, 1, b"", 0), (NONE, MSIX, 0, 1, b"", 0), (TRIGGER, MSIX, 0, 1, b"", 0),
    (NONE | BOOL | TRIGGER, MSIX, 0, 1, b"\1", 0), (NONE | MASK | UNMASK, MSIX, 0, 1, b"", 0),
    (NONE | TRIGGER | MASK, MSIX, 0, 1, b"", 0), (NONE | TRIGGER | 64, MSIX, 0, 1, b"", 0),
    (NONE | TRIGGER | 1 << 31, MSIX, 0, 1, b"", 0), (NONE | EVENTFD | TRIGGER, MSIX, 0, 1, b"", 1),
    # bool bytes are exactly count
    (BOOL | TRIGGER, MSIX, 0, 2, b"\1", 0), (BOOL | TRIGGER, MSIX, 0, 2, b"\1\1\1", 0),
    (BOOL | TRIGGER, MSIX, 0, 2, b"", 0),
    (NONE | TRIGGER, MSIX, 0, 1, b"\1", 0), (GOOD, MSIX, 0, 1, b"\1\1\1\1", 1),
    # descriptors: none or exactly count, with EVENTFD only
    (GOOD, MSIX, 0, 2, b"", 1), (GOOD, MSIX, 0, 1, b"", 2), (NONE | TRIGGER, MSIX, 0, 1, b"", 1),
    (BOOL | TRIGGER, MSIX, 0, 1, b"\1", 1), (NONE | TRIGGER, MSIX, 0, 0, b"", 1),
    # count 0
    (BOOL | TRIGGER, MSIX, 0, 0, b"", 0), (GOOD, MSIX, 0, 0, b"", 0), (NONE | MASK, MSIX, 0, 0, b"", 0),
    (NONE | UNMASK, INTX, 0, 0, b"", 0), (NONE | TRIGGER, MSIX, 1, 0, b"", 0),
    # range
    (NONE | TRIGGER, MSIX, VECTORS, 1, b"", 0), (NONE | TRIGGER, MSIX, 0, VECTORS + 1, b"", 0),
    (NONE | TRIGGER, MSIX, 0xFFFFFFFF, 1, b"", 0), (NONE | TRIGGER, MSIX, 1, 0xFFFFFFFF, b"", 0),
    (NONE | TRIGGER, MSIX, 0xFFFFFFFF, 0xFFFFFFFF, b"", 0), (GOOD, MSIX, VECTORS - 1, 2, b"", 2),
    (GOOD, MSIX, 0, 0xFFFFFFFF, b"", 0), (NONE | TRIGGER, INTX, 0, 2, b"", 0), (NONE | TRIGGER, INTX, 1, 1, b"", 0),
    (NONE | TRIGGER, MSI, 0, 1, b"", 0), (GOOD, MSI, 0, 1, b"", 1), (NONE | TRIGGER, 5, 0, 1, b"", 0),
    (NONE | TRIGGER, 5, 0, 0, b"", 0), (NONE | TRIGGER, 0xFFFFFFFF, 0, 1, b"", 0),
    # ERR and REQ only trigger
    (NONE | MASK, ERR, 0, 1, b"", 0), (NONE | UNMASK, ERR, 0, 1, b"", 0), (NONE | MASK, REQ, 0, 1, b"", 0),
    (BOOL | UNMASK, REQ, 0, 1, b"\1", 0),
    # an eventfd that masks is not offered
    (EVENTFD | MASK, INTX, 0, 1, b"", 1), (EVENTFD | UNMASK, INTX, 0, 1, b"", 1),
])
def test_bad_set_irqs_is_einval_and_leaks_nothing(emulator, client, descriptors, flags, index, start, count, data, fds):
    process, _ = emulator
    before = fd_count(process)
    passed = [descriptors.eventfd() for _ in range(fds)]
    assert client.refused(SET_IRQS, irq_set(flags, index, start, count, data), passed) == errno.EINVAL
    assert fd_count(process) == before
    assert client.alive()


@pytest.mark.parametrize("body", [
    b"", irq_set(NONE | TRIGGER, MSIX, 0, 1)[:19], irq_set(NONE | TRIGGER, MSIX, 0, 1, argsz=19),
    irq_set(NONE | TRIGGER, MSIX, 0, 1, argsz=0), irq_set(BOOL | TRIGGER, MSIX, 0, 4, b"\1\1\1\1", argsz=20),
    irq_set(BOOL | TRIGGER, MSIX, 0, 4, b"\1\1\1\1", argsz=23),
], ids=range(6))
def test_argsz_covers_structure_and_data(client, body):
    assert client.refused(SET_IRQS, body) == errno.EINVAL
    assert client.alive()


def test_larger_argsz_is_taken(client, descriptors):
    """QEMU counts the descriptors in, as the kernel's structure does."""
    fd = descriptors.eventfd()
    client.call(SET_IRQS, irq_set(EVENTFD | TRIGGER, MSIX, 0, 1, argsz=24), [fd])
    trigger(client, MSIX, 0)
    assert fired(fd) == 1


def test_descriptor_that_is_no_eventfd_is_einval(client, descriptors):
    assert client.refused(SET_IRQS, irq_set(GOOD, MSIX, 0, 1), [descriptors.memory(4096)]) == errno.EINVAL
    fds = [descriptors.eventfd(), client.sock.fileno()]
    assert client.refused(SET_IRQS, irq_set(GOOD, MSIX, 0, 2), fds) == errno.EINVAL


@pytest.mark.parametrize(("index", "vector"), [(MSIX, 0), (INTX, 0), (ERR, 0)])
def test_full_eventfd_that_blocks_does_not_stop_the_server(client, index, vector):
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        os.eventfd_write(fd, 0xFFFFFFFFFFFFFFFE)
        arm(client, index, vector, [fd])
        trigger(client, index, vector)
        assert client.alive()
    finally:
        os.close(fd)


def test_refused_message_changes_no_vector(client, descriptors):
    kept, other = descriptors.eventfd(), descriptors.eventfd()
    arm(client, MSIX, 0, [kept])
    assert client.refused(SET_IRQS, irq_set(GOOD, MSIX, 0, 2), [other]) == errno.EINVAL
    trigger(client, MSIX, 0)
    assert (fired(kept), fired(other)) == (1, 0)
