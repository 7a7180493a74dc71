"""Faults on purpose, as a program meets them: on the stream that they strike, told in full, and the same each time."""

import contextlib
import dataclasses
import threading
import time

import numpy as np
import pytest

import maia_rt
from maia_rt.contract.commands import Feature, Opcode, QueueStage
from maia_rt.errors import (
    ClosedError,
    DeviceFault,
    DeviceLost,
    FaultCode,
    FirmwareError,
    InvalidArgument,
    InvalidType,
    ResourceExhausted,
    Unsupported,
)
from tests.helpers.emulator import eventually
from tests.helpers.stopwatch import promptly
from tests.helpers.tiny_program import image as tiny_image

AT_ONCE = 1.0
"""Seconds within which who waits hears of what happened."""


@pytest.fixture
def streams(device):
    opened = [device.create_stream() for _ in range(3)]
    yield opened
    for stream in opened:
        stream.close()


def test_every_fault_of_the_catalogue_is_raised_with_all_that_is_known_on_its_stream_alone(device, streams):
    struck, *others = streams
    buffer, elsewhere = device.allocate(64), device.allocate(64)
    for code in filter(None, FaultCode):
        device.inject(maia_rt.Injection("fault", code=code, address=buffer.address + 4, queue=struck.queue.id,
                                        opcodes=["FILL"], after=1))
        for _ in range(2):
            struck.fill(buffer, 1)
        sequence = struck.queue.ring.head
        for other in others:
            other.fill(elsewhere, 2)
        with pytest.raises(DeviceFault) as caught:
            struck.synchronize()
        fault = caught.value
        assert (fault.code, fault.queue, fault.sequence) == (code, struck.queue.id, sequence)
        assert fault.address == buffer.address + 4 and fault.command.startswith("FILL dst=")
        assert fault.device == device.name and __file__ in str(fault) and code.name in str(fault)
        for other in others:
            other.synchronize()
            other.fill(elsewhere, 3)
            other.synchronize()
        assert struck.recover()
        struck.fill(buffer, 4)
        struck.synchronize()
    assert device.clear_injections() == len(FaultCode) - 1


def fills_that_fail(device, spec, count=40):
    with device.create_stream() as stream, device.allocate(64) as buffer:
        injection = device.inject(f"{spec},opcodes=FILL")
        failed = []
        for number in range(count):
            stream.fill(buffer, 1)
            try:
                stream.synchronize()
            except DeviceFault:
                failed.append(number)
                stream.recover()
        device.clear_injections()
        return failed, injection


def test_a_seed_that_was_told_strikes_the_same_commands_again(device):
    failed, injection = fills_that_fail(device, "fault:code=TRAP,probability=0.25")
    assert 0 < len(failed) < 40 and injection.seed is not None and f"seed={injection.seed}" in str(injection)
    again, same = fills_that_fail(device, f"fault:code=TRAP,probability=0.25,seed={injection.seed}")
    assert again == failed and same == injection


def test_a_delay_makes_a_command_start_later(device, streams):
    stream, other = streams[:2]
    buffer = device.allocate(64)
    device.inject(f"delay:ms=60,queue={stream.queue.id}")
    began = time.monotonic()
    stream.fill(buffer, 1)
    other.fill(buffer, 1)
    other.synchronize()
    done = stream.query()
    if done:
        promptly(began, 0.06)
    assert not done
    stream.synchronize()
    assert time.monotonic() - began > 0.06
    buffer.close()


def test_a_launch_that_hangs_is_an_engine_hang_after_the_watchdogs_time(device, streams):
    stream = streams[0]
    device._firmware.set_feature(Feature.WATCHDOG_MS, 50)
    with device.load(tiny_image()) as program, device.upload(np.ones(1000, np.float32)) as x:
        device.inject("hang:opcodes=LAUNCH")
        stream.launch(program["axpy"], x, x, x, 1.0)
        with pytest.raises(DeviceFault) as caught:
            stream.synchronize()
        assert caught.value.code is FaultCode.ENGINE_HANG and "LAUNCH" in caught.value.command
        stream.recover()
        stream.launch(program["axpy"], x, x, x, 1.0)
        stream.synchronize()


def test_a_command_that_hangs_runs_for_all_that_the_device_says_and_goes_on_when_it_is_let(device, streams):
    stream, buffer = streams[0], device.allocate(64)
    device.inject("hang:opcodes=FILL")
    stream.fill(buffer, 1)
    queue = stream.queue.id

    def stage():
        log = device._firmware.queue_log()
        return int(log[log["queue"] == queue]["stage"][0])

    eventually(lambda: stage() == QueueStage.RUNNING)
    assert device.clear_injections() == 1
    stream.synchronize()
    buffer.close()


def test_corrupt_flips_one_bit_of_a_copy(device, stream):
    buffer = device.upload(np.zeros(4096, np.uint8))
    result = np.ones(4096, np.uint8)
    device.inject(maia_rt.Injection("corrupt", bit=8 * 100 + 5, opcodes=["COPY", "COPY_ND"]))
    stream.copy(result, buffer)
    stream.synchronize()
    assert np.flatnonzero(result).tolist() == [100] and result[100] == 1 << 5
    stream.copy(result, buffer)
    stream.synchronize()
    assert not result.any()
    buffer.close()


def test_a_reset_of_the_device_disarms_all(device):
    device.inject("fault:code=ECC,times=0")
    device.reset()
    with device.create_stream() as stream, device.allocate(64) as buffer:
        stream.fill(buffer, 1)
        stream.synchronize()


# --- the whole device ------------------------------------------------------------------------------------------------


class Waiters:
    """Threads that wait for a device in every way there is."""

    def __init__(self, *calls):
        self.heard = []
        self.threads = [threading.Thread(target=self._run, args=(call,)) for call in calls]
        for thread in self.threads:
            thread.start()
        time.sleep(0.05)
        assert not self.heard

    def _run(self, call):
        try:
            call()
            self.heard.append((time.monotonic(), None))
        except Exception as error:
            self.heard.append((time.monotonic(), error))

    def ended(self, began, kind):
        for thread in self.threads:
            thread.join(10)
        assert len(self.heard) == len(self.threads)
        for at, error in self.heard:
            assert isinstance(error, kind), error
            promptly(began, AT_ONCE, at)


def hold(device, streams):
    """Let the first command of each stream hang; returns an event behind them, and what they fill."""
    device.inject("hang:opcodes=FILL,times=0")
    buffer = device.allocate(64)
    for stream in streams:
        stream.fill(buffer, 1)
    return streams[0].record(), buffer


@pytest.mark.parametrize("spec", ["firmware:now", "firmware:now,ends"])
def test_dead_firmware_is_told_to_every_waiter_within_a_second_and_a_reset_brings_it_back(device, spec):
    streams = [device.create_stream() for _ in range(3)]
    event, buffer = hold(device, streams[:2])
    waiters = Waiters(streams[0].synchronize, streams[1].synchronize, event.synchronize)
    began = time.monotonic()
    device.inject(spec)
    waiters.ended(began, FirmwareError)
    began = time.monotonic()
    with pytest.raises(FirmwareError):
        device.counters()
    promptly(began, AT_ONCE)
    streams[2].copy(np.zeros(64, np.uint8), buffer)  # queues run on
    device.reset()
    assert device.counters()["commands"] == 0
    with device.create_stream() as stream, device.allocate(64) as buffer:
        stream.fill(buffer, 1)


@pytest.mark.emulator_process
@pytest.mark.parametrize("spec", ["gone:now", "gone:now,ends", "gone:opcodes=WRITE_IMM", "gone:ends,opcodes=WRITE_IMM"])
def test_a_device_that_is_gone_is_told_to_every_waiter_within_a_second(embedded, spec):
    device = embedded
    streams = [device.create_stream() for _ in range(3)]
    event, buffer = hold(device, streams[:2])
    waiters = Waiters(streams[0].synchronize, streams[1].synchronize, event.synchronize, device.synchronize)
    began = time.monotonic()
    device.inject(spec)
    if "now" not in spec:
        with contextlib.suppress(DeviceLost):  # told to who submits where the device is gone before its wake
            streams[2]._submit(Opcode.WRITE_IMM, units=4, payload=(buffer.address, 0, 0))
    waiters.ended(began, DeviceLost)
    for call in (device.counters, device.faults, device.clear_injections, streams[0].synchronize):
        began = time.monotonic()
        with pytest.raises(DeviceLost):
            call()
        promptly(began, AT_ONCE)
    began = time.monotonic()
    device.close()
    promptly(began, 5)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_no_injection_is_refused_and_the_next_one_works(device, stream):
    for bad, error in ((None, InvalidType), (3, InvalidType), (b"hang", InvalidType), ("quake", InvalidArgument),
                       ("hang:queue=60000", InvalidArgument), ("", InvalidArgument)):
        with pytest.raises(error):
            device.inject(bad)
    device.inject("fault:code=TRAP,opcodes=FILL")
    with device.allocate(64) as buffer:
        stream.fill(buffer, 1)
        with pytest.raises(DeviceFault):
            stream.synchronize()
        stream.recover()


def test_more_than_there_is_room_for_is_refused(device):
    for _ in range(32):
        device.inject("hang:opcodes=TRAP")
    with pytest.raises(ResourceExhausted):
        device.inject("hang:opcodes=TRAP")
    assert device.clear_injections() == 0
    device.inject("hang:opcodes=TRAP")


def test_a_device_without_the_capability_is_left_alone(device):
    firmware = device._firmware
    firmware.capabilities = dataclasses.replace(firmware.capabilities, injection=False)
    for call in (lambda: device.inject("hang"), device.clear_injections):
        with pytest.raises(Unsupported, match="makes no faults on purpose"):
            call()


def test_a_closed_device_takes_no_injections(device):
    device.close()
    for call in (lambda: device.inject("hang"), device.clear_injections):
        with pytest.raises(ClosedError):
            call()
