"""One socket a process, through which tools ask it what its devices are doing.

The name is abstract, ``maia-rt-PID``: nothing lies in a file system, and it goes with the process. A thread of its own
answers, so it does while the program waits for a device; it takes requests from the same user and from root only.
Requests and replies are JSON objects, one a line:

    {"call": "devices"}                      -> {"ok": [{"name": "emulated", "kind": "embedded"}, ...]}
    {"call": "hang", "device": "emulated"}   -> {"ok": [{...}]}     without "device": of all, those that have to do with
                                                each other in one
                                             -> {"error": "what is wrong"}

``MAIA_LIVE=0`` switches it off.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

Call = Callable[[], Any]

PREFIX: Final = "maia-rt-"
REQUEST_BYTES: Final = 4096
"""Longer requests are refused."""
REPLY_BYTES: Final = 16 << 20
CLIENTS: Final = 16
"""At a time; whoever is there longest goes first."""
REQUEST_SECONDS: Final = 2.0
"""How long a client may take for a request, and for reading the reply."""
_PEER: Final = struct.Struct("3i")
_REFUSAL: Final = b'{"error": "only the user of the process and root may ask", "permission": true}\n'


class Attachment:
    """One device's place at the process's socket; see :func:`attach`."""

    def __init__(self, name: str, kind: str, calls: Mapping[str, Call], together: Mapping[str, Call]) -> None:
        self.name = name
        self.kind = kind
        self.calls = dict(calls)
        self.together = dict(together)

    def close(self) -> None:
        """Leave. The last one to leave closes the socket and ends its thread. Idempotent, and for finalizers too."""
        _leave(self)


def attach(name: str, kind: str, calls: Mapping[str, Call], together: Mapping[str, Call] | None = None
           ) -> Attachment | None:
    """Let tools ask about a device.

    Parameters
    ----------
    name, kind : str
        Of the device, as shown to people.
    calls : mapping
        What may be asked: name -> callable that returns something for JSON. They run on the socket's thread, and must
        not keep the device alive.
    together : mapping, optional
        The same about all devices of the process, each returning a list: for requests that name no device.

    Returns
    -------
    Attachment or None
        None where ``MAIA_LIVE=0`` says so, or there can be no socket.
    """
    if os.environ.get("MAIA_LIVE", "1") == "0":
        return None
    attachment = Attachment(name, kind, calls, together or {})
    with _state.lock:
        if _state.server is None:
            try:
                _state.server = _Server()
            except OSError:
                # No abstract sockets, or no descriptors left: the device works without.
                return None
        _state.attachments.append(attachment)
    return attachment


def _leave(attachment: Attachment) -> None:
    with _state.lock:
        if attachment not in _state.attachments:
            return
        _state.attachments.remove(attachment)
        server = None
        if not _state.attachments:
            server, _state.server = _state.server, None
    if server is not None:
        server.end()


class _State:
    """What there is once a process."""

    def __init__(self) -> None:
        # A finalizer may run while this thread holds it.
        self.lock = threading.RLock()
        self.server: _Server | None = None
        self.attachments: list[Attachment] = []


class _Client:
    """Somebody who has connected, and what is to be read from or written to it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.deadline = time.monotonic() + REQUEST_SECONDS
        self.received = b""
        self.reply = b""


class _Server:
    """The socket and its thread."""

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._bell = -1
        try:
            self._listener.bind(address(os.getpid()))
            self._listener.listen(4 * CLIENTS)
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BaseException:
            self._listener.close()
            raise
        self._clients: list[_Client] = []
        self._thread = threading.Thread(target=self._run, name="maia-live", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Make the thread close everything and end; wait for it, unless this is that thread."""
        os.eventfd_write(self._bell, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join(REQUEST_SECONDS)

    def forget(self) -> None:
        """Close what a forked child has of its parent's."""
        for client in self._clients:
            client.connection.close()
        self._listener.close()
        os.close(self._bell)

    def _run(self) -> None:
        # Not epoll: its descriptor would be another one for a forked child to close.
        with selectors.PollSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._bell, selectors.EVENT_READ)
            try:
                while self._turn(selector):
                    pass
            finally:
                for client in list(self._clients):
                    self._drop(selector, client)
                self._listener.close()
                os.close(self._bell)

    def _turn(self, selector: selectors.BaseSelector) -> bool:
        now = time.monotonic()
        for client in [client for client in self._clients if client.deadline <= now]:
            self._drop(selector, client)
        patience = min((client.deadline - now for client in self._clients), default=None)
        for key, _ in selector.select(patience):
            if key.fd == self._bell:
                return False
            if key.fileobj is self._listener:
                self._accept(selector)
            elif key.data in self._clients:
                self._serve(selector, key.data)
        return True

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # It has gone again, or there are no descriptors: not to be tried without a pause.
            time.sleep(0.01)
            return
        connection.setblocking(False)
        if _peer(connection)[1] not in (0, os.geteuid()):
            with connection, contextlib.suppress(OSError):
                connection.send(_REFUSAL)
            return
        if len(self._clients) >= CLIENTS:
            self._drop(selector, self._clients[0])
        client = _Client(connection)
        self._clients.append(client)
        selector.register(connection, selectors.EVENT_READ, client)

    def _drop(self, selector: selectors.BaseSelector, client: _Client) -> None:
        self._clients.remove(client)
        selector.unregister(client.connection)
        client.connection.close()

    def _serve(self, selector: selectors.BaseSelector, client: _Client) -> None:
        try:
            if not client.reply:
                piece = client.connection.recv(1 << 16)
                client.received += piece
                line, newline, _ = client.received.partition(b"\n")
                if newline:
                    client.reply = _answer(line)
                elif len(client.received) >= REQUEST_BYTES:
                    client.reply = _encode({"error": f"a request has less than {REQUEST_BYTES} bytes"})
                elif piece:
                    return
                else:
                    self._drop(selector, client)
                    return
                client.deadline = time.monotonic() + REQUEST_SECONDS
                selector.modify(client.connection, selectors.EVENT_WRITE, client)
            client.reply = client.reply[client.connection.send(client.reply):]
            if not client.reply:
                self._drop(selector, client)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(selector, client)


def _answer(line: bytes) -> bytes:
    """The reply to one request, whatever it holds."""
    try:
        return _encode(_result(json.loads(line)))
    except Exception as error:
        # Whatever is wrong, with the request or a device, is news for who asks, and must not end the thread.
        return _encode({"error": f"{type(error).__name__}: {error}"})


def _encode(reply: dict[str, Any]) -> bytes:
    return json.dumps(reply).encode() + b"\n"


def _peer(connection: socket.socket) -> tuple[int, int]:
    pid, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, uid


def _result(request: Any) -> dict[str, Any]:
    if not isinstance(request, dict) or not isinstance(request.get("call"), str):
        return {"error": 'a request is a JSON object with a "call"'}
    with _state.lock:
        chosen = [a for a in _state.attachments if request.get("device") in (None, a.name)]
    if request["call"] == "devices":
        return {"ok": [{"name": a.name, "kind": a.kind} for a in chosen]}
    if not chosen:
        return {"error": f"the process has no device {request.get('device')!r}"}
    if "device" not in request:
        together = next((a.together[request["call"]] for a in chosen if request["call"] in a.together), None)
        if together is not None:
            return {"ok": together()}
    found = [a.calls.get(request["call"]) for a in chosen]
    if None in found:
        return {"error": f"unknown call {request['call']!r}"}
    return {"ok": [call() for call in found if call is not None]}


# --- asking ----------------------------------------------------------------------------------------------------------


def address(pid: int) -> str:
    """The socket's address of a process."""
    return f"\0{PREFIX}{pid}"


def processes() -> list[int]:
    """The processes in this network namespace that have a socket."""
    found = set()
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
        for line in table:
            name = line.split()[-1]
            if name.startswith("@" + PREFIX) and name[len(PREFIX) + 1:].isdecimal():
                found.add(int(name[len(PREFIX) + 1:]))
    return sorted(found)


def ask(pid: int, request: Mapping[str, Any], timeout: float = 10.0) -> Any:
    """Ask a process.

    Parameters
    ----------
    pid : int
    request : mapping
        Such as ``{"call": "hang"}``.
    timeout : float
        In seconds.

    Returns
    -------
    object
        The reply's ``ok``.

    Raises
    ------
    ConnectionError
        The process has no socket, or left.
    TimeoutError
        It has one, and does not answer: nothing in it gets to run Python.
    PermissionError
        It belongs to another user.
    ValueError
        It refused the request; the text is its own. Or the answer is none.
    """
    deadline = time.monotonic() + timeout
    reply = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connected = False
        while not connected:
            try:
                connection.connect(address(pid))
                connected = True
            except BlockingIOError:
                # Its queue of connections is full: nobody has taken one for a moment.
                if time.monotonic() > deadline:
                    raise TimeoutError(f"process {pid} takes no connections") from None
                time.sleep(0.01)
        if _peer(connection)[0] != pid:
            raise ConnectionRefusedError(f"the socket of process {pid} is another one's")
        with contextlib.suppress(BrokenPipeError):
            # Who refuses has answered, and closed, before it was asked.
            connection.sendall(_encode(dict(request)))
        while not reply.endswith(b"\n") and len(reply) < REPLY_BYTES:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = connection.recv(1 << 16)
            if not piece:
                raise ConnectionResetError(f"process {pid} closed the connection")
            reply += piece
    answer: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(reply)
    if not isinstance(answer, dict):
        raise ValueError(f"process {pid} sent no JSON object")
    if answer.get("permission"):
        raise PermissionError(f"process {pid} belongs to another user")
    if "ok" not in answer:
        raise ValueError(str(answer.get("error", "a reply without a result")))
    return answer["ok"]


_state = _State()


def _forget_in_child() -> None:
    global _state
    server, _state = _state.server, _State()
    if server is not None:
        server.forget()


os.register_at_fork(after_in_child=_forget_in_child)
