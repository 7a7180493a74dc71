"""A vfio-user peer that plays bytes: what no real server would send, at moments no real server would choose.

It uses nothing of ``maia_rt``. A test writes a function ``script(peer)``; it runs in a thread at one end of a socket
pair, the client under test holds the other. What the script raises, the test raises.
"""

import array
import contextlib
import os
import socket
import struct
import threading
from collections import namedtuple
from dataclasses import dataclass, field

Request = namedtuple("Request", "id command flags body fds raw")


class Peer:
    def __init__(self, sock):
        self.sock = sock
        self.seen = []
        self._fds = []

    def recv(self, count):
        """Exactly `count` bytes and the descriptors that came with them."""
        raw, fds = b"", []
        while len(raw) < count:
            part, ancillary, _, _ = self.sock.recvmsg(count - len(raw), 4096, socket.MSG_CMSG_CLOEXEC)
            if not part:
                raise EOFError("the client closed")
            raw += part
            for _, _, fd_bytes in ancillary:
                fds += array.array("i", fd_bytes)
        self._fds += fds
        return raw, fds

    def request(self, command=None):
        """The client's next message, which must be `command` where one is given."""
        raw, fds = self.recv(16)
        number, got, size, flags, _ = struct.unpack("<HHIII", raw)
        body = self.recv(size - 16)[0] if size > 16 else b""
        message = Request(number, got, flags, body, fds, raw + body)
        self.seen.append(message)
        assert command is None or got == command, f"expected command {command}, got {got}"
        return message

    def send(self, raw, fds=()):
        """Send bytes as they are."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([raw], ancillary)

    def reply(self, request, body=b"", fds=(), flags=1, errno=0, number=None, command=None, size=None):
        """Answer `request`; every field can be falsified."""
        header = struct.pack("<HHIII", request.id if number is None else number,
                             request.command if command is None else command,
                             16 + len(body) if size is None else size, flags, errno)
        self.send(header + body, fds)

    def close(self):
        for fd in self._fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.sock.close()


@dataclass
class Region:
    size: int = 0
    flags: int = 3
    fd: int = -1
    offset: int = 0
    areas: list = field(default_factory=list)


@dataclass
class Device:
    """What the peer says it is while a client opens it: a plain device of one region unless a test says otherwise."""

    flags: int = 1
    regions: list = field(default_factory=lambda: [Region(0x1000)])
    irqs: list = field(default_factory=lambda: [(0, 0), (0, 0), (1, 4)])
    version: bytes = b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":65536}}\0'

    def handshake(self, peer):
        peer.reply(peer.request(1), struct.pack("<HH", 0, 0) + self.version)
        peer.reply(peer.request(4), struct.pack("<IIII", 16, self.flags, len(self.regions), len(self.irqs)))
        for index, region in enumerate(self.regions):
            self.answer_region(peer, index, region)
        for index, (flags, count) in enumerate(self.irqs):
            peer.reply(peer.request(7), struct.pack("<IIII", 16, flags, index, count))

    def answer_region(self, peer, index, region):
        fds = [region.fd] if region.fd >= 0 else []
        request = peer.request(5)
        argsz, _, asked = struct.unpack_from("<III", request.body)
        assert asked == index
        if not region.areas:
            peer.reply(request, struct.pack("<IIIIQQ", 32, region.flags, index, 0, region.size, region.offset), fds)
            return
        needed = 32 + 16 + 16 * len(region.areas)
        if argsz < needed:
            peer.reply(request, struct.pack("<IIIIQQ", needed, region.flags, index, 0, region.size, region.offset), fds)
            request = peer.request(5)
            assert struct.unpack_from("<I", request.body)[0] == needed
        body = struct.pack("<IIIIQQ", needed, region.flags | 8, index, 32, region.size, region.offset)
        body += struct.pack("<HHIII", 1, 1, 0, len(region.areas), 0)
        body += b"".join(struct.pack("<QQ", *area) for area in region.areas)
        peer.reply(request, body, fds)


@contextlib.contextmanager
def playing(script):
    """Run `script(peer)` in a thread; give the client's socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.settimeout(10)
    peer = Peer(theirs)
    failure = []

    def run():
        try:
            script(peer)
        except BaseException as error:
            failure.append(error)
        finally:
            peer.close()

    thread = threading.Thread(target=run, name="scripted server")
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(15)
    assert not thread.is_alive(), "the scripted server hangs"
    if failure:
        raise failure[0]


def until_closed(peer):
    """Answer what a client says while it closes, and end when it has."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = peer.request()
            if not request.flags & 0x10:
                peer.reply(request, request.body[:16] if request.command in (9, 10) else b"")


def open_fds():
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))
