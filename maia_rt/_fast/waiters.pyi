from collections.abc import Callable

class Waiters:
    @property
    def wake(self) -> Callable[[], object] | None: ...
    @property
    def sleeps(self) -> int: ...
