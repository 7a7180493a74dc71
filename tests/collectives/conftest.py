"""Several devices of one emulator, by rank. A guest, and most hosts with hardware, have one: these run nowhere else."""

import contextlib
import os

import pytest

import maia_rt
from tests.helpers.emulator import running

ROLL_OVER = 2**32 - 3


def pytest_collection_modifyitems(config, items):
    """Leave all of them out on a real PCI function: there is one of it."""
    here = [item for item in items if "tests/collectives/" in item.path.as_posix()]
    if os.environ.get("MAIA_TEST_DEVICE"):
        config.hook.pytest_deselected(items=here)
        items[:] = [item for item in items if item not in here]


@pytest.fixture(scope="session")
def eight_sockets():
    """The sockets of one emulator with eight devices."""
    with running(devices=8) as (_, paths):
        yield paths


@pytest.fixture(scope="module", autouse=True)
def emulator_before_everything(eight_sockets):
    """Have the emulator there before the first test takes stock of what it finds."""


@pytest.fixture
def open_devices(eight_sockets, monkeypatch):
    """A function that opens so many of the devices; the first ones' queues roll over at their third command."""
    with contextlib.ExitStack() as stack:
        def open_some(count, **options):
            monkeypatch.setenv("MAIA_FIRST_INDEX", str(ROLL_OVER))
            return [stack.enter_context(maia_rt.open(path, **options)) for path in eight_sockets[:count]]

        yield open_some


@pytest.fixture
def pair(open_devices):
    """A communicator of two."""
    with maia_rt.Communicator(open_devices(2)) as ranks:
        yield ranks


@pytest.fixture(params=[2, 4, 8])
def ranks(request, open_devices):
    """A communicator of two, four and eight."""
    with maia_rt.Communicator(open_devices(request.param)) as made:
        yield made
