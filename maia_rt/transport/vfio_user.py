"""The vfio-user client: a device that another process serves on a socket.

Source: the vfio-user specification (QEMU, docs/interop/vfio-user.rst). It drives any server: our emulator, QEMU's and
libvfio-user's devices.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from maia_rt.errors import (
    DeviceBusy,
    DeviceLost,
    DeviceTimeout,
    InvalidArgument,
    MaiaError,
    ProtocolError,
    TransportError,
    Unsupported,
)
from maia_rt.pci.config import set_bus_master
from maia_rt.transport import uapi, wire
from maia_rt.transport.described import Described
from maia_rt.transport.dma_table import DmaTable
from maia_rt.transport.mapping import PAGE_SIZE, RegionMaps, region_info
from maia_rt.transport.protocol import Access, DeviceInfo, DmaMemory, IrqInfo, RegionInfo, check_irq
from maia_rt.transport.vfio_user_connection import (
    CLOSED,
    FORKED,
    OUR_MAX_DATA_XFER_SIZE,
    OUR_MAX_MSG_FDS,
    READY,
)
from maia_rt.transport.vfio_user_registers import RegisterConnection
from maia_rt.transport.vfio_user_socket import check_timeout, connect
from maia_rt.transport.wire import Command

_log = logging.getLogger(__name__)

_MAX_REGIONS = 1024
_MAX_IRQ_INDEXES = 1024
_MAX_REGION_INFO = 1 << 16
_MAX_VERSION = 1 << 16


class VfioUserClient(Described, RegisterConnection):
    """A device on a vfio-user socket; a :class:`maia_rt.transport.protocol.Transport`.

    Made by :meth:`connect` or :meth:`from_socket`. Methods that the protocol describes are described there.
    """

    def __init__(self, sock: socket.socket, name: str, timeout: float) -> None:
        super().__init__(sock, name, timeout)
        self._fds: dict[int, tuple[int, int]] = {}
        self._maps = RegionMaps(name)
        self._enabled: set[int] = set()
        self._irqs: tuple[IrqInfo, ...] = ()
        self._opened = False
        try:
            self._negotiate()
            self._discover()
            self._opened = True
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(cls, path: str | os.PathLike[str], timeout: float = 5.0) -> VfioUserClient:
        """Open the device that a server offers at `path`.

        Parameters
        ----------
        path : path-like
            A Unix stream socket.
        timeout : float
            How long the server may take for each answer, in seconds.

        Raises
        ------
        DeviceNotFound
            Nothing is there, it is not a socket, or nobody listens on it.
        DevicePermission
            This user may not open it.
        DeviceBusy
            The server does not answer, most likely because it serves another client.
        ProtocolError
            Whoever listens is not a vfio-user server.
        """
        path = os.fspath(path)
        check_timeout(timeout)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            connect(sock, path)
        except BaseException:
            sock.close()
            raise
        return cls(sock, path, timeout)

    @classmethod
    def from_socket(cls, sock: socket.socket, name: str = "", timeout: float = 5.0) -> VfioUserClient:
        """Open the device at the other end of a connected socket, which the client owns (closes) from here on."""
        try:
            check_timeout(timeout)
        except InvalidArgument:
            sock.close()
            raise
        return cls(sock, name or f"vfio-user fd {sock.fileno()}", timeout)

    # --- opening -----------------------------------------------------------------------------------------------------

    def _negotiate(self) -> None:
        """Exchange VERSION, the first message; learn what the server takes."""
        offer = wire.pack_version(wire.Capabilities(
            max_msg_fds=OUR_MAX_MSG_FDS, max_data_xfer_size=OUR_MAX_DATA_XFER_SIZE, pgsizes=PAGE_SIZE))
        try:
            body, _ = self._request(Command.VERSION, [offer], limit=_MAX_VERSION)
            version = wire.unpack_version(body)
        except DeviceTimeout as error:
            raise DeviceBusy(f"{self._name}: no answer to VERSION within {self._timeout:g} s",
                             cause="the server serves another client, or is not a vfio-user server",
                             hint="end the other client, or wait for it") from error
        except DeviceLost as error:
            raise ProtocolError(f"{self._name}: the connection was closed instead of answering VERSION",
                                errno=errno.ECONNRESET,
                                cause="the server serves another client, or is not a vfio-user server") from error
        except ProtocolError as error:
            raise ProtocolError(f"{self._name}: the answer to VERSION makes no sense: {error.what}",
                                errno=error.errno or 0, cause="the peer is not a vfio-user server") from error
        except TransportError as error:
            if error.errno in (errno.EBUSY, errno.EAGAIN, errno.EUSERS):
                raise DeviceBusy(f"{self._name}: the server serves another client",
                                 hint="end the other client, or wait for it") from error
            raise
        if version.major != wire.VERSION_MAJOR or version.minor > wire.VERSION_MINOR:
            raise ProtocolError(f"{self._name}: the server speaks version {version.major}.{version.minor} of the "
                                f"protocol, {wire.VERSION_MAJOR}.{wire.VERSION_MINOR} was offered",
                                errno=errno.EPROTONOSUPPORT)
        caps = version.capabilities
        self._server_max_fds = min(caps.max_msg_fds, wire.MAX_MSG_FDS)
        self._chunk = min(caps.max_data_xfer_size, OUR_MAX_DATA_XFER_SIZE)
        self._page_sizes = caps.pgsizes
        self._dma = DmaTable(self._name, caps.max_dma_maps, caps.pgsizes & -caps.pgsizes)
        self._max_dma_maps = caps.max_dma_maps

    def _discover(self) -> None:
        """Ask for the device, its regions and its interrupts."""
        request = wire.DEVICE_INFO.pack(wire.DEVICE_INFO.size, 0, 0, 0)
        body, _ = self._request(Command.DEVICE_GET_INFO, [request], limit=_MAX_REGION_INFO)
        if len(body) < wire.DEVICE_INFO.size:
            raise self._nonsense(f"the reply to DEVICE_GET_INFO has {len(body)} bytes")
        _, flags, num_regions, num_irqs = wire.DEVICE_INFO.unpack_from(body)
        if num_regions > _MAX_REGIONS or num_irqs > _MAX_IRQ_INDEXES:
            raise self._nonsense(f"the device claims {num_regions} regions and {num_irqs} interrupt indexes")
        self._info = DeviceInfo(self._name, "vfio-user", flags, num_regions, num_irqs)
        self._regions = tuple(self._ask_region(index) for index in range(num_regions))
        self._read_limits = [region.size if region.readable else 0 for region in self._regions]
        self._write_limits = [region.size if region.writable else 0 for region in self._regions]
        self._irqs = tuple(self._ask_irq(index) for index in range(num_irqs))

    def _ask_region(self, index: int) -> RegionInfo:
        what = f"DEVICE_GET_REGION_INFO of region {index}"
        room = wire.REGION_INFO.size
        fds: list[int] = []
        try:
            for _ in range(2):
                request = wire.REGION_INFO.pack(room, 0, index, 0, 0, 0)
                body, fds = self._request(Command.DEVICE_GET_REGION_INFO, [request], what=what, limit=_MAX_REGION_INFO,
                                          max_fds=OUR_MAX_MSG_FDS)
                if len(body) < wire.REGION_INFO.size or len(fds) > 1:
                    raise self._nonsense(f"the reply to {what} has {len(body)} bytes and {len(fds)} descriptors")
                needed, flags, answered, cap_offset, size, base = wire.REGION_INFO.unpack_from(body)
                if answered != index:
                    raise self._nonsense(f"the reply to {what} is for region {answered}")
                if needed <= max(room, len(body)):
                    break
                # The descriptor comes again with the answer that has room for the capabilities.
                wire.close_fds(fds)
                fds, room = [], needed
            else:
                raise self._nonsense(f"the reply to {what} never fits into what it asks for")
            areas, kind = None, None
            if flags & uapi.REGION_FLAG_CAPS:
                areas, kind = wire.unpack_region_caps(body, cap_offset)
            info = region_info(index, flags, size, areas=areas, kind=kind, mappable=bool(fds))
            if info.areas:
                self._fds[index] = (fds.pop(), base)
            return info
        except ProtocolError as error:
            raise self._nonsense(f"region {index}: {error.what.removeprefix(self._name + ': ')}") from error
        except TransportError as error:
            # Servers, like the kernel, answer EINVAL for a region that the device could have but has not (VGA).
            if error.errno == errno.EINVAL:
                return RegionInfo(index, 0, 0)
            raise
        finally:
            wire.close_fds(fds)

    def _ask_irq(self, index: int) -> IrqInfo:
        request = wire.IRQ_INFO.pack(wire.IRQ_INFO.size, 0, index, 0)
        try:
            body, _ = self._request(Command.DEVICE_GET_IRQ_INFO, [request], limit=_MAX_REGION_INFO,
                                    what=f"DEVICE_GET_IRQ_INFO of index {index}")
        except TransportError as error:
            if error.errno == errno.EINVAL and not isinstance(error, ProtocolError):
                return IrqInfo(index, 0, 0)
            raise
        if len(body) < wire.IRQ_INFO.size:
            raise self._nonsense(f"the reply to DEVICE_GET_IRQ_INFO has {len(body)} bytes")
        _, flags, answered, count = wire.IRQ_INFO.unpack_from(body)
        if answered != index:
            raise self._nonsense(f"the reply to DEVICE_GET_IRQ_INFO of index {index} is for index {answered}")
        return IrqInfo(index, count, flags)

    # --- region mappings ----------------------------------------------------------------------------------------------

    def map(self, region: int, offset: int = 0, size: int | None = None) -> memoryview:
        """Map a part of a region through the descriptor that came with its description."""
        info = self.region(region)
        with self._lock:
            if self._state != READY:
                self._refuse()
            fd, base = self._fds.get(region, (-1, 0))
            return self._maps.map(info, fd, base, offset, size)

    def region_file(self, region: int) -> tuple[int, int]:
        """Return the descriptor that came with a region's description, and where in the file the region starts."""
        self.region(region)
        with self._lock:
            if self._state != READY:
                self._refuse()
            return self._fds.get(region, (-1, 0))

    # --- DMA ---------------------------------------------------------------------------------------------------------

    def dma_map(self, iova: int, memory: DmaMemory, access: Access = Access.READ | Access.WRITE) -> None:
        """Show `memory` to the server: its descriptor where it has one, DMA by message otherwise."""
        with self._lock:
            if self._state != READY:
                self._refuse()
            self._dma.check(iova, memory)
            fds = [memory.fd] if memory.fd >= 0 and self._server_max_fds else []
            # The server may use the memory before it answers.
            self._dma.add(iova, memory, access)
            request = wire.DMA_MAP.pack(wire.DMA_MAP.size, int(access), memory.offset if fds else 0, iova, memory.size)
            try:
                self._request(Command.DMA_MAP, [request], fds=fds, limit=wire.DMA_MAP.size,
                              what=f"DMA_MAP of {memory.size:#x} bytes at iova {iova:#x}")
            except BaseException:
                self._dma.remove(iova)
                raise

    def dma_unmap(self, iova: int, size: int) -> None:
        """Take one mapping back. The server answers when its engines have let go."""
        with self._lock:
            if self._state != READY:
                self._refuse()
            self._dma.require(iova, size)
            request = wire.DMA_UNMAP.pack(wire.DMA_UNMAP.size, 0, iova, size)
            # The text wants the request echoed; some servers answer with a header alone.
            self._request(Command.DMA_UNMAP, [request], limit=wire.DMA_UNMAP.size,
                          what=f"DMA_UNMAP of {size:#x} bytes at iova {iova:#x}")
            self._dma.remove(iova)

    @property
    def iova_ranges(self) -> list[tuple[int, int]]:
        """All 64 bits: the protocol knows no holes."""
        return [(0, (1 << 64) - 1)]

    @property
    def page_sizes(self) -> int:
        """The server's ``pgsizes``."""
        return self._page_sizes

    @property
    def max_dma_maps(self) -> int:
        """The server's ``max_dma_maps``."""
        return self._max_dma_maps

    @property
    def needs_pinning(self) -> bool:
        """False: a server shares the memory's pages, nobody pins them."""
        return False

    # --- interrupts --------------------------------------------------------------------------------------------------

    def irq_enable(self, index: int, start: int, eventfds: Sequence[int]) -> None:
        """Send vectors to eventfds, in as many messages as the server's descriptor limit makes necessary."""
        check_irq(self._name, self._irqs, index, start=start, count=len(eventfds), flag=uapi.IRQ_FLAG_EVENTFD)
        if not self._server_max_fds:
            raise Unsupported(f"{self._name}: the server takes no descriptors, so no interrupts")
        for at in range(0, len(eventfds), self._server_max_fds):
            some = list(eventfds[at:at + self._server_max_fds])
            self._set_irqs(uapi.IRQ_SET_DATA_EVENTFD | uapi.IRQ_SET_ACTION_TRIGGER, index, start + at, len(some), some)
            self._enabled.add(index)

    def irq_disable(self, index: int) -> None:
        """Disable every vector of an interrupt index."""
        check_irq(self._name, self._irqs, index, start=0, count=1)
        self._set_irqs(uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_TRIGGER, index, 0, 0)
        self._enabled.discard(index)

    def irq_mask(self, index: int, start: int = 0, count: int = 1) -> None:
        """Hold vectors back."""
        check_irq(self._name, self._irqs, index, start=start, count=count, flag=uapi.IRQ_FLAG_MASKABLE)
        self._set_irqs(uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_MASK, index, start, count)

    def irq_unmask(self, index: int, start: int = 0, count: int = 1) -> None:
        """Let vectors through again."""
        check_irq(self._name, self._irqs, index, start=start, count=count, flag=uapi.IRQ_FLAG_MASKABLE)
        self._set_irqs(uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_UNMASK, index, start, count)

    def irq_trigger(self, index: int, start: int = 0, count: int = 1) -> None:
        """Fire vectors as if the device had."""
        check_irq(self._name, self._irqs, index, start=start, count=count)
        self._set_irqs(uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_TRIGGER, index, start, count)

    def _set_irqs(self, flags: int, index: int, start: int, count: int, fds: Sequence[int] = ()) -> None:
        request = wire.IRQ_SET.pack(wire.IRQ_SET.size, flags, index, start, count)
        self._request(Command.DEVICE_SET_IRQS, [request], fds=fds,
                      what=f"DEVICE_SET_IRQS of vectors {start} to {start + count} of index {index}")

    # --- life --------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Reset the function."""
        if not self._info.can_reset:
            raise Unsupported(f"{self._name}: the device has no reset")
        self._request(Command.DEVICE_RESET)

    @property
    def liveness_fd(self) -> int | None:
        """The socket: readable when the server wants something, hung up when it is gone."""
        return None if self._state in (CLOSED, FORKED) else self._sock.fileno()

    @property
    def release_requested(self) -> bool:
        """False: a server hangs up instead."""
        return False

    @property
    def closed(self) -> bool:
        """Whether close has been called."""
        return self._state == CLOSED

    def close(self) -> None:
        """Let go of the device in the order that the protocol describes."""
        if self._state == FORKED:
            return
        with self._lock:
            if self._state == CLOSED:
                return
            # A server that is gone, or hangs, ends this part at its first request: the connection is then broken.
            with contextlib.suppress(MaiaError):
                self._quiesce()
            self._state = CLOSED
            held = self._maps.close()
            wire.close_fds(fd for fd, _ in self._fds.values())
            self._fds.clear()
            self._dma.clear()
            self._sock.close()
        if held:
            _log.warning("%s: closed while views of %d mapped areas are held; they are unmapped with their last view",
                         self._name, held)

    def _after_fork(self) -> None:
        super()._after_fork()
        wire.close_fds(fd for fd, _ in self._fds.values())
        self._fds.clear()

    def _quiesce(self) -> None:
        """Stop the device: bus mastering off, interrupts off, DMA unmapped. A refused step does not stop the next."""
        if self._state != READY or not self._opened:
            return
        steps: list[Callable[[], Any]] = [self._bus_master_off]
        steps += [functools.partial(self.irq_disable, index) for index in sorted(self._enabled)]
        steps += [functools.partial(self.dma_unmap, iova, size) for iova, size in self._dma]
        for step in steps:
            try:
                step()
            except TransportError as error:
                if self._state != READY:
                    raise
                _log.warning("%s: closing goes on after %s", self._name, error.what)

    def _bus_master_off(self) -> None:
        config = uapi.PciRegion.CONFIG
        if self._info.is_pci and self._regions[config].size:
            set_bus_master(functools.partial(self.read, config), functools.partial(self.write, config), False)

    def __enter__(self) -> VfioUserClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # A finalizer may run in the middle of anything, so it does not talk to the server: hanging up tells it enough.
        if getattr(self, "_state", CLOSED) not in (CLOSED, FORKED):
            self._state = CLOSED
            warnings.warn(f"{self._name}: the device was not closed", ResourceWarning, stacklevel=2)
            wire.close_fds(fd for fd, _ in self._fds.values())
            self._sock.close()

    def __repr__(self) -> str:
        return f"<VfioUserClient {self._name}>"
