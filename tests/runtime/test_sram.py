"""SRAM of tiles and clusters as memory to allocate, and copies that several of them get at once."""

import numpy as np
import pytest

from maia_rt import Space
from maia_rt.errors import InvalidArgument, InvalidType, OutOfMemory
from tests.helpers import tiny_program

COUNT = 1000


def test_sram_is_copied_to_and_from(device, stream):
    data = np.arange(1000, dtype=np.int32)
    with device.allocate(1000, np.int32, space=Space.cluster(0)) as cluster, \
            device.allocate(1000, np.int32, space=Space.tile(1)) as tile:
        assert cluster.space == Space.cluster(0)
        stream.copy(cluster, data)
        stream.copy(tile[::-1], cluster)
        assert np.array_equal(tile.copy_to_host(stream), data[::-1])


def test_a_tiles_sram_is_given_out_from_its_end(device):
    size = device.capabilities.tile_sram_bytes
    with device.allocate(1000, space=Space.tile(0)) as first, \
            device.allocate(100, space=Space.tile(0), alignment=4096) as second:
        assert first.address + 1024 == 0x3000000000000 + size
        assert second.address % 4096 == 0
        assert second.address < first.address
        assert device.memory(Space.tile(0)).used == 1024 + 4096
        assert device.memory(Space.tile(1)).used == 0
    assert device.memory(Space.tile(0)).largest_free == size


def test_a_launch_does_not_run_over_allocated_sram(device, stream):
    tiles = device.capabilities.tiles_per_cluster
    size = device.capabilities.tile_sram_bytes
    with device.load(tiny_program.image(COUNT)) as program, device.upload(np.ones(COUNT, np.float32)) as x:
        kernel = program["axpy"]
        with device.allocate(1000, space=Space.tile(tiles)):
            stream.launch(kernel, x, x, x, 1.0)
        with device.allocate(size - kernel.sram_bytes + 1024, space=Space.tile(tiles)):
            submitted = stream.statistics().submitted
            for clusters in (0, 2, 3):
                with pytest.raises(InvalidArgument, match=rf"kernel 'axpy' uses the first {kernel.sram_bytes} bytes of "
                                                          rf"a tile's SRAM, and in tile {tiles} of cluster 1"):
                    stream.launch(kernel, x, x, x, 1.0, clusters=clusters)
            assert stream.statistics().submitted == submitted
            stream.launch(kernel, x, x, x, 1.0, clusters=1)
        stream.launch(kernel, x, x, x, 1.0)
        assert (x.copy_to_host(stream) == 8).all()


def test_a_multicast_to_every_tile_is_one_command(device, stream):
    data = np.random.default_rng(0).integers(0, 255, 5000, np.uint8)
    tiles = [device.allocate(5000, space=Space.tile(tile)) for tile in range(device.capabilities.tiles)]
    with device.upload(data) as source:
        assert stream.multicast(tiles, source) == 1
        for tile in tiles:
            assert np.array_equal(tile.copy_to_host(stream), data)
        assert stream.multicast(tiles[:1], source) == 1
        assert stream.multicast([], source) == 0
        stream.synchronize()
    for tile in tiles:
        tile.close()


def test_a_multicast_to_the_first_tile_of_each_cluster_and_to_the_clusters(device, stream):
    data = np.arange(64, dtype=np.uint8)
    per = device.capabilities.tiles_per_cluster
    clusters = range(device.capabilities.clusters)
    targets = [device.allocate(64, space=Space.tile(cluster * per)) for cluster in clusters]
    targets += [device.allocate(64, space=Space.cluster(cluster)) for cluster in clusters]
    with device.upload(data) as source:
        assert stream.multicast(targets[::-1], source) == 2
        for target in targets:
            assert np.array_equal(target.copy_to_host(stream), data)
            target.close()


def test_wrong_spaces_and_multicasts_are_refused(device, stream):
    for space, error in [(Space.tile(device.capabilities.tiles), InvalidArgument),
                         (Space.cluster(device.capabilities.clusters), InvalidArgument), ("tile", InvalidType)]:
        with pytest.raises(error):
            device.allocate(10, space=space)
    for call, error in [(lambda: Space.tile(-1), InvalidArgument), (lambda: Space.tile("a"), InvalidType),
                        (lambda: device.memory("hbm"), InvalidType),
                        (lambda: device.allocate(1, space=Space.tile(0), alignment=8192), InvalidArgument),
                        (lambda: device.allocate(1, space=Space.tile(0), alignment=3), InvalidArgument)]:
        with pytest.raises(error):
            call()
    with pytest.raises(OutOfMemory, match="the SRAM of tile 1"):
        device.allocate(device.capabilities.tile_sram_bytes + 1, space=Space.tile(1))
    with device.allocate(64) as source, device.allocate(64) as target:
        for dsts, error, text in [(3, InvalidType, "sequence"), ([b"a" * 64], InvalidType, r"dsts\[0\] is bytes"),
                                  ([target[:32]], InvalidArgument, r"dsts\[0\] has 32 bytes"),
                                  ([target, target], InvalidArgument, "overlap"),
                                  ([target[::2]], InvalidArgument, "strided")]:
            with pytest.raises(error, match=text):
                stream.multicast(dsts, source)
    assert stream.statistics().submitted == 0


def test_a_reset_frees_sram(device):
    buffer = device.allocate(64, space=Space.tile(0))
    device.reset()
    assert buffer.closed
    assert device.memory(Space.tile(0)).used == 0
