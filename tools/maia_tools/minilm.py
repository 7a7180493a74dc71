"""The sentence encoder on a device: weights stay there, batches run side by side, one wait at the end."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from maia_rt.contract import program as program_image
from maia_rt.errors import MaiaError
from maia_tools import minilm_plan
from maia_tools.batches import Batch
from maia_tools.minilm_lane import Lane, places
from maia_tools.minilm_plan import Plan
from maia_tools.weights import Weights

if TYPE_CHECKING:
    import maia_rt

LANES = 2
"""Parts of the device, whole clusters each. While a launch ends on one, tiles of the other have work; each part loads
the weights for its batches, so more parts would load them more often."""
LOADED_SHAPES = 6
"""Batch shapes whose programs stay loaded; a device holds a limited number of kernels."""


class MiniLM:
    """The encoder on one device, through a stream for each lane.

    Every tensor operation is a macro-operation of the device. The client pads token ids, writes masks of 0 and 1,
    and submits: three copies and a graph a batch.

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
        named = minilm_plan.parameters(weights)
        offsets, nbytes = places({name: array.nbytes for name, array in named.items()})
        found = device.capabilities
        clusters = max(1, found.clusters // LANES)
        self._capabilities = replace(found.program, tiles=clusters * found.tiles_per_cluster)
        self._lanes = [Lane(device, ((1 << clusters) - 1) << i * clusters)
                       for i in range(min(LANES, found.clusters))]
        self._weights = device.allocate(nbytes)
        self._host: dict[int, maia_rt.HostBuffer] = {}
        self._parameters: dict[str, maia_rt.Buffer] = {}
        stream = self._lanes[0].stream
        for name, array in named.items():
            view = self._weights.view(array.dtype, array.shape, offsets[name])
            stream.copy(view, array)
            self._parameters[name] = view
        stream.synchronize()

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
        # The largest first: what is left at the end, for one lane alone, is small.
        batches = sorted(batches, key=lambda batch: -batch.ids.size)
        count = sum(len(b.places) for b in batches)
        found = np.zeros((count, self.shape.hidden), np.float32)
        if not batches:
            return found
        sent = [minilm_plan.inputs(b.ids) for b in batches]
        sizes = [x.nbytes + b.mask.nbytes for x, b in zip(sent, batches, strict=True)]
        given = self._pinned(0, sum(sizes))
        taken = self._pinned(1, found.nbytes).view(np.float32, found.shape)
        events = []
        at = row = 0
        for ids, batch in zip(sent, batches, strict=True):
            start = at
            for array in (ids, batch.mask):
                given.array[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
                at += array.nbytes
            end = row + len(batch.places)
            lane = min(self._lanes, key=lambda lane: lane.tokens)
            plan, program = self._program(batch.shape)
            lane.submit(batch.shape, plan, program, self._parameters, given[start:at], taken[row:end])
            events.append((lane.stream.record(), len(batch.places)))
            row = end
        for event, sentences in events:
            event.synchronize()
            if advance is not None:
                advance(sentences)
        for lane in self._lanes:
            lane.tokens = 0
        found[[place for b in batches for place in b.places]] = taken.array
        return found

    def _pinned(self, which: int, nbytes: int) -> maia_rt.HostBuffer:
        """Pinned memory for what goes in (0) or comes out (1). It is kept: nothing is pinned anew at each call."""
        held = self._host.get(which)
        if held is None or held.nbytes < nbytes:
            if held is not None:
                held.close()
            held = self._host[which] = self.device.allocate_host(nbytes)
        return held[:nbytes]

    def _program(self, shape: tuple[int, int]) -> tuple[Plan, maia_rt.Program]:
        """The plan for a batch shape and its program, loaded; the one unused longest makes room."""
        held = self._loaded.get(shape)
        if held is None:
            while len(self._loaded) >= LOADED_SHAPES:
                old, (_, program) = self._loaded.popitem(last=False)
                for lane in self._lanes:
                    lane.forget(old)
                program.close()
            plan = minilm_plan.plan(self.shape, self._capabilities, *shape)
            held = self._loaded[shape] = plan, self.device.load(program_image.write(plan.kernels))
        self._loaded.move_to_end(shape)
        return held

    def close(self) -> None:
        """Give everything on the device back; idempotent.

        Raises
        ------
        maia_rt.errors.DeviceFault, maia_rt.errors.DeviceLost, maia_rt.errors.DeviceTimeout
            Something was still under way and failed; everything is given back all the same.
        """
        with ExitStack() as stack:
            stack.callback(self._weights.close)
            while self._host:
                stack.callback(self._host.popitem()[1].close)
            while self._loaded:
                stack.callback(self._loaded.popitem()[1][1].close)
            for lane in self._lanes:
                stack.callback(lane.close)

    def __enter__(self) -> MiniLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.close()
        except MaiaError:
            if kind is None:  # else what went wrong inside is the news
                raise
