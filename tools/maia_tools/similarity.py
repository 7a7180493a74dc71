"""Cosine similarities of embeddings, multiplied on the device, and the nearest neighbours read off them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from maia_rt import kernels
from maia_rt.contract import program as program_image
from maia_rt.kernels.blocking import blocks

if TYPE_CHECKING:
    import maia_rt

BLOCK_ROWS = 512
"""Rows of the table that are computed at a time."""


def similarities(device: maia_rt.Device, embeddings: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The table of all cosines, some rows at a time.

    Parameters
    ----------
    device : maia_rt.Device
    embeddings : ndarray of float32
        (n, hidden), n > 0, rows of length 1.

    Yields
    ------
    (int, ndarray of float32)
        The number of the first row, and rows (rows, n) from there on.
    """
    count, hidden = embeddings.shape
    with device.create_stream() as stream, device.upload(embeddings, stream) as held:
        for start, end in blocks(0, count, BLOCK_ROWS):
            kernel = kernels.matmul(device.capabilities.program, end - start, count, hidden, transpose_b=True)
            out = np.empty((end - start, count), np.float32)
            image = program_image.write([kernel])
            with device.load(image) as program, device.allocate(out.shape, out.dtype) as product:
                stream.launch(program["matmul"], held[start:end], held, product)
                stream.copy(out, product)
            yield start, out


def nearest(rows: np.ndarray, first: int, count: int) -> list[list[tuple[int, float]]]:
    """For each row of the table, the other sentences that are most similar.

    Parameters
    ----------
    rows : ndarray
        Rows of the table of cosines.
    first : int
        The number of the first of them.
    count : int
        How many others, where there are as many.

    Returns
    -------
    list of list of (int, float)
        A sentence's number and the cosine, the most similar first.
    """
    found = []
    for number, line in enumerate(rows, first):
        order = [int(i) for i in np.argsort(-line, kind="stable")[: count + 1] if i != number][:count]
        found.append([(i, float(line[i])) for i in order])
    return found
