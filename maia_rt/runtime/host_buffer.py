"""Pinned host memory, which a device reaches by itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maia_rt._fast.exporter import BufferExporter
from maia_rt.errors import ForkedError
from maia_rt.memory import PinnedBlock
from maia_rt.runtime import dlpack
from maia_rt.runtime.buffer import Memory

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.stream import Stream


class HostBuffer(Memory, BufferExporter):
    """Pinned host memory, which the device reaches by itself; see :meth:`maia_rt.Device.allocate_host`.

    Copies from and to it run while the program goes on. numpy sees the memory through ``numpy.asarray(buffer)`` or
    :attr:`array`, other libraries through the buffer protocol and DLPack; after :meth:`close` it stays readable until
    the last such array is gone, and is not reused before.
    """

    _noun = "host buffer"

    def __init__(self, device: Device, address: int, nbytes: int, dtype: np.dtype[Any] | None, shape: tuple[int, ...],
                 root: Memory | None, memory: npt.NDArray[np.uint8], steps: tuple[int, ...] | None = None, *,
                 unpin: Callable[[], object] | None = None, readonly: bool = False) -> None:
        super().__init__(device, address, nbytes, dtype, shape, root, steps)
        # All of the root's bytes; None after it was given up.
        self._memory: npt.NDArray[np.uint8] | None = memory
        self._unpin = unpin
        self.readonly = readonly
        if root is None:
            device._pinned.add(memory.ctypes.data, nbytes, address)

    @classmethod
    def _pin(cls, device: Device, block: PinnedBlock, nbytes: int, dtype: np.dtype[Any] | None,
             shape: tuple[int, ...]) -> HostBuffer:
        memory = np.frombuffer(block.view(), np.uint8)[:nbytes]
        root = memory if memory.base is None else memory.base
        # Arrays over the memory, of whatever shape, keep this one alive: the block goes back with the last of them.
        weakref.finalize(root, block.free).atexit = False
        return cls(device, block.iova, nbytes, dtype, shape, None, memory)

    def _derive(self, address: int, nbytes: int, dtype: np.dtype[Any] | None, shape: tuple[int, ...],
                steps: tuple[int, ...] | None) -> HostBuffer:
        if self._memory is None:
            raise self._is_closed()
        return HostBuffer(self.device, address, nbytes, dtype, shape, self._root, self._memory, steps,
                          readonly=self.readonly)

    @property
    def array(self) -> npt.NDArray[Any]:
        """The memory as an array of the buffer's dtype and shape; of uint8 where it has none.

        Raises
        ------
        ClosedError, ForkedError
        """
        if self.closed or self._memory is None:
            raise self._is_closed()
        if self.device._forked:
            raise ForkedError("the host buffer was made before fork", hint="open the device anew in the child")
        at = self._address - self._root._address
        if self._strides is None:
            return self._memory[at:at + self.nbytes].view(self.dtype or np.uint8).reshape(self.shape)
        return np.ndarray(self.shape, self.dtype or np.uint8, self._memory.data, at, self._strides)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy:
            return np.array(self.array, dtype)
        return self.array if dtype is None else self.array.astype(dtype, copy=False)

    def __dlpack__(self, *, stream: None = None, max_version: tuple[int, int] | None = None,
                   dl_device: tuple[int, int] | None = None, copy: bool | None = None) -> Any:
        """Export the memory as a DLPack capsule of the CPU, which keeps it as an array over it does.

        As with :attr:`array`, wait for the stream before what its commands write is read.

        Raises
        ------
        BufferError
            Another device than the CPU is demanded; or the memory is read-only and the consumer knows no such thing.
        ClosedError, ForkedError
        """
        return dlpack.export_host(self, stream, max_version, dl_device, copy)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return kDLCPU."""
        return dlpack.CPU, 0

    def _give_up(self) -> None:
        memory = self._memory
        if memory is not None and not self.device._forked:
            # An array over it is no longer pinned memory, but anybody's.
            self.device._pinned.remove(memory.ctypes.data)
            self.device._reclaimer.give_up(self._releaser())

    def _abandon(self) -> None:
        memory, pinned, free = self._memory, self.device._pinned, self._releaser()
        if memory is not None:
            start = memory.ctypes.data

            def end() -> None:
                pinned.remove(start)
                free()

            self.device._reclaimer.abandon(end)

    def _free_after(self, stream: Stream) -> None:
        if self._memory is not None:
            self.device._pinned.remove(self._memory.ctypes.data)
        super()._free_after(stream)

    def _releaser(self) -> Callable[[], object]:
        memory, self._memory = self._memory, None
        unpin = self._unpin
        # A block goes back with the last array over it; this keeps one until the device is done.
        return unpin if unpin is not None else lambda: memory
