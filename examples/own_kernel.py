"""A kernel of one's own: y = factor * x + shift on one tile, with both numbers given at launch."""

import numpy as np

import maia_rt
from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage, write
from maia_rt.kernels import KernelBuilder


def affine(capabilities: Capabilities, elements: int) -> KernelImage:
    builder = KernelBuilder("affine", capabilities)
    x = builder.argument("x", ArgKind.IN, Dtype.FP32, (elements,))
    y = builder.argument("y", ArgKind.OUT, Dtype.FP32, (elements,))
    factor, shift = builder.scalar("factor"), builder.scalar("shift")
    tile = builder.tile(0)
    block = tile.allocate((elements,), Dtype.FP32)
    tile.move(block, x)  # the tile's DMA engine, from device memory to its SRAM
    tile.scale(block, block, factor, shift)  # its vector unit, which waits for the DMA by a semaphore
    tile.move(y, block)
    return builder.build()


with maia_rt.open() as device, device.create_stream() as stream:
    kernel = device.load(write([affine(device.capabilities.program, 1000)]))["affine"]
    numbers = np.arange(1000, dtype=np.float32)
    x, y = device.upload(numbers), device.allocate(1000, np.float32)
    stream.launch(kernel, x, y, 0.5, -1.0)
    result = y.copy_to_host(stream)
    print(result[:5])

assert np.array_equal(result, numbers * 0.5 - 1)
