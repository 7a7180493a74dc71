"""A program image written with the contract alone: ``out = factor * x + y`` on FP32, one tile."""

import numpy as np

from maia_rt.contract import program
from maia_rt.contract.commands import PostOp, WaitOp
from maia_rt.contract.program import Arg, ArgKind, Dtype, Engine, KernelImage, MacroOp, OpFlag, Space, Stream

X, Y, OUT, FACTOR = range(4)
LOADED, SUMMED = 0, 1


def _operand(op, slot, space, *, index=0, offset=0, dtype=0, row_stride):
    operand = op["operand"][slot]
    operand["space"], operand["index"], operand["offset"] = space, index, offset
    operand["dtype"], operand["row_stride"] = dtype, row_stride


def _op(opcode, n, **fields):
    op = np.zeros((), program.OP)
    op["opcode"], op["n"] = opcode, n
    for name, value in fields.items():
        op[name] = value
    return op


def _semaphore(op, kind, index, code, value):
    op[kind][0]["index"], op[kind][0]["op"], op[kind][0]["value"] = index, code, value


def axpy(count=1000, name="axpy"):
    """A kernel of `count` elements: arguments x, y, out, factor."""
    nbytes = 4 * count
    at = [0, -(-nbytes // 64) * 64, -(-nbytes // 64) * 128]
    loads = []
    for arg in (X, Y):
        op = _op(MacroOp.MOVE, (nbytes, 1, 1))
        _operand(op, program.DST, Space.TILE, offset=at[arg], row_stride=nbytes)
        _operand(op, program.A, Space.ARG, index=arg, row_stride=nbytes)
        _semaphore(op, "post", LOADED, PostOp.ADD, 1)
        loads.append(op)
    scale = _op(MacroOp.SCALE, (count, 1, 1), flags=OpFlag.SCALAR0_ARG, scalar=(FACTOR, 0))
    _operand(scale, program.DST, Space.TILE, offset=at[2], dtype=Dtype.FP32, row_stride=nbytes)
    _operand(scale, program.A, Space.TILE, offset=at[X], dtype=Dtype.FP32, row_stride=nbytes)
    _semaphore(scale, "pre", LOADED, WaitOp.GE, 2)
    add = _op(MacroOp.ADD, (count, 1, 1))
    _operand(add, program.DST, Space.TILE, offset=at[2], dtype=Dtype.FP32, row_stride=nbytes)
    _operand(add, program.A, Space.TILE, offset=at[2], dtype=Dtype.FP32, row_stride=nbytes)
    _operand(add, program.B, Space.TILE, offset=at[Y], dtype=Dtype.FP32, row_stride=nbytes)
    _semaphore(add, "post", SUMMED, PostOp.ADD, 1)
    store = _op(MacroOp.MOVE, (nbytes, 1, 1))
    _operand(store, program.DST, Space.ARG, index=OUT, row_stride=nbytes)
    _operand(store, program.A, Space.TILE, offset=at[2], row_stride=nbytes)
    _semaphore(store, "pre", SUMMED, WaitOp.GE, 1)
    return KernelImage(
        name,
        (Arg("x", ArgKind.IN, Dtype.FP32, (count,)), Arg("y", ArgKind.IN, Dtype.FP32, (count,)),
         Arg("out", ArgKind.OUT, Dtype.FP32, (count,)), Arg("factor", ArgKind.SCALAR, Dtype.FP32)),
        (Stream(0, Engine.DMA, np.array([*loads, store], program.OP)),
         Stream(0, Engine.VECTOR, np.array([scale, add], program.OP))),
        tiles=1, sram_bytes=at[2] + nbytes, tile_semaphores=2)


def image(count=1000):
    """The image of the one kernel ``axpy``."""
    return program.write([axpy(count)])


def busy(products, name="busy"):
    """A kernel without arguments that keeps a tensor unit at one macro-operation, for `products` of 50,000 each."""
    depth = 50_000
    op = _op(MacroOp.MATMUL, (1, 1, depth), flags=OpFlag.TRANSPOSE_B, batch=products,
             scalar=(np.float32(1).view(np.uint32), 0))
    _operand(op, program.DST, Space.TILE, offset=8 * depth, dtype=Dtype.FP32, row_stride=4)
    op["operand"][program.DST]["plane_stride"] = 4
    _operand(op, program.A, Space.TILE, dtype=Dtype.FP32, row_stride=4 * depth)
    _operand(op, program.B, Space.TILE, offset=4 * depth, dtype=Dtype.FP32, row_stride=4 * depth)
    return KernelImage(name, (), (Stream(0, Engine.TENSOR, np.array([op], program.OP)),), tiles=1,
                       sram_bytes=8 * depth + 4 * products)
