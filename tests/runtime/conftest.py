"""Devices for the tests of the runtime: the embedded emulator, and one that serves a socket."""

import os

import pytest

import maia_rt
from tests.helpers.emulator import ROOT, emulator  # noqa: F401


@pytest.fixture(autouse=True)
def paths_for_the_embedded_emulator(monkeypatch):
    folders = [str(ROOT), str(ROOT / "emulator"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    monkeypatch.delenv("MAIA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("MAIA_SOCKETS", raising=False)


@pytest.fixture(scope="module", autouse=True)
def emulator_before_everything(emulator):  # noqa: F811
    """Start the module's emulator before the first test takes stock of what it finds."""


@pytest.fixture
def on_socket(emulator):  # noqa: F811
    """A device on a socket; its emulator lives as long as the module's tests."""
    _, path = emulator
    with maia_rt.open(path) as opened:
        yield opened


@pytest.fixture
def embedded(paths_for_the_embedded_emulator):
    """An embedded device: a new process for each test."""
    with maia_rt.open("emulated") as opened:
        yield opened


@pytest.fixture(params=["embedded", "on_socket"])
def device(request):
    """A device, on each transport there is without hardware."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def stream(device):
    with device.create_stream() as opened:
        yield opened
