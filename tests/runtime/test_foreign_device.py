"""Devices that are not, or no longer, what the driver can drive: the emulator's own server with a register changed."""

import pytest
from helpers.served import Served

import maia_rt
from maia_rt.contract.registers import BAR0
from maia_rt.errors import ContractMismatch, DeviceLost, FirmwareError
from maia_rt.firmware import Firmware

pytestmark = pytest.mark.emulator_process


@pytest.fixture
def served(tmp_path_factory):
    device = Served(str(tmp_path_factory.mktemp("s") / "s"))
    yield device
    device.close()


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("VERSION", BAR0["VERSION"].set(0, "MAJOR", 2), ContractMismatch, r"2\.0"),
        ("VERSION", 0, ContractMismatch, r"0\.0"),
        ("ID", 0x12345678, ContractMismatch, "0x12345678"),
        ("ID", 0xFFFFFFFF, DeviceLost, "all ones"),
        ("STATUS", BAR0["STATUS"].set(BAR0["STATUS"].set(0, "BOOT", 3), "ERROR", 3), FirmwareError, "(?i)firmware"),
    ],
)
def test_a_device_that_cannot_be_driven_is_refused_and_left_alone(served, name, value, error, text):
    served.keep(name, value)
    with pytest.raises(error, match=text) as refusal:
        maia_rt.open(served.path)
    assert refusal.value.hint, "the error says what to try"
    good = served.function.registers.load(name)
    served.function.registers.on_read(name, lambda: served.function.registers.load(name))
    assert good != value
    with maia_rt.open(served.path) as device, device.create_stream() as stream, device.allocate(4) as memory:
        stream.copy(memory, b"next")


def test_a_larger_minor_version_is_driven(served):
    served.keep("VERSION", BAR0["VERSION"].set(BAR0["VERSION"].reset, "MINOR", 7))
    with maia_rt.open(served.path) as device:
        assert device.capabilities.contract == (1, 7)


def test_a_device_that_starts_to_read_as_all_ones_is_lost(served):
    with maia_rt.open(served.path) as device:
        firmware = Firmware(device.transport)
        assert firmware.register("SCRATCH") == 0
        served.keep("SCRATCH", 0xFFFFFFFF)
        assert firmware.register("SCRATCH") == 0xFFFFFFFF, "a register may hold all ones; the device is asked who it is"
        served.keep("ID", 0xFFFFFFFF)
        with pytest.raises(DeviceLost, match="identity register reads 0xffffffff"):
            firmware.register("SCRATCH")
