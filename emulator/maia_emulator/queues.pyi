from maia_emulator.interrupts import Vectors
from maia_emulator.memory import DeviceMemory
from maia_emulator.tiles import Tiles

class FrontEnd:
    memory: DeviceMemory
    tiles: Tiles
    vectors: Vectors
    def __init__(
        self, memory: DeviceMemory, tiles: Tiles, vectors: Vectors, *, max_queues: int, semaphores: int,
        max_kernels: int, tiles_per_cluster: int, spin_us: int, bar2_address: int, bell_address: int,
    ) -> None: ...
    def wake(self) -> None: ...
