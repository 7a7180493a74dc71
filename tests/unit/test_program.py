"""Program images: written and read back, refused by a sentence that names the field, harmless whatever is in them.

Every field of every record is set to hostile values, with the checksum made right again. An image is then either
refused, or it runs in the interpreter, which fails on any access outside a buffer or SRAM and on any hang.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from maia_rt.contract import program, verifier
from maia_rt.contract.program import (
    ARG,
    HEADER,
    KERNEL,
    OP,
    SECTION,
    STREAM,
    ArgKind,
    Dtype,
    KernelImage,
    Section,
)
from maia_rt.errors import ProgramError
from maia_rt.kernels import KernelBuilder, attention, embedding, feed_forward
from tests.helpers import interpreter
from tests.helpers.launching import SMALL

CAPABILITIES = replace(SMALL, tiles=2, tile_sram_bytes=1 << 16)
LARGEST_RUN = 1 << 20
"""Bytes of arguments up to which an accepted image is run."""


def sample() -> list[KernelImage]:
    """A kernel with every kind of operation on two tiles, and a real one."""
    builder = KernelBuilder("sample", CAPABILITIES)
    x = builder.argument("x", ArgKind.IN, Dtype.FP32, (2, 6, 8))
    ids = builder.argument("ids", ArgKind.IN, Dtype.INT32, (6,))
    factor = builder.scalar("factor")
    y = builder.argument("y", ArgKind.OUT, Dtype.FP32, (2, 6, 8))
    small = builder.argument("small", ArgKind.IN, Dtype.MXFP4_E2M1, (8, 32))
    for number in range(2):
        tile = builder.tile(number)
        held, other, square = (tile.allocate(s, Dtype.FP32) for s in ((6, 8), (6, 8), (8, 8)))
        index, half = tile.allocate((6,), Dtype.INT32), tile.allocate((6, 8), Dtype.BF16)
        tile.move(held, x[number])
        tile.fill(square, 0)
        tile.fill(index, 1)
        tile.move(index[2:4], ids[2:4])
        tile.gather(other, x[number], index)
        tile.matmul(held, other, square, accumulate=True, transpose_b=True)
        tile.matmul(other.split(0, (2, 3)), held.split(0, (2, 3)), square)
        tile.add(held, held, other[0])
        tile.scale(held, held, factor, 1.0)
        tile.convert(half, held)
        tile.softmax(other, half, 0.5, held[:1])
        tile.layernorm(other, other, held[0], held[1], 1e-5)
        tile.mean_rows(square[:1], other.split(0, (1, 6)), square[2:3, :6], 1.0)
        tile.l2_normalize(other, other, 1e-6)
        blocks, eights = tile.allocate((8, 32), Dtype.MXFP4_E2M1), tile.allocate((8, 32), Dtype.INT8)
        fp8, sums = tile.allocate((8, 32), Dtype.FP8_E5M2), tile.allocate((8, 8), Dtype.INT32)
        tile.move(blocks, small)
        tile.convert(eights, blocks)
        tile.scale(fp8, blocks, 0.5)
        tile.matmul(square, fp8, blocks, transpose_b=True)
        tile.matmul(sums, eights, eights, transpose_b=True, accumulate=False)
        tile.add(sums, sums, sums[0])
        tile.move(y[number], other)
    return [builder.build(), attention(CAPABILITIES, 2, 3, 2, 4)]


IMAGE = program.write(sample())


def section(kind: Section, image: bytes = IMAGE) -> np.void:
    return np.frombuffer(image, SECTION, len(Section), HEADER.itemsize)[kind - 1]


def repaired(raw: bytearray) -> bytes:
    """The image with its checksum made right."""
    at = HEADER.fields["crc32"][1]
    raw[at : at + 4] = bytes(4)
    raw[at : at + 4] = zlib.crc32(raw).to_bytes(4, "little")
    return bytes(raw)


def leaves(dtype: np.dtype, offset: int = 0, name: str = "") -> Iterator[tuple[str, int, int]]:
    """Name, offset and bytes of every number in a record."""
    if dtype.subdtype:
        base, shape = dtype.subdtype
        for i in range(int(np.prod(shape))):
            yield from leaves(base, offset + i * base.itemsize, f"{name}[{i}]")
    elif dtype.fields:
        for key, (kind, at, *_) in dtype.fields.items():
            yield from leaves(kind, offset + at, f"{name}.{key}")
    else:
        yield name, offset, dtype.itemsize


def hostile(size: int, value: int) -> set[int]:
    """What a number of so many bytes is set to."""
    top = (1 << 8 * size) - 1
    return {v & top for v in (0, 1, 2, 3, value + 1, value - 1, 2 * value, 64, 255, 1 << 12, 1 << 16, 1 << 24,
                              (1 << 24) + 1, 1 << 31, 1 << 40, top // 2, top - 63, top)} - {value}


def run_or_refuse(image: bytes) -> bool:
    """Whether the image was accepted; then it has run without harm."""
    try:
        parsed = program.read(image)
        verifier.verify(parsed, CAPABILITIES)
    except ProgramError:
        return False
    for kernel in parsed.kernels:
        if sum(a.nbytes for a in kernel.args) > LARGEST_RUN:
            continue
        arrays = [1.0 if a.kind is ArgKind.SCALAR else
                  np.zeros(a.array_shape, program.NUMPY_DTYPES[a.dtype]) for a in kernel.args]
        try:
            with np.errstate(all="ignore"):
                interpreter.run(kernel, arrays, 1)
        except interpreter.IndexFault:
            continue  # checked while the kernel runs, by contract
    return True


def test_an_image_comes_back_as_it_was_written() -> None:
    kernels = sample()
    parsed = program.read(IMAGE)
    verifier.verify(parsed, CAPABILITIES)
    assert parsed.data == IMAGE
    for got, want in zip(parsed.kernels, kernels, strict=True):
        assert (got.name, got.args, got.tiles, got.sram_bytes) == (want.name, want.args, want.tiles, want.sram_bytes)
        assert got.macs == want.macs
        for a, b in zip(got.streams, want.streams, strict=True):
            assert (a.tile, a.engine) == (b.tile, b.engine)
            assert a.ops.tobytes() == b.ops.tobytes()
    assert run_or_refuse(IMAGE)


@pytest.mark.parametrize("kind", [Section.KERNELS, Section.ARGS, Section.STREAMS, Section.OPS])
def test_every_field_of_every_record_may_hold_anything(kind: Section) -> None:
    dtype = {Section.KERNELS: KERNEL, Section.ARGS: ARG, Section.STREAMS: STREAM, Section.OPS: OP}[kind]
    entry = section(kind)
    random = np.random.default_rng(int(kind))
    records = int(entry["count"])
    accepted = refused = 0
    for name, offset, size in leaves(dtype):
        for record in {0, records - 1, *(int(r) for r in random.integers(0, records, 3))}:
            at = int(entry["offset"]) + record * dtype.itemsize + offset
            value = int.from_bytes(IMAGE[at : at + size], "little")
            values = sorted(hostile(size, value))
            for bad in (values[i] for i in random.permutation(len(values))[:6]):
                raw = bytearray(IMAGE)
                raw[at : at + size] = bad.to_bytes(size, "little")
                try:
                    taken = run_or_refuse(repaired(raw))
                except Exception as error:
                    raise AssertionError(f"{kind.name}[{record}]{name} = {bad:#x}") from error
                accepted, refused = accepted + taken, refused + (not taken)
    assert refused > accepted / 4


def test_every_field_of_header_and_section_table_is_checked() -> None:
    for start, dtype, count in ((0, HEADER, 1), (HEADER.itemsize, SECTION, len(Section))):
        for record in range(count):
            for name, offset, size in leaves(dtype):
                at = start + record * dtype.itemsize + offset
                if name == ".crc32":
                    continue
                value = int.from_bytes(IMAGE[at : at + min(size, 8)], "little")
                for bad in hostile(min(size, 8), value):
                    raw = bytearray(IMAGE)
                    raw[at : at + min(size, 8)] = bad.to_bytes(min(size, 8), "little")
                    with pytest.raises(ProgramError):
                        program.read(repaired(raw))


def test_a_flipped_bit_anywhere_breaks_the_checksum() -> None:
    random = np.random.default_rng(0)
    for at in {0, len(IMAGE) - 1, *(int(i) for i in random.integers(0, len(IMAGE), 200))}:
        raw = bytearray(IMAGE)
        raw[at] ^= 1 << int(random.integers(0, 8))
        with pytest.raises(ProgramError):
            program.read(bytes(raw))


def test_an_image_cut_short_or_grown_is_refused() -> None:
    for length in {0, 1, 63, 64, 200, len(IMAGE) // 2, len(IMAGE) - 1}:
        with pytest.raises(ProgramError, match="refused"):
            program.read(IMAGE[:length])
    with pytest.raises(ProgramError, match=r"header\.bytes"):
        program.read(IMAGE + b"\0")


def changed(field: str, index: int, value: object, kernel: KernelImage | None = None) -> bytes:
    """The sample with one field of one operation of its first stream changed."""
    first, *others = sample() if kernel is None else [kernel]
    ops = first.streams[0].ops.copy()
    part = ops[index : index + 1]
    *path, last = field.split(".")
    for step in path:
        part = part[:, int(step)] if step.isdigit() else part[step]
    if last.isdigit():
        part[:, int(last)] = value
    else:
        part[last] = value
    streams = (replace(first.streams[0], ops=ops), *first.streams[1:])
    return program.write([replace(first, streams=streams), *others])


@pytest.mark.parametrize(("field", "value", "text"), [
    ("opcode", 0x10, "operation 0 .MATMUL..opcode: does not run on this engine"),
    ("opcode", 0x77, "operation 0 .0x77..opcode: is not in the contract"),
    ("flags", 1, "flags: are not this operation's"),
    ("n.0", 0, "n: is 0 or past"),
    ("n.0", 1 << 20, "dst: leaves the"),
    ("operand.0.offset", 1 << 16, "dst: leaves the"),
    ("operand.1.index", 9, "a.index: names no buffer argument"),
    ("operand.0.space", 3, "dst.space: does not exist"),
    ("pre.0.op", 2, "pre: must be GE"),
    ("reserved", 1, "reserved: is not zero"),
])
def test_a_refusal_names_kernel_tile_engine_operation_and_field(field: str, value: int, text: str) -> None:
    with pytest.raises(ProgramError, match=rf"kernel 'sample' tile 0 DMA.*{text}"):
        verifier.verify(program.read(changed(field, 0, value)), CAPABILITIES)


def test_a_kernel_that_would_wait_for_ever_is_refused() -> None:
    kernel = sample()[0]
    stream = next(i for i, s in enumerate(kernel.streams) if (s.ops["pre"]["op"] != 0).any())
    ops = kernel.streams[stream].ops.copy()
    at = int(np.argmax((ops["pre"]["op"] != 0).any(axis=1)))
    ops["pre"]["value"][at] += 1000
    streams = list(kernel.streams)
    streams[stream] = replace(streams[stream], ops=ops)
    with pytest.raises(ProgramError, match=rf"operation {at}: would wait for semaphore .* for ever"):
        verifier.verify(program.read(program.write([replace(kernel, streams=tuple(streams))])), CAPABILITIES)


@pytest.mark.parametrize(("lacking", "text"), [
    ({"tiles": 1}, r"tiles: needs 2, the device has 1"), ({"tile_sram_bytes": 64}, r"sram_bytes: needs"),
    ({"tile_semaphores": 0}, r"tile_semaphores: needs"), ({"max_args": 2}, r"arg_count: needs 5"),
    ({"dtypes": frozenset({Dtype.FP32})}, r"the device has no INT32"), ({"max_kernels": 1}, r"2 kernels"),
])
def test_a_smaller_device_says_what_it_lacks(lacking: dict[str, object], text: str) -> None:
    with pytest.raises(ProgramError, match=text):
        verifier.verify(program.read(IMAGE), replace(CAPABILITIES, **lacking))


def test_a_models_kernels_are_verified_in_milliseconds() -> None:
    kernels = [embedding(SMALL, 800, 384, words=1000, positions=512, types=2, epsilon=1e-12),
               attention(SMALL, 16, 50, 12, 32), feed_forward(SMALL, 800, 384, 1536)]
    parsed = program.read(program.write(kernels))
    best = 1.0
    for _ in range(5):
        began = time.perf_counter()
        verifier.verify(parsed, SMALL)
        best = min(best, time.perf_counter() - began)
    assert best < 0.1
