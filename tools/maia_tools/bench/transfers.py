"""Copies and register accesses."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from maia_rt.contract.registers import Bar0
from maia_tools.bench.measurement import Bar, Measurement, each
from maia_tools.bench.reference import Memcpy
from maia_tools.bench.subject import Subject
from maia_tools.output import bytes_text

COPY_SIZES = (8, 64, 1 << 10, 4 << 10, 16 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
LARGE_SIZES = (256 << 20, 1 << 30)
BAR_FROM = 1 << 20
"""The size from which a copy is to be as fast as memcpy."""
MESSAGES = 100


def copies(subject: Subject) -> list[Measurement]:
    """Each size each way."""
    found: list[Measurement] = []
    for size in COPY_SIZES:
        found += _copies(subject, size)
    return found + _strided(subject)


def large(subject: Subject) -> list[Measurement]:
    """Sizes that need gigabytes on both sides, as far as the device has room for two of each."""
    found: list[Measurement] = []
    for size in LARGE_SIZES:
        if subject.device.memory().free < 2 * size:
            click.echo(f"copies of {bytes_text(size)} are left out: the device has no room for two", err=True)
            break
        found += _copies(subject, size)
    return found


def _copies(subject: Subject, size: int) -> list[Measurement]:
    device, stack, text = subject.device, subject.stack, bytes_text(size)
    buffer, other = (stack.enter_context(device.allocate(size)) for _ in range(2))
    pinned = stack.enter_context(device.allocate_host(size))
    plain = np.ones(size, np.uint8)
    pinned.array[:] = 1
    count = rounds(size)
    found = [memcpy(size)]
    for name, dst, src in (
        ("host to device, plain", buffer, plain), ("device to host, plain", plain, buffer),
        ("host to device, pinned", buffer, pinned), ("device to host, pinned", pinned, buffer),
        ("device to device", other, buffer),
    ):
        found.append(_copy(subject, f"copy {text} {name}", name, dst, src, size, count))
    return found


def memcpy(size: int) -> Measurement:
    """What the machine itself takes to copy so many bytes."""
    both, count = Memcpy(size), rounds(size)
    return Measurement(f"memcpy {bytes_text(size)}", count, lambda: each(count, both.copy), nbytes=size,
                       series=("memcpy", size))


def rounds(size: int) -> int:
    """How often a copy of so many bytes is made in one sample."""
    return max(2, min(64, (8 << 20) // size))


def _copy(subject: Subject, name: str, line: str, dst: Any, src: Any, size: int, count: int) -> Measurement:
    stream = subject.stream
    way = stream.copy(dst, src)
    stream.synchronize()

    def once() -> None:
        stream.copy(dst, src)
        stream.synchronize()

    direct = size >= BAR_FROM and line.endswith("pinned")
    return Measurement(f"{name} ({way.value})", count, lambda: each(count, once), subject.settle, nbytes=size,
                       reference=f"memcpy {bytes_text(size)}", bar=Bar(1 / 0.95) if direct else None,
                       series=(line, size))


def _strided(subject: Subject) -> list[Measurement]:
    """1024 rows of 1 KiB out of 2 KiB."""
    device, stack = subject.device, subject.stack
    wide = stack.enter_context(device.allocate((1024, 2048), np.uint8))
    dense = stack.enter_context(device.allocate_host((1024, 1024), np.uint8))
    size = 1 << 20
    return [
        _copy(subject, "copy 1 MiB host to device in 1,024 rows", "", wide[:, :1024], dense, size, 1),
        _copy(subject, "copy 1 MiB device to host in 1,024 rows", "", dense, wide[:, :1024], size, 1),
    ]


def registers(subject: Subject) -> list[Measurement]:
    """One register over the transport."""
    transport = subject.device.transport

    def read() -> None:
        transport.read(0, Bar0.ID, 4)

    def write() -> None:
        transport.write(0, Bar0.SCRATCH, 4, 0)

    return [Measurement(name, MESSAGES, lambda once=once: each(MESSAGES, once),  # type: ignore[misc]
                        subject.stream.synchronize, reference="socket, round trip", bar=bar)
            for name, once, bar in (("register read", read, Bar(1.5)), ("register write", write, None))]
