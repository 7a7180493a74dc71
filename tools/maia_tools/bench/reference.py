"""What ``maia bench`` times beside the device, in the same run: memcpy, a shared word, a socket.

A ratio to these says more than a time: it holds across machines and noisy hours.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

REQUEST_BYTES = 32
"""A vfio-user REGION_READ: 16 bytes of header, 16 of body."""
REPLY_BYTES = 36
REST = 0
"""The word that sends the answering process to sleep until it is wanted again."""
_REPLY_AT = 8
"""64-bit words from the request: another cache line."""


class Memcpy:
    """Copies between two warm host buffers."""

    def __init__(self, size: int) -> None:
        self._source = np.ones(size, np.uint8)
        self._target = np.ones(size, np.uint8)

    def copy(self) -> None:
        """One memcpy of the whole size."""
        np.copyto(self._target, self._source)


class PingPong:
    """A word in shared memory that another process answers: the least that submit and wait can cost in Python.

    That process spins, so it is let go between samples: on few cores it would spoil all the others.
    """

    def __init__(self, words: memoryview, starter: socket.socket) -> None:
        self._words = words
        self._starter = starter
        self._count = 0

    def begin(self) -> None:
        """Start the answering process spinning."""
        self._count += 1
        self._words[0] = self._count
        self._starter.sendall(b"!")
        while self._words[_REPLY_AT] != self._count:
            pass

    def end(self) -> None:
        """Let it sleep."""
        self._words[0] = REST

    def round_trips(self, count: int) -> None:
        """Write, and wait for the answer, ``count`` times."""
        words = self._words
        number = self._count
        for _ in range(count):
            number += 1
            words[0] = number
            while words[_REPLY_AT] != number:
                pass
        self._count = number


@contextmanager
def ping_pong(cores: Sequence[int] = ()) -> Iterator[PingPong]:
    """Start the process that answers, on these cores if any; it ends with the context."""
    fd = os.memfd_create("maia-bench", os.MFD_CLOEXEC)
    os.ftruncate(fd, mmap.PAGESIZE)
    page = mmap.mmap(fd, mmap.PAGESIZE)
    words = memoryview(page).cast("Q")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    peer = _start("pingpong", cores, theirs.fileno(), fd)
    theirs.close()
    try:
        yield PingPong(words, ours)
    finally:
        words[0] = REST
        ours.close()
        _end(peer)
        words.release()
        page.close()
        os.close(fd)


class Echo:
    """A process that answers a register-read-sized message over a socket, as simply as Python can."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._request = bytes(REQUEST_BYTES)

    def round_trips(self, count: int) -> None:
        """Send a request and receive the reply, ``count`` times."""
        end, request = self._end, self._request
        for _ in range(count):
            end.sendall(request)
            end.recv(REPLY_BYTES)


@contextmanager
def echo(cores: Sequence[int] = ()) -> Iterator[Echo]:
    """Start the process that answers, on these cores if any; it ends with the context."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    peer = _start("echo", cores, theirs.fileno())
    theirs.close()
    try:
        yield Echo(ours)
    finally:
        ours.close()
        _end(peer)


def _start(what: str, cores: Sequence[int], *fds: int) -> subprocess.Popen[bytes]:
    peer = subprocess.Popen([sys.executable, __file__, what, *map(str, fds)], pass_fds=fds, stdin=subprocess.DEVNULL)
    if cores:
        os.sched_setaffinity(peer.pid, cores)
    return peer


def _end(peer: subprocess.Popen[bytes]) -> None:
    try:
        peer.wait(5)
    except subprocess.TimeoutExpired:
        peer.kill()
        peer.wait()


def _serve_pingpong(starter: int, fd: int) -> None:
    page = mmap.mmap(fd, mmap.PAGESIZE)
    words = memoryview(page).cast("Q")
    last = spins = 0
    owner = os.getppid()
    with socket.socket(fileno=starter) as end:
        while end.recv(1):
            while (value := words[0]) != REST:
                if value != last:
                    words[_REPLY_AT] = last = value
                spins += 1
                # Whoever asks may be killed in the middle of a game.
                if not spins & 0xFFFFF and os.getppid() != owner:
                    return


def _serve_echo(fd: int) -> None:
    reply = bytes(REPLY_BYTES)
    with socket.socket(fileno=fd) as end:
        while end.recv(REQUEST_BYTES):
            end.sendall(reply)


if __name__ == "__main__":
    {"pingpong": _serve_pingpong, "echo": _serve_echo}[sys.argv[1]](*map(int, sys.argv[2:]))
