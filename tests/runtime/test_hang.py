"""Hang reports: who waits for whom, through streams, down to the root; deadlocks are named."""

import json
import os
import re
import threading

import numpy as np
import pytest

import maia_rt
from maia_rt import HangVerdict
from maia_rt.contract.commands import BRANCH, COMMAND, BranchSource, Condition, Opcode, PostOp, WaitOp
from maia_rt.errors import ClosedError, DeviceFault, DeviceTimeout, ForkedError, InvalidArgument
from maia_rt.observe import live
from maia_rt.runtime.waits import _kernel
from tests.helpers.emulator import eventually
from tests.helpers.tiny_program import image as tiny_image

FIRST = 1000
"""The first of some semaphores that no queue mirrors into."""


@pytest.fixture
def streams(device):
    opened = [device.create_stream(timeout=5) for _ in range(4)]
    yield opened
    for stream in opened:
        stream.close()


def block(stream, semaphore, value=1):
    """A command that waits for a semaphore."""
    return stream._submit(Opcode.NOP, pre=((semaphore, WaitOp.GE, value),), unbounded=True)


def post(stream, semaphore, value=1, *, behind=None):
    """A command that sets a semaphore, after another one has been waited for."""
    pre = () if behind is None else ((behind, WaitOp.GE, 1),)
    return stream._submit(Opcode.NOP, pre=pre, post=((semaphore, PostOp.SET, value),), unbounded=behind is not None)


@pytest.fixture
def release(device):
    """Set these semaphores, so that what waits goes on; back to zero at the end."""
    touched = set()

    def run(*semaphores):
        touched.update(semaphores)
        with device.create_stream() as other:
            for semaphore in semaphores:
                post(other, semaphore)

    yield run
    with device.create_stream() as other:
        for semaphore in touched:
            post(other, semaphore, 0)


def test_a_device_without_work_is_idle(device):
    report = device.hang_report()
    assert report.verdict is HangVerdict.IDLE
    assert not report.hangs
    assert report.links == ()
    assert str(report) == f"{device.name}: idle: nothing is outstanding on {len(list(device._queues))} queues"


def test_a_semaphore_that_nobody_will_signal_is_said_to_be_that(device, streams, release):
    sequence = block(streams[0], FIRST)
    report = device.hang_report()
    assert report.verdict is HangVerdict.UNSIGNALLED
    assert report.hangs
    (link,) = report.links
    assert (link.queue, link.state, link.sequence) == (streams[0].queue.id, "waits", sequence)
    assert link.command.startswith("NOP")
    assert "test_hang.py:" in link.where
    (wait,) = link.waits
    assert (wait.semaphore, wait.value, wait.wanted, wait.signallers) == (FIRST, 0, 1, ())
    assert re.match(rf"{device.name}: unsignalled: queue {link.queue} \({streams[0].name}\) waits for semaphore 1000 "
                    r">= 1, which is 0(, .*)?; nobody that is submitted will ever signal it\n", str(report))
    release(FIRST)


def test_a_chain_over_three_streams_is_followed_to_its_root(device, streams, release):
    root, middle, last, _ = streams
    held = block(root, FIRST)
    middle.wait(root.record())
    last.wait(middle.record())
    report = device.hang_report()
    assert report.verdict is HangVerdict.UNSIGNALLED
    assert [link.queue for link in report.links] == [last.queue.id, middle.queue.id, root.queue.id]
    assert report.sentence.startswith(f"queue {root.queue.id} ({root.name}) waits for semaphore 1000")
    lines = str(report).splitlines()
    assert len(lines) == 4
    assert re.search(rf"queue {last.queue.id} .*waits for command \d+ of queue {middle.queue.id}, which has done \d+; "
                     r"that command, of stream \d+, was submitted at .*test_hang\.py:\d+$", lines[1])
    assert re.search(rf"waits for command {held} of queue {root.queue.id}", lines[2])
    release(FIRST)
    device.synchronize()
    assert not device.hang_report().hangs


def test_who_should_signal_a_semaphore_is_named_with_its_line(device, streams, release):
    first, second, *_ = streams
    block(first, FIRST)
    signal = post(second, FIRST, behind=FIRST + 1)
    report = device.hang_report()
    assert [link.queue for link in report.links] == [first.queue.id, second.queue.id]
    (wait,) = report.links[0].waits
    assert [(s.queue, s.sequence, s.listed) for s in wait.signallers] == [(second.queue.id, signal, None)]
    assert re.search(rf"command {signal} of queue {second.queue.id} \({second.name}\) will signal it, submitted at "
                     ".*test_hang", wait.text)
    assert report.sentence.startswith(f"queue {second.queue.id} ({second.name}) waits for semaphore 1001")
    release(FIRST + 1)
    first.synchronize()
    release(FIRST)


@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_streams_that_wait_for_each_other_in_a_circle_are_a_deadlock_with_all_its_members(device, streams, release,
                                                                                          members):
    ring = streams[:members]
    for number, stream in enumerate(ring):
        block(stream, FIRST + number)
        post(stream, FIRST + (number + 1) % members)
    report = device.hang_report()
    assert report.verdict is HangVerdict.DEADLOCK
    assert {place.queue for place in report.cycle} == {stream.queue.id for stream in ring}
    assert len(report.links) == members
    for stream in ring:
        assert f"queue {stream.queue.id}" in report.sentence
    if members == 1:
        assert "itself" in report.sentence
    release(FIRST)
    device.synchronize()
    release(*range(FIRST, FIRST + 4))


def test_who_waits_for_a_deadlock_is_outside_of_it(device, streams, release):
    first, second, outside, _ = streams
    block(first, FIRST)
    post(first, FIRST + 1)
    block(second, FIRST + 1)
    post(second, FIRST)
    outside.wait(first.record())
    report = device.hang_report()
    assert {place.queue for place in report.cycle} == {first.queue.id, second.queue.id}
    assert report.links[0].queue == outside.queue.id
    release(FIRST, FIRST + 1)


def test_who_waits_for_what_another_stream_lost_is_told_of_its_failure(device, streams, release):
    broken, waiting, *_ = streams
    block(broken, FIRST)
    broken._submit(Opcode.TRAP, payload=(77, 0, 0))
    post(broken, FIRST + 1)
    block(waiting, FIRST + 1)
    release(FIRST)
    with pytest.raises(DeviceFault):
        broken.synchronize()
    # What it lost has become NOPs, which the device passes in its own time.
    assert eventually(lambda: broken.queue.ring.poll() == broken.queue.ring.head)
    report = device.hang_report()
    assert report.verdict is HangVerdict.FAULT
    assert [link.queue for link in report.links] == [waiting.queue.id]
    assert re.search(rf"waits for semaphore 1001 .*{broken.name}.* would have done so, submitted at .*test_hang.*, but "
                     rf"was lost, for {broken.name} has failed in TRAP", report.sentence)
    release(FIRST + 1)
    waiting.synchronize()
    report = device.hang_report()
    assert report.verdict is HangVerdict.IDLE
    assert report.sentence.endswith(f"{broken.name} stands still after a fault")
    broken.recover()
    assert "fault" not in device.hang_report().sentence


def test_a_semaphore_of_a_list_names_its_place(device, streams, release):
    first, second, *_ = streams
    commands = np.zeros(3, COMMAND)
    commands["opcode"] = Opcode.NOP
    commands["post"][2, 0] = (FIRST, PostOp.SET, 0, 1)
    with device.allocate_host(192) as pinned:
        pinned.array[:] = np.frombuffer(commands.tobytes(), np.uint8)
        block(first, FIRST)
        second._submit(Opcode.INDIRECT, payload=(pinned.address, 3, 0), pre=((FIRST + 1, WaitOp.GE, 1),),
                       unbounded=True)
        report = device.hang_report()
        (wait,) = report.links[0].waits
        assert [s.listed for s in wait.signallers] == [2]
        assert "at 2 of its list" in wait.text
        release(FIRST + 1)
        device.synchronize()
        release(FIRST)


def test_a_timeout_carries_the_report_and_its_verdict(device, streams, release):
    root, waiting, *_ = streams
    block(root, FIRST)
    waiting.wait(root.record())
    with pytest.raises(DeviceTimeout, match=r"was not done within 0.01 s; the device is at command .*Likely cause: "
                                            r"queue .* waits for semaphore 1000 >= 1, which is 0.*; nobody") as caught:
        waiting.synchronize(0.01)
    report = caught.value.report
    assert [link.queue for link in report.links] == [waiting.queue.id, root.queue.id]
    with pytest.raises(DeviceTimeout) as caught:
        root.synchronize(0.01)
    assert [link.queue for link in caught.value.report.links] == [root.queue.id]
    release(FIRST)


def test_a_report_is_json_with_a_schema(device, streams, release):
    block(streams[0], FIRST)
    data = json.loads(json.dumps(device.hang_report().to_json()))
    assert (data["schema"], data["verdict"], data["device"]) == (2, "unsignalled", device.name)
    assert data["links"][0]["waits"][0]["semaphore"] == FIRST
    release(FIRST)


def test_a_closed_device_has_no_report(own_selector):
    device = maia_rt.open(own_selector)
    device.close()
    with pytest.raises(ClosedError):
        device.hang_report()


def test_a_forked_child_has_no_report_and_is_not_found(device):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            device.hang_report()
        except ForkedError:
            code = 2 if os.getpid() in live.processes() else 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert os.getpid() in live.processes()


def test_the_process_answers_while_its_main_thread_waits(device, streams, release):
    """From a thread here; tests/tools/test_hang.py asks from another process."""
    block(streams[0], FIRST)
    answers = []

    def ask():
        answers.extend(live.ask(os.getpid(), {"call": "hang", "device": device.name}))
        release(FIRST)

    thread = threading.Thread(target=ask)
    thread.start()
    streams[0].synchronize(20)
    thread.join()
    assert [answer["verdict"] for answer in answers if answer["hangs"]] == ["unsignalled"]


def test_a_semaphore_of_the_program_is_said_to_be_its_own(device, streams):
    with device.create_semaphore() as semaphore:
        streams[0].wait(semaphore, 3)
        streams[1].wait(streams[0])
        report = device.hang_report()
        assert report.verdict is HangVerdict.UNSIGNALLED
        assert f"waits for {semaphore.name} >= 3, which is 0" in report.sentence
        assert report.sentence.endswith("nobody that is submitted will ever signal it; the program can, for it holds "
                                        "the semaphore")
        semaphore.set(2)
        assert "last written by the host" in device.hang_report().sentence
        streams[2].signal(semaphore)
        device.synchronize()


def test_who_wrote_a_semaphore_last_is_named_with_the_line(device, streams, release):
    sequence = post(streams[1], FIRST, 5)
    streams[1].synchronize()
    block(streams[0], FIRST, 6)
    (wait,) = device.hang_report().links[0].waits
    assert re.search(rf"which is 5, last written by command {sequence} of queue {streams[1].queue.id}, submitted at "
                     r".*test_hang\.py:\d+", wait.text)
    post(streams[1], FIRST, 6)
    device.synchronize()
    release(FIRST)


def test_a_function_that_takes_long_is_shown_with_the_line_where_it_is(device, streams):
    begun, go_on = threading.Event(), threading.Event()

    def slow():
        begun.set()
        go_on.wait(10)

    first, second, third, _ = streams
    first.call(slow)
    assert begun.wait(10)
    second.call(int)
    third.wait(first)
    report = device.hang_report()
    texts = {link.queue: link.waits[0].text for link in report.links}
    go_on.set()
    assert report.verdict is HangVerdict.WAITING
    assert re.search("function that it called, which is running, at .*threading.py", texts[first.queue.id])
    assert f"runs after one that {first.name} called" in texts[second.queue.id]
    device.synchronize()
    assert device.hang_report().verdict is HangVerdict.IDLE


def test_a_timeout_of_the_program_at_a_semaphore_says_who_should_signal_it(device, streams, release):
    with device.create_semaphore() as semaphore:
        with pytest.raises(DeviceTimeout, match=rf"the program waits for {semaphore.name} >= 1, .*nobody") as caught:
            semaphore.wait(1, 0.01)
        assert caught.value.report.verdict is HangVerdict.UNSIGNALLED
        block(streams[0], FIRST)
        streams[0].signal(semaphore)
        with pytest.raises(DeviceTimeout, match=rf"\({streams[0].name}\) will signal it.*test_hang") as caught:
            semaphore.wait(1, 0.01)
        assert [link.queue for link in caught.value.report.links] == [streams[0].queue.id]
        release(FIRST)
        semaphore.wait(1)


def test_a_graph_that_is_stuck_names_the_node(device, streams):
    with device.create_semaphore() as semaphore, device.allocate(64) as buffer:
        with streams[0].capture() as capture:
            streams[0].fill(buffer, 1)
            streams[0].wait(semaphore, 1)
            streams[0].fill(buffer, 2)
        with capture.instantiate() as graph:
            graph.launch(streams[1])
            assert eventually(lambda: "at 1 of" in str(device.hang_report()))
            (link,) = device.hang_report().links
            assert link.waits[0].semaphore == semaphore.index
            assert re.search(r"in node .*made at .*test_hang", link.detail)
            semaphore.set(1)
            streams[1].synchronize()


def test_a_word_of_memory_and_who_writes_it(device, streams, release):
    first, second, *_ = streams
    with device.allocate_host(1, np.uint32) as word:
        word.array[:] = 3
        first.wait_value(word, 7, condition="eq")
        assert eventually(lambda: device.hang_report().verdict is HangVerdict.UNSIGNALLED), "the device comes to it"
        report = device.hang_report()
        assert (f"waits for the word at {word.address:#x} == 7, which is 3; nobody that is submitted will ever write"
                in report.sentence)
        block(second, FIRST)
        second.write_value(word, 7)
        report = device.hang_report()
        assert [link.queue for link in report.links] == [first.queue.id, second.queue.id]
        assert re.search(rf"command \d+ of queue {second.queue.id} \({second.name}\) will write it, submitted at "
                         r".*test_hang", report.links[0].waits[0].text)
        release(FIRST)
        device.synchronize()


def test_a_list_that_is_stuck_says_at_which_of_its_commands(device, streams, release):
    commands = np.zeros(3, COMMAND)
    commands["opcode"] = Opcode.NOP
    commands["pre"][1, 0] = (FIRST, WaitOp.GE, 0, 1)
    with device.allocate_host(192) as pinned:
        pinned.array[:] = np.frombuffer(commands.tobytes(), np.uint8)
        streams[0]._submit(Opcode.INDIRECT, payload=(pinned.address, 3, 0), unbounded=True)
        streams[1].wait(streams[0])
        assert eventually(lambda: device.hang_report().hangs)
        report = device.hang_report()
        assert report.verdict is HangVerdict.UNSIGNALLED
        link = report.links[-1]
        assert link.command.startswith("INDIRECT")
        assert link.detail.startswith("at 1 of its list of 3: NOP pre=[#1000>=1]")
        assert link.waits[0].semaphore == FIRST
        release(FIRST)
        device.synchronize()


def test_a_list_that_goes_round_for_ever_says_where(device, streams):
    commands = np.zeros(2, COMMAND)
    commands["opcode"] = Opcode.NOP
    with device.allocate_host(192) as pinned, device.allocate_host(1, np.uint32) as word:
        word.array[:] = 0
        branch = np.zeros((), BRANCH)
        branch["opcode"], branch["where"], branch["value"], branch["mask"] = Opcode.BRANCH, word.address, 0, 0xFFFFFFFF
        branch["condition"], branch["source"] = Condition.EQ, BranchSource.MEMORY
        pinned.array[:128] = np.frombuffer(commands[:1].tobytes() + branch.tobytes(), np.uint8)
        streams[0]._submit(Opcode.INDIRECT, payload=(pinned.address, 2, 0), unbounded=True)
        streams[1].wait(streams[0])
        try:
            report = device.hang_report()
            while not report.links[-1].detail:  # the device has not begun
                report = device.hang_report()
            assert report.verdict is HangVerdict.WAITING
            assert report.links[-1].state == "runs"
            assert re.match(r"at [01] of its list of 2: (NOP|BRANCH)", report.links[-1].detail)
        finally:
            word.array[:] = 1
        device.synchronize()


def test_a_launch_is_shown_with_its_kernels_name(device, stream, release):
    with device.load(tiny_image()) as program, device.allocate(1000, np.float32) as x:
        block(stream, FIRST)
        stream.launch(program["axpy"], x, x, x, 1.0)
        raw = stream.queue.ring.command_at(stream.queue.ring.head)
        assert _kernel(device, raw) == "kernel axpy"
        release(FIRST)
        stream.synchronize()


def test_a_launch_that_gets_nowhere_is_shown_with_its_kernel_and_for_how_long(device, streams):
    first, second, *_ = streams
    with device.load(tiny_image()) as program, device.allocate(1000, np.float32) as x:
        device.inject("hang:opcodes=LAUNCH")
        first.launch(program["axpy"], x, x, x, 1.0)
        second.wait(first)
        assert eventually(lambda: device.hang_report().links[-1].seconds)
        report = device.hang_report()
        assert report.verdict is HangVerdict.WAITING
        assert [link.queue for link in report.links] == [second.queue.id, first.queue.id]
        link = report.links[-1]
        assert (link.state, link.detail) == ("runs", "kernel axpy")
        assert 0 < link.seconds < 10
        assert f"queue {first.queue.id} ({first.name}) is at command {link.sequence}: LAUNCH" in report.sentence
        assert first.abort()
        with pytest.raises(DeviceFault):
            first.synchronize()
        first.recover()
        second.synchronize()


@pytest.mark.emulator_process
def test_dead_firmware_is_said_and_the_driver_tells_what_it_knows(embedded):
    semaphore, stream = embedded.create_semaphore(), embedded.create_stream()
    stream.wait(semaphore, 1)
    embedded.inject("firmware:now")
    report = embedded.hang_report()
    assert report.verdict is HangVerdict.FIRMWARE
    assert report.firmware
    assert f"waits for {semaphore.name} >= 1, which is 0" in report.sentence
    assert str(report).splitlines()[1].startswith("  the device could not be asked, this is what the driver knows")
    embedded.reset()
    assert eventually(lambda: embedded.hang_report().verdict is HangVerdict.IDLE)


@pytest.mark.emulator_process  # a guest asks so slowly that the device may be done by then
def test_a_launch_without_tiles_says_who_has_them(device, streams, release):
    with device.load(tiny_image(100_000)) as program, device.allocate(100_000, np.float32) as x:
        for number in range(20):
            # All at once, so that the device is not done with them before it is asked, even where asking takes long.
            for stream in streams:
                block(stream, FIRST + number)
                for _ in range(10 + 10 * number):
                    stream.launch(program["axpy"], x, x, x, 1.0, clusters=1)
            release(FIRST + number)
            report = device.hang_report()
            if "waits for tiles" in str(report):
                break
            device.synchronize()
        assert report.verdict is HangVerdict.WAITING
        (wait,) = report.links[0].waits
        holder = wait.places[-1].queue
        assert re.search(rf"waits for tiles, which are held by .*kernel axpy on queue {holder}", wait.text)
        device.synchronize()


def test_no_wait_without_a_deadline_a_timeout_says_what_it_waits_for_and_who_should_have_signalled(
        device, streams, release):
    first, second, *_ = streams
    block(first, FIRST)
    post(second, FIRST, behind=FIRST + 1)
    event = first.record()
    device.timeout = first.queue.timeout = second.queue.timeout = 0.01
    try:
        with pytest.raises(DeviceTimeout, match=r"waits for semaphore 1001 >= 1, which is 0.*; nobody"):
            device.synchronize()
        for wait in (first.synchronize, event.synchronize):
            with pytest.raises(DeviceTimeout) as caught:
                wait()
            text = str(caught.value.report)
            assert f"waits for semaphore {FIRST} >= 1, which is 0" in text
            assert re.search(rf"command \d+ of queue {second.queue.id} .* will signal it, submitted at .*test_h", text)
            assert re.search(rf"waits for semaphore {FIRST + 1} >= 1, which is 0.*; nobody", str(caught.value))
        for endless in (float("inf"), float("nan"), 1e10, -1):
            with pytest.raises(InvalidArgument):
                first.synchronize(endless)
    finally:
        device.timeout = first.queue.timeout = second.queue.timeout = 30
    release(FIRST + 1)
    device.synchronize()
    release(FIRST)
