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


@dataclass
class InterpreterLauncher:
    """Verifies an image and interprets it."""

    capabilities: Capabilities
    seed: int = 0

    def launch(self, kernel: KernelImage, *inputs: np.ndarray) -> np.ndarray:
        image = program.read(program.write([kernel]))
        verifier.verify(image, self.capabilities)
        arrays, out = arguments(kernel, inputs)
        self.seed += 1
        interpreter.run(image.kernels[0], arrays, self.seed)
        return out


class DeviceLauncher:
    """Loads each kernel on a device and launches it there."""

    def __init__(self, device: maia_rt.Device) -> None:
        self.device = device
        self.capabilities = device.capabilities.program
        self.stream = device.create_stream()

    def launch(self, kernel: KernelImage, *inputs: np.ndarray) -> np.ndarray:
        arrays, out = arguments(kernel, inputs)
        with contextlib.ExitStack() as stack:
            loaded = stack.enter_context(self.device.load(program.write([kernel])))
            buffers = [stack.enter_context(self.device.allocate(a.shape, a.dtype)) for a in arrays]
            for buffer, array in zip(buffers, arrays, strict=True):
                self.stream.copy(buffer, array)
            self.stream.launch(loaded[kernel.name], *buffers)
            self.stream.copy(out, next(b for b, a in zip(buffers, arrays, strict=True) if a is out))
            self.stream.synchronize()
        return out

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


def arguments(kernel: KernelImage, inputs: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """All arguments of a kernel, its OUT argument full of ones' bytes, and that argument."""
    given = iter(inputs)
    arrays = []
    out = np.zeros(0)
    for arg in kernel.args:
        if arg.kind is ArgKind.OUT:
            out = np.frombuffer(bytearray(b"\xff" * arg.nbytes), NUMPY_DTYPES[arg.dtype]).reshape(arg.array_shape)
            arrays.append(out)
        else:
            array = np.ascontiguousarray(next(given), NUMPY_DTYPES[arg.dtype])
            assert array.shape == arg.array_shape, f"{arg.name}: {array.shape}, not {arg.array_shape}"
            arrays.append(array)
    return arrays, out
