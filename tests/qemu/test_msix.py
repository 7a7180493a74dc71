"""MSI-X through QEMU: messages land in memory at an address of the test's choice, so they can be seen and counted."""

import pytest
from helpers.emulator import eventually
from helpers.qtest_device import BUS_MASTER, COMMAND, MEMORY_SPACE, MSIX_PBA, MSIX_TABLE, QtestDriver

NOP = 1
ERRORS = 0x8C
MAILBOX = 0x1000
"""Where vector v writes its message: MAILBOX + 4 * v."""
NOT_SOON = 0.3
"""Seconds after which a message that has not come is one that does not come."""


@pytest.fixture
def driver(mapped_device):
    """A booted device, MSI-X enabled, vectors 0 and 5 set up, queue 0 with vector 5."""
    device = mapped_device
    device.set_msix()
    for vector in (0, 5):
        device.set_vector(vector, MAILBOX + 4 * vector, 0xA000 + vector)
    with QtestDriver(device) as driver:
        driver.boot()
        driver.open_queue(vector=5)
        assert taken(driver, 0), "the creation of the queue"
        yield driver


def taken(driver, vector, seconds=3.0):
    """Wait for a vector's message; returns its data and empties the mailbox, or 0."""
    machine, at = driver.machine, MAILBOX + 4 * vector
    data = eventually(lambda: machine.load(at, 4), seconds)
    machine.store(at, 4, 0)
    return data


def fire(driver):
    """Make the queue's vector fire."""
    sequence = driver.submit(NOP, arm=True)
    assert eventually(lambda: driver.progress()[0] == sequence)


def test_message_is_the_vectors_data_at_the_vectors_address(driver):
    fire(driver)
    assert taken(driver, 5) == 0xA005
    assert driver.machine.load(MAILBOX, 4) == 0, "no other vector"
    assert driver.client.pending() == 0


def test_one_message_for_one_arming(driver):
    for _ in range(5):
        fire(driver)
        assert taken(driver, 5) == 0xA005
        assert not taken(driver, 5, NOT_SOON / 5)


def test_unarmed_queue_sends_nothing(driver):
    sequence = driver.submit(NOP)
    assert eventually(lambda: driver.progress()[0] == sequence)
    assert not taken(driver, 5, NOT_SOON)
    assert driver.client.pending() == 0


def mask(driver, kind, masked):
    if kind == "vector":
        driver.client.mask_vector(5, masked)
    else:
        driver.client.set_msix(masked=masked)


KINDS = pytest.mark.parametrize("kind", ["vector", "function"])


@KINDS
def test_vector_that_was_never_unmasked_is_pending_until_it_is(mapped_device, kind):
    device = mapped_device
    device.set_msix(masked=kind == "function")
    device.set_vector(5, MAILBOX + 20, 0xA005, masked=kind == "vector")
    with QtestDriver(device) as driver:
        driver.boot()
        driver.open_queue(vector=5)
        for _ in range(3):
            fire(driver)
        assert eventually(lambda: device.pending() >> 5 & 1)
        assert not taken(driver, 5, NOT_SOON)
        mask(driver, kind, False)
        assert taken(driver, 5) == 0xA005
        assert not device.pending() >> 5 & 1
        assert not taken(driver, 5, NOT_SOON), "three interrupts while masked are one"
        fire(driver)
        assert taken(driver, 5) == 0xA005


@KINDS
def test_vector_that_is_masked_later_sends_its_message_when_unmasked(driver, kind):
    """QEMU 11 tells the server nothing of this mask: it holds the message itself, and shows no pending bit for it."""
    mask(driver, kind, True)
    for _ in range(3):
        fire(driver)
    assert not taken(driver, 5, NOT_SOON)
    mask(driver, kind, False)
    assert taken(driver, 5) == 0xA005
    assert not taken(driver, 5, NOT_SOON), "three interrupts while masked are one"
    fire(driver)
    assert taken(driver, 5) == 0xA005


def test_mask_of_one_vector_leaves_the_others_alone(driver):
    driver.client.mask_vector(5, True)
    assert driver.command(0x40, 1, 0)[0] == 0
    assert taken(driver, 0) == 0xA000
    driver.client.mask_vector(5, False)
    driver.client.mask_vector(0, True)
    fire(driver)
    assert taken(driver, 5) == 0xA005


def test_vector_that_is_moved_while_masked_sends_its_new_message(driver):
    driver.client.mask_vector(5, True)
    fire(driver)
    assert not taken(driver, 5, NOT_SOON)
    driver.client.set_vector(5, 0x2000, 0xBEEF)
    assert eventually(lambda: driver.machine.load(0x2000, 4)) == 0xBEEF
    assert not taken(driver, 5, NOT_SOON)


def test_nothing_is_sent_while_msix_is_disabled(driver):
    device = driver.client
    device.set_msix(enabled=False)
    fire(driver)
    assert not taken(driver, 5, NOT_SOON)
    device.set_msix()
    taken(driver, 5, NOT_SOON)  # hardware may remember it, or not
    fire(driver)
    assert taken(driver, 5) == 0xA005


def test_vectors_set_up_one_by_one_while_others_work(driver):
    device = driver.client
    for vector in (64, 1, 33):
        assert driver.command(0x11, 0)[0] == 0  # DELETE_QUEUE
        device.set_vector(vector, MAILBOX + 4 * vector, 0xA000 + vector)
        driver.open_queue(vector=vector)
        fire(driver)
        assert taken(driver, vector) == 0xA000 + vector
        assert not driver.machine.load(MAILBOX + 20, 4)


def test_without_bus_mastering_no_message_leaves(driver):
    """Hardware sends none; QEMU, which sends them for us, drops them too. What is done meanwhile has happened."""
    device = driver.client
    device.write(COMMAND, 2, MEMORY_SPACE)
    device.write32(0x80, 0)
    device.write32(0xB0, 99)  # an impossible ADMIN_SIZE: firmware fails, which raises ERRORS and vector 0
    taken(driver, 0, 0.01)
    device.write32(0x80, 1)
    assert eventually(lambda: device.read32(ERRORS))
    assert not taken(driver, 0, NOT_SOON)
    device.write(COMMAND, 2, MEMORY_SPACE | BUS_MASTER)
    assert device.alive()


def test_table_keeps_what_is_written_and_pending_bits_cannot_be_written(mapped_device):
    device = mapped_device
    assert [device.read32(MSIX_TABLE + 16 * v + 12) for v in range(65)] == [1] * 65, "masked after reset"
    for vector in range(65):
        device.set_vector(vector, 0x1_0000_1000 * (vector + 1), vector ^ 0xFFFF, masked=vector % 2)
    for vector in range(65):
        at = MSIX_TABLE + 16 * vector
        assert device.read64(at) == 0x1_0000_1000 * (vector + 1)
        assert device.read32(at + 8) == vector ^ 0xFFFF
        assert device.read32(at + 12) == vector % 2
    device.write64(MSIX_PBA, 0xFFFFFFFFFFFFFFFF)
    assert device.read64(MSIX_PBA) == 0
