"""Where the tests of kernels run them: on the emulated device, or in the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

import maia_rt
from maia_rt.contract import program, verifier
from maia_rt.contract.program import NUMPY_DTYPES, ArgKind, Capabilities, KernelImage
from tests.helpers import interpreter

SMALL = Capabilities(tiles=4, tile_sram_bytes=2 << 20, tile_semaphores=32, max_args=16, max_kernels=64)
"""As the emulator's small profile."""
TIGHT = replace(SMALL, tiles=3, tile_sram_bytes=48 << 10)
"""Little SRAM and an odd number of tiles: everything is blocked."""
MANY = replace(SMALL, tiles=20, tile_sram_bytes=3 << 20)
"""More tiles than most shapes have work for, as on the larger profiles."""
LONE = replace(SMALL, tiles=1, tile_sram_bytes=256 << 10)


class Launcher(Protocol):
    """Runs kernels built for its capabilities."""

    capabilities: Capabilities

    def launch(self, kernel: KernelImage, *inputs: np.ndarray) -> np.ndarray:
        """Launch with the IN arguments given, in order; returns what is in the only OUT argument."""

    def launch_all(self, kernel: KernelImage, *inputs: np.ndarray | float) -> dict[str, np.ndarray]:
        """Launch with all but the OUT arguments given, in order; returns OUT and INOUT arguments by name."""


@dataclass
class InterpreterLauncher:
    """Verifies an image and interprets it."""

    capabilities: Capabilities
    seed: int = 0

    def launch(self, kernel: KernelImage, *inputs: np.ndarray) -> np.ndarray:
        (out,) = self.launch_all(kernel, *inputs).values()
        return out

    def launch_all(self, kernel: KernelImage, *inputs: np.ndarray | float) -> dict[str, np.ndarray]:
        image = program.read(program.write([kernel]))
        verifier.verify(image, self.capabilities)
        arguments = prepared(kernel, inputs)
        self.seed += 1
        interpreter.run(image.kernels[0], arguments, self.seed)
        return written(kernel, arguments)


class DeviceLauncher:
    """Loads each kernel on a device and launches it there."""

    def __init__(self, device: maia_rt.Device) -> None:
        self.device = device
        self.capabilities = device.capabilities.program
        self.stream = device.create_stream()

    def launch(self, kernel: KernelImage, *inputs: np.ndarray) -> np.ndarray:
        (out,) = self.launch_all(kernel, *inputs).values()
        return out

    def launch_all(self, kernel: KernelImage, *inputs: np.ndarray | float) -> dict[str, np.ndarray]:
        arguments = prepared(kernel, inputs)
        with contextlib.ExitStack() as stack:
            loaded = stack.enter_context(self.device.load(program.write([kernel])))
            given = [stack.enter_context(self.device.allocate(a.shape, a.dtype)) if isinstance(a, np.ndarray) else a
                     for a in arguments]
            for buffer, array in zip(given, arguments, strict=True):
                if isinstance(array, np.ndarray):
                    self.stream.copy(buffer, array)
            self.stream.launch(loaded[kernel.name], *given)
            for buffer, array, arg in zip(given, arguments, kernel.args, strict=True):
                if arg.kind in (ArgKind.OUT, ArgKind.INOUT):
                    self.stream.copy(array, buffer)
            self.stream.synchronize()
        return written(kernel, arguments)

    def __enter__(self) -> DeviceLauncher:
        # Pinned memory for staging is made at the first copies: have it before anybody counts maps.
        array = np.zeros(8 << 20, np.uint8)
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(self.device.create_stream()) for _ in range(3)]
            buffer = stack.enter_context(self.device.allocate(array.nbytes))
            for stream in (self.stream, self.device.default_stream, *others):
                stream.copy(buffer, array)
                stream.copy(array, buffer)
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


def prepared(kernel: KernelImage, inputs: Sequence[np.ndarray | float]) -> list[np.ndarray | float]:
    """All arguments of a kernel; OUT arguments are full of ones' bytes, INOUT arguments are copies."""
    given = iter(inputs)
    arguments: list[np.ndarray | float] = []
    for arg in kernel.args:
        if arg.kind is ArgKind.OUT:
            arguments.append(np.frombuffer(bytearray(b"\xff" * arg.nbytes),
                                           NUMPY_DTYPES[arg.dtype]).reshape(arg.array_shape))
        elif arg.kind is ArgKind.SCALAR:
            arguments.append(float(next(given)))
        else:
            array = np.array(next(given), NUMPY_DTYPES[arg.dtype], order="C")
            assert array.shape == arg.array_shape, f"{arg.name}: {array.shape}, not {arg.array_shape}"
            arguments.append(array)
    assert next(given, None) is None, "more inputs than the kernel takes"
    return arguments


def written(kernel: KernelImage, arguments: Sequence[np.ndarray | float]) -> dict[str, np.ndarray]:
    """What a kernel may have written, by the names of its arguments."""
    return {arg.name: array for arg, array in zip(kernel.args, arguments, strict=True)
            if arg.kind in (ArgKind.OUT, ArgKind.INOUT) and isinstance(array, np.ndarray)}


def arguments(kernel: KernelImage, inputs: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """All arguments of a kernel that takes buffers, and the only one that it writes."""
    arrays = prepared(kernel, inputs)
    (out,) = written(kernel, arrays).values()
    return [np.asarray(a) for a in arrays], out
