"""A vfio-user client made of bytes: it uses nothing of ``maia_rt``, so the server is held to the protocol's text.

    header: u16 id, u16 command, u32 size, u32 flags, u32 errno      flags: 0-3 type, 4 no reply, 5 error
"""

import array
import json
import os
import socket
import struct
from collections import namedtuple

from helpers.emulator import connect

(VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO, SET_IRQS, REGION_READ,
 REGION_WRITE, DMA_READ, DMA_WRITE, DEVICE_RESET, DIRTY_PAGES, WRITE_MULTI, FEATURE, MIG_READ, MIG_WRITE) = range(1, 19)
REPLY, NO_REPLY, ERROR = 1, 0x10, 0x20
BAR0, BAR2, BAR4, ROM, CONFIG, VGA = 0, 2, 4, 6, 7, 8

# The request of QEMU 11.1.3: 214 bytes with its header.
QEMU_CAPABILITIES = {
    "max_msg_fds": 16, "max_data_xfer_size": 1048576, "max_dma_maps": 65535, "pgsizes": 4096,
    "migration": {"pgsize": 4096, "max_bitmap_size": 268435456}, "write_multiple": True,
}

Message = namedtuple("Message", "id command size flags errno body fds")


def header(command, body_size, number=1, flags=0, errno=0, size=None):
    return struct.pack("<HHIII", number, command, 16 + body_size if size is None else size, flags, errno)


def version_body(capabilities=None, major=0, minor=0):
    text = b"" if capabilities is None else json.dumps({"capabilities": capabilities}).encode() + b"\0"
    return struct.pack("<HH", major, minor) + text


def dma_map(iova, size, flags=3, offset=0, argsz=32):
    return struct.pack("<IIQQQ", argsz, flags, offset, iova, size)


def dma_unmap(iova, size, flags=0, argsz=24):
    return struct.pack("<IIQQ", argsz, flags, iova, size)


def region_info(index, argsz=32):
    return struct.pack("<IIIIQQ", argsz, 0, index, 0, 0, 0)


def irq_set(flags, index, start, count, data=b"", argsz=None):
    return struct.pack("<IIIII", 20 + len(data) if argsz is None else argsz, flags, index, start, count) + data


def access(region, offset, count, data=b""):
    return struct.pack("<QII", offset, region, count) + data


class RawClient:
    """A connection; a context manager. `negotiate` unless the test wants the first message for itself."""

    def __init__(self, path_or_socket, negotiate=True, capabilities=None):
        self.sock = connect(path_or_socket) if isinstance(path_or_socket, str) else path_or_socket
        self.number = 0
        self.version = None
        try:
            if negotiate:
                offered = QEMU_CAPABILITIES if capabilities is None else capabilities
                self.version = self.call(VERSION, version_body(offered))
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()
        if self.version is not None:
            close(self.version.fds)

    def send_raw(self, raw, fds=()):
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.sock.sendmsg([raw], ancillary)
        if sent < len(raw):
            self.sock.sendall(raw[sent:])

    def send(self, command, body=b"", fds=(), flags=0, size=None):
        self.number = (self.number + 1) & 0xFFFF
        self.send_raw(header(command, len(body), self.number, flags, size=size) + body, fds)
        return self.number

    def recv_exact(self, count):
        raw, fds = b"", []
        while len(raw) < count:
            part, ancillary, _, _ = self.sock.recvmsg(count - len(raw), 4096, socket.MSG_CMSG_CLOEXEC)
            for _, _, some in ancillary:
                fds += array.array("i", some)
            if not part:
                close(fds)
                raise EOFError(f"the server closed after {len(raw)} of {count} bytes")
            raw += part
        return raw, fds

    def recv(self):
        raw, fds = self.recv_exact(16)
        number, command, size, flags, errno = struct.unpack("<HHIII", raw)
        body, more = self.recv_exact(size - 16) if size > 16 else (b"", [])
        return Message(number, command, size, flags, errno, body, fds + more)

    def call(self, command, body=b"", fds=()):
        """Send a command; its reply must have its id and command, and be no error."""
        number = self.send(command, body, fds)
        reply = self.recv()
        assert (reply.id, reply.command) == (number, command)
        assert reply.flags == REPLY and reply.errno == 0, f"errno {reply.errno}"
        return reply

    def refused(self, command, body=b"", fds=(), size=None):
        """Send a command that must be refused; returns the errno."""
        number = self.send(command, body, fds, size=size)
        reply = self.recv()
        assert (reply.id, reply.command) == (number, command)
        assert reply.flags == REPLY | ERROR, "it was accepted"
        assert (reply.size, reply.fds) == (16, [])
        assert reply.errno > 0
        return reply.errno

    def read(self, region, offset, count):
        reply = self.call(REGION_READ, access(region, offset, count))
        assert reply.body[:16] == access(region, offset, count)
        assert len(reply.body) == 16 + count
        return reply.body[16:]

    def write(self, region, offset, data):
        reply = self.call(REGION_WRITE, access(region, offset, len(data), data))
        assert reply.body == access(region, offset, len(data))

    def read32(self, offset, region=BAR0):
        return int.from_bytes(self.read(region, offset, 4), "little")

    def read64(self, offset, region=BAR0):
        return int.from_bytes(self.read(region, offset, 8), "little")

    def write32(self, offset, value, region=BAR0):
        self.write(region, offset, value.to_bytes(4, "little"))

    def write64(self, offset, value, region=BAR0):
        self.write(region, offset, value.to_bytes(8, "little"))

    def alive(self):
        """Whether the connection still serves."""
        return self.read32(0) == 0x4149414D

    def closed(self):
        """Whether the server has closed the connection, with nothing more to say."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True


def close(fds):
    for fd in fds:
        os.close(fd)


class Descriptors:
    """Descriptors for a test to pass, all closed at its end."""

    def __init__(self):
        self._fds = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        close(self._fds)

    def memory(self, size):
        fd = os.memfd_create("test", os.MFD_CLOEXEC)
        self._fds.append(fd)
        os.ftruncate(fd, size)
        return fd

    def eventfd(self):
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds.append(fd)
        return fd


def fired(fd):
    """The eventfd's count since it was last asked."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
