from typing import Any

from maia_rt._fast.extent import Extent

class BufferExporter(Extent):
    @property
    def array(self) -> Any: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
