from typing import Any

class Extent:
    _address: int
    _parent: Any
    _closed: bool
    _fits: set[object]
    _run: int
    readonly: bool
    device: Any
