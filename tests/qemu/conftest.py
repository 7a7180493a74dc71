"""A QEMU as the emulator's client, without a guest: a test is the guest, through the qtest socket."""

import contextlib

import pytest
from helpers import guest_lab
from helpers.emulator import running
from helpers.qtest import Machine, vfio_user
from helpers.qtest_device import Device


@pytest.fixture(scope="session", autouse=True)
def lab():
    """The lab's QEMU."""
    guest_lab.require()


@pytest.fixture
def start_machine():
    """A function that starts a machine, ended with the test: ``start_machine(options, **Machine's)``."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **more: stack.enter_context(Machine(*args, **more))


@pytest.fixture
def attach(start_machine):
    """A function that starts an emulator and a machine with its device: ``attach(*emulator's, **Machine's)``."""
    with contextlib.ExitStack() as stack:
        def start(*args, options=(), **more):
            process, (path,) = stack.enter_context(running(*args))
            machine = stack.enter_context(Machine([*vfio_user(path), *options], **more))
            device = Device(machine)
            device.path, device.emulator = path, process
            return device

        yield start


@pytest.fixture(params=["mapped memory", "messages"])
def device(request, attach):
    """The device, enabled: with memory that it may map, and with memory that it reaches by messages only."""
    return attach(shared=request.param == "mapped memory").enable()


@pytest.fixture
def mapped_device(attach):
    """The device, enabled, for tests in which DMA plays no part."""
    return attach().enable()
