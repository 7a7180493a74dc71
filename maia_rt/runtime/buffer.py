"""Memory that commands work on, and what all of it can do; the memory of the device."""

from __future__ import annotations

import abc
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from maia_rt._fast.extent import Extent
from maia_rt.errors import BufferInUse, ClosedError, InvalidArgument, InvalidType, OutOfMemory, Unsupported
from maia_rt.memory.space import Space
from maia_rt.observe.place import Place, here
from maia_rt.runtime import check, dlpack, strides
from maia_rt.runtime.addresses import Freed

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.stream import Stream


Shape = int | tuple[int, ...]
CLOSE_SECONDS: Final = 0.2
"""How long closing memory waits for commands that use it: time for what is under way, none for what waits itself."""
M = TypeVar("M", bound="Memory")


class Home(Protocol):
    """Where a piece of device memory goes back to."""

    def free(self, address: int) -> None:
        """Take it back; the device is done with it. Finalizers may call this."""


class Memory(Extent, abc.ABC):
    """A piece of memory with a device address: the root of :class:`Buffer` and :class:`HostBuffer`.

    Indexing gives views of the same memory, as numpy's basic indexing does: ``x[3]``, ``x[a:b, ::2]``, ``x[..., 0]``.
    A view keeps its buffer alive, but not open.

    Attributes
    ----------
    device : Device
    nbytes : int
        Of its elements; a strided view spans more.
    dtype : numpy.dtype or None
        None for plain bytes.
    shape : tuple of int
        In elements of `dtype`, in bytes where it has none.
    readonly : bool
        Whether the device may only read it.
    """

    _noun = "memory"
    device: Device

    def __init__(self, device: Device, address: int, nbytes: int, dtype: np.dtype[Any] | None, shape: tuple[int, ...],
                 root: Memory | None, steps: tuple[int, ...] | None = None) -> None:
        self.device = device
        self.nbytes = nbytes
        self.dtype = dtype
        self.shape = shape
        # In bytes; None where the elements lie side by side.
        self._strides = steps
        self._run = nbytes if steps is None else 0
        self._address = address
        self._parent = root     # of a view; nothing refers to itself, so what is dropped is given back at once
        self._closed = False
        self._freed: Place | None = None
        self._made = here() if root is None else None
        if root is None and device._validator is not None:
            device._validator.forget(address, nbytes)

    @property
    def _root(self) -> Memory:
        """The buffer that this is a view of, or this."""
        parent: Memory | None = self._parent
        return self if parent is None else parent

    @property
    def closed(self) -> bool:
        """Whether the memory has been given back."""
        return self._root._closed

    @property
    def address(self) -> int:
        """The device address of element 0.

        Raises
        ------
        ClosedError
            The text says where the memory was given back.
        """
        if self._root._closed:
            raise self._is_closed()
        return self._address

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 1 if self.dtype is None else self.dtype.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from an element to the next, for each dimension."""
        return strides.contiguous(self.shape, self.itemsize) if self._strides is None else self._strides

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie side by side, in C order."""
        return self._strides is None

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
            It would leave this view, or this view is strided.
        """
        address = self.address
        if self._strides is not None:
            raise InvalidArgument(f"a strided view of a {self._noun} has no other dtype or shape",
                                  hint="take the view of the whole first, then index it")
        kind = None if dtype is None else check.dtype(dtype)
        size = 1 if kind is None else kind.itemsize
        offset = check.integer(offset, "an offset", 0, self.nbytes)
        if shape is None:
            shape = ((self.nbytes - offset) // size if size else 0,)
        dims = check.shape(shape)
        nbytes = math.prod(dims) * size
        if offset + nbytes > self.nbytes:
            raise InvalidArgument(f"a view of shape {dims} needs {nbytes} bytes from offset {offset}; "
                                  f"the {self._noun} has {self.nbytes}")
        return self._derive(address + offset, nbytes, kind, dims, None)

    def __getitem__(self, item: Any) -> Any:
        """Return a view of a part: integers, slices with or without a step, an ellipsis.

        Raises
        ------
        InvalidType, InvalidArgument, IndexOutOfRange, ClosedError
        """
        address, size = self.address, self.itemsize
        offset, dims, steps = strides.index(self.shape, self.strides, item)
        kept = None if strides.is_contiguous(dims, steps, size) else steps
        return self._derive(address + offset, math.prod(dims) * size, self.dtype, dims, kept)

    def __iter__(self) -> Iterator[Any]:
        if not self.shape:
            raise InvalidType(f"a {self._noun} without dimensions has no parts")
        return (self[at] for at in range(self.shape[0]))

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def close(self) -> None:
        """Give the memory back; idempotent. A view does not close its buffer.

        Commands that use it and are about to end are waited for, a fifth of a second at most.

        Raises
        ------
        BufferInUse
            Commands that are not done use it; the text names one. The memory stays open: wait for the stream, or
            free it in the stream's order with :meth:`maia_rt.Stream.free`.
        """
        if self._parent is None and not self._closed:
            if not self.device.closed:
                self._refuse_in_use()
            self._hand_over()

    def _refuse_in_use(self) -> None:
        use = self.device._find_use(self._address, self._address + max(self.nbytes, 1), CLOSE_SECONDS)
        if use is not None:
            raise BufferInUse(f"{self!r} cannot be closed: {use} still uses it", cause="the command is not done",
                              hint="synchronize the stream first, or free the buffer with stream.free(buffer)")

    def _hand_over(self) -> None:
        """Close without a look at who uses it: it is kept until every queue has passed what was submitted before."""
        if not self._closed:
            self._mark_closed()
            self._give_up()

    def _mark_closed(self) -> None:
        self._freed = here()
        # First this: whoever hears that something was closed then finds out what.
        self._closed = True
        self.device._addresses.forget(Freed(type(self).__name__, self._address, self.nbytes, self.dtype, self.shape,
                                            self._freed))

    def _free_after(self, stream: Stream) -> None:
        """Close in the order of a stream: its commands so far may use the memory, nobody else's do."""
        self._mark_closed()
        self.device._reclaimer.give_up_after(stream.record(), self._releaser())

    def _is_closed(self) -> ClosedError:
        where = self._root._freed
        return ClosedError(f"the {self._noun} has been closed" + (f", at {where}" if where else ""),
                           hint="keep it open until it is no longer used")

    def __enter__(self: M) -> M:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._parent is None:
            # What went wrong inside the block is the news; its commands may well be under way still.
            self._hand_over()

    def __del__(self) -> None:
        if self._parent is None and not self._closed:
            self._closed = True
            if not self.device.closed:
                warnings.warn(f"a {self._noun} of {self.nbytes} bytes was not closed"
                              + (f"; it was made at {self._made}" if self._made else ""),
                              ResourceWarning, stacklevel=2, source=self)
                self._abandon()

    def _view_at(self, address: int, dtype: np.dtype[Any], shape: tuple[int, ...], steps: tuple[int, ...]) -> Any:
        """Return a view by address and strides, which lie inside of this memory."""
        below, above = strides.span(shape, steps, dtype.itemsize)
        if address + below < self.address or address + above > self.address + self.nbytes:
            raise InvalidArgument(f"a view of shape {shape} at {address:#x} would leave {self!r}")
        kept = None if strides.is_contiguous(shape, steps, dtype.itemsize) else steps
        return self._derive(address, math.prod(shape) * dtype.itemsize, dtype, shape, kept)

    @abc.abstractmethod
    def _derive(self, address: int, nbytes: int, dtype: np.dtype[Any] | None, shape: tuple[int, ...],
                steps: tuple[int, ...] | None) -> Memory:
        """Return a view of this memory's root."""

    @abc.abstractmethod
    def _give_up(self) -> None:
        """Hand the memory back to the device, which may still use it."""

    @abc.abstractmethod
    def _abandon(self) -> None:
        """Likewise from a finalizer, which may not call the device."""

    @abc.abstractmethod
    def _releaser(self) -> Callable[[], object]:
        """Return what gives the memory back at once, to be called when a stream has passed a moment."""

    def __repr__(self) -> str:
        what = f"{self.nbytes} bytes" if self.dtype is None else f"{self.dtype} {self.shape}"
        if self._strides is not None:
            what += f" strides {self._strides}"
        return f"<{type(self).__name__} {what} at {self._address:#x}{', closed' if self.closed else ''}>"


class Buffer(Memory):
    """Memory of the device; see :meth:`maia_rt.Device.allocate` and :meth:`maia_rt.Stream.allocate`.

    Attributes
    ----------
    space : Space
        HBM, or the SRAM of a cluster or tile.
    """

    _noun = "buffer"

    def __init__(self, device: Device, address: int, nbytes: int, dtype: np.dtype[Any] | None, shape: tuple[int, ...],
                 root: Memory | None, steps: tuple[int, ...] | None = None, *, home: Home | None = None,
                 space: Space | None = None) -> None:
        super().__init__(device, address, nbytes, dtype, shape, root, steps)
        self._home = home
        self.space = space or Space.hbm()
        self._mapped: list[weakref.ref[npt.NDArray[Any]]] = []

    def _derive(self, address: int, nbytes: int, dtype: np.dtype[Any] | None, shape: tuple[int, ...],
                steps: tuple[int, ...] | None) -> Buffer:
        return Buffer(self.device, address, nbytes, dtype, shape, self._root, steps, space=self.space)

    def _free_after(self, stream: Stream) -> None:
        free_after = getattr(self._home, "_free_after", None)
        if free_after is not None and all(one() is None for one in self._mapped):
            self._mark_closed()
            free_after(stream, self._address)
        else:
            super()._free_after(stream)

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
        self.device._require_stream(stream).copy(found, self)
        return found

    def map(self) -> npt.NDArray[Any]:
        """Map the buffer's device memory into this process, through the device's BAR 4.

        Returns
        -------
        ndarray
            Of the buffer's dtype and shape (of uint8 where it has none): loads and stores go to the device. Slow over
            a real link, loads above all; made for looking at a few words and for writing small tables.

        Notes
        -----
        The order is the program's to keep. Wait for the stream before you read what a command wrote, and before you
        write what a command still reads. Stores may linger in the processor's write-combining buffers: call
        :meth:`maia_rt.Device.fence` between them and the submission of a command that reads them. The memory is not
        handed out again before the last array over the mapping is gone, also where the buffer is closed earlier.

        Raises
        ------
        Unsupported
            It is SRAM, which no BAR shows, or the transport cannot map the BAR.
        ClosedError, ForkedError
        """
        self.device._require_open()
        address, size = self.address, self.itemsize
        if self.space != Space.hbm():
            raise Unsupported(f"{self!r} lies in the SRAM of {self.space}, which cannot be mapped",
                              hint="copy it to a HostBuffer")
        below, above = strides.span(self.shape, self.strides, size)
        memory = self.device._map_hbm(address + below, above - below)
        root: Any = self._root
        root._mapped = [one for one in root._mapped if one() is not None] + [weakref.ref(memory)]
        return np.ndarray(self.shape, self.dtype or np.uint8, memory.data, -below, self.strides)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        raise InvalidType("a buffer lies on the device; numpy does not see it",
                          hint="use copy_to_host(), or map() for a look through BAR 4")

    def __dlpack__(self, *, stream: Any = None, max_version: tuple[int, int] | None = None,
                   dl_device: tuple[int, int] | None = None, copy: bool | None = None) -> Any:
        """Export the buffer as a DLPack capsule, of device type kDLExtDev; see :func:`maia_rt.from_dlpack`.

        Parameters
        ----------
        stream : Stream, optional
            Which commands shall find the contents: those of this stream that come now. None: the call waits for
            everything submitted to the device. -1: the consumer sees to the order.
        max_version : (int, int), optional
            What the consumer knows.
        dl_device : (int, int), optional
            Where it wants the tensor. The CPU gets a copy.
        copy : bool, optional

        Raises
        ------
        BufferError
            A tensor on the CPU is demanded without a copy, or the device is another.
        ClosedError
        """
        return dlpack.export_buffer(self, stream, max_version, dl_device, copy)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return kDLExtDev and the number of the device in this process."""
        return dlpack.EXT_DEV, dlpack.number_of(self.device)

    def _give_up(self) -> None:
        if not self.device._forked:
            self.device._reclaimer.give_up(self._releaser())

    def _abandon(self) -> None:
        self.device._reclaimer.abandon(self._releaser())

    def _releaser(self) -> Callable[[], object]:
        home, address, reclaimer = self._home, self._address, self.device._reclaimer
        mapped = [memory for one in self._mapped if (memory := one()) is not None]

        def free() -> None:
            if home is not None:
                home.free(address)

        if not mapped:
            return free
        left = len(mapped)

        def unmapped() -> None:
            nonlocal left
            left -= 1
            if not left:
                reclaimer.abandon(free)

        for memory in mapped:
            weakref.finalize(memory, unmapped).atexit = False
        return _nothing


def measure(shape: Shape, dtype: npt.DTypeLike | None) -> tuple[np.dtype[Any] | None, tuple[int, ...], int]:
    """Return dtype, shape and bytes of what is to be allocated; InvalidArgument for negative extents."""
    kind = None if dtype is None else check.dtype(dtype)
    dims = check.shape(shape)
    nbytes = math.prod(dims) * (1 if kind is None else kind.itemsize)
    if nbytes >= 1 << 62:
        raise OutOfMemory(f"{nbytes:,} bytes are more than any memory has", hint="look at the shape")
    return kind, dims, nbytes


def _nothing() -> None:
    """Give nothing back: that is done elsewhere."""
