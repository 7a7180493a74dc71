"""Where kernels run: on the emulated device, and in the interpreter under four devices' capabilities.

The interpreter runs engines in random orders, so it finds missing waits; the device computes with its own arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import maia_rt
from tests.helpers.emulator import environment
from tests.helpers.launching import LONE, MANY, SMALL, TIGHT, DeviceLauncher, InterpreterLauncher, Launcher

CAPABILITIES = {"small": SMALL, "tight": TIGHT, "lone": LONE, "many": MANY}


@pytest.fixture(scope="session")
def device() -> Iterator[maia_rt.Device]:
    """One emulated device for every kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        patch.setenv("MAIA_LIVE", "0")  # it stays open through tests of what a process without devices has
        opened = maia_rt.open("emulated")
    with opened:
        yield opened


@pytest.fixture(scope="session")
def device_launcher(device: maia_rt.Device) -> Iterator[DeviceLauncher]:
    """Runs kernels on the device."""
    with DeviceLauncher(device) as launcher:
        yield launcher


@pytest.fixture(scope="session", params=["device", *(f"interpreter-{name}" for name in CAPABILITIES)])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    """Somewhere to run kernels."""
    if request.param == "device":
        found: Launcher = request.getfixturevalue("device_launcher")
        return found
    return InterpreterLauncher(CAPABILITIES[request.param.split("-")[1]])
