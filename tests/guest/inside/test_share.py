"""In a guest: programs share a device over the kernel's VFIO, and one that is killed costs the others nothing."""

import subprocess
import sys

import numpy as np
import pytest
from guest.inside.kernel_devices import MAIA, find, give

import maia_rt
from maia_rt.errors import DeviceBusy
from tests.helpers.nursery import outlive

MIB = 1 << 20


@pytest.fixture
def path(tmp_path):
    """Where a broker of the first of our devices serves two shares of it."""
    address = give(find(MAIA))
    broker = subprocess.Popen([sys.executable, "-m", "maia_tools.cli", "share", address, "--socket", tmp_path / "s",
                               "--max-clients", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = broker.stdout.readline()
    if not said.startswith(f"sharing {address} on "):
        broker.kill()
        raise AssertionError(said + broker.communicate()[1])
    yield str(tmp_path / "s")
    broker.terminate()
    assert broker.communicate(timeout=60) == ("", "")
    assert broker.returncode == 0


def test_programs_share_a_device_and_outlive_each_other(path):
    with maia_rt.open(f"share:{path}") as device, device.create_stream() as stream:
        with maia_rt.open(f"share:{path}") as other:
            values = np.arange(50_000, dtype=np.float32)
            with device.upload(values) as mine, other.upload(-values) as theirs:
                assert (mine.copy_to_host() == values).all()
                assert (theirs.copy_to_host() == -values).all()
        outlive(path, stream, size=MIB, rounds=2)


def test_who_has_the_whole_device_is_told_to_another_program(path):
    address = find(MAIA)
    with pytest.raises(DeviceBusy, match=r"maia_tools\.cli share"):
        maia_rt.open(address)
    with maia_rt.open(f"share:{path}") as device:
        assert device.capabilities.clusters == 1
