"""Devices for the tests of the runtime, on each transport.

On a host without hardware: the embedded emulator, and one that serves a socket. With ``MAIA_TEST_DEVICE``, the PCI
address of a function bound to vfio-pci, that device instead: this is how the guest runs these tests over the kernel's
VFIO, and how they run on hardware. ``MAIA_TEST_OTHER_DEVICE`` is a second one, for tests that need two.
"""

import os

import pytest

import maia_rt
from tests.helpers.emulator import ROOT, emulator  # noqa: F401

PCI_DEVICE = os.environ.get("MAIA_TEST_DEVICE")
ROLL_OVER = 2**32 - 3
FIRST_INDICES = [int(os.environ.get("MAIA_FIRST_INDEX", "0"))] if PCI_DEVICE else [0, ROLL_OVER]
TRANSPORTS = [os.environ.get("MAIA_TEST_TRANSPORT", "vfio")] if PCI_DEVICE else ["embedded", "socket"]


def pytest_collection_modifyitems(config, items):
    """Leave out, on a real PCI function, what is about the emulator's process."""
    if PCI_DEVICE:
        left_out = [item for item in items if item.get_closest_marker("emulator_process")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def paths_for_the_embedded_emulator(monkeypatch):
    folders = [str(ROOT), str(ROOT / "emulator"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    monkeypatch.delenv("MAIA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("MAIA_SOCKETS", raising=False)


@pytest.fixture(params=FIRST_INDICES, ids=lambda first: "roll-over" if first else "from 0", autouse=True)
def first_index(request, monkeypatch):
    """Every test runs twice: the second time the 32-bit sequence numbers roll over at its third command."""
    monkeypatch.setenv("MAIA_FIRST_INDEX", str(request.param))
    return request.param


@pytest.fixture(scope="module", autouse=True)
def emulator_before_everything(request):
    """Start the module's emulator before the first test takes stock of what it finds."""
    if not PCI_DEVICE:
        request.getfixturevalue("emulator")


@pytest.fixture
def attached(request, record_property):
    """A device that outlives the test: on a socket, whose emulator lives as long as the module, or a PCI function."""
    with maia_rt.open(PCI_DEVICE or request.getfixturevalue("emulator")[1]) as opened:
        kind = opened.transport.info.kind
        assert kind == os.environ.get("MAIA_TEST_TRANSPORT", kind)
        record_property("transport", kind)
        yield opened


@pytest.fixture
def crowded(request):
    """The device with two hardware queues, so that streams must share them."""
    with maia_rt.open(PCI_DEVICE or request.getfixturevalue("emulator")[1], max_queues=2) as opened:
        yield opened


@pytest.fixture
def embedded(paths_for_the_embedded_emulator, record_property):
    """An embedded device: a new process for each test."""
    with maia_rt.open("emulated") as opened:
        record_property("transport", f"{opened.transport.info.kind}, embedded")
        yield opened


@pytest.fixture
def own_selector(paths_for_the_embedded_emulator):
    """What a program that a test starts opens: a device that nobody else has open."""
    return PCI_DEVICE or "emulated"


@pytest.fixture
def other_device(paths_for_the_embedded_emulator):
    """A second device."""
    with maia_rt.open(os.environ.get("MAIA_TEST_OTHER_DEVICE") or "emulated") as opened:
        yield opened


@pytest.fixture(params=TRANSPORTS)
def device(request):
    """A device, on each transport there is."""
    return request.getfixturevalue("embedded" if request.param == "embedded" else "attached")


@pytest.fixture
def stream(device):
    with device.create_stream() as opened:
        yield opened
