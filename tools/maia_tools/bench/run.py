"""One run of the benchmark.

Every round takes one sample of every measurement, so that a noisy moment spoils all alike.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import click

from maia_tools import selection
from maia_tools.bench import commands, scaling, transfers
from maia_tools.bench.measurement import Measurement, each
from maia_tools.bench.model import model
from maia_tools.bench.neighbours import neighbours
from maia_tools.bench.peers import peers
from maia_tools.bench.reference import Echo, PingPong, echo, ping_pong
from maia_tools.bench.subject import BURST, Cores, Subject

GROUPS: dict[str, Callable[[Subject], list[Measurement]]] = {
    "submit": commands.submissions, "wait": commands.waits, "launch": commands.launches, "graph": commands.graphs,
    "events": commands.events, "queues": scaling.queues, "flight": scaling.in_flight, "registers": transfers.registers,
    "copies": transfers.copies, "peers": peers, "model": model, "large": transfers.large, "neighbours": neighbours,
}
"""What can be asked for by name."""
UNASKED = [name for name in GROUPS if name not in ("large", "neighbours")]
"""What is measured when nothing is asked for."""
IDLE_SECONDS = 0.002


def references(game: PingPong, peer: Echo) -> list[Measurement]:
    """What the machine itself takes to write a few bytes, and to tell another process something and hear back."""

    def begin() -> None:
        # The emulated device, which has just been busy, still watches its doorbells for a moment.
        time.sleep(IDLE_SECONDS)
        game.begin()

    trips, messages = commands.ROUND_TRIPS, transfers.MESSAGES
    return [
        commands.packing(),
        Measurement("shared word, round trip", trips, lambda: game.round_trips(trips), begin, game.end),
        # One by one, as what it is the reference of: between two of them the other side falls asleep.
        Measurement("socket, round trip", messages, lambda: each(messages, lambda: peer.round_trips(1))),
    ]


def measure(selector: str | None, rounds: int, groups: Sequence[str]) -> dict[str, Any]:
    """Take ``rounds`` samples of all that is in ``groups``; the result as ``--json`` prints it."""
    import maia_rt

    with ExitStack() as stack:
        device = stack.enter_context(maia_rt.open(selection.selector(selector)))
        stream = stack.enter_context(device.create_stream(entries=4 * BURST))
        cores = Cores()
        stack.callback(cores.mix)
        cores.add(device)
        game, peer = stack.enter_context(ping_pong(cores.others)), stack.enter_context(echo(cores.others))
        subject = Subject(device, stream, stack, cores)
        # Groups share references.
        named = {m.name: m for m in references(game, peer)}
        for group in groups:
            named |= {m.name: m for m in GROUPS[group](subject) if m.name not in named}
        found = list(named.values())
        cores.part()
        # One unseen round warms caches, pages and pools.
        with click.progressbar(range(rounds + 1), label="measuring", file=click.get_text_stream("stderr"),
                               hidden=not os.isatty(2)) as numbers:
            for number in numbers:
                for m in found:
                    m.sample()
                    if number == 0:
                        m.rounds.clear()
        identity = device.identity
        return {
            "device": {"name": device.name, "model": identity.model, "firmware": identity.firmware,
                       "emulated": device.capabilities.emulated},
            "host": {"cores": len(cores.all), "machine": platform.machine(),
                     "processor": processor(), "python": platform.python_version(), "kernel": platform.release()},
            "rounds": rounds,
            "pinned": bool(cores.others),
            "results": [m.data(named) for m in found],
        }


def processor() -> str:
    """The processor's name, as the kernel has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return ""
