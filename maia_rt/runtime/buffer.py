"""Memory that commands work on: device memory, and pinned host memory."""

from __future__ import annotations

import abc
import math
import warnings
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from maia_rt.errors import ClosedError, ForkedError, InvalidArgument, InvalidType
from maia_rt.memory import PinnedBlock

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.stream import Stream


Shape = int | tuple[int, ...]
M = TypeVar("M", bound="Memory")


class Memory(abc.ABC):
    """A piece of memory with a device address: the root of :class:`Buffer` and :class:`HostBuffer`.

    Attributes
    ----------
    device : Device
    nbytes : int
    dtype : numpy.dtype or None
        None for plain bytes.
    shape : tuple of int
        In elements of `dtype`, in bytes where it has none.
    """

    def __init__(self, device: Device, address: int, nbytes: int, dtype: np.dtype[Any] | None, shape: tuple[int, ...],
                 root: Memory | None) -> None:
        self.device = device
        self.nbytes = nbytes
        self.dtype = dtype
        self.shape = shape
        self._address = address
        self._root = root or self
        self._closed = False
        if root is None and device._validator is not None:
            device._validator.forget(address, nbytes)

    @property
    def closed(self) -> bool:
        """Whether the memory has been given back."""
        return self._root._closed

    @property
    def address(self) -> int:
        """The device address of the first byte.

        Raises
        ------
        ClosedError
        """
        if self._root._closed:
            raise ClosedError(f"the {self._noun} has been closed", hint="keep it open until it is no longer used")
        return self._address

    _noun = "memory"

    def view(self, dtype: npt.DTypeLike | None = None, shape: int | tuple[int, ...] | None = None,
             offset: int = 0) -> Any:
        """Return a view: the same memory with a dtype and a shape, from `offset` on.

        Parameters
        ----------
        dtype : dtype-like, optional
            None for plain bytes.
        shape : int or tuple of int, optional
            In elements; by default one dimension, to the end of this view.
        offset : int
            In bytes.

        Raises
        ------
        InvalidArgument
            It would leave this view.
        """
        kind = None if dtype is None else np.dtype(dtype)
        size = 1 if kind is None else kind.itemsize
        if not 0 <= offset <= self.nbytes:
            raise InvalidArgument(f"offset {offset} is outside the {self.nbytes} bytes of the {self._noun}")
        if shape is None:
            shape = ((self.nbytes - offset) // size,)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        nbytes = math.prod(shape) * size
        if min(shape, default=0) < 0 or offset + nbytes > self.nbytes:
            raise InvalidArgument(f"a view of shape {shape} needs {nbytes} bytes from offset {offset}; "
                                  f"the {self._noun} has {self.nbytes}")
        return self._derive(self.address + offset, nbytes, kind, shape)

    def close(self) -> None:
        """Give the memory back; idempotent. A view does not close its buffer."""
        if self._root is self and not self._closed:
            self._closed = True
            self.device._addresses.forget(self._address, self.nbytes, repr(self).removesuffix(", closed>") + ">")
            self._give_up()

    def __enter__(self: M) -> M:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_root", None) is self and not self._closed:
            self._closed = True
            if not self.device.closed:
                warnings.warn(f"a {self._noun} of {self.nbytes} bytes was not closed", ResourceWarning, stacklevel=2,
                              source=self)
                self._abandon()

    @abc.abstractmethod
    def _derive(self, address: int, nbytes: int, dtype: np.dtype[Any] | None, shape: tuple[int, ...]) -> Memory:
        """Return a view of this memory's root."""

    @abc.abstractmethod
    def _give_up(self) -> None:
        """Hand the memory back to the device."""

    @abc.abstractmethod
    def _abandon(self) -> None:
        """Likewise from a finalizer, which may not call the device."""

    def __getitem__(self, item: slice) -> Any:
        """Return a slice along the first axis, without a step."""
        if not isinstance(item, slice):
            raise InvalidType(f"{self._noun} is sliced, as in x[a:b]; its elements lie on the device",
                              hint="copy it to the host first")
        if not self.shape:
            raise InvalidArgument(f"a {self._noun} without dimensions has no slices")
        start, stop, step = item.indices(self.shape[0])
        if step != 1:
            raise InvalidArgument(f"a slice of a {self._noun} has no step; {step} was asked for")
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        count = max(stop - start, 0)
        return self._derive(self.address + start * row, count * row, self.dtype, (count, *self.shape[1:]))

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def __repr__(self) -> str:
        what = f"{self.nbytes} bytes" if self.dtype is None else f"{self.dtype} {self.shape}"
        return f"<{type(self).__name__} {what} at {self._address:#x}{', closed' if self.closed else ''}>"


class Buffer(Memory):
    """Device memory; see :meth:`maia_rt.Device.allocate`.

    Closing a buffer that commands still use is allowed: its memory is handed out again once every queue has passed what
    was submitted before. A view (:meth:`view`, slices) keeps its buffer alive, but not open.
    """

    _noun = "buffer"

    def _derive(self, address: int, nbytes: int, dtype: np.dtype[Any] | None, shape: tuple[int, ...]) -> Buffer:
        return Buffer(self.device, address, nbytes, dtype, shape, self._root)

    def copy_to_host(self, stream: Stream | None = None) -> npt.NDArray[Any]:
        """Return the contents as a new array.

        Parameters
        ----------
        stream : Stream, optional
            After whose commands the copy runs. None: after everything that has been submitted to the device.

        Returns
        -------
        ndarray
            Of the buffer's dtype and shape; of uint8 where it has none.

        Raises
        ------
        ClosedError, DeviceFault, DeviceTimeout, DeviceLost
        """
        found = np.empty(self.shape, self.dtype or np.uint8)
        if stream is None:
            self.device.synchronize()
            stream = self.device.default_stream
        stream.copy(found, self)
        return found

    def _give_up(self) -> None:
        self.device._give_up(self._address)

    def _abandon(self) -> None:
        self.device._abandon(self._address)


class HostBuffer(Memory):
    """Pinned host memory, which the device reaches by itself; see :meth:`maia_rt.Device.allocate_host`.

    Copies from and to it run while the program goes on. numpy sees the memory through ``numpy.asarray(buffer)`` or
    :attr:`array`; after :meth:`close` it stays readable until the last such array is gone, and is not reused before.
    """

    _noun = "host buffer"

    def __init__(self, device: Device, address: int, nbytes: int, dtype: np.dtype[Any] | None, shape: tuple[int, ...],
                 root: Memory | None, block: PinnedBlock, memory: npt.NDArray[np.uint8]) -> None:
        super().__init__(device, address, nbytes, dtype, shape, root)
        self._block = block
        self._memory: npt.NDArray[np.uint8] | None = memory

    @classmethod
    def _pin(cls, device: Device, block: PinnedBlock, nbytes: int, dtype: np.dtype[Any] | None,
             shape: tuple[int, ...]) -> HostBuffer:
        memory = np.frombuffer(block.view(), np.uint8)[:nbytes]
        root = memory if memory.base is None else memory.base
        # Arrays over the memory, of whatever shape, keep this one alive: the block goes back with the last of them.
        weakref.finalize(root, block.free).atexit = False
        return cls(device, block.iova, nbytes, dtype, shape, None, block, memory)

    def _derive(self, address: int, nbytes: int, dtype: np.dtype[Any] | None, shape: tuple[int, ...]) -> HostBuffer:
        start = address - self.address
        memory = self._memory
        if memory is None:
            raise ClosedError("the host buffer has been closed")
        part = memory[start:start + nbytes]
        return HostBuffer(self.device, address, nbytes, dtype, shape, self._root, self._block, part)

    @property
    def array(self) -> npt.NDArray[Any]:
        """The memory as an array of the buffer's dtype and shape; of uint8 where it has none.

        Raises
        ------
        ClosedError
        """
        if self.closed or self._memory is None:
            raise ClosedError("the host buffer has been closed")
        if self.device._forked:
            raise ForkedError("the host buffer was made before fork", hint="open the device anew in the child")
        return self._memory.view(self.dtype or np.uint8).reshape(self.shape)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy:
            return np.array(self.array, dtype)
        return self.array if dtype is None else self.array.astype(dtype, copy=False)

    def __buffer__(self, flags: int) -> memoryview:
        """Serve the buffer protocol, on Python 3.12 and later."""
        return self.array.data

    def _give_up(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            self.device._give_up_host(self._block, memory)

    def _abandon(self) -> None:
        if self._memory is not None:
            self.device._abandon_host(self._block, self._memory)


def measure(shape: Shape, dtype: npt.DTypeLike | None) -> tuple[np.dtype[Any] | None, tuple[int, ...], int]:
    """Return dtype, shape and bytes of what is to be allocated; InvalidArgument for negative extents."""
    kind = None if dtype is None else np.dtype(dtype)
    dims = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    if min(dims, default=0) < 0:
        raise InvalidArgument(f"a shape has no negative extents: {dims}")
    return kind, tuple(int(d) for d in dims), math.prod(dims) * (1 if kind is None else kind.itemsize)
