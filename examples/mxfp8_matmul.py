"""A product of two matrices in MXFP8: quantized on the device, multiplied there, compared with float32."""

import numpy as np

import maia_rt
from maia_rt import Dtype, kernels
from maia_rt.contract.program import write

M, N, K = 256, 256, 256

random = np.random.default_rng(0)
a = random.standard_normal((M, K)).astype(np.float32)
weights = random.standard_normal((N, K)).astype(np.float32)  # stored (n, k): blocks of 32 share a scale along k

with maia_rt.open() as device, device.create_stream() as stream:
    capabilities = device.capabilities.program
    program = device.load(write([
        kernels.convert(capabilities, M, K, Dtype.FP32, Dtype.MXFP8_E4M3, name="quantize"),
        kernels.matmul(capabilities, M, N, K, dtype=Dtype.MXFP8_E4M3, transpose_b=True),
    ]))
    # Memory of an MX type is bytes: each row its elements, then a scale for every 32 of them. The activations are
    # quantized by the device, the weights here; both give the same bytes.
    raw = maia_rt.to_mx(weights, Dtype.MXFP8_E4M3)
    x, w = device.upload(a), device.upload(raw)
    quantized, y = device.allocate((M, raw.shape[1]), np.uint8), device.allocate((M, N), np.float32)
    stream.launch(program["quantize"], x, quantized)
    stream.launch(program["matmul"], quantized, w, y)
    result = y.copy_to_host(stream)
    assert np.array_equal(quantized.copy_to_host(stream), maia_rt.to_mx(a, Dtype.MXFP8_E4M3))

exact = a @ weights.T
error = np.abs(result - exact).max() / np.abs(exact).max()
print(f"{raw.nbytes / weights.nbytes:.0%} of the bytes, off by {error:.1%} of the largest result")
assert error < 0.05
