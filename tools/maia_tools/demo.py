"""``maia demo``: a sentence encoder on the device, beside plain numpy, checked against float64."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from maia_tools.encoding_run import MAX_DIFFERENCE, MIN_COSINE, Advance, EncodingRun, Figures, Stage, run
from maia_tools.output import SCHEMA
from maia_tools.sentences import SENTENCES
from maia_tools.tokens import MAX_TOKENS

SHOWN_NEIGHBOURS = 40
"""Sentences whose neighbours are printed; ``--json`` has the embeddings of all."""
LABEL_CELLS = 34
ENGINES = (("tensor units", "busy_ns_tensor"), ("vector units", "busy_ns_vector"), ("tile DMA", "busy_ns_dma"),
           ("command processor", "busy_ns_command"))


@click.command()
@click.argument("sentences", nargs=-1)
@click.option("--text", "file", type=click.File("rb"),
              help="Take sentences from FILE, one a line; - is standard input.")
@click.option("--device", "selector", default=None, metavar="SELECTOR",
              help="Index, PCI address, socket path or 'emulated'. Default: the first device.")
@click.option("--repeat", default=5, show_default=True, type=click.IntRange(1, 1000),
              help="Timed passes; medians are shown.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def demo(sentences: tuple[str, ...], file: BinaryIO | None, selector: str | None, repeat: int, as_json: bool) -> int:
    """Embed SENTENCES (built-in ones without any) with all-MiniLM-L6-v2 on the device.

    Every tensor operation runs on the device. Exits with 1 where the embeddings are further from a float64 reference
    than FP32 should be.
    """
    if sentences and file:
        raise click.UsageError("give sentences or --text, not both")
    texts: Sequence[str] = sentences or SENTENCES
    if file:
        texts = lines(file.read())
    with _progress() as stage:
        found = run(texts, selector=selector, repeats=repeat, stage=stage)
    if as_json:
        click.echo(json.dumps(as_object(found)))
    else:
        show(found, Console(soft_wrap=True, highlight=False))
    return 0 if found.figures.passed else 1


def lines(raw: bytes) -> list[str]:
    """The lines of a UTF-8 file, empty ones too; bytes that are no UTF-8 count as U+FFFD."""
    found = raw.decode(errors="replace").split("\n")
    if found[-1] == "":
        found.pop()
    return [line.removesuffix("\r") for line in found]


def as_object(found: EncodingRun) -> dict[str, object]:
    """What ``--json`` prints."""
    return {
        "schema": SCHEMA, "kind": "demo",
        "sentences": [{"text": s.text, "tokens": len(s.ids), "truncated": s.truncated, "embedding": row.tolist()}
                      for s, row in zip(found.sentences, found.embeddings, strict=True)],
        "figures": {**found.figures.as_dict(), "passed": found.figures.passed},
    }


@contextmanager
def _progress() -> Iterator[Stage]:
    """A bar on stderr for each stage."""
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        def stage(name: str, steps: int) -> Advance:
            task = progress.add_task(name, total=steps)
            return lambda done: progress.advance(task, done)

        yield stage


def show(found: EncodingRun, console: Console) -> None:
    """Print the tables and figures."""
    if found.sentences:
        _show_similarities(found, console)
        _show_neighbours(found, console)
    for number, sentence in enumerate(found.sentences, 1):
        if sentence.truncated:
            console.print(Text(f"Sentence {number} has more than {MAX_TOKENS} tokens; the rest was left out."))
    _show_device(found.figures, console)
    _show_time(found.figures, console)


def printable(text: str) -> str:
    """A text as one line that any terminal takes."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    return clean.encode(errors="replace").decode() or "(empty)"


def _label(text: str, cells: int) -> Text:
    label = Text(printable(text), no_wrap=True, overflow="ellipsis")
    label.truncate(cells, overflow="ellipsis", pad=True)
    return label


def _show_similarities(found: EncodingRun, console: Console) -> None:
    """Cosines in percent, as many columns as the terminal is wide."""
    count = min(len(found.table), max(1, (console.width - LABEL_CELLS - 5) // 4))
    heading = "Similarity (cosine, %)"
    if count < len(found.sentences):
        heading += f" of the first {count} of {len(found.sentences)} sentences"
    console.print(Text(heading, style="bold"))
    console.print(Text(" " * (LABEL_CELLS + 4) + "".join(f"{i:4d}" for i in range(1, count + 1)), style="dim"))
    for i in range(count):
        line = Text(f"{i + 1:3d} ", style="dim")
        line.append_text(_label(found.sentences[i].text, LABEL_CELLS))
        for value in found.table[i, :count]:
            percent = round(100 * float(value))
            style = "bold green" if percent >= 50 else "yellow" if percent >= 25 else "dim"
            line.append(f"{percent:4d}", style=style)
        console.print(line)
    console.print()


def _show_neighbours(found: EncodingRun, console: Console) -> None:
    """Each sentence and the one nearest to it."""
    if len(found.sentences) < 2:
        return
    cells = max(20, (console.width - 12) // 2)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Sentence", no_wrap=True)
    table.add_column("Nearest neighbour", no_wrap=True)
    table.add_column("cosine", justify="right", no_wrap=True)
    for sentence, others in list(zip(found.sentences, found.neighbours, strict=True))[:SHOWN_NEIGHBOURS]:
        other, cosine = others[0]
        table.add_row(_label(sentence.text, cells), _label(found.sentences[other].text, cells), f"{cosine:.3f}")
    console.print(table)
    if len(found.sentences) > SHOWN_NEIGHBOURS:
        console.print(f"and {len(found.sentences) - SHOWN_NEIGHBOURS} more")
    console.print()


def _show_device(figures: Figures, console: Console) -> None:
    """What the device did in one pass."""
    counters = figures.counters
    kind = "emulated device: software stands in for the hardware" if figures.emulated else "device"
    console.print(Text(f"One pass on {figures.device} ({kind})", style="bold"))
    shapes = ", ".join(f"{s} x {length}" for s, length in figures.batches) or "none"
    rows = [
        ("sentences", f"{figures.sentences:,} of {figures.tokens:,} tokens, {figures.padded_tokens:,} with padding"),
        ("batches", shapes),
        ("commands", f"{counters['commands']:,}, of which {counters['launches']:,} launches of "
                     f"{counters['macro_ops']:,} macro-operations"),
        ("doorbells", f"{counters['doorbells']:,} taken, {counters['wakes']:,} wakes, "
                      f"{counters['interrupts']:,} interrupts"),
        ("host to device", f"{counters['bytes_host_to_device']:,} bytes"),
        ("device to host", f"{counters['bytes_device_to_host']:,} bytes"),
        ("tile SRAM", f"{counters['bytes_tile_in']:,} bytes in, {counters['bytes_tile_out']:,} bytes out"),
        ("multiply-adds", f"{counters['macs']:,} on tensor units ({figures.macs:,} by the model's shape)"),
        ("engine time", ", ".join(f"{name} {counters[key] / 1e6:.1f} ms" for name, key in ENGINES)),
    ]
    for name, text in rows:
        console.print(Text(f"  {name:<16}{text}"))
    console.print()


def _show_time(figures: Figures, console: Console) -> None:
    """Times beside numpy's, and last how close the embeddings are."""
    console.print(Text("Time", style="bold"))
    console.print(Text(f"  set-up {figures.setup_s:.2f} s, first pass {1e3 * figures.first_pass_s:.0f} ms "
                       "(kernels are built and loaded in it)"))
    label = "emulated device" if figures.emulated else "device"
    console.print(Text(f"  {label} {1e3 * figures.device_pass_s:.1f} ms, plain numpy on this host "
                       f"{1e3 * figures.numpy_pass_s:.1f} ms a pass (medians of {figures.repeats}): ratio "
                       f"{figures.ratio:.2f}"))
    console.print()
    verdict = "ok" if figures.passed else "TOO LARGE"
    console.print(Text(
        f"Largest difference to the float64 reference {figures.largest_difference:.2e} (bound {MAX_DIFFERENCE:g}), "
        f"smallest cosine {figures.smallest_cosine:.9f} (bound {MIN_COSINE}): {verdict}"))
