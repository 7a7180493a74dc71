"""Words shared with a device: exact widths, checked bounds, closed and forked ones refuse."""

import ctypes
import mmap
import os
import struct

import pytest

from maia_rt.errors import ClosedError, ForkedError, InvalidArgument, Unsupported
from maia_rt.memory import DmaRegion
from maia_rt.transport import SharedWords

WIDTHS = (1, 2, 4, 8)


def read(words, width):
    return getattr(words, f"read{8 * width}")


def write(words, width):
    return getattr(words, f"write{8 * width}")


@pytest.mark.parametrize("width", WIDTHS)
def test_a_word_is_little_endian_and_changes_nothing_beside_it(width):
    memory = bytearray(b"\xaa" * 32)
    value = 0x0807060504030201 & (1 << 8 * width) - 1
    with SharedWords(memory) as words:
        write(words, width)(16, value)
        assert read(words, width)(16) == value
    assert memory == b"\xaa" * 16 + value.to_bytes(width, "little") + b"\xaa" * (16 - width)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_largest_value_fits_and_the_next_does_not(width):
    with SharedWords(bytearray(8)) as words:
        write(words, width)(0, (1 << 8 * width) - 1)
        for value in (1 << 8 * width, -1, 1 << 200):
            with pytest.raises(InvalidArgument, match="does not fit"):
                write(words, width)(0, value)
        assert read(words, width)(0) == (1 << 8 * width) - 1


@pytest.mark.parametrize("width", WIDTHS)
def test_the_last_word_is_within_the_memory_and_the_next_is_not(width):
    with SharedWords(bytearray(24), "ring") as words:
        assert read(words, width)(24 - width) == 0
        for offset in (24, 24 - width + 1, -width, -1, 1 << 63, 1 << 200):
            with pytest.raises(InvalidArgument, match=r"ring: .* (not within|not aligned)"):
                read(words, width)(offset)
            with pytest.raises(InvalidArgument):
                write(words, width)(offset, 0)


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_a_misaligned_word_is_refused_not_split(width):
    with SharedWords(bytearray(32)) as words:
        for offset in range(1, width):
            with pytest.raises(InvalidArgument, match="not aligned"):
                read(words, width)(offset)
            with pytest.raises(InvalidArgument, match="not aligned"):
                write(words, width)(offset, 0)


@pytest.mark.parametrize("wrong", [1.5, "1", None])
def test_offsets_and_values_are_integers(wrong):
    with SharedWords(bytearray(8)) as words:
        with pytest.raises(TypeError):
            words.read32(wrong)
        with pytest.raises(TypeError):
            words.write32(0, wrong)


def test_memory_that_starts_between_words_is_refused():
    with pytest.raises(InvalidArgument, match="aligned to 8"):
        SharedWords(memoryview(bytearray(32))[4:])


def test_memory_that_is_not_contiguous_is_refused():
    with pytest.raises(BufferError):
        SharedWords(memoryview(bytearray(32))[::2])


def test_read_only_memory_is_read_only():
    with SharedWords(bytes(8)) as words:
        assert not words.writable
        assert words.read64(0) == 0
        with pytest.raises(Unsupported, match="read-only"):
            words.write8(0, 1)


def test_empty_memory_has_no_words():
    with SharedWords(bytearray()) as words, pytest.raises(InvalidArgument):
        words.read8(0)


def test_it_sees_what_the_other_side_stores():
    with mmap.mmap(-1, 4096) as shared, SharedWords(shared) as words:
        child = os.fork()
        if child == 0:
            struct.pack_into("<Q", shared, 8, 0x1122334455667788)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert words.read64(8) == 0x1122334455667788
        assert words.read8(15) == 0x11


def test_it_holds_its_memory_until_it_is_closed():
    memory = bytearray(8)
    words = SharedWords(memory)
    with pytest.raises(BufferError):
        memory.append(0)
    words.close()
    words.close()
    memory.append(0)
    assert words.closed
    with pytest.raises(ClosedError, match="memory has been closed"):
        words.read8(0)
    with pytest.raises(ClosedError):
        words.write8(0, 0)


def test_dropped_words_let_go_of_their_memory():
    memory = bytearray(8)
    words = SharedWords(memory)
    del words
    memory.append(0)


def test_a_region_closes_after_its_words():
    region = DmaRegion(4096)
    words = SharedWords(region.view(), "queue")
    words.write32(64, 7)
    assert ctypes.c_uint32.from_address(region.address + 64).value == 7
    with pytest.raises(InvalidArgument, match="still in use"):
        region.close()
    words.close()
    region.close()


def test_a_forked_child_gets_an_error_instead_of_a_fault():
    with DmaRegion(4096) as region, SharedWords(region.view(), "queue") as words:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                words.read32(0)
            except ForkedError as error:
                code = 0 if "queue" in str(error) else 2
            finally:
                words.close()
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert words.read32(0) == 0
