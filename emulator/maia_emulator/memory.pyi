from collections.abc import Callable

from maia_emulator.dma import DmaTable

class DeviceMemory:
    dma: DmaTable
    hbm_fd: int
    hbm_bytes: int
    tile_bytes: int
    cluster_bytes: int
    tiles: int
    clusters: int
    def __init__(
        self, *, clusters: int, tiles: int, tile_bytes: int, cluster_bytes: int, hbm_bytes: int, id: bytes
    ) -> None: ...
    def set_messages(
        self, read: Callable[[int, int], bytes] | None, write: Callable[[int, bytes], None] | None
    ) -> None: ...
    def clear(self) -> None: ...
    def read(self, address: int, size: int) -> bytes: ...
    def write(self, address: int, data: bytes) -> None: ...
    def mapped(self, address: int, size: int) -> bool: ...
