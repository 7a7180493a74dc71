"""The devices that the emulator can be: counts and sizes, and nothing else.

Public, with sources in docs/contract.md: clusters, tiles, HBM and PCIe Gen5 x8 of maia100, HBM of maia200. The
clusters, tiles, SRAM and link of maia200 are modelled on what was shown of it, without a source that we can name.
Everything else is ours: SRAM sizes of maia100, queues, semaphores, contexts, program limits, and all of `small`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from maia_rt.contract.program import Capabilities
from maia_rt.contract.registers import Profile as ProfileId

MIB: Final = 1 << 20
GIB: Final = 1 << 30


@dataclass(frozen=True)
class Profile:
    """One kind of device.

    Attributes
    ----------
    hbm_bar_bytes : int
        Size of BAR 4: the power of two that holds HBM.
    link_speed : int
        PCIe generation, as in Link Capabilities.
    link_us : float
        Microseconds of latency that the model of links takes, where it is asked for.
    """

    id: ProfileId
    model: str
    clusters: int
    tiles_per_cluster: int
    tile_sram_bytes: int
    cluster_sram_bytes: int
    hbm_bytes: int
    link_speed: int
    max_queues: int = 64
    priorities: int = 4
    semaphores: int = 1024
    min_entries_log2: int = 2
    max_entries_log2: int = 16
    max_contexts: int = 32
    ranges_per_context: int = 8
    max_kernels: int = 4096
    max_args: int = 32
    tile_semaphores: int = 64
    link_us: float = 1.0

    @property
    def tiles(self) -> int:
        """Tiles of the whole device."""
        return self.clusters * self.tiles_per_cluster

    @property
    def vectors(self) -> int:
        """MSI-X vectors: 0 for the device, one a queue."""
        return self.max_queues + 1

    @property
    def link_gbps(self) -> float:
        """What the model of links takes for eight lanes of its generation, in gigabits a second each way.

        Gen5: 32 GT/s a lane in blocks of 128 of 130 bits. Gen6: 64 GT/s in flits with 236 of 256 bytes of packets.
        """
        return 8 * (64 * 236 / 256 if self.link_speed == 6 else 32 * 128 / 130)

    @property
    def hbm_bar_bytes(self) -> int:
        """A BAR is a power of two; 216 GiB of HBM lie in one of 256 GiB."""
        return 1 << (self.hbm_bytes - 1).bit_length()

    @property
    def program_capabilities(self) -> Capabilities:
        """What the program verifier is told."""
        return Capabilities(
            tiles=self.tiles,
            tile_sram_bytes=self.tile_sram_bytes,
            tile_semaphores=self.tile_semaphores,
            max_args=self.max_args,
            max_kernels=self.max_kernels,
        )


PROFILES: Final[dict[str, Profile]] = {
    "small": Profile(
        ProfileId.SMALL, "MAIA small (emulated)", clusters=2, tiles_per_cluster=2, tile_sram_bytes=2 * MIB,
        cluster_sram_bytes=8 * MIB, hbm_bytes=1 * GIB, link_speed=5,
    ),
    "maia100": Profile(
        ProfileId.MAIA100, "MAIA 100 (emulated)", clusters=16, tiles_per_cluster=4, tile_sram_bytes=3 * MIB,
        cluster_sram_bytes=16 * MIB, hbm_bytes=64 * GIB, link_speed=5,
    ),
    "maia200": Profile(
        ProfileId.MAIA200, "MAIA 200 (emulated)", clusters=4, tiles_per_cluster=10, tile_sram_bytes=3 * MIB,
        cluster_sram_bytes=35 * MIB, hbm_bytes=216 * GIB, link_speed=6,
    ),
}
