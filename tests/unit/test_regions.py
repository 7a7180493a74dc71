"""DMA memory is shared, sealed, there from the start, absent from children, and never pulled away under a user."""

import ctypes
import fcntl
import logging
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from helpers.scripted_server import Device, playing, until_closed

from maia_rt.errors import ClosedError, DeviceLost, InvalidArgument, MemlockLimit, OutOfMemory
from maia_rt.memory import DmaRegion, PinnedPool, check_memlock, regions
from maia_rt.transport.mapping import SharedMapping
from maia_rt.transport.vfio_user import VfioUserClient

ROOT = Path(__file__).resolve().parents[2]


def test_the_memory_is_the_files_memory():
    with DmaRegion(5000) as region:
        assert region.size == 8192
        assert region.page_size == 4096
        with region.view() as view:
            assert len(view) == 8192
            assert bytes(view) == bytes(8192)
            view[:5] = b"hello"
        assert os.pread(region.fd, 5, region.offset) == b"hello"
        assert ctypes.string_at(region.address, 5) == b"hello"


def test_the_file_is_sealed_and_does_not_survive_exec():
    with DmaRegion(4096) as region:
        for size in (0, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(region.fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert not os.get_inheritable(region.fd)


def test_its_pages_exist_before_they_are_touched():
    with DmaRegion(1 << 20) as region:
        assert os.fstat(region.fd).st_blocks * 512 >= 1 << 20


def test_a_region_with_views_does_not_close():
    region = DmaRegion(4096)
    array = np.frombuffer(region.view()[128:256], np.uint32)
    with pytest.raises(InvalidArgument, match="still in use"):
        region.close()
    array[0] = 7
    assert os.pread(region.fd, 4, 128) == b"\7\0\0\0"
    del array
    region.close()
    region.close()
    assert region.closed
    with pytest.raises(ClosedError):
        region.view()


def test_released_memory_lives_as_long_as_its_last_view():
    region = DmaRegion(4096)
    view = region.view()
    region.release()
    region.release()
    view[0] = 1
    mapped = _mapped_regions()
    del view
    assert _mapped_regions() == mapped - 1


def _mapped_regions():
    return Path("/proc/self/maps").read_text().count("memfd:maia-dma")


def test_a_forgotten_region_is_given_back_with_a_warning():
    with pytest.warns(ResourceWarning, match="8192 bytes was not closed"):
        DmaRegion(8192)


def test_sizes_that_make_no_sense_are_refused():
    for size in (0, -1):
        with pytest.raises(InvalidArgument):
            DmaRegion(size)


def test_more_than_the_host_has_is_out_of_memory():
    with pytest.raises(OutOfMemory):
        DmaRegion(1 << 62)


def test_without_huge_pages_ordinary_ones_are_used_and_the_reason_is_said_once(caplog, monkeypatch):
    huge = regions.huge_page_size()
    free = Path(f"/sys/kernel/mm/hugepages/hugepages-{huge >> 10}kB/free_hugepages")
    available = int(free.read_text()) if huge and free.exists() else 0
    monkeypatch.setattr(regions, "_said", set())
    with caplog.at_level(logging.INFO), DmaRegion(huge or 4096) as one, DmaRegion(huge or 4096) as two:
        if available >= 2:
            assert one.page_size == two.page_size == huge
            assert not caplog.text
        elif not available:
            assert one.page_size == two.page_size == 4096
            assert caplog.text.count("huge pages") == (1 if huge else 0)
    with caplog.at_level(logging.INFO), DmaRegion(huge or 4096, huge_pages=False) as region:
        assert region.page_size == 4096


def test_a_forked_child_has_neither_the_memory_nor_the_file():
    code = """
        import os, warnings
        from pathlib import Path
        warnings.simplefilter("ignore", DeprecationWarning)
        from maia_rt.errors import ForkedError
        from maia_rt.memory import DmaRegion
        region = DmaRegion(1 << 20)
        view = region.view()
        number = region.fd
        child = os.fork()
        if child == 0:
            problems = []
            try:
                region.view()
                problems.append("view")
            except ForkedError:
                pass
            if "maia-dma" in Path("/proc/self/maps").read_text():
                problems.append("mapped")
            if "maia-dma" in "".join(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")[:-1]):
                problems.append("open")
            blocks = [bytearray(1 << 20) for _ in range(8)]     # may land where the region was
            region.close()
            region.release()
            del view, region
            assert all(not any(block[::4096]) for block in blocks)
            print(problems, flush=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        view[0] = 1
        del view
        region.close()
    """
    done = subprocess.run([sys.executable, "-W", "error::ResourceWarning", "-c", textwrap.dedent(code)], text=True,
                          capture_output=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_a_mapping_that_cannot_be_says_why():
    with pytest.raises(OSError, match="Bad file descriptor"):
        SharedMapping(-1, 4096)


# --- limits ----------------------------------------------------------------------------------------------------------


def test_the_memlock_limit_is_named_before_anything_is_pinned():
    code = """
        import os, resource
        from maia_rt.errors import MemlockLimit
        from maia_rt.memory import check_memlock
        soft, hard = 1 << 20, 2 << 20
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
        if os.getuid() == 0:
            check_memlock(1 << 40)      # CAP_IPC_LOCK lifts it
            os.setgid(65534)
            os.setuid(65534)
        check_memlock(1 << 20)
        try:
            check_memlock((1 << 20) + 1)
        except MemlockLimit as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], text=True, capture_output=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stderr == ""
    assert done.stdout == ("1048577 bytes cannot be pinned: RLIMIT_MEMLOCK is 1048576 bytes, 0 are in use. "
                           "Try: ulimit -l 2048\n")


def test_no_memlock_limit_is_no_limit(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    check_memlock(1 << 50)


# --- pinned pools ----------------------------------------------------------------------------------------------------


def serving(**device):
    """A server that accepts every map; the list gets what the client asked for."""
    seen = []

    def script(peer):
        Device(**device).handshake(peer)
        handshake = len(peer.seen)
        until_closed(peer)
        seen.extend(request.command for request in peer.seen[handshake:])

    return script, seen


def test_a_pool_maps_regions_and_hands_out_their_pieces():
    script, seen = serving()
    with playing(script) as sock, VfioUserClient.from_socket(sock, "scripted") as device:
        with PinnedPool(device, region_size=64 << 10) as pool:
            a, b, c = pool.allocate(100), pool.allocate(4096, 4096), pool.allocate(200_000)
            assert a.iova % 64 == 0
            assert b.iova % 4096 == b.address % 4096 == 0
            assert len({a.iova, b.iova, c.iova}) == 3
            a.view()[:] = bytes(100)
            c.view()[199_999] = 9
            assert pool.statistics().allocations == 3
            for block in (a, b, c):
                block.free()
                block.free()
            with pytest.raises(ClosedError):
                a.view()
            assert pool.statistics().used == 0
            assert pool.trim() == 65536 + 200704
        with pytest.raises(ClosedError):
            pool.allocate(1)
    assert seen == [2, 2, 3, 3]


def test_an_empty_region_makes_room_for_another():
    script, seen = serving(version=b'{"capabilities":{"max_dma_maps":1}}\0')
    with playing(script) as sock, VfioUserClient.from_socket(sock, "scripted") as device:
        pool = PinnedPool(device, region_size=4096)
        pool.allocate(4096).free()
        block = pool.allocate(8192)
        with pytest.raises(MemlockLimit, match="all 1 DMA mappings"):
            pool.allocate(16384)
        block.free()
        pool.close()
        pool.close()
    assert seen == [2, 3, 2, 3]


def test_a_region_that_a_device_has_mapped_does_not_close():
    script, _ = serving()
    with playing(script) as sock, VfioUserClient.from_socket(sock, "scripted") as device:
        region = DmaRegion(4096)
        device.dma_map(0x1000, region)
        with pytest.raises(InvalidArgument, match="unmap it"):
            region.close()
        device.dma_unmap(0x1000, 4096)
        region.close()


def test_a_pool_closes_when_its_device_is_gone():
    def script(peer):
        Device().handshake(peer)
        peer.reply(peer.request(2))

    with playing(script) as sock, VfioUserClient.from_socket(sock, "scripted") as device:
        pool = PinnedPool(device)
        block = pool.allocate(4096)
        view = block.view()
        with pytest.raises(DeviceLost):
            device.read(0, 0, 4)
        pool.close()
        view[0] = 1
        block.free()
        del view


def test_a_forgotten_block_goes_back_with_a_warning():
    script, _ = serving()
    with playing(script) as sock, VfioUserClient.from_socket(sock, "scripted") as device, PinnedPool(device) as pool:
        with pytest.warns(ResourceWarning, match="100 bytes of pinned memory"):
            pool.allocate(100)
        assert pool.statistics().allocations == 0


def test_nonsense_is_refused():
    script, _ = serving()
    with playing(script) as sock, VfioUserClient.from_socket(sock, "scripted") as device:
        with pytest.raises(InvalidArgument):
            PinnedPool(device, region_size=0)
        with PinnedPool(device) as pool:
            for size, alignment in ((0, 64), (-1, 64), (64, 3), (64, 0)):
                with pytest.raises(InvalidArgument):
                    pool.allocate(size, alignment)
