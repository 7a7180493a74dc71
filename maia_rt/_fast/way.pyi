from collections.abc import Sequence

class Way:
    _copies: int
    _every: int
    def _make_plain(self, shift: int, first: int, size: int, fds: Sequence[int | None]) -> None: ...
    def _make_special(self) -> None: ...
