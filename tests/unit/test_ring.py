"""The ring against a consumer in plain Python; tests/runtime runs the same code against the device."""

import os
import random
import signal
import socket
import struct
import threading
import time

import numpy as np
import pytest

from maia_rt._fast import ring as fast
from maia_rt._fast.command import Command
from maia_rt.contract import commands
from maia_rt.contract.commands import CommandFlag, Opcode, PostOp, WaitOp
from maia_rt.errors import ClosedError, DeviceLost, ForkedError, InvalidArgument, QueueFull
from tests.helpers.ring_consumer import RingConsumer
from tests.helpers.stopwatch import promptly

SECOND = 1_000_000_000
NEAR_WRAP = 2**32 - 3


def row(raw, dtype=commands.COMMAND):
    return np.frombuffer(raw, dtype)[0]


def test_a_submitted_command_lies_in_its_slot_with_its_sequence():
    with RingConsumer(initial=NEAR_WRAP) as device:
        sequence = device.ring.submit(Opcode.COPY, CommandFlag.BARRIER, 0, 0x1000, 0x1_0000_0000_0000, 77)
        assert sequence == NEAR_WRAP + 1
        device.step()
        got = row(device.seen[0], commands.COPY)
        assert (got["opcode"], got["flags"], got["src"], got["dst"], got["size"]) == (2, 1, 0x1000, 2**48, 77)
        assert device.ring.poll() == sequence
        assert device.ring.done(sequence)


def test_indices_pass_2_to_the_32():
    with RingConsumer(entries=4, initial=NEAR_WRAP) as device:
        for i in range(20):
            sequence = device.ring.submit(Opcode.NOP, 0, 0, i, 0, 0)
            assert sequence == NEAR_WRAP + 1 + i
            assert not device.ring.done(sequence)
            device.step()
            assert device.ring.wait(sequence, 0) == fast.WAIT_DONE
        assert [int(row(raw)["payload"][0]) for raw in device.seen] == list(range(20))


def test_commands_are_encoded_as_the_contract_says():
    cases = [
        (Command.nop(), commands.COMMAND, {"opcode": 1, "units": 0}),
        (Command.copy(2, 1, 3, flags=1), commands.COPY, {"opcode": 2, "flags": 1, "src": 1, "dst": 2, "size": 3}),
        (Command.copy_nd(64), commands.COPY_ND, {"opcode": 3, "descriptor": 64}),
        (Command.fill(8, 100, 0xABCD, 2), commands.FILL,
         {"opcode": 4, "dst": 8, "size": 100, "pattern": 0xABCD, "width": 2}),
        (Command.write_imm(9, b"hello"), commands.WRITE_IMM, {"opcode": 5, "dst": 9, "units": 5}),
        (Command.launch(7, 0x4000, 3, units=5), commands.LAUNCH,
         {"opcode": 6, "kernel": 7, "args": 0x4000, "arg_count": 3, "units": 5}),
        (Command.crc(1, 2, 3), commands.CRC, {"opcode": 7, "src": 1, "size": 2, "result": 3}),
        (Command.signal_remote(16, PostOp.ADD, 5), commands.SIGNAL_REMOTE,
         {"opcode": 8, "address": 16, "op": 2, "value": 5}),
        (Command.indirect(128, 6), commands.INDIRECT, {"opcode": 9, "list": 128, "count": 6}),
        (Command.crc(1, 2, 4, expected=True), commands.CRC,
         {"opcode": 7, "units": 1, "src": 1, "size": 2, "result": 4}),
        (Command.indirect(128, 6, times=64, concurrent=True), commands.INDIRECT,
         {"opcode": 9, "list": 128, "count": 6, "times": 64, "options": 1}),
        (Command.trap(4), commands.TRAP, {"opcode": 10, "code": 4}),
        (Command.wait_value(64, 5, 2, 0xFF, flags=1), commands.WAIT_VALUE,
         {"opcode": 11, "flags": 1, "address": 64, "value": 5, "mask": 0xFF, "condition": 2}),
        (Command.branch(3, 70, 9, 4, source=2), commands.BRANCH,
         {"opcode": 12, "where": 70, "value": 9, "mask": 0xFFFFFFFF, "target": 3, "condition": 4, "source": 2}),
    ]
    for command, dtype, expected in cases:
        got = row(bytes(command), dtype)
        assert {name: int(got[name]) for name in expected} == expected
        assert bytes(Command.from_bytes(bytes(command))) == bytes(command)
    assert bytes(row(bytes(Command.write_imm(9, b"hello")), commands.WRITE_IMM)["data"])[:5] == b"hello"
    both = row(bytes(Command.nop().pre(0, 3, WaitOp.GE, 9).post(1, 70, PostOp.ADD, 2)))
    assert both["pre"][0].tolist() == (3, 1, 0, 9)
    assert both["post"][1].tolist() == (70, 2, 0, 2)


@pytest.mark.parametrize("make", [
    lambda: Command.write_imm(0, b""), lambda: Command.write_imm(0, bytes(17)), lambda: Command.from_bytes(bytes(63)),
    lambda: Command.nop().pre(2, 0, 1, 0), lambda: Command.nop().post(-1, 0, 1, 0),
])
def test_what_cannot_be_encoded_is_refused(make):
    with pytest.raises(InvalidArgument):
        make()


def test_an_encoded_command_may_be_submitted_again():
    with RingConsumer() as device:
        command = Command.copy(1, 2, 3)
        assert [device.ring.submit_encoded(command) for _ in range(3)] == [1, 2, 3]
        device.step(3)
        assert {bytes(raw[4:]) for raw in device.seen} == {bytes(command)[4:]}


def test_submit_wait_carries_one_pre_semaphore():
    with RingConsumer() as device:
        device.ring.submit(Opcode.COPY, 0, 5, 1, 2, 3)
        for _ in range(8):
            device.step()
            device.ring.submit_wait(CommandFlag.BARRIER, 12, WaitOp.GE, 0xFFFFFFFF)
        device.step()
        got = row(device.seen[-1])
        assert got["pre"].tolist() == [(12, 1, 0, 0xFFFFFFFF), (0, 0, 0, 0)]
        assert got["payload"].tolist() == [0, 0, 0]
        assert got["units"] == 0


def test_a_command_carries_two_semaphore_operations_of_each_kind():
    with RingConsumer() as device:
        device.ring.submit_with(Opcode.COPY, CommandFlag.BARRIER, 0, 1, 2, 3, ((7, WaitOp.EQ, 9), (8, WaitOp.GE, 2)),
                                ((9, PostOp.ADD, 1),))
        device.step()
        got = row(device.seen[-1])
        assert got["pre"].tolist() == [(7, 2, 0, 9), (8, 1, 0, 2)]
        assert got["post"].tolist() == [(9, 2, 0, 1), (0, 0, 0, 0)]
        assert got["payload"].tolist() == [1, 2, 3]
        before = device.ring.head
        for pre, error in ((((1, 1, 1),) * 3, InvalidArgument), (((-1, 1, 1),), OverflowError), ((5,), TypeError)):
            with pytest.raises(error):
                device.ring.submit_with(Opcode.NOP, 0, 0, 0, 0, 0, pre, ())
        assert device.ring.head == before


def test_launch_arguments_lie_in_the_slot_of_their_command():
    with RingConsumer(entries=4) as device:
        for i in range(6):
            device.ring.submit_launch(1, 40 + i, 3, (2**48 + i, 2**63 + 1, 1.5))
            device.step()
            got = row(device.seen[-1], commands.LAUNCH)
            assert (got["kernel"], got["arg_count"], got["units"]) == (40 + i, 3, 3)
            offset = int(got["args"]) - 0x10000
            assert offset == i % 4 * 256
            words = struct.unpack_from("<QQQ", device.memory["args"], offset)
            assert words == (2**48 + i, 2**63 + 1, struct.unpack("<I", struct.pack("<f", 1.5))[0])
        assert device.ring.submit_launch(0, 1, 0, ()) == 7
        device.step()
        assert row(device.seen[-1], commands.LAUNCH)["args"] == 0


def test_a_launch_that_cannot_be_encoded_submits_nothing():
    with RingConsumer() as device:
        with pytest.raises(InvalidArgument):
            device.ring.submit_launch(0, 1, 0, (0,) * 33)
        for bad in (-1, 2**64, "x"):
            with pytest.raises((OverflowError, TypeError)):
                device.ring.submit_launch(0, 1, 0, (1, bad))
        assert device.ring.head == 0
        assert device.pending == 0


@pytest.mark.parametrize("count", [1, 3, 8, 9, 100, 1000])
def test_a_batch_of_any_size_goes_through_a_small_ring(count):
    with RingConsumer(entries=8, initial=NEAR_WRAP) as device:
        device.start()
        batch = np.zeros(count, commands.COMMAND)
        batch["opcode"] = Opcode.NOP
        batch["payload"][:, 0] = np.arange(count)
        last = device.ring.submit_batch(batch)
        assert last == NEAR_WRAP + count
        assert device.ring.wait(last, 5 * SECOND) == fast.WAIT_DONE
        assert [int(row(raw)["payload"][0]) for raw in device.seen] == list(range(count))
        assert not batch["sequence"].any()


def test_a_batch_that_fits_rings_once():
    with RingConsumer(entries=512) as device:
        batch = np.zeros(300, commands.COMMAND)
        before = device.ring.doorbells
        assert device.ring.submit_batch(batch) == 300
        assert device.ring.doorbells == before + 1
        assert device.ring.submit_batch(b"") == 300


def test_a_batch_must_be_whole_commands():
    with RingConsumer() as device:
        for bad in (bytes(65), [1, 2], None):
            with pytest.raises(InvalidArgument):
                device.ring.submit_batch(bad)


def test_a_full_ring_gives_up_at_its_deadline():
    with RingConsumer(entries=4, name="queue 7", timeout_ns=100_000_000) as device:
        for _i in range(4):
            device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        start = time.monotonic()
        with pytest.raises(QueueFull, match=r"queue 7: the ring's 4 entries stayed full for 0.1 s; waited for .* 1"):
            device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        assert promptly(start, 1) > 0.09
        with pytest.raises(QueueFull, match="0 of a batch of 3 commands were submitted"):
            device.ring.submit_batch(bytes(192))
        device.step(4)
        assert device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0) == 5


def test_a_full_ring_waits_for_room():
    with RingConsumer(entries=4) as device:
        device.start()
        last = 0
        for i in range(200):
            last = device.ring.submit(Opcode.NOP, 0, 0, i, 0, 0)
        assert device.ring.wait(last, 5 * SECOND) == fast.WAIT_DONE
        assert [int(row(raw)["payload"][0]) for raw in device.seen] == list(range(200))


def test_a_wait_times_out_no_earlier_and_not_much_later():
    with RingConsumer() as device:
        sequence = device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        for timeout in (0, 1000, 30_000_000):
            start = time.monotonic_ns()
            assert device.ring.wait(sequence, timeout) == fast.WAIT_TIMED_OUT
            assert timeout <= time.monotonic_ns() - start < timeout + 500_000_000


def test_threads_wait_for_different_sequences_of_one_queue():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with RingConsumer(entries=64, spin_ns=0) as device:
        sequences = [device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0) for _ in range(24)]
        ended = {}

        def wait(sequence):
            ended[sequence] = (device.ring.wait(sequence, 10 * SECOND), device.ring.poll())

        threads = [threading.Thread(target=wait, args=(s,)) for s in rng.sample(sequences, 24)]
        for thread in threads:
            thread.start()
        while device.pending:
            time.sleep(rng.random() * 0.01)
            device.step(min(device.pending, rng.randrange(1, 4)))
            time.sleep(0.001)
            device.check_arm()
        # Every wait was armed for: one interrupt each at most, and nobody needs another.
        deadline = time.monotonic() + 5
        while any(t.is_alive() for t in threads) and time.monotonic() < deadline:
            device.check_arm()
            time.sleep(0.001)
        for thread in threads:
            thread.join(1)
        assert set(ended) == set(sequences)
        assert all(status == fast.WAIT_DONE and seen >= s for s, (status, seen) in ended.items())


def test_a_waiter_that_gives_up_hands_over():
    with RingConsumer(spin_ns=0, entries=4) as device:
        first, second = (device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0) for _ in range(2))
        status = {}
        leader = threading.Thread(target=lambda: status.update(a=device.ring.wait(first, 200_000_000)))
        leader.start()
        time.sleep(0.05)
        follower = threading.Thread(target=lambda: status.update(b=device.ring.wait(second, 5 * SECOND)))
        follower.start()
        leader.join()
        assert status == {"a": fast.WAIT_TIMED_OUT}
        time.sleep(0.05)
        device.check_arm()
        device.step(2)
        follower.join(2)
        assert status["b"] == fast.WAIT_DONE


def test_a_signal_handler_that_raises_ends_a_wait():
    class Interrupted(Exception):
        pass

    def handler(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with RingConsumer() as device:
            sequence = device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            start = time.monotonic()
            with pytest.raises(Interrupted):
                device.ring.wait(sequence, 20 * SECOND)
            promptly(start, 2)
            device.step()
            assert device.ring.wait(sequence, SECOND) == fast.WAIT_DONE
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_stopped_queue_ends_waits_and_takes_commands_while_there_is_room():
    with RingConsumer(spin_ns=0, entries=4) as device:
        first, second = (device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0) for _ in range(2))
        device.step()
        device.fault(code=4)
        assert device.ring.wait(first, SECOND) == fast.WAIT_DONE
        assert device.ring.wait(second, SECOND) == fast.WAIT_STOPPED
        assert device.ring.state == (1, 4, 2)
        assert device.ring.stopped
        for _ in range(3):
            device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        with pytest.raises(fast.QueueStopped):
            device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        with pytest.raises(fast.QueueStopped):
            device.ring.submit_batch(bytes(64))


def test_a_device_event_makes_sleeping_waits_look_again():
    events, ours = os.eventfd(0, os.EFD_NONBLOCK), []
    with RingConsumer(spin_ns=0, event_fd=events,
                      on_event=lambda: (os.eventfd_read(events), ours.append(1), device.ring.kick())) as device:
        sequence = device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        statuses = []
        threads = [threading.Thread(target=lambda: statuses.append(device.ring.wait(sequence, 10 * SECOND)))
                   for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        device.fault()
        os.eventfd_write(events, 1)
        for thread in threads:
            thread.join(2)
        assert statuses == [fast.WAIT_STOPPED] * 3
        assert ours == [1]
    os.close(events)


def test_a_transport_that_hangs_up_ends_every_wait():
    here, there = socket.socketpair()
    with here, RingConsumer(spin_ns=0, liveness_fd=here.fileno()) as device:
        sequence = device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        statuses = []
        threads = [threading.Thread(target=lambda: statuses.append(device.ring.wait(sequence, 10 * SECOND)))
                   for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        start = time.monotonic()
        there.close()
        for thread in threads:
            thread.join(2)
        assert statuses == [fast.WAIT_LOST] * 4
        promptly(start, 1)
        with pytest.raises(DeviceLost):
            device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)


def test_the_transport_is_served_during_a_wait():
    here, there = socket.socketpair()
    with here, there, RingConsumer(spin_ns=0, liveness_fd=here.fileno(), service=lambda: here.recv(1)) as device:
        sequence = device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        thread = threading.Thread(target=lambda: (there.send(b"x"), time.sleep(0.05), device.step()))
        thread.start()
        assert device.ring.wait(sequence, 5 * SECOND) == fast.WAIT_DONE
        thread.join()
        here.setblocking(False)
        with pytest.raises(BlockingIOError):
            here.recv(1)


def test_an_exception_of_a_callable_ends_the_wait_and_leaves_the_ring_usable():
    def broken():
        raise DeviceLost("gone")

    here, there = socket.socketpair()
    with here, there, RingConsumer(spin_ns=0, liveness_fd=here.fileno(), service=broken) as device:
        sequence = device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        there.send(b"x")
        with pytest.raises(DeviceLost, match="gone"):
            device.ring.wait(sequence, 5 * SECOND)
        device.step()
        assert device.ring.wait(sequence, 0) == fast.WAIT_DONE


def test_a_sleeping_device_is_woken_and_a_waking_one_is_not():
    woken = []
    with RingConsumer(wake=lambda: woken.append(device.tail)) as device:
        device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        assert woken == []
        device.sleep()
        device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        assert woken == [2], "the tail is stored before the wake"
        device.sleep(False)
        device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        assert woken == [2]


def test_a_device_that_falls_asleep_is_woken_for_an_arm():
    woken = []
    with RingConsumer(spin_ns=0, wake=lambda: (woken.append(1), device.step())) as device:
        device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        device.sleep()
        assert device.ring.wait(1, 5 * SECOND) == fast.WAIT_DONE
        assert woken == [1]


def test_reports_are_taken_and_their_room_is_given_back():
    with RingConsumer(entries=4, initial=NEAR_WRAP) as device:
        for _i in range(3):
            device.ring.submit(Opcode.NOP, CommandFlag.REPORT, 0, 0, 0, 0)
        device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        device.step(4)
        expected = [(NEAR_WRAP + i, 100 * (NEAR_WRAP + i), 100 * (NEAR_WRAP + i) + 7, 0, 0) for i in (1, 2, 3)]
        assert device.ring.take_reports() == expected
        assert device.ring.take_reports() == []
        assert device._get("doorbell", 0x08, "<I") == 3


def test_reports_nobody_takes_never_fill_the_report_ring():
    with RingConsumer(entries=4) as device:
        for _ in range(50):
            device.ring.submit(Opcode.NOP, CommandFlag.REPORT, 0, 0, 0, 0)
            device.step()
        batch = np.zeros(40, commands.COMMAND)
        batch["flags"] = CommandFlag.REPORT
        device.start()
        last = device.ring.submit_batch(batch)
        assert device.ring.wait(last, 5 * SECOND) == fast.WAIT_DONE
        assert [r[0] for r in device.ring.take_reports()] == list(range(1, 91))


def test_many_threads_submit_to_one_ring():
    with RingConsumer(entries=16, initial=NEAR_WRAP) as device:
        device.start()
        sequences = [[] for _ in range(6)]

        def work(number):
            batch = np.zeros(5 if number % 2 else 200, commands.COMMAND)
            batch["payload"][:, 0] = number
            batch["payload"][:, 1] = np.arange(len(batch))
            for _ in range(5):
                sequences[number].append((device.ring.submit_batch(batch), len(batch)))
                sequences[number].append((device.ring.submit(Opcode.NOP, 0, 0, number, 0, 0), 1))
                device.ring.wait(sequences[number][-1][0], 5 * SECOND)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = [s for pairs in sequences for last, count in pairs for s in range(last - count + 1, last + 1)]
        assert sorted(taken) == list(range(NEAR_WRAP + 1, NEAR_WRAP + 1 + len(taken))), "no sequence twice, none lost"
        owner = {s: n for n, pairs in enumerate(sequences) for last, count in pairs
                 for s in range(last - count + 1, last + 1)}
        assert all(int(row(raw)["payload"][0]) == owner[NEAR_WRAP + 1 + i] for i, raw in enumerate(device.seen))


def test_close_ends_waits_and_lets_the_memory_go():
    device = RingConsumer(spin_ns=0)
    sequence = device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
    statuses = []
    threads = [threading.Thread(target=lambda: statuses.append(device.ring.wait(sequence, 10 * SECOND)))
               for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert device.ring.close()
    for thread in threads:
        thread.join(2)
    assert statuses == [fast.WAIT_CLOSED] * 2
    for call in (lambda: device.ring.submit(1, 0, 0, 0, 0, 0), lambda: device.ring.wait(1, 0), device.ring.poll,
                 device.ring.take_reports, lambda: device.ring.submit_batch(bytes(64)),
                 lambda: device.ring.void(0, None), device.ring.hold):
        with pytest.raises(ClosedError):
            call()
    assert device.ring.close()
    device.close()
    for memory in device.memory.values():
        memory.close()


def reset(device, index):
    """What the device does for RESET_QUEUE."""
    for where, offset, code, value in (("progress", 0, "<Q", index), ("progress", 8, "<I", 0),
                                       ("progress", 24, "<I", 0), ("doorbell", 0, "<I", index & 0xFFFFFFFF),
                                       ("doorbell", 8, "<I", 0), ("doorbell", 0x10, "<Q", 0)):
        device._put(where, offset, code, value)
    device.report_tail = device.armed = 0


@pytest.mark.parametrize("initial", [0, NEAR_WRAP])
def test_a_queue_that_stopped_goes_on_without_the_commands_of_one_account(initial):
    with RingConsumer(entries=8, initial=initial) as device:
        ring, ours, theirs = device.ring, fast.Account(1, "ours"), fast.Account(2, "theirs")
        for i in range(6):
            ring.sole = (ours, theirs)[i % 2]
            ring.submit_with(Opcode.FILL, CommandFlag.BARRIER | CommandFlag.REPORT, 0, 1000 + i, 2, 3,
                             ((9, WaitOp.GE, 1),), ((9, PostOp.ADD, 1),))
        ring.submit_launch(CommandFlag.BARRIER, 5, 0, (1 << 40,))
        device.step(2)
        device.fault()
        assert (ours.submitted, theirs.submitted, theirs.last) == (3, 4, initial + 7)
        assert ring.hold()
        lost = ring.void(initial + 3, 1)
        assert [(sequence - initial, owner) for sequence, _, _, owner in lost] == [(3, 1), (5, 1)]
        assert {row(raw, commands.FILL)["dst"] for _, raw, _, _ in lost} == {1002, 1004}
        assert ring.outstanding() == [initial + 4, initial + 6, initial + 7]
        assert ring.outstanding(1) == []
        reset(device, ring.poll())
        ring.resume(ring.poll())
        ring.let_go()
        assert not ring.stopped
        device.step(5)
        again = [row(raw) for raw in device.seen[2:]]
        assert [got["opcode"] for got in again] == [Opcode.NOP, Opcode.FILL] * 2 + [Opcode.LAUNCH]
        assert [int(got["pre"][0]["op"]) for got in again] == [0, 1, 0, 1, 0]
        assert struct.unpack_from("<Q", device.memory["args"], (initial + 6) % 8 * 256) == (1 << 40,)
        assert [record[0] - initial for record in ring.take_reports()] == [1, 2, 4, 6]
        assert ring.submit(Opcode.NOP, 0, 0, 0, 0, 0) == initial + 8


def test_nobody_submits_while_a_ring_is_held():
    with RingConsumer() as device:
        device.ring.hold()
        other = threading.Thread(target=lambda: device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0))
        other.start()
        time.sleep(0.05)
        assert device.ring.head == 0
        device.ring.let_go()
        other.join(2)
        assert device.ring.head == 1


def test_a_child_made_by_fork_never_touches_the_ring():
    with RingConsumer() as device:
        device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        child = os.fork()
        if child == 0:
            code = 0
            for call in (lambda: device.ring.submit(1, 0, 0, 0, 0, 0), lambda: device.ring.submit_batch(bytes(64)),
                         lambda: device.ring.submit_encoded(Command.nop()), lambda: device.ring.wait(1, SECOND),
                         lambda: device.ring.done(1), device.ring.take_reports, lambda: device.ring.void(0, None)):
                try:
                    call()
                    code |= 1
                except ForkedError:
                    pass
            device.ring.close()
            os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0) == 2


def test_a_progress_word_beyond_the_tail_is_a_broken_device():
    with RingConsumer(entries=4) as device:
        device._put("progress", 0, "<Q", 100)
        for _ in range(4):
            device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        with pytest.raises(DeviceLost, match="progress 100 of 4"):
            device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("sizes", [(63, 64, 128, 4096, 0), (192, 64, 256, 4096, 0), (256, 63, 256, 4096, 0),
                                   (256, 64, 128, 4096, 0), (256, 64, 256, 100, 0), (256, 64, 256, 4096, 100)])
def test_memory_of_the_wrong_size_is_refused(sizes):
    with pytest.raises(InvalidArgument):
        fast.Ring(*(bytearray(size) for size in sizes))


def test_a_wait_that_spinning_covers_does_not_sleep():
    with RingConsumer(spin_ns=SECOND) as device:
        sequence = device.ring.submit(Opcode.NOP, 0, 0, 0, 0, 0)
        timer = threading.Timer(0.02, device.step)
        timer.start()
        assert device.ring.wait(sequence, 5 * SECOND) == fast.WAIT_DONE
        assert device.ring.waiters.sleeps == 0
        timer.join()
