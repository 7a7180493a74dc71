"""The loadable program image: its layout, a writer, a reader and the verifier that both sides run.

An image holds kernels. A kernel declares its arguments and what it needs (tiles, SRAM, semaphores) and consists of
streams: one list of macro-operations for each engine of each tile that it uses. Engines run their streams in order and
independently of each other; only semaphores order them.

    header | section table | STRINGS | KERNELS | ARGS | STREAMS | OPS

Semaphores of macro-operations only count up and waits are >=, so whether a kernel can finish does not depend on
timing: the verifier runs the streams to their end in its head and refuses a kernel that would hang.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from maia_rt.contract.commands import SEMAPHORE_OP, PostOp, WaitOp
from maia_rt.errors import ProgramError

MAGIC = b"MAIAPROG"
IMAGE_MAJOR = 1
IMAGE_MINOR = 0
MAX_IMAGE_BYTES = 64 << 20
SHARED_SEMAPHORE = 0x8000
"""Set in a macro-operation's semaphore index: the semaphore is the launch's, not the tile's."""


class Section(enum.IntEnum):
    """Sections, each present once, in this order."""

    STRINGS = 1
    KERNELS = 2
    ARGS = 3
    STREAMS = 4
    OPS = 5


class Dtype(enum.IntEnum):
    """Element types. FP8 and MX come with a later minor version."""

    FP32 = 1
    FP16 = 2
    BF16 = 3
    INT32 = 4
    UINT8 = 5


NUMPY_DTYPES: dict[Dtype, np.dtype[Any]] = {
    Dtype.FP32: np.dtype("<f4"), Dtype.FP16: np.dtype("<f2"), Dtype.BF16: np.dtype(ml_dtypes.bfloat16),
    Dtype.INT32: np.dtype("<i4"), Dtype.UINT8: np.dtype("u1"),
}
DTYPE_BYTES = np.array([0, 4, 2, 2, 4, 1], np.int64)
FLOATS = (Dtype.FP32, Dtype.FP16, Dtype.BF16)


class ArgKind(enum.IntEnum):
    """How a kernel uses an argument."""

    IN = 1
    OUT = 2
    INOUT = 3
    SCALAR = 4
    """An FP32 value in the low half of the argument's 8 bytes."""


class Engine(enum.IntEnum):
    """The engines of a tile."""

    DMA = 0
    TENSOR = 1
    VECTOR = 2


class MacroOp(enum.IntEnum):
    """Macro-operations; docs/contract.md gives each one's arithmetic. The engine follows from the number."""

    MOVE = 0x01
    GATHER = 0x02
    SET = 0x03
    MATMUL = 0x10
    ADD = 0x20
    SUB = 0x21
    MUL = 0x22
    SCALE = 0x23
    CONVERT = 0x24
    GELU = 0x25
    RELU = 0x26
    TANH = 0x27
    EXP = 0x28
    SOFTMAX = 0x29
    LAYERNORM = 0x2A
    MEAN_ROWS = 0x2B
    L2_NORMALIZE = 0x2C


def engine_of(op: int) -> Engine:
    """The engine that runs a macro-operation: 0x0_ DMA, 0x1_ tensor, 0x2_ vector."""
    return Engine(min(op >> 4, 2))


class OpFlag(enum.IntFlag):
    """Flags of macro-operations."""

    TRANSPOSE_A = 1
    """MATMUL: A is stored as k x m."""
    TRANSPOSE_B = 2
    """MATMUL: B is stored as n x k."""
    ACCUMULATE = 4
    """MATMUL: add to what DST holds."""
    SCALAR0_ARG = 8
    """scalar[0] holds the index of a SCALAR argument as an integer."""
    SCALAR1_ARG = 16


class Space(enum.IntEnum):
    """Where an operand lies."""

    NONE = 0
    TILE = 1
    """The tile's own SRAM; ``offset`` in bytes. The only space of tensor and vector engines."""
    ARG = 2
    """Buffer argument ``index``; ``offset`` in bytes from its start. DMA engines only."""


OPERAND = np.dtype(
    [("offset", "<u8"), ("plane_stride", "<u8"), ("row_stride", "<u4"), ("space", "u1"), ("dtype", "u1"),
     ("index", "<u2")]
)
"""24 bytes. Strides are bytes; a row stride of 0 shows one row again and again (sources only)."""
OP = np.dtype(
    [("opcode", "<u2"), ("flags", "<u2"), ("reserved", "<u4"), ("pre", SEMAPHORE_OP, (2,)),
     ("post", SEMAPHORE_OP, (2,)), ("operand", OPERAND, (4,)), ("n", "<u4", (3,)), ("batch", "<u4"),
     ("scalar", "<u4", (2,)), ("reserved1", "<u8", (4,))]
)
"""192 bytes. Operands are DST, A, B, C. ``n`` is (row bytes, rows, planes) for DMA, (m, n, k) and ``batch`` for MATMUL,
(columns, rows, planes) in elements for vector operations. ``scalar`` holds FP32 bits."""
DST, A, B, C = range(4)

HEADER = np.dtype(
    [("magic", "S8"), ("major", "<u2"), ("minor", "<u2"), ("sections", "<u4"), ("bytes", "<u8"), ("crc32", "<u4"),
     ("reserved", "u1", (36,))]
)
SECTION = np.dtype([("type", "<u4"), ("count", "<u4"), ("offset", "<u8"), ("bytes", "<u8"), ("reserved", "<u8")])
KERNEL = np.dtype(
    [("name_offset", "<u4"), ("name_bytes", "<u4"), ("first_arg", "<u4"), ("arg_count", "<u4"),
     ("first_stream", "<u4"), ("stream_count", "<u4"), ("tiles", "<u4"), ("sram_bytes", "<u4"),
     ("tile_semaphores", "<u2"), ("shared_semaphores", "<u2"), ("reserved", "u1", (28,))]
)
ARG = np.dtype(
    [("name_offset", "<u4"), ("name_bytes", "<u4"), ("kind", "u1"), ("dtype", "u1"), ("rank", "u1"), ("reserved", "u1"),
     ("alignment", "<u4"), ("bytes", "<u8"), ("shape", "<u4", (8,)), ("reserved1", "<u8")]
)
STREAM = np.dtype([("tile", "<u4"), ("engine", "<u4"), ("first_op", "<u4"), ("op_count", "<u4")])
_RECORDS = {Section.KERNELS: KERNEL, Section.ARGS: ARG, Section.STREAMS: STREAM, Section.OPS: OP}


@dataclass(frozen=True)
class Capabilities:
    """What a device offers programs, from its capability registers."""

    tiles: int
    tile_sram_bytes: int
    tile_semaphores: int
    max_args: int
    max_kernels: int
    dtypes: frozenset[Dtype] = frozenset(Dtype)


@dataclass(frozen=True)
class Arg:
    """A kernel's argument.

    ``shape`` is in elements, C order, without gaps; ``alignment`` in bytes. A SCALAR has no shape.
    """

    name: str
    kind: ArgKind
    dtype: Dtype
    shape: tuple[int, ...] = ()
    alignment: int = 64

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * int(DTYPE_BYTES[self.dtype])


@dataclass(frozen=True)
class Stream:
    """The macro-operations (dtype OP) of one engine of one tile."""

    tile: int
    engine: Engine
    ops: npt.NDArray[Any]


@dataclass(frozen=True)
class KernelImage:
    """One kernel: what it takes, what it needs, what it does."""

    name: str
    args: tuple[Arg, ...]
    streams: tuple[Stream, ...]
    tiles: int
    sram_bytes: int
    tile_semaphores: int = 0
    shared_semaphores: int = 0

    @property
    def macs(self) -> int:
        """Multiply-adds of one launch."""
        total = 0
        for stream in self.streams:
            ops = stream.ops[stream.ops["opcode"] == MacroOp.MATMUL]
            total += int((ops["n"].astype(np.int64).prod(axis=1) * ops["batch"]).sum())
        return total


@dataclass(frozen=True)
class Image:
    """A program image's kernels, in the order of their handles."""

    kernels: tuple[KernelImage, ...]
    data: bytes = field(repr=False, default=b"")


def write(kernels: Sequence[KernelImage]) -> bytes:
    """Serialize kernels as a program image.

    Parameters
    ----------
    kernels : sequence of KernelImage
        Not verified here; see `verify`.

    Returns
    -------
    bytes
        The image.
    """
    strings = bytearray()

    def place(text: str) -> tuple[int, int]:
        raw = text.encode()
        offset = len(strings)
        strings.extend(raw)
        return offset, len(raw)

    kernel_rows: list[npt.NDArray[Any]] = []
    arg_rows: list[npt.NDArray[Any]] = []
    stream_rows: list[npt.NDArray[Any]] = []
    ops: list[npt.NDArray[Any]] = []
    op_count = 0
    for kernel in kernels:
        row = np.zeros((), KERNEL)
        row["name_offset"], row["name_bytes"] = place(kernel.name)
        row["first_arg"], row["arg_count"] = len(arg_rows), len(kernel.args)
        row["first_stream"], row["stream_count"] = len(stream_rows), len(kernel.streams)
        row["tiles"], row["sram_bytes"] = kernel.tiles, kernel.sram_bytes
        row["tile_semaphores"], row["shared_semaphores"] = kernel.tile_semaphores, kernel.shared_semaphores
        kernel_rows.append(row)
        for arg in kernel.args:
            entry = np.zeros((), ARG)
            entry["name_offset"], entry["name_bytes"] = place(arg.name)
            entry["kind"], entry["dtype"], entry["rank"] = arg.kind, arg.dtype, len(arg.shape)
            entry["alignment"], entry["bytes"] = arg.alignment, arg.nbytes
            entry["shape"][: len(arg.shape)] = arg.shape
            arg_rows.append(entry)
        for stream in kernel.streams:
            stream_rows.append(np.array((stream.tile, stream.engine, op_count, len(stream.ops)), STREAM))
            ops.append(stream.ops)
            op_count += len(stream.ops)

    def pack(rows: list[npt.NDArray[Any]], dtype: np.dtype[np.void]) -> bytes:
        return np.array(rows, dtype).tobytes() if rows else b""

    bodies = [
        (Section.STRINGS, len(strings), bytes(strings)),
        (Section.KERNELS, len(kernel_rows), pack(kernel_rows, KERNEL)),
        (Section.ARGS, len(arg_rows), pack(arg_rows, ARG)),
        (Section.STREAMS, len(stream_rows), pack(stream_rows, STREAM)),
        (Section.OPS, op_count, np.concatenate(ops).astype(OP).tobytes() if ops else b""),
    ]
    header = np.zeros((), HEADER)
    table = np.zeros(len(bodies), SECTION)
    body = bytearray()
    start = HEADER.itemsize + table.nbytes
    for line, (kind, count, raw) in zip(table, bodies, strict=True):
        body.extend(bytes(-(start + len(body)) % 64))
        line["type"], line["count"], line["offset"], line["bytes"] = kind, count, start + len(body), len(raw)
        body.extend(raw)
    header["magic"], header["major"], header["minor"] = MAGIC, IMAGE_MAJOR, IMAGE_MINOR
    header["sections"], header["bytes"] = len(bodies), start + len(body)
    rest = table.tobytes() + bytes(body)
    header["crc32"] = zlib.crc32(header.tobytes() + rest)
    return header.tobytes() + rest


def read(data: bytes) -> Image:
    """Parse an image; every offset, count and text is checked, no operation is looked at (see `verify`).

    Raises
    ------
    ProgramError
        Naming the field that is wrong.
    """
    if not HEADER.itemsize <= len(data) <= MAX_IMAGE_BYTES:
        raise _refused("image", f"{len(data)} bytes; an image has {HEADER.itemsize} to {MAX_IMAGE_BYTES}", "truncated")
    header: np.void = np.frombuffer(data, HEADER, 1)[0]
    if bytes(data[:8]) != MAGIC:
        raise _refused("header.magic", f"{bytes(data[:8])!r} is not {MAGIC!r}", "the file is no program image")
    if int(header["major"]) != IMAGE_MAJOR or int(header["minor"]) > IMAGE_MINOR:
        raise _refused("header.version", f"{header['major']}.{header['minor']}; this loader reads "
                       f"{IMAGE_MAJOR}.0 to {IMAGE_MAJOR}.{IMAGE_MINOR}", "built by another version")
    if int(header["bytes"]) != len(data):
        raise _refused("header.bytes", f"says {header['bytes']}, the image has {len(data)}", "truncated")
    clean = header.copy()
    clean["crc32"] = 0
    if zlib.crc32(clean.tobytes() + bytes(data[HEADER.itemsize:])) != int(header["crc32"]):
        raise _refused("header.crc32", "does not match the contents", "corrupted on its way")
    if header["reserved"].any():
        raise _refused("header.reserved", "not zero", "built by a newer version")
    if int(header["sections"]) != len(Section):
        raise _refused("header.sections", f"{header['sections']}, not {len(Section)}", "")
    table = _table(data, HEADER.itemsize, SECTION, len(Section), "sections")
    parts: dict[Section, npt.NDArray[Any]] = {}
    strings = b""
    end = HEADER.itemsize + table.nbytes
    for entry, kind in zip(table, Section, strict=True):
        where = f"section {kind.name}"
        if int(entry["type"]) != kind or int(entry["reserved"]):
            raise _refused(where, f"type {entry['type']} where {int(kind)} belongs", "")
        offset, count, size = int(entry["offset"]), int(entry["count"]), int(entry["bytes"])
        if offset % 64 or offset < end or offset + size > len(data):
            raise _refused(where, f"bytes {offset}..{offset + size} overlap others or leave the image", "corrupted")
        end = offset + size
        item = 1 if kind is Section.STRINGS else _RECORDS[kind].itemsize
        if count * item != size:
            raise _refused(where, f"{count} records of {item} bytes in {size} bytes", "corrupted")
        if kind is Section.STRINGS:
            strings = bytes(data[offset:end])
        else:
            parts[kind] = _table(data, offset, _RECORDS[kind], count, where)
    return Image(tuple(_kernel(row, i, parts, strings) for i, row in enumerate(parts[Section.KERNELS])), bytes(data))


def _table(data: bytes, offset: int, dtype: np.dtype[np.void], count: int, where: str) -> npt.NDArray[Any]:
    if offset + count * dtype.itemsize > len(data):
        raise _refused(where, "leaves the image", "truncated")
    return np.frombuffer(data, dtype, count, offset)


def _text(strings: bytes, row: np.void, where: str) -> str:
    offset, size = int(row["name_offset"]), int(row["name_bytes"])
    if not 1 <= size <= 256 or offset + size > len(strings):
        raise _refused(f"{where}.name", "is empty, too long or outside the strings", "corrupted")
    try:
        return strings[offset : offset + size].decode()
    except UnicodeDecodeError:
        raise _refused(f"{where}.name", "is no UTF-8", "corrupted") from None


def _kernel(row: np.void, index: int, parts: dict[Section, npt.NDArray[Any]], strings: bytes) -> KernelImage:
    where = f"kernel {index}"
    name = _text(strings, row, where)
    where = f"kernel {name!r}"
    if row["reserved"].any():
        raise _refused(f"{where}.reserved", "not zero", "built by a newer version")

    def span(first: str, count: str, kind: Section) -> npt.NDArray[Any]:
        start, number = int(row[first]), int(row[count])
        if start + number > len(parts[kind]):
            raise _refused(f"{where}.{first}", f"{start} + {number} is past the {len(parts[kind])} {kind.name}", "")
        return parts[kind][start : start + number]

    args = []
    for i, entry in enumerate(span("first_arg", "arg_count", Section.ARGS)):
        at = f"{where} argument {i}"
        text = _text(strings, entry, at)
        kind, dtype, rank = int(entry["kind"]), int(entry["dtype"]), int(entry["rank"])
        if kind not in set(ArgKind) or dtype not in set(Dtype) or rank > 8:
            raise _refused(at, f"kind {kind}, dtype {dtype}, rank {rank} is not in the contract", "")
        alignment = int(entry["alignment"])
        if not 1 <= alignment <= 4096 or alignment & (alignment - 1):
            raise _refused(f"{at}.alignment", f"{alignment} is no power of two up to 4096", "")
        if entry["shape"][rank:].any() or int(entry["reserved"]) or int(entry["reserved1"]):
            raise _refused(f"{at}.reserved", "not zero", "built by a newer version")
        arg = Arg(text, ArgKind(kind), Dtype(dtype), tuple(int(d) for d in entry["shape"][:rank]), alignment)
        size = int(DTYPE_BYTES[dtype])
        for extent in arg.shape:
            size *= extent
        if size != int(entry["bytes"]) or size >= 1 << 48:
            raise _refused(f"{at}.bytes", f"{entry['bytes']}, but its shape {arg.shape} has {size}", "")
        if kind == ArgKind.SCALAR and (rank or dtype != Dtype.FP32):
            raise _refused(at, "a SCALAR is one FP32 value", "")
        args.append(arg)
    streams = []
    for i, entry in enumerate(span("first_stream", "stream_count", Section.STREAMS)):
        at = f"{where} stream {i}"
        if int(entry["engine"]) > max(Engine):
            raise _refused(f"{at}.engine", f"{entry['engine']} does not exist", "")
        start, count = int(entry["first_op"]), int(entry["op_count"])
        if start + count > len(parts[Section.OPS]):
            raise _refused(f"{at}.first_op", f"{start} + {count} is past the {len(parts[Section.OPS])} OPS", "")
        streams.append(Stream(int(entry["tile"]), Engine(int(entry["engine"])),
                              parts[Section.OPS][start : start + count]))
    return KernelImage(name, tuple(args), tuple(streams), int(row["tiles"]), int(row["sram_bytes"]),
                       int(row["tile_semaphores"]), int(row["shared_semaphores"]))


def verify(image: Image, capabilities: Capabilities) -> None:
    """Check that a device with these capabilities can run every kernel of an image without doing harm.

    After this only argument addresses and GATHER indices are left to check while a kernel runs.

    Raises
    ------
    ProgramError
        One sentence: kernel, field, and the capability that lacks.
    """
    if not 1 <= len(image.kernels) <= capabilities.max_kernels:
        raise _refused("image", f"{len(image.kernels)} kernels; the device takes 1 to {capabilities.max_kernels}", "")
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
                raise _refused(f"{where}.{what}", f"needs {need}, the device has {have}",
                               "built for a larger device")
        if kernel.tiles < 1:
            raise _refused(f"{where}.tiles", "is 0", "")
        for arg in kernel.args:
            if arg.dtype not in capabilities.dtypes:
                raise _refused(f"{where} argument {arg.name!r}.dtype", f"the device has no {arg.dtype.name}", "")
        seen: set[tuple[int, Engine]] = set()
        for stream in kernel.streams:
            at = f"{where} tile {stream.tile} {stream.engine.name}"
            if stream.tile >= kernel.tiles:
                raise _refused(at, f"the kernel has {kernel.tiles} tiles", "")
            if (stream.tile, stream.engine) in seen:
                raise _refused(at, "has two streams", "")
            seen.add((stream.tile, stream.engine))
        _verify_ops(kernel, where, capabilities)
        _verify_order(kernel, where)


def _verify_ops(kernel: KernelImage, where: str, capabilities: Capabilities) -> None:
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
            raise _refused(f"{where} tile {stream.tile} {stream.engine.name} operation {i - first} "
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
    _verify_operands(kernel, ops, opcode, n, batch, flags, refuse, capabilities)


def _verify_operands(kernel: KernelImage, ops: npt.NDArray[Any], opcode: npt.NDArray[Any], n: npt.NDArray[Any],
                     batch: npt.NDArray[Any], flags: npt.NDArray[Any],
                     refuse: Callable[[npt.NDArray[Any], str, str], None], capabilities: Capabilities) -> None:
    operand = ops["operand"]
    space = operand["space"].astype(np.int64)
    dtype = operand["dtype"].astype(np.int64)
    buffers = [a.nbytes if a.kind != ArgKind.SCALAR else -1 for a in kernel.args]
    writable = np.array([a.kind in (ArgKind.OUT, ArgKind.INOUT) for a in kernel.args] + [False])
    sizes = np.array([*buffers, -1], np.int64)
    dma = opcode < 0x10
    legal_dtypes = {int(d) for d in capabilities.dtypes} & {int(d) for d in FLOATS}
    for slot, name in enumerate(("dst", "a", "b", "c")):
        want = _among(opcode, _OPERANDS[slot])
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
        refuse(used & bytes_only & (d != 0), f"{name}.dtype", "DMA moves bytes: the dtype is 0")
        refuse(indices & ((d != Dtype.INT32) | (s != Space.TILE)), f"{name}.dtype", "indices are INT32 in TILE")
        refuse(used & ~dma & ~_among(d, legal_dtypes), f"{name}.dtype", "is no floating type of this device")
        width = np.where(bytes_only, 1, DTYPE_BYTES[np.minimum(d, len(DTYPE_BYTES) - 1)])
        row, rows, planes = _shape(slot, opcode, n, batch, flags)
        offset = operand["offset"][:, slot]
        refuse(used & (offset >= 1 << 48), f"{name}.offset", "is past 2^48")
        offset = np.minimum(offset, 1 << 48).astype(np.int64)
        row_stride = operand["row_stride"][:, slot].astype(np.int64)
        plane = operand["plane_stride"][:, slot]
        refuse(used & (plane >= 1 << 40), f"{name}.plane_stride", "is past 2^40")
        plane_stride = np.minimum(plane, 1 << 40).astype(np.int64)
        align = np.maximum(width, 1)
        refuse(used & ((offset % align != 0) | (row_stride % align != 0) | (plane_stride % align != 0)), name,
               "is not aligned to its elements")
        # Sources may show one row again and again, but BLAS wants a leading dimension of at least a row.
        distinct = (slot == DST) | (opcode == MacroOp.MATMUL) | (row_stride != 0)
        refuse(used & (rows > 1) & (row_stride < row * width) & distinct,
               f"{name}.row_stride", "is shorter than a row")
        refuse(used & (planes > 1) & (slot == DST) & (plane_stride < (rows - 1) * row_stride + row * width),
               f"{name}.plane_stride", "is shorter than a plane")
        # In floating point first: the product of three hostile 24..40-bit numbers must not wrap.
        extent_wide = (planes - 1.0) * plane_stride + (rows - 1.0) * row_stride + row * width + offset
        extent = np.where(extent_wide < 2.0**62, (planes - 1) * plane_stride + (rows - 1) * row_stride
                          + row * width + offset, 1 << 62)
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
            raise _refused(f"{where} tile {stream.tile} {stream.engine.name} operation {places[i]}",
                           f"would wait for {waits} for ever", "a post is missing or two streams wait for each other")


_ALL_VECTOR = {int(o) for o in MacroOp if o >= 0x20}
_BINARY = {int(MacroOp.ADD), int(MacroOp.SUB), int(MacroOp.MUL)}
_SCALAR_OPS = {int(o) for o in (MacroOp.SCALE, MacroOp.SOFTMAX, MacroOp.LAYERNORM, MacroOp.MEAN_ROWS,
                                MacroOp.L2_NORMALIZE)}
_OPERANDS: tuple[set[int], ...] = (
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


def _refused(where: str, what: str, cause: str) -> ProgramError:
    return ProgramError(f"program refused: {where}: {what}", cause=cause,
                        hint="build the image again with this version of maia_rt")
