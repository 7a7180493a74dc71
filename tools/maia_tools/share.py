"""``maia share``: hold a device and give other programs a part of it each."""

from __future__ import annotations

import logging
import signal

import click

from maia_rt.runtime.discovery import connect_alone
from maia_rt.share import Broker
from maia_tools.output import bytes_text
from maia_tools.selection import selector


@click.command()
@click.argument("device", required=False)
@click.option("--socket", "path", required=True, metavar="PATH", help="Where programs find their share.")
@click.option("--max-clients", type=click.IntRange(1, 64), metavar="N",
              help="How many equal shares (default: one a cluster, at most 8).")
@click.option("--lease", type=click.FloatRange(0.1, 1e9), metavar="SECONDS",
              help="How long a program keeps its share when others wait for one (default: for ever).")
def share(device: str | None, path: str, max_clients: int | None, lease: float | None) -> None:
    """Hold DEVICE and serve equal shares of it, until interrupted.

    DEVICE is as for --device of other commands: a number of `maia info`, a PCI address, a socket, or emulated. Programs
    open their share as maia_rt.open("share:PATH"). It is a device of its own to them; none can read or disturb another.
    """
    logging.basicConfig(level=logging.WARNING, format="maia share: %(message)s")
    transport, emulator, hold = connect_alone(selector(device))
    try:
        try:
            with Broker(transport, path, clients=max_clients, lease=lease) as broker:
                signal.set_wakeup_fd(broker.wake_fd, warn_on_full_buffer=False)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, lambda *_: broker.stop())
                part = broker.shares[0]
                click.echo(f"sharing {transport.name} on {path}: {len(broker.shares)} shares, each with "
                           f"{bytes_text(part.hbm_bytes)} of HBM, clusters: {part.clusters}, queues: {part.queues}")
                click.get_text_stream("stdout").flush()
                broker.run()
        finally:
            signal.set_wakeup_fd(-1)
            transport.close()
            if emulator is not None:
                emulator.close()
    finally:
        if hold is not None:
            hold.release()
