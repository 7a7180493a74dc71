"""The command line: ``python -m maia_emulator --socket PATH``, which ``maia emulate`` calls too."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import math
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from maia_emulator.function import Function
from maia_emulator.processor import Processor
from maia_emulator.profiles import PROFILES, Profile
from maia_emulator.server import ListeningSocket, Server, ServerError
from maia_rt.contract.commands import MAX_INJECTIONS
from maia_rt.contract.function import DEVICE_ID, VENDOR_ID
from maia_rt.contract.injection import Injection
from maia_rt.errors import MaiaError

DESCRIPTORS: Final = 16384


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, or until the client of ``--fd`` goes.

    Prints ``listening on PATH`` on stdout, one line a device, when clients may connect.

    Returns
    -------
    int
        0 after an orderly end, 1 where a socket cannot be served. Wrong usage ends the process with 2.
    """
    arguments = parser()
    options = arguments.parse_args(argv)
    if len(options.inject) > MAX_INJECTIONS:
        arguments.error(f"{len(options.inject)} injections; a device has room for {MAX_INJECTIONS}")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        return _run(options)
    except ServerError as error:
        print(f"maia_emulator: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    injections = _seeded(options.inject, options.seed)
    for injection in injections:
        print(f"maia_emulator: injecting {injection}", file=sys.stderr, flush=True)
    # A client may pass an eventfd for each of its device's vectors.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, DESCRIPTORS)), hard))
    with contextlib.ExitStack() as cleanup:
        # Sockets first, devices and their threads after: see ListeningSocket.
        ends: list[ListeningSocket | socket.socket] = []
        for path in _paths(options):
            ends.append(ListeningSocket(path))
            cleanup.callback(ends[-1].close)
        if options.fd is not None:
            ends.append(_inherited(options.fd))
            cleanup.callback(ends[-1].close)
        done, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        cleanup.callback(os.close, done)
        cleanup.callback(os.close, wake)
        cleanup.enter_context(_signals_wake(wake))
        servers = []
        processor = Processor()
        for number, end in enumerate(ends):
            function = Function(
                _profile(options), seed=options.seed, number=number, workers=options.workers,
                vendor_id=options.vendor_id, device_id=options.device_id, injections=injections,
                processor=processor,
            )
            function.engine.set_link(*link(options))
            server = Server(function, end, ended=lambda: os.write(wake, b"\0"))
            cleanup.callback(server.stop)
            server.start()
            servers.append(server)
        for end in ends:
            if isinstance(end, ListeningSocket):
                print(f"listening on {end.path}", flush=True)
        ready = select.poll()
        ready.register(done, select.POLLIN)
        ready.poll()
    return 0


@contextlib.contextmanager
def _signals_wake(fd: int) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into a byte on a pipe; further ones change nothing, until the process is gone.

    The interpreter's C handler writes it: a handler in Python would not run while the main thread is about to poll.
    """
    came = False

    def note(_number: int, _frame: object) -> None:
        nonlocal came
        came = True

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    fd_before = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        for number, old in before.items():
            signal.signal(number, signal.SIG_IGN if came else old)


def _paths(options: argparse.Namespace) -> list[str]:
    if options.socket is None:
        return []
    if options.devices == 1:
        return [options.socket]
    return [f"{options.socket}.{number}" for number in range(options.devices)]


def _inherited(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ServerError(f"descriptor {fd} is no socket: {error.strerror}") from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise ServerError(f"descriptor {fd} is no unix stream socket")
    sock.set_inheritable(False)
    return sock


def _profile(options: argparse.Namespace) -> Profile:
    profile = PROFILES[options.profile]
    return profile if options.queues is None else replace(profile, max_queues=options.queues)


def link(options: argparse.Namespace) -> tuple[float, float]:
    """Gigabits a second and microseconds of the links; zeros for no model."""
    gbps, latency = options.link_gbps, options.link_us
    if gbps is not None and math.isnan(gbps):
        profile = _profile(options)
        gbps, latency = profile.link_gbps, profile.link_us if latency is None else latency
    return gbps or 0.0, latency or 0.0


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="maia_emulator", description="Serve emulated MAIA-like devices on vfio-user sockets.",
    )
    where = made.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", metavar="PATH", help="listen here; with --devices on PATH.0, PATH.1 ...")
    where.add_argument("--fd", type=_count, metavar="N", help="serve the one client of this connected descriptor")
    made.add_argument("--devices", type=_positive, default=1, metavar="N", help="how many devices (default 1)")
    made.add_argument("--profile", choices=sorted(PROFILES), default="small", help="what device (default small)")
    made.add_argument("--queues", type=_positive, metavar="N", help="how many hardware queues (default 64)")
    made.add_argument("--seed", type=_count, default=0, help="decides serial numbers and random choices (default 0)")
    made.add_argument("--workers", type=_count, default=0, metavar="N", help="engine threads (default one a core)")
    made.add_argument("--inject", type=_injection, action="append", default=[], metavar="SPEC",
                      help="make a fault on purpose, from the start and after each reset, such as "
                      "fault:code=ECC,opcodes=COPY,after=3 or delay:us=50,probability=0.1 (repeatable); "
                      "its seed, where it has none, follows from --seed and is printed")
    made.add_argument("--link-gbps", type=_rate, metavar="X",
                      help="model the links to host and peers: gigabits a second each way, or 'profile' for the "
                      "profile's (default: as fast as memory is)")
    made.add_argument("--link-us", type=_microseconds, metavar="Y",
                      help="and the microseconds that every command over a link takes at least")
    made.add_argument("--vendor-id", type=_id, default=VENDOR_ID, metavar="ID", help=f"default {VENDOR_ID:#06x}")
    made.add_argument("--device-id", type=_id, default=DEVICE_ID, metavar="ID", help=f"default {DEVICE_ID:#06x}")
    return made


def _injection(text: str) -> Injection:
    try:
        injection = Injection.parse(text)
    except MaiaError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if injection.now:
        raise argparse.ArgumentTypeError(f"{text!r}: now is for a device that runs; here a fault needs a command")
    return injection


def _seeded(injections: Sequence[Injection], seed: int) -> list[Injection]:
    """Each with a seed of its own."""
    return [dataclasses.replace(injection, seed=(seed + number) % 2**64) if injection.seed is None else injection
            for number, injection in enumerate(injections)]


def _rate(text: str) -> float:
    """Gigabits a second; nan stands for the profile's."""
    if text == "profile":
        return math.nan
    value = float(text)
    if not 0.001 <= value <= 100_000:
        raise argparse.ArgumentTypeError(f"{text} is not within 0.001 to 100000 gigabits a second")
    return value


def _microseconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 to 1000000 microseconds")
    return value


def _count(text: str) -> int:
    value = int(text, 0)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _positive(text: str) -> int:
    value = _count(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError(f"{text} is not within 1 to 64")
    return value


def _id(text: str) -> int:
    value = int(text, 16)
    if not 0 <= value <= 0xFFFF:
        raise argparse.ArgumentTypeError(f"{text} is no 16-bit id")
    return value
