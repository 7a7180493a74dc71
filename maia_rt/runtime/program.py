"""Programs and their kernels: loading, and checking what a launch is given."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from maia_rt._fast.lane import known_words
from maia_rt.contract.dtype import MX_DTYPES
from maia_rt.contract.program import NUMPY_DTYPES, Arg, ArgKind, Image, KernelImage, read, write
from maia_rt.errors import ClosedError, InvalidArgument, InvalidType, KernelNotFound
from maia_rt.runtime.buffer import Memory

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device

_MOST_KERNELS: Final = 64
"""How many kernels' arguments a piece of memory is remembered to fit."""


class Kernel:
    """One kernel of a loaded program; launched by :meth:`maia_rt.Stream.launch`.

    Attributes
    ----------
    program : Program
    name : str
    args : tuple of maia_rt.contract.program.Arg
        What it takes.
    macs : int
        Multiply-adds of one launch.
    """

    def __init__(self, program: Program, image: KernelImage, handle: int) -> None:
        self.program = program
        self.name = image.name
        self.args = image.args
        self._image = image
        self._handle = handle
        self._checks = [_Check(arg) for arg in image.args]

    @property
    def macs(self) -> int:
        """Multiply-adds of one launch."""
        return self._image.macs

    @property
    def sram_bytes(self) -> int:
        """How much of each tile's SRAM it uses, from the first byte on."""
        return self._image.sram_bytes

    @property
    def handle(self) -> int:
        """The device's number for it.

        Raises
        ------
        ClosedError
            The program has been closed.
        """
        if self.program._closed:
            raise ClosedError(f"kernel {self.name!r}: its program has been closed")
        return self._handle

    def encode(self, args: tuple[Any, ...]) -> tuple[int | float, ...]:
        """Check arguments against what the kernel declares; return device addresses and scalars.

        Raises
        ------
        InvalidArgument
            Wrong count, size, dtype, shape, alignment or device.
        InvalidType
            An argument is neither memory of a device nor, for a scalar, a number.
        ClosedError
            A buffer or the program has been closed.
        """
        if self.program._closed:
            raise ClosedError(f"kernel {self.name!r}: its program has been closed")
        # Most launches pass what earlier ones did: what was found good stays so, but for its life.
        known = known_words(self, self._checks, args)
        if known is not None:
            return known
        if len(args) != len(self._checks):
            names = ", ".join(arg.name for arg in self.args)
            raise InvalidArgument(f"kernel {self.name!r} takes {len(self._checks)} arguments, not {len(args)}",
                                  hint=f"pass {names}")
        return tuple([check.number(self, arg) if check.scalar else self._address(check, arg)
                      for check, arg in zip(self._checks, args, strict=True)])

    def _address(self, check: _Check, arg: Any) -> int:
        """The device address of a buffer argument, once it is found to be what the kernel declares."""
        if not isinstance(arg, Memory):
            raise InvalidType(f"{check.where(self)} is {type(arg).__name__}, not a Buffer or HostBuffer",
                              hint="allocate device memory and copy the data there")
        root = arg._root
        if root._closed:
            at = f", at {root._freed}" if root._freed else ""
            raise ClosedError(f"{check.where(self)} has been closed{at}")
        if root.device is not self.program.device:
            raise InvalidArgument(f"{check.where(self)} belongs to another device")
        if arg.dtype is None:
            if arg.nbytes < check.nbytes:
                raise InvalidArgument(f"{check.where(self)} has {arg.nbytes} bytes, {check.nbytes} are needed")
        elif arg.dtype != check.dtype or arg.shape != check.shape:
            raise InvalidArgument(f"{check.where(self)} is {arg.dtype} {arg.shape}, not {check.dtype} {check.shape}",
                                  hint=check.hint)
        if arg._strides is not None:
            raise InvalidArgument(f"{check.where(self)} is a strided view {arg.shape} with strides {arg._strides}; "
                                  "kernels take memory whose elements lie side by side",
                                  hint="copy it to a buffer of its own with stream.copy, and pass that")
        if check.writes and arg.readonly:
            raise InvalidArgument(f"{check.where(self)} is read-only, and the kernel writes it")
        if arg._address & check.misaligned:
            raise InvalidArgument(f"{check.where(self)} is at {arg._address:#x}, not a multiple of "
                                  f"{check.misaligned + 1}")
        if not 0 < len(arg._fits) < _MOST_KERNELS:
            arg._fits = set()
        arg._fits.add(check)
        return arg._address

    def accesses(self, args: tuple[Any, ...]) -> tuple[list[tuple[int, int, Memory]], list[tuple[int, int, Memory]]]:
        """What a launch with these arguments, checked by :meth:`encode`, reads and writes: (address, bytes, memory)."""
        ranges = [(arg.kind, (memory._address, arg.nbytes, memory))
                  for arg, memory in zip(self.args, args, strict=True) if arg.kind != ArgKind.SCALAR]
        return ([one for kind, one in ranges if kind in (ArgKind.IN, ArgKind.INOUT)],
                [one for kind, one in ranges if kind in (ArgKind.OUT, ArgKind.INOUT)])

    def __repr__(self) -> str:
        shown = ", ".join(f"{a.name}: {a.dtype.name}{list(a.shape)}" for a in self.args)
        return f"<Kernel {self.name}({shown})>"


class _Check:
    """What one argument must be, looked up once."""

    __slots__ = ("dtype", "hint", "misaligned", "name", "nbytes", "scalar", "shape", "writes")

    def __init__(self, arg: Arg) -> None:
        self.name = arg.name
        self.scalar = arg.kind == ArgKind.SCALAR
        self.writes = arg.kind in (ArgKind.OUT, ArgKind.INOUT)
        self.nbytes = arg.nbytes
        self.shape = arg.array_shape
        self.hint = "pass memory of that dtype and shape, or a view of it without a dtype"
        if arg.dtype in MX_DTYPES:
            self.hint = (f"rows of {arg.dtype.name} are bytes: pass uint8 memory of that shape, such as "
                         f"maia_rt.to_mx makes for {arg.shape} elements")
        self.dtype = NUMPY_DTYPES[arg.dtype]
        self.misaligned = arg.alignment - 1

    def where(self, kernel: Kernel) -> str:
        return f"kernel {kernel.name!r}: argument {self.name!r}"

    def number(self, kernel: Kernel, value: Any) -> float:
        if isinstance(value, int | float | np.floating | np.integer):
            return float(value)
        raise InvalidType(f"{self.where(kernel)} is {type(value).__name__}, not a number")


class Program(Mapping[str, Kernel]):
    """A program loaded on a device: its kernels by name. See :meth:`maia_rt.Device.load`.

    Attributes
    ----------
    device : Device
    """

    def __init__(self, device: Device, image: bytes | Image) -> None:
        self._closed = True
        self.device = device
        parsed = image if isinstance(image, Image) else read(bytes(image))
        # The device verifies; doing it here as well would only take its time twice.
        self._first, _ = device._firmware.load_program(parsed.data or write(parsed.kernels))
        self._closed = False
        self._kernels = {kernel.name: Kernel(self, kernel, self._first + i) for i, kernel in enumerate(parsed.kernels)}

    def __getitem__(self, name: str) -> Kernel:
        try:
            return self._kernels[name]
        except KeyError:
            raise KernelNotFound(f"no kernel {name!r:.80}; there are {', '.join(self._kernels)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._kernels)

    def __len__(self) -> int:
        return len(self._kernels)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def closed(self) -> bool:
        """Whether the program has been closed, by itself or with its device."""
        return self._closed

    def close(self) -> None:
        """Unload the program once the device is done with what was submitted; idempotent."""
        if not self._closed:
            self._closed = True
            self.device._addresses.closings += 1
            self.device._unload(self._first)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            self._closed = True
            if not self.device.closed:
                warnings.warn("a program was not closed", ResourceWarning, stacklevel=2, source=self)
                self.device._abandon_program(self._first)

    def __repr__(self) -> str:
        return f"<Program {', '.join(self._kernels)}{', closed' if self._closed else ''}>"
