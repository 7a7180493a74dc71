"""The broker: a process that holds a device and serves shares of it to other programs."""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
import select
import socket
import stat
import struct
import threading
import time
from dataclasses import dataclass
from typing import Final

from maia_rt.errors import DeviceBusy, DeviceLost, InvalidArgument, MaiaError
from maia_rt.firmware import Firmware
from maia_rt.memory import PinnedPool
from maia_rt.share.function import ShareFunction
from maia_rt.share.partition import WINDOW_BITS, Partition, divide
from maia_rt.share.session import Session
from maia_rt.share.tenant import Tenant
from maia_rt.transport import wire
from maia_rt.transport.protocol import Transport

_log = logging.getLogger(__name__)

TURN_SECONDS: Final = 3.0
"""How long a client waits for its turn before it hears that the device is in use: less than any client's patience."""
_WAITING: Final = 64
_UCRED: Final = struct.Struct("iII")


@dataclass(frozen=True)
class Client:
    """A program that has a share.

    Attributes
    ----------
    pid : int
        As the kernel says it (SO_PEERCRED).
    command : str
        Its name.
    slot : int
        Which share.
    since : float
        ``time.monotonic()`` when it got it.
    """

    pid: int
    command: str
    slot: int
    since: float


class _Served:
    """A client with its session."""

    def __init__(self, client: Client, session: Session, tenant: Tenant) -> None:
        self.client = client
        self.session = session
        self.tenant = tenant


class Broker:
    """Holds a device, and serves equal shares of it on a socket. Each client's share is a device of its own to it.

    A client drives its queues without the broker: rings, doorbells and interrupts are between it and the device. What
    passes through here, register accesses and admin commands, is checked and confined to the client's part. When a
    client goes, however it goes, its queues are deleted and its memory is zeroed before the next one gets the share.

    Parameters
    ----------
    transport : Transport
        The device, which the broker boots and, at :meth:`close`, closes.
    path : str
        Where to listen; a socket file that nobody serves any more is replaced. Only this user, and root, may connect.
    clients : int, optional
        How many shares; as many as there are clusters, at most 8, by default.
    lease : float, optional
        After so many seconds a client loses its share as soon as another one waits; never, by default.

    Raises
    ------
    Unsupported
        The device cannot keep programs apart.
    InvalidArgument
        It is too small for so many clients; or the path is no place for a socket.
    DeviceBusy
        Somebody else listens there.
    """

    def __init__(self, transport: Transport, path: str, *, clients: int | None = None,
                 lease: float | None = None) -> None:
        if lease is not None and not 0 < lease < 1e9:
            raise InvalidArgument(f"a lease is a positive number of seconds, not {lease}")
        self.path = path
        self._lease = lease
        self._transport = transport
        self._lock = threading.Lock()
        self._served: dict[int, _Served] = {}
        self._threads: set[threading.Thread] = set()
        self._waiting: collections.deque[tuple[socket.socket, float]] = collections.deque()
        self._stopping = False
        self._failure: MaiaError | None = None
        self._pool: PinnedPool | None = None
        self._listening: socket.socket | None = None
        self._woken, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._firmware = Firmware(transport)
        try:
            offered = self._firmware.capabilities
            self.shares: list[Partition] = divide(transport.name, offered, transport.iova_ranges,
                                                  min(offered.clusters, 8) if clients is None else clients)
            self._free = list(range(len(self.shares)))
            self._pool = PinnedPool(transport, address_bits=WINDOW_BITS, region_size=1 << 20)
            self._firmware.boot(self._pool)
            self._listening = _listen(path)
            self._file = os.lstat(path)
        except BaseException:
            self.close()
            raise

    def clients(self) -> list[Client]:
        """Who has a share at this moment."""
        with self._lock:
            return [one.client for one in self._served.values()]

    def waiting(self) -> int:
        """How many wait for one."""
        with self._lock:
            return len(self._waiting)

    # --- serving -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until :meth:`stop`.

        Raises
        ------
        MaiaError
            The device is lost.
        """
        listening = self._listening
        if listening is None:
            return
        poll = select.poll()
        liveness = self._transport.liveness_fd
        event = self._firmware.vectors[0]
        poll.register(self._woken, select.POLLIN)
        poll.register(event, select.POLLIN)
        if liveness is not None:
            poll.register(liveness, select.POLLIN | select.POLLRDHUP)
        while not self._stopping and self._failure is None:
            poll.register(listening, select.POLLIN if len(self._waiting) < _WAITING else 0)
            ready = {fd for fd, _ in poll.poll(self._milliseconds())}
            if self._woken in ready:
                os.read(self._woken, select.PIPE_BUF)
            try:
                if event in ready:
                    self._firmware.on_event()
                    self._tell_who_stopped()
                if liveness in ready:
                    self._transport.service()
            except MaiaError as error:
                self._failure = error
            if listening.fileno() in ready:
                self._accept(listening)
            self._serve_next()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Make :meth:`run` return; any thread, or a signal handler, may call."""
        self._stopping = True
        self._notify()

    @property
    def wake_fd(self) -> int:
        """A byte written here makes :meth:`run` look up: for `signal.set_wakeup_fd`.

        A handler in Python alone does not run while the main thread is about to poll.
        """
        return self._wake

    def close(self) -> None:
        """End all clients, and close the device; idempotent."""
        self._stopping = True
        if self._listening is not None:
            with contextlib.suppress(OSError):
                status = os.lstat(self.path)
                if (status.st_dev, status.st_ino) == (self._file.st_dev, self._file.st_ino):
                    os.unlink(self.path)
            self._listening.close()
            self._listening = None
        with self._lock:
            served, threads = list(self._served.values()), list(self._threads)
        for one in served:
            one.session.stop()
        for thread in threads:
            thread.join()
        while self._waiting:
            _refuse(self._waiting.popleft()[0], errno.ESHUTDOWN)
        self._firmware.stop()
        self._firmware.close()
        if self._pool is not None:
            self._pool.close()
        self._transport.close()
        if self._wake >= 0:
            os.close(self._wake)
            os.close(self._woken)
            self._wake = -1

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- clients -----------------------------------------------------------------------------------------------------

    def _milliseconds(self) -> float | None:
        """Until somebody has waited too long, or a lease runs out that somebody waits for."""
        with self._lock:
            if not self._waiting:
                return None
            moments = [self._waiting[0][1]]
            if self._lease is not None:
                moments += [one.client.since + self._lease for one in self._served.values()]
        return max(0.0, min(moments) - time.monotonic()) * 1000 + 1

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except OSError as error:
            _log.warning("%s: accept: %s", self.path, error)
            time.sleep(0.1)
            return
        if _credentials(sock)[1] not in (0, os.getuid()):
            _refuse(sock, errno.EACCES)
            return
        with self._lock:
            self._waiting.append((sock, time.monotonic() + TURN_SECONDS))

    def _serve_next(self) -> None:
        """Give free shares to those who wait, in their order; end leases that ran out; refuse who waited too long."""
        now = time.monotonic()
        with self._lock:
            while self._waiting and _is_gone(self._waiting[0][0]):
                self._waiting.popleft()[0].close()
            while self._free and self._waiting and self._failure is None:
                self._begin(self._waiting.popleft()[0], self._free.pop(0))
            late = []
            while self._waiting and self._waiting[0][1] <= now:
                late.append(self._waiting.popleft()[0])
            expired = [] if self._lease is None or not self._waiting else [
                one for one in self._served.values() if now - one.client.since >= self._lease]
        for one in expired[:len(self._waiting)]:
            _log.warning("%s: the lease of process %d (%s) ran out after %g s, and others wait", self.path,
                         one.client.pid, one.client.command, self._lease)
            one.session.stop()
        for sock in late:
            _refuse(sock, errno.EBUSY)

    def _begin(self, sock: socket.socket, slot: int) -> None:
        pid = _credentials(sock)[0]
        thread = threading.Thread(target=self._serve, args=(sock, slot, pid), name=f"share {slot}", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _serve(self, sock: socket.socket, slot: int, pid: int) -> None:
        """One client, from its first message to the last trace of it: the body of its thread."""
        tenant: Tenant | None = None
        try:
            if self._pool is None:
                raise DeviceLost(f"{self.path}: the broker is closed")
            tenant = Tenant(self._transport, self._firmware, self._pool, self.shares[slot])
            session = Session(sock, ShareFunction(self._transport, self._firmware, tenant), tenant)
            served = _Served(Client(pid, _name(pid), slot, time.monotonic()), session, tenant)
            with self._lock:
                self._served[slot] = served
            if self._stopping:
                session.stop()
            session.run()
        except MaiaError as error:
            self._failure = error
        finally:
            sock.close()
            self._end(slot, tenant)

    def _end(self, slot: int, tenant: Tenant | None) -> None:
        """Take the share back, clean; a share that the device did not clean is given to nobody any more."""
        try:
            if tenant is not None:
                tenant.close()
            clean = True
        except MaiaError as error:
            self._failure, clean = error, False
        with self._lock:
            self._served.pop(slot, None)
            self._threads.discard(threading.current_thread())
            if clean:
                self._free.append(slot)
            self._notify()

    def _notify(self) -> None:
        if self._wake >= 0:
            with contextlib.suppress(BlockingIOError):  # it is full of what says the same
                os.write(self._wake, b"\0")

    def _tell_who_stopped(self) -> None:
        with self._lock:
            tenants = [one.tenant for one in self._served.values()]
        stopped = [tenant for tenant in tenants if tenant.look()]
        if not stopped:
            return
        faults = self._firmware.faults()
        for tenant in tenants:
            tenant.note(faults)
        for tenant in stopped:
            tenant.tell()


def _listen(path: str) -> socket.socket:
    """A listening socket that only this user may connect to."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        _remove_stale(path)
        sock.bind(path)
        sock.listen(_WAITING)
    except OSError as error:
        sock.close()
        raise InvalidArgument(f"cannot listen on {path!r}: {error}", hint="choose another path") from None
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


def _remove_stale(path: str) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise InvalidArgument(f"{path!r} exists and is no socket; it is left as it is", hint="choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise DeviceBusy(f"{path!r} is in use by another server", hint="choose another path")
    os.unlink(path)


def _credentials(sock: socket.socket) -> tuple[int, int]:
    """Process id and user of who is connected."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(200).replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "ended"


def _is_gone(sock: socket.socket) -> bool:
    """Whether a client that waits has hung up."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _refuse(sock: socket.socket, error: int) -> None:
    """Answer a client's first message with an errno, if it has sent one, and close."""
    with sock, contextlib.suppress(OSError):
        sock.setblocking(False)
        header = sock.recv(wire.HEADER_SIZE)
        if len(header) == wire.HEADER_SIZE:
            parsed = wire.unpack_header(header)
            # What else it sent is taken too: closing with it unread would reset the connection, errno and all.
            sock.recv(max(parsed.body_size, 0))
            sock.send(wire.pack_error(parsed, error))
