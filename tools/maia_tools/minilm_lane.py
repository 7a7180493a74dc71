"""A part of the device that encodes batches one after the other, beside the other parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from maia_rt.contract.program import NUMPY_DTYPES
from maia_tools.minilm_plan import Plan

if TYPE_CHECKING:
    import maia_rt

ALIGNMENT = 256
"""Bytes between the starts of arrays in one buffer; kernels ask for 64."""


class Lane:
    """A stream on some clusters, its memory, and a graph for each batch shape.

    Parameters
    ----------
    device : maia_rt.Device
    clusters : int
        A mask of the clusters that its launches run on.
    """

    def __init__(self, device: maia_rt.Device, clusters: int) -> None:
        self.stream = device.create_stream(clusters=clusters)
        self.tokens = 0
        """Submitted since the last wait, padding included: who has the least gets the next batch."""
        self._device = device
        self._workspace: maia_rt.Buffer | None = None
        self._graphs: dict[tuple[int, int], maia_rt.Graph] = {}

    def submit(self, shape: tuple[int, int], plan: Plan, program: maia_rt.Program,
               parameters: Mapping[str, maia_rt.Buffer], given: maia_rt.HostBuffer, taken: maia_rt.HostBuffer) -> None:
        """Inputs in, every launch as one command, embeddings out.

        Parameters
        ----------
        shape : tuple of int
            Of the batch: sequences, length.
        plan, program
            For that shape.
        parameters : mapping of str to maia_rt.Buffer
            The weights by name.
        given, taken : maia_rt.HostBuffer
            Ids (3, tokens) of int32 and after them the mask (sequences, length) of float32; where (sequences, hidden)
            embeddings of float32 go.
        """
        buffers = self._buffers(plan)
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._capture(plan, program, {**parameters, **buffers})
        ids = buffers["ids"].nbytes
        self.stream.copy(buffers["ids"], given[:ids])
        self.stream.copy(buffers["mask"], given[ids:])
        graph.launch(self.stream)
        self.stream.copy(taken, buffers["embeddings"])
        self.tokens += math.prod(shape)

    def _capture(self, plan: Plan, program: maia_rt.Program, buffers: Mapping[str, maia_rt.Buffer]) -> maia_rt.Graph:
        with self.stream.capture() as capture:
            for launch in plan.launches:
                self.stream.launch(program[launch.kernel], *(buffers[name] for name in launch.buffers))
        return capture.instantiate()

    def _buffers(self, plan: Plan) -> dict[str, maia_rt.Buffer]:
        """A plan's buffers in the workspace, which grows to the largest plan's need."""
        sizes = {name: math.prod(shape) * NUMPY_DTYPES[dtype].itemsize for name, (dtype, shape) in plan.buffers.items()}
        offsets, nbytes = places(sizes)
        if self._workspace is None or self._workspace.nbytes < nbytes:
            self.stream.synchronize()
            self.forget(*self._graphs)
            if self._workspace is not None:
                self._workspace.close()
            self._workspace = self._device.allocate(nbytes)
        space = self._workspace
        return {name: space.view(NUMPY_DTYPES[dtype], shape, offsets[name])
                for name, (dtype, shape) in plan.buffers.items()}

    def forget(self, *shapes: tuple[int, int]) -> None:
        """Close the graphs of batch shapes."""
        for shape in shapes:
            graph = self._graphs.pop(shape, None)
            if graph is not None:
                graph.close()

    def close(self) -> None:
        """Give everything on the device back; idempotent."""
        with ExitStack() as stack:
            stack.callback(self.stream.close)
            if self._workspace is not None:
                stack.callback(self._workspace.close)
            stack.callback(self.forget, *self._graphs)


def places(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where each of several arrays starts in one buffer, and the buffer's size in bytes."""
    offsets = {}
    end = 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end
