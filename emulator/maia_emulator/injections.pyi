FELL_SILENT: int
DIED: int
WENT: int
HUNG_UP: int

class Injections:
    def __init__(self, max_queues: int) -> None: ...
    def arm(self, raw: bytes) -> int: ...
