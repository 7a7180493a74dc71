"""Words of memory that streams write and wait for."""

import time

import numpy as np
import pytest

from maia_rt.errors import DeviceTimeout
from tests.helpers.stopwatch import promptly

HALF = 1 << 31
LAST = (1 << 32) - 1


def test_a_word_of_memory_is_written_and_waited_for(device):
    with device.create_stream() as first, device.create_stream() as second, \
            device.allocate_host(4, np.uint32) as word, device.allocate(4, np.uint32) as other:
        word.array[:] = 0
        first.wait_value(word, 5)
        first.write_value(other[1:], 7)
        second.write_value(word[1:], 9)
        second.synchronize(10)
        assert not first.query()
        second.write_value(word, 6)
        first.synchronize(10)
        assert list(word.array[:2]) == [6, 9]
        assert other.copy_to_host(first)[1] == 7


@pytest.mark.parametrize(("condition", "mask", "before", "after"), [
    ("ge", LAST, 4, 5), ("ge", LAST, 5 + HALF, 5 + HALF - 1), ("eq", LAST, 6, 5), ("ne", LAST, 5, 6),
    ("and", LAST, 2, 4), ("eq", 0xFF, 0x106, 0x105), ("and", 1, 4, 1)])
def test_a_word_is_masked_and_compared(attached, condition, mask, before, after):
    with attached.create_stream() as stream, attached.allocate_host(1, np.uint32) as word:
        word.array[0] = before
        stream.wait_value(word, 5, condition=condition, mask=mask)
        with pytest.raises(DeviceTimeout):
            stream.synchronize(0.02)
        word.array[0] = after
        stream.synchronize(10)


def test_the_program_releases_a_stream_by_a_store_to_pinned_memory(device, stream):
    with device.allocate_host(1, np.uint32) as word:
        word.array[0] = 0
        stream.wait_value(word, 1, condition="eq")
        time.sleep(0.05)
        word.array[0] = 1
        start = time.monotonic()
        stream.synchronize(10)
        promptly(start, 5)


