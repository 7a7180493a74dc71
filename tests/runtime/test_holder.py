"""A second program is told who has the device, and a device whose holder was killed is found out and reset."""

import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import maia_rt
from maia_rt.errors import DeviceBusy
from maia_rt.runtime.hold import holder_of, take_hold
from tests.runtime.conftest import PCI_DEVICE

HOLDER = """
import sys, maia_rt
device = maia_rt.open(sys.argv[1])
buffer = device.upload(b"secret" * 1000)
print("held", flush=True)
sys.stdin.read()
device.close()
"""


@pytest.fixture
def selector(request):
    return PCI_DEVICE or request.getfixturevalue("emulator")[1]


@pytest.fixture
def holder(selector):
    """Another process that has the device open."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, selector], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_open_names_the_process_that_has_the_device(selector, holder):
    with pytest.raises(DeviceBusy) as refusal:
        maia_rt.open(selector)
    assert f"process {holder.pid} (" in refusal.value.cause and sys.executable in refusal.value.cause
    assert "maia share" in refusal.value.hint
    holder.communicate()
    with maia_rt.open(selector) as device:
        assert device.found == ""


def test_a_second_open_in_the_same_process_says_that(selector):
    with maia_rt.open(selector):
        with pytest.raises(DeviceBusy) as refusal:
            maia_rt.open(selector)
        assert "this process" in refusal.value.cause
    assert holder_of(selector) is None


def test_a_device_whose_holder_was_killed_is_reset_and_that_is_said_once(selector, holder, caplog):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with caplog.at_level(logging.WARNING, "maia_rt"), maia_rt.open(selector) as device:
        assert f"ended without closing it: process {holder.pid}" in device.found
        assert [record.getMessage() for record in caplog.records] == [
            f"{device.name}: {device.found}; it is reset before use"]
        # Nothing of it is left.
        with device.allocate(1 << 20) as fresh:
            assert not fresh.copy_to_host().any()
    caplog.clear()
    with maia_rt.open(selector) as device:
        assert device.found == "" and not caplog.records


def test_an_open_that_fails_leaves_no_holder(tmp_path, selector):
    with pytest.raises(maia_rt.errors.InvalidArgument):
        maia_rt.open(selector, timeout=-1)
    assert holder_of(selector) is None
    with maia_rt.open(selector) as device, device.upload(np.arange(9)) as nine:
        assert np.array_equal(nine.copy_to_host(), np.arange(9))


def test_a_record_that_makes_no_sense_harms_nobody(selector, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    take_hold("it", selector).release()
    (folder,) = tmp_path.iterdir()
    hold = take_hold("it", selector)
    (record,) = folder.iterdir()
    del hold            # as if it had been killed
    for nonsense in (b"", b"\xff\0", b"[]", b'{"pid": "x"}', b"9" * 10000):
        record.write_bytes(nonsense)
        hold = take_hold("it", selector)
        assert hold.died is None
        hold.release()
        assert not list(folder.iterdir())
    os.chmod(folder, 0o777)
    assert take_hold("it", selector) is None        # a folder that others may write to is not used
