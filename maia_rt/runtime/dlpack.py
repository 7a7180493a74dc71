"""DLPack both ways: buffers as tensors of other libraries, their tensors as arrays and buffers.

As the array API standard has it (https://data-apis.org/array-api/latest/API_specification/generated/
array_api.array.__dlpack__.html), with versioned capsules for consumers that know them.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from maia_rt._fast.dlpack import ImportedTensor, export_tensor
from maia_rt.errors import InvalidArgument, InvalidType

if TYPE_CHECKING:
    from maia_rt.runtime.buffer import Buffer, Memory
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.host_buffer import HostBuffer

CPU: Final = 1
EXT_DEV: Final = 12
_NO_SYNC: Final = -1

_KINDS: Final = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
# Codes of dlpack.h for the types that numpy has not by itself.
_EXTENSIONS: Final = {
    name: (code, bits) for name, code, bits in (
        ("bfloat16", 4, 16), ("float8_e3m4", 7, 8), ("float8_e4m3", 8, 8), ("float8_e4m3b11fnuz", 9, 8),
        ("float8_e4m3fn", 10, 8), ("float8_e4m3fnuz", 11, 8), ("float8_e5m2", 12, 8), ("float8_e5m2fnuz", 13, 8),
        ("float8_e8m0fnu", 14, 8))
    if hasattr(ml_dtypes, name)
}
_LETTERS: Final = {code: letter for letter, code in _KINDS.items()}

_numbers = itertools.count()
_devices: weakref.WeakKeyDictionary[Device, int] = weakref.WeakKeyDictionary()


def number_of(device: Device) -> int:
    """Return the device's id in DLPack: its number in this process."""
    number = _devices.get(device)
    if number is None:
        number = _devices[device] = next(_numbers)
    return number


def from_dlpack(obj: Any, device: Device, *, copy: bool | None = None) -> Memory:
    """Make a buffer of a tensor of another library.

    Parameters
    ----------
    obj : object with ``__dlpack__`` and ``__dlpack_device__``
        On the CPU: its elements are copied to new device memory. Memory of `device`, ours or passed on by another
        library: a view of it, nothing is copied.
    device : Device
    copy : bool, optional
        False: never copy, refuse instead. True: always.

    Returns
    -------
    Buffer or HostBuffer

    Raises
    ------
    BufferError
        It lies on a device that cannot be reached, or would have to be copied.
    InvalidType
        It knows no DLPack, or has a dtype that numpy and ml_dtypes do not.
    """
    from maia_rt.runtime.buffer import Memory

    if not hasattr(device, "_find_root"):
        raise InvalidType(f"device is {type(device).__name__}, not a Device")
    device._require_open()
    if isinstance(obj, Memory) and obj.device is device and not copy:
        whole: Memory = obj[...]
        return whole
    kind, number = _device_of(obj)
    if kind == EXT_DEV and number == number_of(device):
        tensor = ImportedTensor(obj.__dlpack__(max_version=(1, 0), stream=None))
        root = device._find_root(tensor.address)
        if root is None:
            raise BufferError(f"the tensor at {tensor.address:#x} is no buffer of {device.name} that is open")
        dtype = dtype_of(tensor)
        steps = tuple(step * dtype.itemsize for step in tensor.strides)
        found: Memory = root._view_at(tensor.address, dtype, tensor.shape, steps)
        if not copy:
            return found
        made = device.allocate(found.shape, found.dtype)
        device.default_stream.copy(made, found)
        device.default_stream.synchronize()
        return made
    if copy is False:
        raise BufferError("a tensor on the CPU becomes a buffer by a copy, which was not allowed")
    return device.upload(as_array(obj))


def as_array(obj: Any) -> npt.NDArray[Any]:
    """Return an array over a tensor of the CPU, which it keeps; read-only where the tensor is.

    Raises
    ------
    BufferError
        It lies elsewhere.
    InvalidType
        It knows no DLPack, or has a dtype that numpy and ml_dtypes do not.
    """
    kind, number = _device_of(obj)
    if kind != CPU:
        raise BufferError(f"the tensor lies on DLPack device ({kind}, {number}), not on the CPU")
    try:
        capsule = obj.__dlpack__(max_version=(1, 0))
    except TypeError:
        capsule = obj.__dlpack__()  # the protocol before versions
    tensor = ImportedTensor(capsule)
    dtype = dtype_of(tensor)
    strides = tuple(step * dtype.itemsize for step in tensor.strides)
    if 0 in tensor.shape:
        return np.empty(tensor.shape, dtype)
    return np.ndarray(tensor.shape, dtype, memoryview(tensor), tensor.address - tensor.start, strides)


def dtype_of(tensor: ImportedTensor) -> np.dtype[Any]:
    """Return the numpy dtype of a tensor; InvalidType where there is none."""
    code, bits, lanes = tensor.dtype
    if lanes == 1:
        if code in _LETTERS and bits % 8 == 0:
            try:
                return np.dtype(f"{_LETTERS[code]}{bits // 8}")
            except TypeError:
                pass
        for name, known in _EXTENSIONS.items():
            if known == (code, bits):
                extension: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
                return extension
    raise InvalidType(f"a tensor of DLPack dtype code {code}, {bits} bits, {lanes} lanes has no numpy dtype",
                      hint="view it as integers of that width first")


def export_host(buffer: HostBuffer, stream: Any, version: Any, where: Any, copy: bool | None) -> Any:
    """Serve :meth:`maia_rt.HostBuffer.__dlpack__`."""
    if stream is not None:
        raise InvalidArgument("a tensor on the CPU has no stream", hint="pass stream=None")
    if where is not None and tuple(where) != (CPU, 0):
        raise BufferError(f"pinned host memory cannot become a tensor of DLPack device {tuple(where)}")
    return _export_array(np.array(buffer.array) if copy else buffer.array, version, copied=bool(copy))


def export_buffer(buffer: Buffer, stream: Any, version: Any, where: Any, copy: bool | None) -> Any:
    """Serve :meth:`maia_rt.Buffer.__dlpack__`."""
    here = buffer.__dlpack_device__()
    address = buffer.address
    wanted = here if where is None else tuple(where)
    if wanted == (CPU, 0):
        if copy is False:
            raise BufferError("device memory becomes a tensor on the CPU by a copy, which was not allowed")
        return _export_array(buffer.copy_to_host(), version, copied=True)
    if wanted != here:
        raise BufferError(f"memory of DLPack device {here} cannot become a tensor of {wanted}")
    if copy:
        raise BufferError("device memory is exported without a copy")
    _order(buffer.device, stream)
    dtype = _code_of(buffer.dtype or np.dtype(np.uint8))
    size = buffer.itemsize
    if any(step % size for step in buffer.strides):
        raise BufferError("the strides are no multiples of the element, as DLPack wants them")
    return export_tensor(buffer, address, dtype, buffer.shape, tuple(step // size for step in buffer.strides), here,
                         versioned=_versioned(version))


def _order(device: Device, stream: Any) -> None:
    if stream is None:
        device.synchronize()
    elif stream != _NO_SYNC:
        if getattr(stream, "device", None) is not device:
            raise InvalidType("stream is no stream of the buffer's device", hint="pass a Stream, None or -1")
        for other in device._open_streams():
            if other is not stream:
                stream.wait(other.record())


def _export_array(array: npt.NDArray[Any], version: Any, *, copied: bool) -> Any:
    versioned = _versioned(version)
    readonly = not array.flags.writeable
    if readonly and not versioned:
        raise BufferError("the memory is read-only, which DLPack says from version 1.0 on only")
    size = array.dtype.itemsize
    if any(step % size for step in array.strides):
        raise BufferError("the strides are no multiples of the element, as DLPack wants them")
    return export_tensor(array, array.ctypes.data, _code_of(array.dtype), array.shape,
                         tuple(step // size for step in array.strides), (CPU, 0), readonly=readonly, copied=copied,
                         versioned=versioned)


def _versioned(version: Any) -> bool:
    return version is not None and int(version[0]) >= 1


def _code_of(dtype: np.dtype[Any]) -> tuple[int, int]:
    if dtype.name in _EXTENSIONS:
        return _EXTENSIONS[dtype.name]
    if dtype.kind in _KINDS and dtype.isnative:
        return _KINDS[dtype.kind], 8 * dtype.itemsize
    raise BufferError(f"DLPack has no type for {dtype}")


def _device_of(obj: Any) -> tuple[int, int]:
    try:
        kind, number = obj.__dlpack_device__()
    except AttributeError:
        raise InvalidType(f"{type(obj).__name__} knows no DLPack", hint="pass an array, a tensor or a buffer") from None
    return int(kind), int(number)
