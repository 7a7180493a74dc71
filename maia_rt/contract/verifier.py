"""What a program image may do: the check that builders and devices run before anything is loaded.

After it only argument addresses and GATHER indices are left to check while a kernel runs. Semaphores of
macro-operations only count up and waits are >=, so whether a kernel can finish does not depend on timing: the verifier
runs the streams to their end in its head and refuses a kernel that would hang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from maia_rt.contract.commands import PostOp, WaitOp
from maia_rt.contract.dtype import DTYPE_BITS, FLOATS, INTEGERS, MINOR_0_DTYPES, MX_BLOCK, MX_DTYPES, Dtype
from maia_rt.contract.program import (
    DST,
    OPERAND,
    SHARED_SEMAPHORE,
    A,
    ArgKind,
    B,
    C,
    Capabilities,
    Engine,
    Image,
    KernelImage,
    MacroOp,
    OpFlag,
    Space,
    refused,
)


def verify(image: Image, capabilities: Capabilities) -> None:
    """Check that a device with these capabilities can run every kernel of an image without doing harm.

    After this only argument addresses and GATHER indices are left to check while a kernel runs.

    Raises
    ------
    ProgramError
        One sentence: kernel, field, and the capability that lacks.
    """
    if not 1 <= len(image.kernels) <= capabilities.max_kernels:
        raise refused("image", f"{len(image.kernels)} kernels; the device takes 1 to {capabilities.max_kernels}", "")
    for kernel in image.kernels:
        where = f"kernel {kernel.name!r}"
        for what, need, have in (
            ("tiles", kernel.tiles, capabilities.tiles),
            ("sram_bytes", kernel.sram_bytes, capabilities.tile_sram_bytes),
            ("tile_semaphores", kernel.tile_semaphores, capabilities.tile_semaphores),
            ("shared_semaphores", kernel.shared_semaphores, capabilities.tile_semaphores),
            ("arg_count", len(kernel.args), capabilities.max_args),
        ):
            if need > have:
                raise refused(f"{where}.{what}", f"needs {need}, the device has {have}",
                               "built for a larger device")
        if kernel.tiles < 1:
            raise refused(f"{where}.tiles", "is 0", "")
        for arg in kernel.args:
            if arg.dtype not in capabilities.dtypes:
                raise refused(f"{where} argument {arg.name!r}.dtype", f"the device has no {arg.dtype.name}", "")
            if arg.dtype in MX_DTYPES and (not arg.shape or arg.shape[-1] % MX_BLOCK):
                raise refused(f"{where} argument {arg.name!r}.shape",
                              f"rows of {arg.dtype.name} are a multiple of {MX_BLOCK} elements", "")
        seen: set[tuple[int, Engine]] = set()
        for stream in kernel.streams:
            at = f"{where} tile {stream.tile} {stream.engine.name}"
            if stream.tile >= kernel.tiles:
                raise refused(at, f"the kernel has {kernel.tiles} tiles", "")
            if (stream.tile, stream.engine) in seen:
                raise refused(at, "has two streams", "")
            seen.add((stream.tile, stream.engine))
        _verify_ops(kernel, where, _computed(image.minor, capabilities))
        _verify_order(kernel, where)


def _computed(minor: int, capabilities: Capabilities) -> frozenset[Dtype]:
    """What tensor and vector units take in an image of this minor version on this device."""
    if minor == 0:
        return capabilities.dtypes & FLOATS & MINOR_0_DTYPES
    return capabilities.dtypes & (FLOATS | INTEGERS if Dtype.INT8 in capabilities.dtypes else FLOATS)


def _verify_ops(kernel: KernelImage, where: str, computed: frozenset[Dtype]) -> None:
    """Look at every operation of every stream, all at once: a check is one pass over one array."""
    if not any(len(s.ops) for s in kernel.streams):
        return
    ops = np.concatenate([s.ops for s in kernel.streams])
    ends = np.cumsum([len(s.ops) for s in kernel.streams])
    engine = np.repeat([int(s.engine) for s in kernel.streams], [len(s.ops) for s in kernel.streams])
    opcode = ops["opcode"].astype(np.int64)

    def refuse(bad: npt.NDArray[Any], what: str, why: str) -> None:
        if bad.any():
            i = int(np.argmax(bad))
            number = int(np.searchsorted(ends, i, side="right"))
            stream = kernel.streams[number]
            first = int(ends[number]) - len(stream.ops)
            raise refused(f"{where} tile {stream.tile} {stream.engine.name} operation {i - first} "
                           f"({_op_name(int(opcode[i]))}).{what}", why, "")

    refuse(~_among(opcode, MacroOp), "opcode", "is not in the contract")
    refuse(np.minimum(opcode >> 4, 2) != engine, "opcode", "does not run on this engine")
    refuse((ops["reserved"] != 0) | ops["reserved1"].any(axis=1), "reserved", "is not zero")
    flags = ops["flags"].astype(np.int64)
    allowed = np.where(opcode == MacroOp.MATMUL, 15, np.where(_among(opcode, _SCALAR_OPS), 24, 0))
    refuse((flags & ~allowed) != 0, "flags", "are not this operation's")
    for i, bit in enumerate((OpFlag.SCALAR0_ARG, OpFlag.SCALAR1_ARG)):
        scalars = np.array([a.kind == ArgKind.SCALAR for a in kernel.args] + [False])
        number = np.minimum(ops["scalar"][:, i].astype(np.int64), len(kernel.args))
        refuse(((flags & bit) != 0) & ~scalars[number], f"scalar[{i}]", "names no SCALAR argument")
    for group, largest in (("pre", WaitOp.GE), ("post", PostOp.ADD)):
        sem = ops[group]
        used = sem["op"] != 0
        index = sem["index"].astype(np.int64)
        limit = np.where(index & SHARED_SEMAPHORE, kernel.shared_semaphores, kernel.tile_semaphores)
        only = WaitOp.GE if group == "pre" else PostOp.ADD
        refuse((used & (sem["op"] != only)).any(axis=1), group, f"must be {largest.name}")
        refuse((used & ((index & ~SHARED_SEMAPHORE) >= limit)).any(axis=1), group,
               "names a semaphore past the declared ones")
        refuse((used & (sem["value"] >= 1 << 20)).any(axis=1), group, "has a value past 2^20")
        refuse((sem["reserved"] != 0).any(axis=1), f"{group}.reserved", "is not zero")
    n = ops["n"].astype(np.int64)
    batch = ops["batch"].astype(np.int64)
    refuse((n == 0).any(axis=1) | (n > 1 << 24).any(axis=1), "n", "is 0 or past 2^24")
    matmul = opcode == MacroOp.MATMUL
    refuse((matmul & ((batch == 0) | (batch > 1 << 16))) | (~matmul & (batch != 0)), "batch", "is out of range")
    refuse((opcode == MacroOp.SET) & (n[:, 0] % 4 != 0), "n", "has rows that are no multiple of 4 bytes")
    _verify_dtypes(ops, opcode, flags, refuse, computed)
    _verify_operands(kernel, ops, opcode, n, batch, flags, refuse)


def _verify_dtypes(ops: npt.NDArray[Any], opcode: npt.NDArray[Any], flags: npt.NDArray[Any],
                   refuse: Callable[[npt.NDArray[Any], str, str], None], computed: frozenset[Dtype]) -> None:
    """Which operations take which types (docs/contract.md, "Macro-operations")."""
    dtype = ops["operand"]["dtype"].astype(np.int64)
    used = ops["operand"]["space"] != Space.NONE
    dma = opcode < 0x10
    for slot, name in enumerate(_SLOTS):
        d, here = dtype[:, slot], used[:, slot]
        indices = (opcode == MacroOp.GATHER) & (slot == B)
        refuse(here & dma & ~indices & (d != 0), f"{name}.dtype", "DMA moves bytes: the dtype is 0")
        refuse(indices & ((d != Dtype.INT32) | (ops["operand"]["space"][:, slot] != Space.TILE)), f"{name}.dtype",
               "indices are INT32 in TILE")
        refuse(here & ~dma & ~_among(d, computed), f"{name}.dtype",
               "is no type that this device, or an image of this version, computes with")
    d = np.where(used & ~dma[:, None], dtype, 0)
    integer = _among(d, INTEGERS)
    some = integer.any(axis=1)
    matmul = opcode == MacroOp.MATMUL
    refuse(matmul & some & ((d[:, DST] != Dtype.INT32) | (d[:, A] != Dtype.INT8) | (d[:, B] != Dtype.INT8)), "dtype",
           "is not INT8 times INT8 into INT32, the one product of integers")
    refuse(matmul & some & (ops["scalar"][:, 0] != _ONE), "scalar[0]", "is not 1, as in a product of integers")
    refuse(_among(opcode, _BINARY) & some & ((d != Dtype.INT32) & (d != 0)).any(axis=1), "dtype",
           "mixes integers: all three operands are INT32, or none is an integer")
    refuse(some & ~_among(opcode, _BINARY | _CONVERTING) & ~matmul, "dtype", "is an integer, which this does not take")
    mx = _among(d, MX_DTYPES)
    refuse(matmul & mx[:, A] & ((flags & OpFlag.TRANSPOSE_A) != 0), "a.dtype",
           "is MX, whose blocks run along k: A is stored m x k")
    refuse(matmul & mx[:, B] & ((flags & OpFlag.TRANSPOSE_B) == 0), "b.dtype",
           "is MX, whose blocks run along k: B is stored n x k, with TRANSPOSE_B")
    refuse((opcode == MacroOp.MEAN_ROWS) & mx[:, B], "b.dtype", "is MX: weights of rows are not")


def _verify_operands(kernel: KernelImage, ops: npt.NDArray[Any], opcode: npt.NDArray[Any], n: npt.NDArray[Any],
                     batch: npt.NDArray[Any], flags: npt.NDArray[Any],
                     refuse: Callable[[npt.NDArray[Any], str, str], None]) -> None:
    operand = ops["operand"]
    space = operand["space"].astype(np.int64)
    dtype = operand["dtype"].astype(np.int64)
    buffers = [a.nbytes if a.kind != ArgKind.SCALAR else -1 for a in kernel.args]
    writable = np.array([a.kind in (ArgKind.OUT, ArgKind.INOUT) for a in kernel.args] + [False])
    sizes = np.array([*buffers, -1], np.int64)
    dma = opcode < 0x10
    for slot, name in enumerate(_SLOTS):
        want = _among(opcode, OPERANDS[slot])
        may = want | _among(opcode, _OPTIONAL[slot])
        s = space[:, slot]
        refuse(want & (s == Space.NONE), name, "is missing")
        raw = np.ascontiguousarray(operand[:, slot]).view("u1").reshape(len(ops), OPERAND.itemsize)
        refuse(~may & raw.any(axis=1), name, "is not this operation's")
        refuse(s > Space.ARG, f"{name}.space", "does not exist")
        used = s != Space.NONE
        index = operand["index"][:, slot].astype(np.int64)
        refuse(used & ~dma & (s != Space.TILE), f"{name}.space", "is not TILE")
        d = dtype[:, slot]
        indices = (opcode == MacroOp.GATHER) & (slot == B)
        bytes_only = dma & ~indices
        bits = np.where(bytes_only, 8, DTYPE_BITS[np.minimum(d, len(DTYPE_BITS) - 1)])
        mx = _among(d, MX_DTYPES) & ~bytes_only
        row, rows, planes = _shape(slot, opcode, n, batch, flags)
        refuse(used & mx & (row % MX_BLOCK != 0), name, f"has MX rows that are no multiple of {MX_BLOCK} elements")
        size = row * bits // 8 + np.where(mx, row // MX_BLOCK, 0)
        offset = operand["offset"][:, slot]
        refuse(used & (offset >= 1 << 48), f"{name}.offset", "is past 2^48")
        offset = np.minimum(offset, 1 << 48).astype(np.int64)
        row_stride = operand["row_stride"][:, slot].astype(np.int64)
        plane = operand["plane_stride"][:, slot]
        refuse(used & (plane >= 1 << 40), f"{name}.plane_stride", "is past 2^40")
        plane_stride = np.minimum(plane, 1 << 40).astype(np.int64)
        align = np.where(mx, 1, np.maximum(bits // 8, 1))
        refuse(used & ((offset % align != 0) | (row_stride % align != 0) | (plane_stride % align != 0)), name,
               "is not aligned to its elements")
        # Sources may show one row again and again, but BLAS wants a leading dimension of at least a row.
        distinct = (slot == DST) | (opcode == MacroOp.MATMUL) | (row_stride != 0)
        refuse(used & (rows > 1) & (row_stride < size) & distinct,
               f"{name}.row_stride", "is shorter than a row")
        refuse(used & (planes > 1) & (slot == DST) & (plane_stride < (rows - 1) * row_stride + size),
               f"{name}.plane_stride", "is shorter than a plane")
        # In floating point first: the product of three hostile 24..40-bit numbers must not wrap.
        extent_wide = (planes - 1.0) * plane_stride + (rows - 1.0) * row_stride + size + offset
        extent = np.where(extent_wide < 2.0**62, (planes - 1) * plane_stride + (rows - 1) * row_stride
                          + size + offset, 1 << 62)
        tile = used & (s == Space.TILE)
        refuse(tile & (extent > kernel.sram_bytes), name, f"leaves the {kernel.sram_bytes} bytes of SRAM declared")
        refuse(used & (index != 0) & (s == Space.TILE), f"{name}.index", "is not zero")
        arg = used & (s == Space.ARG)
        number = np.minimum(index, len(kernel.args))
        refuse(arg & (sizes[number] < 0), f"{name}.index", "names no buffer argument")
        refuse(arg & (extent > sizes[number]), name, "leaves its argument")
        if slot == DST:
            refuse(arg & ~writable[number], name, "writes an argument declared IN")


def _among(values: npt.NDArray[Any], members: Iterable[int]) -> npt.NDArray[Any]:
    """Whether each value (not negative) is one of a few below 255."""
    table = np.zeros(256, bool)
    table[[int(m) for m in members]] = True
    found: npt.NDArray[Any] = table[np.minimum(values, 255)]
    return found


def _shape(slot: int, opcode: npt.NDArray[Any], n: npt.NDArray[Any], batch: npt.NDArray[Any],
           flags: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Row length in elements, rows and planes of an operand."""
    row, rows, planes = n[:, 0].copy(), n[:, 1].copy(), n[:, 2].copy()
    m, cols, k = n[:, 0], n[:, 1], n[:, 2]
    matmul = opcode == MacroOp.MATMUL
    if slot == DST:
        row, rows = np.where(matmul, cols, row), np.where(matmul, m, rows)
    elif slot == A:
        transposed = (flags & OpFlag.TRANSPOSE_A) != 0
        row = np.where(matmul, np.where(transposed, m, k), row)
        rows = np.where(matmul, np.where(transposed, k, m), rows)
    elif slot == B:
        transposed = (flags & OpFlag.TRANSPOSE_B) != 0
        row = np.where(matmul, np.where(transposed, k, cols), row)
        rows = np.where(matmul, np.where(transposed, cols, k), rows)
    planes = np.where(matmul, batch, planes)
    gather = opcode == MacroOp.GATHER
    if slot == A:
        rows = np.where(gather, n[:, 2], rows)
    if slot == B:
        row, rows = np.where(gather, n[:, 1], row), np.where(gather, 1, rows)
    planes = np.where(gather, 1, planes)
    if slot in (B, C):
        row_vector = opcode == MacroOp.LAYERNORM
        rows, planes = np.where(row_vector, 1, rows), np.where(row_vector, 1, planes)
    mean = opcode == MacroOp.MEAN_ROWS
    if slot == DST:
        rows = np.where(mean, 1, rows)
    if slot == B:
        row, rows = np.where(mean, n[:, 1], row), np.where(mean, 1, rows)
    return row, rows, planes


def _verify_order(kernel: KernelImage, where: str) -> None:
    """Run the streams against their semaphores; refuse what would hang. The result is the same in any order."""
    counts: dict[tuple[int, int], int] = {}
    programs = []
    for stream in kernel.streams:
        sems = np.concatenate([stream.ops["pre"], stream.ops["post"]], axis=1)
        places = np.flatnonzero(sems["op"].any(axis=1))
        sems = sems[places]
        programs.append((stream, places, sems["op"].tolist(), sems["index"].tolist(), sems["value"].tolist()))
    at = [0] * len(programs)
    moved = True
    while moved:
        moved = False
        for number, (stream, _, op, index, value) in enumerate(programs):
            while at[number] < len(op):
                i = at[number]
                keys = [(-1 if x & SHARED_SEMAPHORE else stream.tile, x) for x in index[i]]
                if any(op[i][j] and counts.get(keys[j], 0) < value[i][j] for j in (0, 1)):
                    break
                for j in (2, 3):
                    if op[i][j]:
                        counts[keys[j]] = counts.get(keys[j], 0) + value[i][j]
                at[number] += 1
                moved = True
    for number, (stream, places, op, index, value) in enumerate(programs):
        if at[number] < len(op):
            i = at[number]
            waits = " and ".join(f"semaphore {x:#x} >= {v}" for o, x, v in
                                 zip(op[i][:2], index[i][:2], value[i][:2], strict=True) if o)
            raise refused(f"{where} tile {stream.tile} {stream.engine.name} operation {places[i]}",
                           f"would wait for {waits} for ever", "a post is missing or two streams wait for each other")


_SLOTS = ("dst", "a", "b", "c")
_ONE = 0x3F800000
_CONVERTING = {int(MacroOp.SCALE), int(MacroOp.CONVERT)}
_BINARY = {int(MacroOp.ADD), int(MacroOp.SUB), int(MacroOp.MUL)}
_SCALAR_OPS = {int(o) for o in (MacroOp.SCALE, MacroOp.SOFTMAX, MacroOp.LAYERNORM, MacroOp.MEAN_ROWS,
                                MacroOp.L2_NORMALIZE)}
OPERANDS: tuple[set[int], ...] = (
    {int(o) for o in MacroOp},
    {int(o) for o in MacroOp} - {int(MacroOp.SET)},
    _BINARY | {int(o) for o in (MacroOp.GATHER, MacroOp.MATMUL, MacroOp.LAYERNORM, MacroOp.MEAN_ROWS)},
    {int(MacroOp.LAYERNORM)},
)
_OPTIONAL: tuple[set[int], ...] = (set(), set(), {int(MacroOp.SOFTMAX)}, set())


def _op_name(opcode: int) -> str:
    try:
        return MacroOp(opcode).name
    except ValueError:
        return f"{opcode:#x}"
