"""How memory of a device is made: HBM, SRAM, pinned host memory, arrays that are there already."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from maia_rt.errors import InvalidArgument, InvalidType, MaiaError, OutOfMemory, Unsupported
from maia_rt.memory import RegisteredMemory
from maia_rt.memory.space import Space
from maia_rt.runtime import check
from maia_rt.runtime.buffer import Buffer, Memory, Shape, measure
from maia_rt.runtime.host_buffer import HostBuffer
from maia_rt.transport import Access
from maia_rt.transport.mapping import PAGE_SIZE
from maia_rt.transport.uapi import PciRegion

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device

T = TypeVar("T")
_NAMED: Final = 3


def allocate(device: Device, shape: Shape, dtype: npt.DTypeLike | None, alignment: int, space: Space | None) -> Buffer:
    """Serve :meth:`maia_rt.Device.allocate`."""
    device._require_open()
    kind, dims, nbytes = measure(shape, dtype)
    alignment = check.integer(alignment, "an alignment", 1, 1 << 40)
    where = Space.hbm() if space is None else check.instance(space, Space, "space", "pass Space.cluster(i) or .tile(i)")
    heap = device._spaces.heap(where)
    address = take(device, where, max(nbytes, 1), alignment)
    try:
        buffer = Buffer(device, address, nbytes, kind, dims, None, home=heap, space=where)
    except BaseException:
        heap.free(address)
        raise
    device._memories.add(buffer)
    return buffer


def take(device: Device, space: Space, nbytes: int, alignment: int, *, wait: bool = True) -> int:
    """Return the address of free memory; where there is none, after what pools and closed buffers still hold."""
    heap = device._spaces.heap(space)
    device._reclaimer.collect()
    try:
        return heap.allocate(nbytes, alignment)
    except OutOfMemory as error:
        if not wait:
            raise
        full = error
    # What was closed while commands used it comes back when they are done; what pools hold on to, when they are told.
    _wait_for_queues(device)
    try:
        return heap.allocate(nbytes, alignment)
    except OutOfMemory as error:
        full = error
    if space == Space.hbm():
        for pool in snapshot(device._pools):
            with contextlib.suppress(MaiaError):
                pool.trim()
        with contextlib.suppress(OutOfMemory):
            return heap.allocate(nbytes, alignment)
    raise OutOfMemory(full.what, cause=full.cause + _largest(device, space), hint=full.hint)


def settle(device: Device, space: Space) -> None:
    """Free what was closed in a space; where commands may still use it, after everything that was submitted."""
    device._reclaimer.collect()
    held = sum(isinstance(one, Buffer) and one.space == space and not one.closed for one in snapshot(device._memories))
    if held < device._spaces.statistics(space).allocations:
        _wait_for_queues(device)


def _wait_for_queues(device: Device) -> None:
    for queue in list(device._queues):
        with contextlib.suppress(MaiaError):
            queue.wait(queue.ring.head)
    device._reclaimer.collect()


def _largest(device: Device, space: Space) -> str:
    held = [one for one in snapshot(device._memories)
            if isinstance(one, Buffer) and one.space == space and not one.closed]
    held.sort(key=lambda one: -one.nbytes)
    named = [f"{one.nbytes} bytes" + (f" from {one._made}" if one._made else "") for one in held[:_NAMED]]
    return ", the largest buffers are: " + "; ".join(named) if named else ""


def allocate_host(device: Device, shape: Shape, dtype: npt.DTypeLike | None) -> HostBuffer:
    """Serve :meth:`maia_rt.Device.allocate_host`."""
    device._require_open()
    kind, dims, nbytes = measure(shape, dtype)
    device._reclaimer.collect()
    block = device._pool.allocate(max(nbytes, 1))
    buffer = HostBuffer._pin(device, block, nbytes, kind, dims)
    device._memories.add(buffer)
    return buffer


def register(device: Device, array: Any) -> HostBuffer:
    """Serve :meth:`maia_rt.Device.register`."""
    device._require_open()
    if not isinstance(array, np.ndarray):
        try:
            array = np.asarray(memoryview(array))
        except TypeError:
            raise InvalidType(f"what is registered is {type(array).__name__}, not an array or another object with a "
                              "buffer") from None
    if array.dtype.hasobject:
        raise InvalidType("an array of Python objects is no memory of a device")
    if not array.flags.c_contiguous:
        raise InvalidArgument(f"an array of shape {array.shape} with strides {array.strides} cannot be registered",
                              cause="it is not contiguous", hint="register the array that it is a view of")
    if not array.nbytes:
        raise InvalidArgument("an array without bytes cannot be registered")
    device._reclaimer.collect()
    address, pinned = array.ctypes.data, device._pinned
    if pinned.overlaps(address, array.nbytes):
        raise InvalidArgument(f"{array.nbytes} bytes at {address:#x} are registered already, or pinned memory",
                              hint="use the buffer that was made then, or close it first")
    readonly = not array.flags.writeable
    pages = RegisteredMemory(array, address, array.nbytes, readonly=readonly)
    iova = device._pool.map(pages, Access.READ if readonly else Access.READ | Access.WRITE)
    pool, service = device._pool, None if device._transport.needs_pinning else device._message_service
    if service is not None:
        service.begin()

    def unpin() -> None:
        try:
            # A device that is gone has let go already.
            with contextlib.suppress(MaiaError):
                pool.unmap(iova)
        finally:
            if service is not None:
                service.end()

    try:
        memory = array.reshape(-1).view(np.uint8)
        buffer = HostBuffer(device, iova + address - pages.address, array.nbytes, array.dtype, array.shape, None,
                            memory, unpin=unpin, readonly=readonly)
    except BaseException:
        unpin()
        raise
    device._memories.add(buffer)
    return buffer


def map_hbm(device: Device, address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """Return an array over device memory, through BAR 4."""
    offset = address - device.capabilities.hbm_base
    first = offset // PAGE_SIZE * PAGE_SIZE
    if not nbytes:
        return np.empty(0, np.uint8)
    if not device._transport.region(PciRegion.BAR4).mappable:
        raise Unsupported(f"{device.name}: BAR 4 cannot be mapped", hint="copy the memory instead")
    size = -(-(offset + nbytes) // PAGE_SIZE) * PAGE_SIZE - first
    view = device._transport.map(PciRegion.BAR4, first, size)
    return np.frombuffer(view, np.uint8, nbytes, offset - first)


def find_root(device: Device, address: int) -> Memory | None:
    """Return the open buffer of the device that an address lies in."""
    for memory in snapshot(device._memories):
        if not memory.closed and memory._address <= address < memory._address + max(memory.nbytes, 1):
            return memory
    return None


def snapshot(members: Iterable[T]) -> list[T]:
    """Return what is in a weak set, also while other threads add to it."""
    while True:
        try:
            return list(members)
        except RuntimeError:
            continue
