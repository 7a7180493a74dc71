"""The sentence encoder on a device: weights stay there, batches stream through, one wait at the end."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from maia_rt.contract import program as program_image
from maia_rt.contract.program import NUMPY_DTYPES
from maia_rt.errors import MaiaError
from maia_tools import minilm_plan
from maia_tools.batches import Batch
from maia_tools.minilm_plan import Plan
from maia_tools.weights import Weights

if TYPE_CHECKING:
    import maia_rt

ALIGNMENT = 256
"""Bytes between the starts of arrays in one buffer; kernels ask for 64."""
LOADED_SHAPES = 6
"""Batch shapes whose programs stay loaded; a device holds a limited number of kernels."""


class MiniLM:
    """The encoder on one device, through one stream.

    Every tensor operation is a macro-operation of the device. The client pads token ids, writes masks of 0 and 1,
    and submits.

    Parameters
    ----------
    device : maia_rt.Device
    weights : Weights
        Uploaded here, in FP32; they stay in device memory until `close`.

    Raises
    ------
    maia_rt.errors.OutOfMemory
        Device memory does not hold the weights.
    """

    def __init__(self, device: maia_rt.Device, weights: Weights) -> None:
        self.device = device
        self.shape = weights.shape
        self._loaded: OrderedDict[tuple[int, int], tuple[Plan, maia_rt.Program]] = OrderedDict()
        self._workspace: maia_rt.Buffer | None = None
        named = minilm_plan.parameters(weights)
        offsets, nbytes = _offsets({name: array.nbytes for name, array in named.items()})
        self._stream = device.create_stream()
        self._weights = device.allocate(nbytes)
        self._parameters: dict[str, maia_rt.Buffer] = {}
        for name, array in named.items():
            view = self._weights.view(array.dtype, array.shape, offsets[name])
            self._stream.copy(view, array)
            self._parameters[name] = view
        self._stream.synchronize()

    def encode(self, batches: Sequence[Batch], advance: Callable[[int], object] | None = None) -> np.ndarray:
        """Embed sentences: submit every batch, then wait once.

        Parameters
        ----------
        batches : sequence of Batch
            Their ``places`` are 0 .. n - 1, in any order.
        advance : callable, optional
            Called with the number of sentences of each batch as it is done.

        Returns
        -------
        ndarray of float32
            (n, hidden), each row of length 1, in the order of ``places``.

        Raises
        ------
        maia_rt.errors.DeviceFault, maia_rt.errors.DeviceLost, maia_rt.errors.DeviceTimeout
        """
        hidden = self.shape.hidden
        count = sum(len(b.places) for b in batches)
        found = np.zeros((count, hidden), np.float32)
        if not batches:
            return found
        sent = [minilm_plan.inputs(b.ids) for b in batches]
        sizes = [x.nbytes + b.mask.nbytes for x, b in zip(sent, batches, strict=True)]
        with self.device.allocate_host(sum(sizes)) as given, \
                self.device.allocate_host(found.shape, np.float32) as taken:
            events = []
            at = row = 0
            for ids, batch in zip(sent, batches, strict=True):
                for array in (ids, batch.mask):
                    given.array[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
                    at += array.nbytes
                end = row + len(batch.places)
                self._submit(batch, given[at - ids.nbytes - batch.mask.nbytes : at], taken[row:end])
                events.append((self._stream.record(), len(batch.places)))
                row = end
            if advance is not None:
                for event, sentences in events:
                    event.synchronize()
                    advance(sentences)
            self._stream.synchronize()
            found[[place for b in batches for place in b.places]] = taken.array
        return found

    def _submit(self, batch: Batch, given: maia_rt.HostBuffer, taken: maia_rt.HostBuffer) -> None:
        """Inputs in, every launch, embeddings out."""
        plan, program = self._program(batch.shape)
        buffers: dict[str, maia_rt.Buffer] = {**self._parameters, **self._buffers(plan)}
        ids = buffers["ids"].nbytes
        stream = self._stream
        stream.copy(buffers["ids"], given[:ids])
        stream.copy(buffers["mask"], given[ids:])
        for launch in plan.launches:
            stream.launch(program[launch.kernel], *(buffers[name] for name in launch.buffers))
        stream.copy(taken, buffers["embeddings"])

    def _program(self, shape: tuple[int, int]) -> tuple[Plan, maia_rt.Program]:
        """The plan for a batch shape and its program, loaded; the one unused longest makes room."""
        held = self._loaded.get(shape)
        if held is None:
            while len(self._loaded) >= LOADED_SHAPES:
                self._loaded.popitem(last=False)[1][1].close()
            plan = minilm_plan.plan(self.shape, self.device.capabilities.program, *shape)
            held = self._loaded[shape] = plan, self.device.load(program_image.write(plan.kernels))
        self._loaded.move_to_end(shape)
        return held

    def _buffers(self, plan: Plan) -> Mapping[str, maia_rt.Buffer]:
        """A plan's buffers in the workspace, which grows to the largest plan's need."""
        sizes = {name: math.prod(shape) * NUMPY_DTYPES[dtype].itemsize for name, (dtype, shape) in plan.buffers.items()}
        offsets, nbytes = _offsets(sizes)
        if self._workspace is None or self._workspace.nbytes < nbytes:
            if self._workspace is not None:
                self._workspace.close()
            self._workspace = self.device.allocate(nbytes)
        space = self._workspace
        return {name: space.view(NUMPY_DTYPES[dtype], shape, offsets[name])
                for name, (dtype, shape) in plan.buffers.items()}

    def close(self) -> None:
        """Give everything on the device back; idempotent.

        Raises
        ------
        maia_rt.errors.DeviceFault, maia_rt.errors.DeviceLost, maia_rt.errors.DeviceTimeout
            Something was still under way and failed; everything is given back all the same.
        """
        for _, program in self._loaded.values():
            program.close()
        self._loaded.clear()
        self._weights.close()
        if self._workspace is not None:
            self._workspace.close()
        self._stream.close()

    def __enter__(self) -> MiniLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.close()
        except MaiaError:
            if kind is None:  # else what went wrong inside is the news
                raise


def _offsets(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where each of several arrays starts in one buffer, and the buffer's size."""
    offsets = {}
    end = 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end
