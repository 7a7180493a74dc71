"""Address spaces hand out what is free, join what comes back, and say what is left when they are full."""

import gc
import itertools
import random
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from maia_rt.errors import InvalidArgument, OutOfMemory
from maia_rt.memory import AddressSpace, DeviceHeap

BASE = 0x1_0000_0000


def test_allocations_are_aligned_and_do_not_overlap():
    heap = DeviceHeap(BASE, 1 << 20)
    taken = [(heap.allocate(size, alignment), size, alignment)
             for size, alignment in [(1, 1), (1000, 4096), (256, 256), (5000, 65536), (300, 1)]]
    for address, size, alignment in taken:
        assert address % max(alignment, 256) == 0
        assert address >= BASE
        assert address + size <= BASE + (1 << 20)
    taken.sort()
    assert all(a + size <= b for (a, size, _), (b, _, _) in itertools.pairwise(taken))


def test_everything_freed_is_one_range_again():
    heap = DeviceHeap(BASE, 1 << 20)
    taken = [heap.allocate(4096) for _ in range(256)]
    with pytest.raises(OutOfMemory):
        heap.allocate(1)
    random.Random(7).shuffle(taken)
    for address in taken:
        heap.free(address)
    stats = heap.statistics()
    assert (stats.used, stats.free, stats.largest_free, stats.allocations) == (0, 1 << 20, 1 << 20, 0)
    assert stats.peak == 1 << 20
    assert heap.allocate(1 << 20) == BASE


def test_out_of_memory_names_size_free_and_largest():
    heap = DeviceHeap(0, 4096, granule=256)
    taken = [heap.allocate(256) for _ in range(16)]
    for address in taken[::2]:
        heap.free(address)
    with pytest.raises(OutOfMemory) as caught:
        heap.allocate(512)
    text = str(caught.value)
    assert "no room for 512 bytes" in text
    assert "2048 of 4096 bytes are free" in text
    assert "the largest range has 256" in text
    assert "8 allocations" in text
    assert "fragmented" in text
    with pytest.raises(OutOfMemory, match="too much is in use"):
        heap.allocate(4096)


def test_the_last_fitting_range_is_found_even_where_bins_round():
    heap = DeviceHeap(0, 1 << 20, granule=1)
    hole = heap.allocate(100_003)
    heap.allocate(heap.statistics().free)
    heap.free(hole)
    assert heap.allocate(100_003) == hole
    heap.free(hole)
    assert heap.allocate(1, 1 << 16) == 0
    with pytest.raises(OutOfMemory, match="aligned to 0x100000"):
        heap.allocate(1, 1 << 20)


@pytest.mark.parametrize(("size", "alignment"), [(0, 1), (-1, 1), (1, 0), (1, 3), (1, -4)])
def test_sizes_and_alignments_that_make_no_sense_are_refused(size, alignment):
    with pytest.raises(InvalidArgument):
        DeviceHeap(0, 4096).allocate(size, alignment)


def test_a_double_free_and_a_foreign_address_are_refused():
    heap = DeviceHeap(0, 4096)
    address = heap.allocate(512)
    with pytest.raises(InvalidArgument):
        heap.free(address + 256)
    heap.free(address)
    with pytest.raises(InvalidArgument, match="freed before"):
        heap.free(address)
    assert heap.statistics().free == 4096


def test_ranges_are_joined_cut_to_the_granule_and_never_bridged():
    space = AddressSpace([(0x3001, 0x5FFF), (0x1000, 0x2FFF), (0x3000, 0x3000), (0x8010, 0x9FFF), (0xB000, 0xB0FF)],
                         granule=0x1000, name="test")
    assert space.size == 0x6000
    assert {space.allocate(0x5000), space.allocate(0x1000)} == {0x1000, 0x9000}
    with pytest.raises(InvalidArgument):
        AddressSpace([(5, 4)], granule=1, name="test")
    with pytest.raises(InvalidArgument):
        AddressSpace([], granule=3, name="test")


def test_a_finalizer_inside_allocate_may_free():
    heap = DeviceHeap(0, 1 << 20)

    class Owner:
        def __init__(self):
            self.address = heap.allocate(256)
            self.me = self  # only the garbage collector ends it

        def __del__(self):
            heap.free(self.address)

    with heap._lock:  # as if a collection started in the middle of allocate
        owner = Owner.__new__(Owner)
        heap._allocated[0xFF00] = 256
        owner.address, owner.me = 0xFF00, owner
        heap._used += 256
        del owner
        gc.collect()
        assert 0xFF00 not in heap._allocated
    heap.allocate(256)
    assert not heap._returned


def test_threads_share_a_heap():
    heap = DeviceHeap(0, 1 << 20)

    def worker(seed):
        choose = random.Random(seed)
        mine = []
        for _ in range(500):
            if mine and choose.random() < 0.5:
                heap.free(mine.pop(choose.randrange(len(mine))))
            else:
                mine.append(heap.allocate(choose.randrange(1, 512)))
        for address in mine:
            heap.free(address)

    threads = [threading.Thread(target=worker, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heap.statistics().largest_free == 1 << 20


class HeapMachine(RuleBasedStateMachine):
    """Random allocations and frees against a plain list of what is taken."""

    @initialize(granule=st.sampled_from([1, 64, 256]), holes=st.lists(st.integers(1, 30), max_size=3))
    def start(self, granule, holes):
        ranges, at = [], 0
        for hole in [*holes, 200]:
            ranges.append((at, at + 100 * granule - 1))
            at += (100 + hole) * granule
        self.ranges = ranges
        self.granule = granule
        self.space = AddressSpace(ranges, granule=granule, name="test")
        self.taken = {}

    def free_runs(self):
        edges = sorted(self.taken.items())
        for first, last in self.ranges:
            at = first
            for start, size in edges:
                if first <= start <= last:
                    yield at, start
                    at = start + size
            yield at, last + 1

    @rule(size=st.integers(1, 6000), shift=st.integers(0, 10))
    def allocate(self, size, shift):
        alignment = max(1 << shift, self.granule)
        rounded = -(-size // self.granule) * self.granule
        fits = any(-(-start // alignment) * alignment + rounded <= end for start, end in self.free_runs())
        try:
            address = self.space.allocate(size, 1 << shift)
        except OutOfMemory:
            assert not fits
            return
        assert fits
        assert address % alignment == 0
        assert any(start <= address and address + rounded <= end for start, end in self.free_runs())
        self.taken[address] = rounded

    @precondition(lambda self: getattr(self, "taken", None))
    @rule(data=st.data())
    def free(self, data):
        address = data.draw(st.sampled_from(sorted(self.taken)))
        self.space.free(address)
        del self.taken[address]

    @invariant()
    def figures_agree(self):
        if not hasattr(self, "space"):
            return
        stats = self.space.statistics()
        assert stats.used == sum(self.taken.values())
        assert stats.allocations == len(self.taken)
        assert stats.largest_free == max((end - start for start, end in self.free_runs()), default=0)


TestHeapMachine = HeapMachine.TestCase
TestHeapMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
