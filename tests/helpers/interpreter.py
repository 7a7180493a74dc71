"""The contract's macro-operations in plain numpy: a second opinion on what an engine must compute.

Slow, and made to find mistakes: SRAM starts as NaN, so what was never loaded shows; engines run in a random order
that the semaphores allow, so a dependency that was forgotten shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from maia_rt.contract.commands import SEMAPHORE_OP
from maia_rt.contract.dtype import INTEGERS, MX_DTYPES, NUMPY_DTYPES, Dtype, array_shape
from maia_rt.contract.microscaling import from_mx, to_mx
from maia_rt.contract.program import (
    DST,
    SHARED_SEMAPHORE,
    A,
    ArgKind,
    B,
    C,
    KernelImage,
    MacroOp,
    OpFlag,
    Space,
)

_erf = np.frompyfunc(math.erf, 1, 1)


class IndexFault(Exception):
    """A GATHER index outside its table: a PROGRAM fault."""


class Interpreter:
    """Runs launches of one kernel.

    Parameters
    ----------
    kernel : KernelImage
    seed : int
        Of the order in which engines run.
    """

    def __init__(self, kernel: KernelImage, seed: int = 0) -> None:
        self.kernel = kernel
        self.random = np.random.default_rng(seed)
        self.macs = 0
        self.macro_ops = 0

    def launch(self, *args: np.ndarray | float) -> None:
        """Run to the end; OUT and INOUT arrays are written in place."""
        if len(args) != len(self.kernel.args):
            raise TypeError(f"{len(self.kernel.args)} arguments")
        self.memories: list[np.ndarray] = []
        self.scalar_args: list[float] = []
        for declared, value in zip(self.kernel.args, args, strict=True):
            if declared.kind is ArgKind.SCALAR:
                self.memories.append(np.zeros(0, np.uint8))
                self.scalar_args.append(float(value))
                continue
            if value.dtype != NUMPY_DTYPES[declared.dtype] or value.shape != declared.array_shape:
                raise TypeError(f"{declared.name}: {value.dtype} {value.shape} for {declared}")
            self.memories.append(value.reshape(-1).view(np.uint8))
            self.scalar_args.append(0.0)
        self.sram = [np.full(self.kernel.sram_bytes, 0xFF, np.uint8) for _ in range(self.kernel.tiles)]
        counts: dict[tuple[int, int], int] = {}
        at = [0] * len(self.kernel.streams)
        left = [i for i, s in enumerate(self.kernel.streams) if len(s.ops)]
        while left:
            ready = [i for i in left if self._ready(i, at[i], counts)]
            if not ready:
                raise AssertionError("the kernel hangs")
            # Runs of one engine find more than a fair mix does.
            i = int(self.random.choice(ready))
            for _ in range(int(self.random.integers(1, 12))):
                stream = self.kernel.streams[i]
                if at[i] == len(stream.ops) or not self._ready(i, at[i], counts):
                    break
                op = stream.ops[at[i]]
                self._run(stream.tile, op)
                self.macro_ops += 1
                for post in op["post"]:
                    if post["op"]:
                        key = self._key(stream.tile, int(post["index"]))
                        counts[key] = counts.get(key, 0) + int(post["value"])
                at[i] += 1
            left = [i for i in left if at[i] < len(self.kernel.streams[i].ops)]

    @staticmethod
    def _key(tile: int, index: int) -> tuple[int, int]:
        return (-1 if index & SHARED_SEMAPHORE else tile, index)

    def _ready(self, stream: int, at: int, counts: dict[tuple[int, int], int]) -> bool:
        tile = self.kernel.streams[stream].tile
        pre = self.kernel.streams[stream].ops[at]["pre"]
        assert pre.dtype == SEMAPHORE_OP
        return all(counts.get(self._key(tile, int(p["index"])), 0) >= int(p["value"]) for p in pre if p["op"])

    # ---------------------------------------------------------------------------------------------------------------

    def _memory(self, tile: int, operand: np.void) -> np.ndarray:
        return self.sram[tile] if operand["space"] == Space.TILE else self.memories[int(operand["index"])]

    def _view(self, tile: int, operand: np.void, dtype: np.dtype, planes: int, rows: int, columns: int) -> np.ndarray:
        memory = self._memory(tile, operand)
        offset, row, plane = (int(operand[f]) for f in ("offset", "row_stride", "plane_stride"))
        extent = offset + (planes - 1) * plane + (rows - 1) * row + columns * dtype.itemsize
        assert extent <= memory.size, "an operand leaves its memory"
        return np.ndarray((planes, rows, columns), dtype, memory, offset, (plane, row, dtype.itemsize))

    def _scalar(self, op: np.void, which: int) -> float:
        if int(op["flags"]) & (OpFlag.SCALAR0_ARG, OpFlag.SCALAR1_ARG)[which] and op["opcode"] != MacroOp.MATMUL:
            return float(np.float32(self.scalar_args[int(op["scalar"][which])]))
        return float(op["scalar"][which : which + 1].view(np.float32)[0])

    def _run(self, tile: int, op: np.void) -> None:
        opcode = MacroOp(int(op["opcode"]))
        n = [int(x) for x in op["n"]]
        operand = op["operand"]
        u1 = np.dtype(np.uint8)
        if opcode is MacroOp.MOVE:
            source = self._view(tile, operand[A], u1, n[2], n[1], n[0])
            self._view(tile, operand[DST], u1, n[2], n[1], n[0])[...] = source.copy()
        elif opcode is MacroOp.SET:
            pattern = np.frombuffer(op["scalar"][:1].tobytes() * (n[0] // 4), np.uint8)
            self._view(tile, operand[DST], u1, n[2], n[1], n[0])[...] = pattern
        elif opcode is MacroOp.GATHER:
            table = self._view(tile, operand[A], u1, 1, n[2], n[0])[0]
            index = self._view(tile, operand[B], np.dtype("<i4"), 1, 1, n[1])[0, 0]
            if (index < 0).any() or (index >= n[2]).any():
                raise IndexFault(f"{index} of {n[2]}")
            self._view(tile, operand[DST], u1, 1, n[1], n[0])[0] = table[index]
        elif opcode is MacroOp.MATMUL:
            self._matmul(tile, op, n)
        else:
            self._vector(tile, opcode, op, n)

    def _matmul(self, tile: int, op: np.void, n: list[int]) -> None:
        m, cols, k = n
        flags, batch = int(op["flags"]), int(op["batch"])
        self.macs += m * cols * k * batch
        if op["operand"][DST]["dtype"] == Dtype.INT32:
            self._matmul_integers(tile, op, n)
            return
        a = self._floats(tile, op, A, batch, *((k, m) if flags & OpFlag.TRANSPOSE_A else (m, k)))
        b = self._floats(tile, op, B, batch, *((cols, k) if flags & OpFlag.TRANSPOSE_B else (k, cols)))
        a = a.swapaxes(1, 2) if flags & OpFlag.TRANSPOSE_A else a
        b = b.swapaxes(1, 2) if flags & OpFlag.TRANSPOSE_B else b
        product = np.float32(self._scalar(op, 0)) * np.matmul(a, b)
        if flags & OpFlag.ACCUMULATE:
            product = product + self._floats(tile, op, DST, batch, m, cols)
        self._store(tile, op, batch, m, cols, product)

    def _floats(self, tile: int, op: np.void, slot: int, planes: int, rows: int, columns: int) -> np.ndarray:
        operand = op["operand"][slot]
        dtype = Dtype(int(operand["dtype"]))
        found = self._view(tile, operand, NUMPY_DTYPES[dtype], planes, rows, array_shape(dtype, (columns,))[0])
        return from_mx(found, dtype) if dtype in MX_DTYPES else found.astype(np.float32)

    def _integers(self, tile: int, op: np.void, slot: int, planes: int, rows: int, columns: int) -> np.ndarray:
        operand = op["operand"][slot]
        view = self._view(tile, operand, NUMPY_DTYPES[Dtype(int(operand["dtype"]))], planes, rows, columns)
        return view.astype(np.int64)

    def _store(self, tile: int, op: np.void, planes: int, rows: int, columns: int, out: np.ndarray) -> None:
        """Round to the destination's type; integers modulo 2^32 come as int64."""
        operand = op["operand"][DST]
        dtype = Dtype(int(operand["dtype"]))
        dst = self._view(tile, operand, NUMPY_DTYPES[dtype], planes, rows, array_shape(dtype, (columns,))[0])
        if dtype in MX_DTYPES:
            dst[...] = to_mx(out, dtype)
        elif dtype is Dtype.FP8_E4M3:
            dst[...] = np.clip(out, -448, 448).astype(dst.dtype)
        elif dtype in INTEGERS and out.dtype != np.int64:
            limits = np.iinfo(dst.dtype)
            whole = np.rint(np.nan_to_num(out.astype(np.float64), nan=0.0, posinf=2.0**40, neginf=-(2.0**40)))
            dst[...] = np.clip(whole, limits.min, limits.max).astype(dst.dtype)
        else:
            dst[...] = out.astype(dst.dtype)

    def _matmul_integers(self, tile: int, op: np.void, n: list[int]) -> None:
        m, cols, k = n
        flags, batch = int(op["flags"]), int(op["batch"])
        a = self._integers(tile, op, A, batch, *((k, m) if flags & OpFlag.TRANSPOSE_A else (m, k)))
        b = self._integers(tile, op, B, batch, *((cols, k) if flags & OpFlag.TRANSPOSE_B else (k, cols)))
        a = a.swapaxes(1, 2) if flags & OpFlag.TRANSPOSE_A else a
        b = b.swapaxes(1, 2) if flags & OpFlag.TRANSPOSE_B else b
        product = np.matmul(a, b)
        if flags & OpFlag.ACCUMULATE:
            product += self._integers(tile, op, DST, batch, m, cols)
        self._store(tile, op, batch, m, cols, product)

    def _exact(self, tile: int, opcode: MacroOp, op: np.void, n: list[int]) -> bool:
        """Integers among themselves."""
        columns, rows, planes = n
        dtypes = {Dtype(int(op["operand"][slot]["dtype"])) for slot in (DST, A)}
        if not dtypes <= INTEGERS or opcode is MacroOp.SCALE:
            return False
        out = self._integers(tile, op, A, planes, rows, columns)
        if opcode is MacroOp.CONVERT:
            limits = np.iinfo(NUMPY_DTYPES[Dtype(int(op["operand"][DST]["dtype"]))])
            out = np.clip(out, limits.min, limits.max)
        else:
            b = self._integers(tile, op, B, planes, rows, columns)
            out = {MacroOp.ADD: np.add, MacroOp.SUB: np.subtract, MacroOp.MUL: np.multiply}[opcode](out, b)
        self._store(tile, op, planes, rows, columns, out)
        return True

    def _vector(self, tile: int, opcode: MacroOp, op: np.void, n: list[int]) -> None:
        columns, rows, planes = n
        one = np.float32(1)
        if self._exact(tile, opcode, op, n):
            return
        s0 = np.float32(self._scalar(op, 0))
        a = self._floats(tile, op, A, planes, rows, columns)
        if opcode is MacroOp.MEAN_ROWS:
            mask = self._floats(tile, op, B, planes, 1, rows)
            total = np.einsum("pxr,prc->pc", mask, a, dtype=np.float32)
            mean = total / np.maximum(mask.sum(axis=(1, 2), dtype=np.float32), s0)[:, None]
            self._store(tile, op, planes, 1, columns, mean[:, None])
            return
        if opcode in (MacroOp.ADD, MacroOp.SUB, MacroOp.MUL):
            b = self._floats(tile, op, B, planes, rows, columns)
            with np.errstate(over="ignore"):  # past the largest number lies infinity
                out = {MacroOp.ADD: np.add, MacroOp.SUB: np.subtract, MacroOp.MUL: np.multiply}[opcode](a, b)
        elif opcode is MacroOp.SCALE:
            with np.errstate(over="ignore"):
                out = s0 * a + np.float32(self._scalar(op, 1))
        elif opcode is MacroOp.CONVERT:
            out = a
        elif opcode is MacroOp.GELU:
            out = (a * 0.5 * (1 + _erf(a.astype(np.float64) / math.sqrt(2)).astype(np.float64))).astype(np.float32)
        elif opcode is MacroOp.RELU:
            out = np.maximum(a, np.float32(0))
        elif opcode is MacroOp.TANH:
            out = np.tanh(a)
        elif opcode is MacroOp.EXP:
            out = np.exp(a)
        elif opcode is MacroOp.SOFTMAX:
            keep = np.ones(a.shape, bool)
            if op["operand"][B]["space"]:
                keep = self._floats(tile, op, B, planes, rows, columns) != 0
            x = np.where(keep, s0 * a, np.float32(-np.inf))
            most = x.max(axis=2, keepdims=True)
            with np.errstate(over="ignore"):  # to -inf, and exp of it is the 0 that is wanted
                e = np.where(keep, np.exp(x - np.where(np.isfinite(most), most, 0)), np.float32(0))
            total = e.sum(axis=2, keepdims=True, dtype=np.float32)
            out = np.where(total > 0, e / np.where(total > 0, total, one), np.float32(0))
        elif opcode is MacroOp.LAYERNORM:
            gamma, beta = (self._floats(tile, op, slot, 1, 1, columns) for slot in (B, C))
            centred = a - a.mean(axis=2, keepdims=True, dtype=np.float32)
            variance = np.square(centred).mean(axis=2, keepdims=True, dtype=np.float32)
            out = centred / np.sqrt(variance + s0) * gamma + beta
        elif opcode is MacroOp.L2_NORMALIZE:
            out = a / np.maximum(np.sqrt(np.square(a).sum(axis=2, keepdims=True, dtype=np.float32)), s0)
        else:
            raise AssertionError(opcode)
        self._store(tile, op, planes, rows, columns, out)


def run(kernel: KernelImage, args: Sequence[np.ndarray | float], seed: int = 0) -> Interpreter:
    """Launch once; returns the interpreter for its counts."""
    interpreter = Interpreter(kernel, seed)
    interpreter.launch(*args)
    return interpreter
