"""The loadable program image: its layout, a writer and a reader. verifier.py says what an image may do.

An image holds kernels. A kernel declares its arguments and what it needs (tiles, SRAM, semaphores) and consists of
streams: one list of macro-operations for each engine of each tile that it uses. Engines run their streams in order and
independently of each other; only semaphores order them.

    header | section table | STRINGS | KERNELS | ARGS | STREAMS | OPS

Images are 1.0 or, where they use a type or a combination of types that came later, 1.1 (docs/contract.md, "Versions").
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from maia_rt.contract.commands import SEMAPHORE_OP
from maia_rt.contract.dtype import MINOR_0_DTYPES, MX_BLOCK, MX_DTYPES, array_shape, row_bytes
from maia_rt.contract.dtype import NUMPY_DTYPES as NUMPY_DTYPES  # noqa: PLC0414 - part of this module, as is Dtype
from maia_rt.contract.dtype import Dtype as Dtype  # noqa: PLC0414
from maia_rt.errors import ProgramError

MAGIC = b"MAIAPROG"
IMAGE_MAJOR = 1
IMAGE_MINOR = 1
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

    ``shape`` is in elements, C order, without gaps, the last axis of an MX type a multiple of 32; ``alignment`` in
    bytes. A SCALAR has no shape.
    """

    name: str
    kind: ArgKind
    dtype: Dtype
    shape: tuple[int, ...] = ()
    alignment: int = 64

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        return rows * row_bytes(self.dtype, self.shape[-1] if self.shape else 1)

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The shape of memory for it, of dtype ``NUMPY_DTYPES[self.dtype]``: the last axis of an MX type is bytes."""
        return array_shape(self.dtype, self.shape)


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
    minor: int = IMAGE_MINOR


def write(kernels: Sequence[KernelImage]) -> bytes:
    """Serialize kernels as a program image.

    Parameters
    ----------
    kernels : sequence of KernelImage
        Not verified here; see `verify`.

    Returns
    -------
    bytes
        The image; 1.0 where that has all it uses, so that devices of before take it too.
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
    header["magic"], header["major"], header["minor"] = MAGIC, IMAGE_MAJOR, _least_minor(kernels)
    header["sections"], header["bytes"] = len(bodies), start + len(body)
    rest = table.tobytes() + bytes(body)
    header["crc32"] = zlib.crc32(header.tobytes() + rest)
    return header.tobytes() + rest


def _least_minor(kernels: Sequence[KernelImage]) -> int:
    """The oldest minor version that has every type these kernels use, where they use it."""
    for kernel in kernels:
        if any(arg.dtype not in MINOR_0_DTYPES for arg in kernel.args):
            return 1
        for stream in kernel.streams:
            dtypes = stream.ops["operand"]["dtype"]
            computed = (stream.ops["opcode"] >= 0x10) & (dtypes == Dtype.INT32).any(axis=1)
            if computed.any() or (dtypes > Dtype.UINT8).any():
                return 1
    return 0


def read(data: bytes) -> Image:
    """Parse an image; every offset, count and text is checked, no operation is looked at (see `verify`).

    Raises
    ------
    ProgramError
        Naming the field that is wrong.
    """
    if not HEADER.itemsize <= len(data) <= MAX_IMAGE_BYTES:
        raise refused("image", f"{len(data)} bytes; an image has {HEADER.itemsize} to {MAX_IMAGE_BYTES}", "truncated")
    header: np.void = np.frombuffer(data, HEADER, 1)[0]
    if bytes(data[:8]) != MAGIC:
        raise refused("header.magic", f"{bytes(data[:8])!r} is not {MAGIC!r}", "the file is no program image")
    if int(header["major"]) != IMAGE_MAJOR or int(header["minor"]) > IMAGE_MINOR:
        raise refused("header.version", f"{header['major']}.{header['minor']}; this loader reads "
                       f"{IMAGE_MAJOR}.0 to {IMAGE_MAJOR}.{IMAGE_MINOR}", "built by another version")
    if int(header["bytes"]) != len(data):
        raise refused("header.bytes", f"says {header['bytes']}, the image has {len(data)}", "truncated")
    clean = header.copy()
    clean["crc32"] = 0
    if zlib.crc32(clean.tobytes() + bytes(data[HEADER.itemsize:])) != int(header["crc32"]):
        raise refused("header.crc32", "does not match the contents", "corrupted on its way")
    if header["reserved"].any():
        raise refused("header.reserved", "not zero", "built by a newer version")
    if int(header["sections"]) != len(Section):
        raise refused("header.sections", f"{header['sections']}, not {len(Section)}", "")
    table = _table(data, HEADER.itemsize, SECTION, len(Section), "sections")
    parts: dict[Section, npt.NDArray[Any]] = {}
    strings = b""
    end = HEADER.itemsize + table.nbytes
    for entry, kind in zip(table, Section, strict=True):
        where = f"section {kind.name}"
        if int(entry["type"]) != kind or int(entry["reserved"]):
            raise refused(where, f"type {entry['type']} where {int(kind)} belongs", "")
        offset, count, size = int(entry["offset"]), int(entry["count"]), int(entry["bytes"])
        if offset % 64 or offset < end or offset + size > len(data):
            raise refused(where, f"bytes {offset}..{offset + size} overlap others or leave the image", "corrupted")
        end = offset + size
        item = 1 if kind is Section.STRINGS else _RECORDS[kind].itemsize
        if count * item != size:
            raise refused(where, f"{count} records of {item} bytes in {size} bytes", "corrupted")
        if kind is Section.STRINGS:
            strings = bytes(data[offset:end])
        else:
            parts[kind] = _table(data, offset, _RECORDS[kind], count, where)
    minor = int(header["minor"])
    kernels = tuple(_kernel(row, i, parts, strings, minor) for i, row in enumerate(parts[Section.KERNELS]))
    return Image(kernels, bytes(data), minor)


def _table(data: bytes, offset: int, dtype: np.dtype[np.void], count: int, where: str) -> npt.NDArray[Any]:
    if offset + count * dtype.itemsize > len(data):
        raise refused(where, "leaves the image", "truncated")
    return np.frombuffer(data, dtype, count, offset)


def _text(strings: bytes, row: np.void, where: str) -> str:
    offset, size = int(row["name_offset"]), int(row["name_bytes"])
    if not 1 <= size <= 256 or offset + size > len(strings):
        raise refused(f"{where}.name", "is empty, too long or outside the strings", "corrupted")
    try:
        return strings[offset : offset + size].decode()
    except UnicodeDecodeError:
        raise refused(f"{where}.name", "is no UTF-8", "corrupted") from None


def _kernel(row: np.void, index: int, parts: dict[Section, npt.NDArray[Any]], strings: bytes,
            minor: int) -> KernelImage:
    where = f"kernel {index}"
    name = _text(strings, row, where)
    where = f"kernel {name!r}"
    if row["reserved"].any():
        raise refused(f"{where}.reserved", "not zero", "built by a newer version")

    def span(first: str, count: str, kind: Section) -> npt.NDArray[Any]:
        start, number = int(row[first]), int(row[count])
        if start + number > len(parts[kind]):
            raise refused(f"{where}.{first}", f"{start} + {number} is past the {len(parts[kind])} {kind.name}", "")
        return parts[kind][start : start + number]

    args = []
    for i, entry in enumerate(span("first_arg", "arg_count", Section.ARGS)):
        at = f"{where} argument {i}"
        text = _text(strings, entry, at)
        kind, dtype, rank = int(entry["kind"]), int(entry["dtype"]), int(entry["rank"])
        if kind not in set(ArgKind) or dtype not in set(Dtype) or rank > 8:
            raise refused(at, f"kind {kind}, dtype {dtype}, rank {rank} is not in the contract", "")
        alignment = int(entry["alignment"])
        if not 1 <= alignment <= 4096 or alignment & (alignment - 1):
            raise refused(f"{at}.alignment", f"{alignment} is no power of two up to 4096", "")
        if entry["shape"][rank:].any() or int(entry["reserved"]) or int(entry["reserved1"]):
            raise refused(f"{at}.reserved", "not zero", "built by a newer version")
        arg = Arg(text, ArgKind(kind), Dtype(dtype), tuple(int(d) for d in entry["shape"][:rank]), alignment)
        if minor == 0 and arg.dtype not in MINOR_0_DTYPES:
            raise refused(f"{at}.dtype", f"{arg.dtype.name} came with images of version 1.1", "the header says 1.0")
        if arg.dtype in MX_DTYPES and (not rank or arg.shape[-1] % MX_BLOCK):
            raise refused(f"{at}.shape", f"rows of {arg.dtype.name} are a multiple of {MX_BLOCK} elements, and "
                          f"{arg.shape} has others", "")
        size = row_bytes(arg.dtype, arg.shape[-1] if rank else 1)
        for extent in arg.shape[:-1]:
            size *= extent
        if size != int(entry["bytes"]) or size >= 1 << 48:
            raise refused(f"{at}.bytes", f"{entry['bytes']}, but its shape {arg.shape} has {size}", "")
        if kind == ArgKind.SCALAR and (rank or dtype != Dtype.FP32):
            raise refused(at, "a SCALAR is one FP32 value", "")
        args.append(arg)
    streams = []
    for i, entry in enumerate(span("first_stream", "stream_count", Section.STREAMS)):
        at = f"{where} stream {i}"
        if int(entry["engine"]) > max(Engine):
            raise refused(f"{at}.engine", f"{entry['engine']} does not exist", "")
        start, count = int(entry["first_op"]), int(entry["op_count"])
        if start + count > len(parts[Section.OPS]):
            raise refused(f"{at}.first_op", f"{start} + {count} is past the {len(parts[Section.OPS])} OPS", "")
        streams.append(Stream(int(entry["tile"]), Engine(int(entry["engine"])),
                              parts[Section.OPS][start : start + count]))
    return KernelImage(name, tuple(args), tuple(streams), int(row["tiles"]), int(row["sram_bytes"]),
                       int(row["tile_semaphores"]), int(row["shared_semaphores"]))


def refused(where: str, what: str, cause: str) -> ProgramError:
    """The error of a refusal: which part, what is wrong with it, how that may have come about."""
    return ProgramError(f"program refused: {where}: {what}", cause=cause,
                        hint="build the image again with this version of maia_rt")
