"""Devices that reach each other's memory and semaphores; what is wrong with a path is found before it is used."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.emulator import running
from maia_tools.topo import topo

import maia_rt
from maia_rt.contract.commands import Opcode, PostOp
from maia_rt.errors import BufferInUse, ClosedError, DeviceLost, InvalidArgument, InvalidType, Unsupported
from maia_rt.runtime import peer_copy

# What a test does not close is closed with its device; the collector may come by before.
pytestmark = [pytest.mark.emulator_process,
              pytest.mark.filterwarnings("ignore:a buffer of .* was not closed:ResourceWarning")]


@pytest.fixture
def two():
    """Two devices of one emulator."""
    with running(devices=2) as (_, paths), maia_rt.open(paths[0]) as one, maia_rt.open(paths[1]) as other:
        yield one, other


@pytest.fixture
def apart(paths_for_the_embedded_emulator):
    """Two devices, each with an emulator of its own."""
    with maia_rt.open("emulated") as one, maia_rt.open("emulated") as other:
        yield one, other


@pytest.mark.parametrize("devices", ["two", "apart"])
def test_a_device_reads_and_writes_its_peers_memory_and_posts_to_its_semaphores(devices, request):
    one, other = request.getfixturevalue(devices)
    path = one.peer(other)
    assert (path.kind, path.why) == ("direct", "")
    assert path.bandwidth > 1e6
    assert one.peer(other) is path
    given = np.random.default_rng(1).integers(0, 256, 100_000, np.uint8)
    with (one.create_stream() as stream, other.create_stream() as far, other.upload(given) as source,
          one.allocate(given.nbytes) as middle, other.allocate(given.nbytes) as target,
          other.create_semaphore(7) as semaphore):
        far.wait(semaphore, 12)
        stream._submit(Opcode.COPY, payload=(path.address(source), middle.address, given.nbytes))
        stream._submit(Opcode.COPY, payload=(middle.address, path.address(target), given.nbytes))
        stream._submit(Opcode.SIGNAL_REMOTE, payload=(path.semaphore(semaphore), PostOp.ADD | 5 << 32, 0))
        found = target.copy_to_host(far)
        assert np.array_equal(found, given)
        assert path.semaphore(semaphore.index) == path.semaphore(semaphore)
        assert path.address(target.address) == path.address(target)


def test_a_device_is_not_its_own_peer_and_others_objects_are_refused(two):
    one, other = two
    path = one.peer(other)
    with pytest.raises(InvalidArgument, match="own peer"):
        one.peer(one)
    with pytest.raises(InvalidType):
        one.peer("the other")
    with (one.allocate(64) as mine, one.create_semaphore() as semaphore, other.allocate_host(64) as host,
          other.allocate(64, space=maia_rt.Space.tile(0)) as sram):
        for wrong, error in ((mine, InvalidArgument), (host, Unsupported), (sram, Unsupported), ("x", InvalidType),
                             (None, InvalidType), (0, InvalidArgument), (1 << 70, InvalidArgument)):
            with pytest.raises(error):
                path.address(wrong)
        for wrong, error in ((semaphore, InvalidArgument), ("x", InvalidType), (-1, InvalidArgument),
                             (other.capabilities.semaphores, InvalidArgument)):
            with pytest.raises(error):
                path.semaphore(wrong)
        closed, ended = other.allocate(64), other.create_semaphore()
        closed.close()
        ended.close()
        with pytest.raises(ClosedError):
            path.address(closed)
        with pytest.raises(ClosedError):
            path.semaphore(ended)


@pytest.mark.parametrize("which", [0, 1])
def test_a_path_ends_with_either_device(two, which):
    path, back = two[0].peer(two[1]), two[1].peer(two[0])
    near, far = (device.allocate(64) for device in (two[1 - which], two[which]))
    with two[1 - which].create_stream() as stream:
        stream.copy(far, near)
        two[which].close()
        for dst, src in ((near, far), (far, near)):
            with pytest.raises(ClosedError):
                stream.copy(dst, src)
    assert path.closed and back.closed
    for one in (path, back):
        with pytest.raises(ClosedError, match="has been closed"):
            one.address(one.other.capabilities.hbm_base)
    with pytest.raises(ClosedError):
        two[0].peer(two[1])
    with two[1 - which].create_stream() as stream, two[1 - which].allocate(64) as memory:
        stream.copy(memory, bytes(64))


def test_a_peer_that_died_is_named(apart):
    one, other = apart
    path = one.peer(other)
    near, far = one.allocate(64), other.allocate(64)
    with one.create_stream() as stream:
        assert stream.copy(near, far) is maia_rt.CopyPath.DIRECT
        other._emulator._process.kill()
        other._emulator._process.wait()
        for dst, src in ((near, far), (far, near)):
            with pytest.raises(DeviceLost, match="a peer of"):
                stream.copy(dst, src)
        stream.copy(near, bytes(64))
    with pytest.raises(DeviceLost, match="a peer of"):
        path.address(other.capabilities.hbm_base)
    with pytest.raises(DeviceLost, match="a peer of"):
        one.peer(other)


def test_memory_that_a_peers_command_uses_is_not_given_back(two):
    one, other = two
    path = one.peer(other)
    with one.create_stream() as stream, one.create_semaphore() as gate, one.allocate(4096) as target:
        source = other.allocate(4096)
        stream.wait(gate, 1)
        stream._submit(Opcode.COPY, payload=(path.address(source), target.address, 4096))
        with pytest.raises(BufferInUse, match=f"of {one.name} "):
            source.close()
        gate.add()
        stream.synchronize()
        source.close()


def test_memory_freed_behind_a_peers_command_is_dealt_out_only_when_that_is_done(two):
    one, other = two
    path = one.peer(other)
    with one.create_stream() as stream, one.create_semaphore() as gate, one.allocate(4096) as target:
        source = other.allocate(4096)
        address = source.address
        stream.wait(gate, 1)
        stream._submit(Opcode.COPY, payload=(path.address(source), target.address, 4096))
        source._hand_over()
        with other.allocate(4096) as fresh:
            assert fresh.address != address
        gate.add()
        stream.synchronize()
        with other.allocate(4096) as fresh:
            assert fresh.address == address


@pytest.mark.parametrize("which", [0, 1])
def test_a_path_outlives_a_reset_and_is_proven_anew(two, which):
    one, other = two
    path = one.peer(other)
    two[which].reset()
    assert one.peer(other) is path
    assert path.kind == "direct"
    with one.create_stream() as stream, other.upload(np.arange(100)) as source, one.allocate(100, np.int64) as target:
        stream._submit(Opcode.COPY, payload=(path.address(source), target.address, 800))
        assert np.array_equal(target.copy_to_host(stream), np.arange(100))


def test_the_proof_finds_a_path_that_turns_a_bit(two):
    one, other = two
    one.inject("corrupt:opcodes=COPY,after=1,times=1")
    path = one.peer(other)
    assert path.kind == "staged"
    assert "of the peer's memory" in path.why or "the peer's memory are wrong" in path.why
    with pytest.raises(Unsupported, match="by itself"):
        path.address(other.capabilities.hbm_base)


def test_a_path_whose_commands_fail_is_staged(two):
    one, other = two
    one.inject("fault:code=ADDRESS,opcodes=SIGNAL_REMOTE")
    path = one.peer(other)
    assert path.kind == "staged"
    assert "ADDRESS" in path.why
    assert path.bandwidth > 0


@pytest.fixture(params=["direct", "staged"])
def pair(two, request):
    """Two devices that reach each other, or cannot."""
    if request.param == "staged":
        two[0].inject("fault:code=ADDRESS,opcodes=SIGNAL_REMOTE")
    assert two[0].peer(two[1]).kind == request.param
    return two


def test_a_stream_copies_between_devices_any_way_and_shape(pair):
    one, other = pair
    wanted = maia_rt.CopyPath(one.peer(other).kind)
    given = np.random.default_rng(2).integers(0, 1 << 16, (300, 4001), np.uint16)
    with (one.create_stream() as stream, other.upload(given) as far, one.allocate(given.shape, np.uint16) as near,
          other.allocate(given.shape, np.uint16) as back):
        assert stream.copy(near, far) is wanted
        assert stream.copy(back, near, checksum=True) is wanted
        assert np.array_equal(back.copy_to_host(), given)
        assert stream.copy(near[::2, 1::3], far[1::2, :-1:3]) is wanted
        assert stream.copy(back[5:9].view() if back[5:9].contiguous else back[5:9], near[0:4].view()) is wanted
        given_near = given.copy()
        given_near[::2, 1::3] = given[1::2, :-1:3]
        assert np.array_equal(near.copy_to_host(stream), given_near)
        assert np.array_equal(back.copy_to_host()[5:9], given_near[:4])
        assert stream.copy(near[:0], far[:0]) is maia_rt.CopyPath.DIRECT
        with other.allocate(64, space=maia_rt.Space.tile(0)) as sram, one.allocate(64) as small:
            stream.fill(small, 7)
            assert stream.copy(sram, small) is maia_rt.CopyPath.STAGED
            assert set(sram.copy_to_host()) == {7}


def test_a_copy_between_devices_refuses_what_is_neither(two):
    one, other = two
    with (one.create_stream() as stream, one.allocate(64) as near, other.allocate(64) as far,
          other.allocate_host(64) as host, other.allocate(65) as longer):
        for dst, src in ((far, far), (far, np.zeros(64, np.uint8)), (np.zeros(64, np.uint8), far), (host, near),
                         (near, host), (near, longer)):
            with pytest.raises(InvalidArgument):
                stream.copy(dst, src)
        gone = other.allocate(64)
        gone.close()
        with pytest.raises(ClosedError):
            stream.copy(near, gone)
        stream.copy(near, far)


def test_a_copy_that_arrives_wrong_is_found_mended_and_the_path_given_up(monkeypatch):
    monkeypatch.setenv("MAIA_PEER_CHECKS", "3")
    monkeypatch.setattr(peer_copy, "_REST_NS", 10**10)
    with running(devices=2) as (_, paths), maia_rt.open(paths[0]) as one, maia_rt.open(paths[1]) as other:
        path = one.peer(other)
        given = np.arange(1000)
        with one.create_stream() as stream, other.upload(given) as far, one.allocate(1000, np.int64) as near:
            stream.copy(near, far)
            stream.copy(near, far)
            stream.synchronize()  # so that none of these two is struck
            one.inject("corrupt:opcodes=COPY,times=1")
            with pytest.warns(RuntimeWarning, match="given up"):
                assert stream.copy(near, far) is maia_rt.CopyPath.STAGED
            assert np.array_equal(near.copy_to_host(stream), given)
            assert (path.kind, path.checks, path.mismatches) == ("staged", 1, 1)
            assert "another checksum" in path.why
            assert stream.copy(near, far) is maia_rt.CopyPath.STAGED


def test_a_topology_says_who_reaches_whom_and_maia_topo_draws_it():
    with running(devices=2) as (_, paths):
        with maia_rt.open(paths[0]) as one, maia_rt.open(paths[1]) as other:
            one.inject("fault:code=ADDRESS,opcodes=SIGNAL_REMOTE")
            found = maia_rt.topology([one, other])
            assert [place.name for place in found.devices] == paths
            assert [(link.source, link.target, link.kind) for link in found.links] == [
                (0, 1, "staged"), (1, 0, "direct")]
            assert "ADDRESS" in found.links[0].why
            assert found.links[1].bandwidth > 0
        drawn = CliRunner().invoke(topo, paths)
        assert drawn.exit_code == 0, drawn.output
        assert "GB/s" in drawn.output
        assert paths[1] in drawn.output
        found = json.loads(CliRunner().invoke(topo, [*paths, "--json"]).output)
        assert (found["kind"], len(found["devices"]), len(found["links"])) == ("topology", 2, 2)
