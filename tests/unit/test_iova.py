"""I/O virtual addresses come from the usable ranges only."""

import pytest

from maia_rt.errors import InvalidArgument, ResourceExhausted
from maia_rt.memory import IovaAllocator

X86 = [(0, 0xFEDF_FFFF), (0xFEF0_0000, 0xFFFF_FFFF_FFFF)]


def test_the_interrupt_window_is_never_handed_out():
    iovas = IovaAllocator(X86, 4096, address_bits=32)
    assert iovas.size == 0x1_0000_0000 - 0x10_0000 - 4096
    seen = []
    with pytest.raises(ResourceExhausted):
        while True:
            seen.append(iovas.allocate(0x10_0000))
    assert len(seen) > 4000
    assert all(at + 0x10_0000 <= 0xFEE0_0000 or at >= 0xFEF0_0000 for at in seen)


def test_page_zero_is_never_handed_out():
    iovas = IovaAllocator([(0, 0x3FFF)], 4096)
    assert sorted(iovas.allocate(4096) for _ in range(3)) == [0x1000, 0x2000, 0x3000]


def test_a_device_with_few_address_bits_gets_low_addresses():
    iovas = IovaAllocator(X86, 4096, address_bits=28)
    assert iovas.size == (1 << 28) - 4096
    with pytest.raises(InvalidArgument, match="28 bits"):
        IovaAllocator([(1 << 30, 1 << 31)], 4096, address_bits=28)


def test_addresses_are_whole_pages_of_the_smallest_size():
    iovas = IovaAllocator([(0, (1 << 64) - 1)], 0x201000)
    first, second = iovas.allocate(1), iovas.allocate(4097)
    assert iovas.size_of(first) == 4096
    assert iovas.size_of(second) == 8192
    assert iovas.allocate(1 << 21, 1 << 21) % (1 << 21) == 0


def test_no_more_addresses_names_the_figures():
    iovas = IovaAllocator([(0, 0x2FFF)], 4096)
    iovas.allocate(4096)
    with pytest.raises(ResourceExhausted, match="4096 of 8192 bytes are free"):
        iovas.allocate(8192)
