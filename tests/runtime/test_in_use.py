"""Memory that commands use is not closed; the error names the command."""

import numpy as np
import pytest

from maia_rt import Space
from maia_rt.contract.commands import COMMAND, Opcode
from maia_rt.errors import BufferInUse, ClosedError
from tests.helpers import tiny_program
from tests.helpers.blocked import blocked


def uses():
    """Commands by name: (stream, device, buffer) to what submits one that uses the buffer."""
    return {
        "FILL": lambda stream, device, buffer: stream.fill(buffer, 1),
        "COPY": lambda stream, device, buffer: stream.copy(buffer[:32], buffer[32:64]),
        "WRITE_IMM": lambda stream, device, buffer: stream.copy(buffer[8:16], bytes(8)),
        "COPY_ND": lambda stream, device, buffer: stream.copy(buffer[0:32:2], buffer[32:64:2]),
        "CRC": lambda stream, device, buffer: stream._submit(Opcode.CRC, payload=(buffer.address, 64,
                                                                                 buffer.address + 64)),
        "SIGNAL_REMOTE": lambda stream, device, buffer: stream._submit(Opcode.SIGNAL_REMOTE,
                                                                       payload=(buffer.address + 4, 1 | 5 << 32, 0)),
    }


@pytest.mark.parametrize("name", uses())
def test_closing_names_the_command_that_uses_it(attached, name):
    with attached.create_stream() as stream:
        buffer = attached.allocate(4096)
        with blocked(stream):
            uses()[name](stream, attached, buffer)
            with pytest.raises(BufferInUse) as caught:
                buffer.close()
            text = str(caught.value)
            assert f"({name} " in text
            assert f"of queue {stream.queue.id}" in text
            assert "test_in_use.py:" in text
            assert "synchronize the stream" in text
            assert not buffer.closed
        buffer.close()
        assert buffer.closed


def test_a_launch_uses_its_arguments(device, stream):
    with device.load(tiny_program.image(8)) as program:
        memories = [device.allocate(8, np.float32) for _ in range(3)]
        with blocked(stream):
            stream.launch(program["axpy"], *memories, 1.0)
            for memory in memories:
                with pytest.raises(BufferInUse, match="LAUNCH"):
                    memory.close()
        for memory in memories:
            memory.close()


def test_a_multicast_uses_every_destination(attached):
    with attached.create_stream() as stream:
        tiles = [attached.allocate(64, space=Space.tile(tile)) for tile in range(attached.capabilities.tiles)]
        with attached.allocate(64) as source, blocked(stream):
            stream.multicast(tiles, source)
            for memory in (*tiles, source):
                with pytest.raises(BufferInUse, match="COPY_ND"):
                    memory.close()
        for tile in tiles:
            tile.close()


def test_what_a_list_of_commands_uses_is_in_use(attached):
    with attached.create_stream() as stream, attached.allocate_host(128) as listed:
        buffer, other = attached.allocate(256), attached.allocate(64)
        commands = np.zeros(2, COMMAND)
        commands["opcode"] = [Opcode.NOP, Opcode.COPY]
        commands["payload"][1] = (buffer.address, buffer.address + 128, 64)
        listed.array[:] = commands.view(np.uint8)
        with blocked(stream):
            stream._submit(Opcode.INDIRECT, payload=(listed.address, 2, 0))
            for memory in (buffer, listed):
                with pytest.raises(BufferInUse, match="INDIRECT"):
                    memory.close()
            other.close()
        buffer.close()


def test_a_list_elsewhere_is_asked_of_its_owner(attached):
    with attached.create_stream() as stream:
        buffer = attached.allocate(256)
        with attached.upload(np.frombuffer(bytes([Opcode.NOP]) + bytes(63), np.uint8)) as listed:
            attached._list_readers.append(lambda address, count: [(buffer.address + 255, 1)]
                                          if (address, count) == (listed.address, 1) else None)
            with blocked(stream):
                stream._submit(Opcode.INDIRECT, payload=(listed.address, 1, 0))
                with pytest.raises(BufferInUse, match="INDIRECT"):
                    buffer.close()
        buffer.close()


def test_memory_beside_what_is_used_is_closed(attached):
    with attached.create_stream() as stream, attached.allocate(4096) as used:
        before, after = attached.allocate(4096), attached.allocate(4096)
        with blocked(stream):
            stream.fill(used, 1)
            before.close()
            after.close()


def test_commands_about_to_end_are_waited_for(device, stream):
    for _ in range(20):
        buffer = device.allocate(1 << 16)
        stream.fill(buffer, 1)
        buffer.close()


def test_leaving_a_with_block_is_closing(device, stream):
    with blocked(stream):
        with pytest.raises(BufferInUse), device.allocate_host(4096) as host:
            stream.fill(host, 1)
        assert not host.closed
    host.close()


def test_an_exception_that_leaves_a_with_block_stays_the_news(device, stream):
    used = device.memory().used
    with blocked(stream):
        with pytest.raises(RuntimeError, match="the news"), device.allocate(4096) as buffer:
            stream.fill(buffer, 1)
            raise RuntimeError("the news")
        assert buffer.closed
        assert device.memory().used == used + 4096
    assert device.memory().used == used


def test_closing_the_device_closes_memory_in_use(own_selector):
    import maia_rt

    with maia_rt.open(own_selector) as device:
        stream, buffer = device.create_stream(), device.allocate(4096)
        for _ in range(10):
            stream.fill(buffer, 1)
    assert buffer.closed


def test_what_failed_is_not_in_use(device):
    from maia_rt.errors import DeviceFault

    with device.create_stream() as stream:
        buffer = device.allocate(4096)
        stream._submit(Opcode.TRAP)
        stream.fill(buffer, 1)
        with pytest.raises(DeviceFault):
            stream.synchronize()
        buffer.close()
        stream.recover()


def test_a_second_close_does_nothing_and_use_says_where_the_first_was(device, stream):
    buffer = device.allocate(64)
    buffer.close()
    buffer.close()
    with pytest.raises(ClosedError, match=r"test_in_use.py:\d+"):
        stream.fill(buffer, 0)
