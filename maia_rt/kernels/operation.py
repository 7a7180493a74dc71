"""Operations as they are written down, and their encoding once every semaphore is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from maia_rt.contract.commands import PostOp, WaitOp
from maia_rt.contract.program import OP, Engine, MacroOp

Operand = tuple[int, int, int, int, int, int]
"""Offset, plane stride, row stride, space, dtype, index: a row of the contract's OPERAND."""
NO_OPERAND: Operand = (0, 0, 0, 0, 0, 0)


class Operation:
    """One macro-operation that was written; pass it as ``after=`` to make another of the same tile wait for it."""

    __slots__ = ("batch", "engine", "flags", "n", "opcode", "operands", "position", "scalars", "tile", "waits")

    def __init__(self, tile: int, engine: Engine, position: int, opcode: MacroOp, flags: int,
                 operands: tuple[Operand, ...], n: tuple[int, int, int], batch: int,
                 scalars: tuple[int, int], waits: dict[int, Operation]) -> None:
        self.tile = tile
        self.engine = engine
        self.position = position
        self.opcode = opcode
        self.flags = flags
        self.operands = operands
        self.n = n
        self.batch = batch
        self.scalars = scalars
        self.waits = waits


def encode(lists: Sequence[Sequence[Operation]]) -> npt.NDArray[Any]:
    """The operations of several streams as one array of OP, semaphores included."""
    posting: dict[tuple[int, int], set[int]] = {}
    for operations in lists:
        for operation in operations:
            for producer in operation.waits.values():
                posting.setdefault((producer.tile, producer.engine), set()).add(producer.position)
    counts = {key: {p: i + 1 for i, p in enumerate(sorted(positions))} for key, positions in posting.items()}
    every = [operation for operations in lists for operation in operations]
    ops = np.zeros(len(every), OP)
    ops["opcode"] = [o.opcode for o in every]
    ops["flags"] = [o.flags for o in every]
    ops["n"] = [o.n for o in every]
    ops["batch"] = [o.batch for o in every]
    ops["scalar"] = [o.scalars for o in every]
    operands = np.array([o.operands for o in every], np.int64)
    for i, name in enumerate(("offset", "plane_stride", "row_stride", "space", "dtype", "index")):
        ops["operand"][name] = operands[:, :, i]
    pre = np.zeros((len(every), 2, 3), np.int64)
    post = np.zeros((len(every), 3), np.int64)
    for row, operation in enumerate(every):
        for slot, producer in enumerate(operation.waits.values()):
            pre[row, slot] = (producer.engine, WaitOp.GE, counts[producer.tile, producer.engine][producer.position])
        if operation.position in posting.get((operation.tile, operation.engine), ()):
            post[row] = (operation.engine, PostOp.ADD, 1)
    for i, name in enumerate(("index", "op", "value")):
        ops["pre"][name] = pre[:, :, i]
        ops["post"][name][:, 0] = post[:, i]
    return ops
