"""``maia bench``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from maia_tools.bench import compare, plots
from maia_tools.bench.run import GROUPS, UNASKED, measure
from maia_tools.options import device_option, json_option
from maia_tools.output import print_json, print_table

HEADER = ("what", "this run", "reference of this run", "takes", "ratio", "bar", "met")


@click.command()
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(1, 1000), help="Samples of each.")
@click.option("--only", "groups", multiple=True, type=click.Choice(list(GROUPS)),
              help="One group only; repeatable. Without: all but large and neighbours.")
@click.option("--compare", "base", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Compare with an earlier --json; exit with 1 where something became slower.")
@click.option("--threshold", default=1.3, show_default=True, type=click.FloatRange(1.0),
              help="With --compare: how many times as slow is slower.")
@click.option("--plot", "folder", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
              help="Write pictures (PNG) and a report (Markdown) there.")
@device_option
@json_option
@click.pass_context
def bench(context: click.Context, rounds: int, groups: tuple[str, ...], base: Path | None, threshold: float,
          folder: Path | None, device: str | None, as_json: bool) -> None:
    """Time submissions, waits, launches, graphs, events, copies and registers, beside what the machine itself takes."""
    before = None if base is None else compare.load(base)
    data = measure(device, rounds, [name for name in GROUPS if name in (groups or UNASKED)])
    slower: list[compare.Change] = []
    if before is not None:
        both = compare.changes(before, data)
        slower = [change for change in both if change.factor > threshold]
        data["compared"] = {
            "with": str(base), "threshold": threshold,
            "changes": [{"name": change.name, "before": change.before, "now": change.now,
                         "of_reference": change.relative, "factor": round(change.factor, 3)} for change in both],
        }
    rows = [_row(result) for result in data["results"]]
    if folder is not None:
        data["written"] = [str(path) for path in plots.draw(data, folder, [HEADER, *rows])]
    if as_json:
        print_json("bench", data)
    else:
        _print(data, rows, slower)
    if slower:
        context.exit(1)


def _print(data: dict[str, Any], rows: Sequence[Sequence[str]], slower: Sequence[compare.Change]) -> None:
    shown, host = data["device"], data["host"]
    click.echo(f"{shown['model']} ({shown['name']}), {'emulated' if shown['emulated'] else 'hardware'}; "
               f"{host['processor'] or host['machine']}, {host['cores']} cores, Python {host['python']}; "
               f"medians of {data['rounds']} rounds\n")
    print_table(HEADER, rows, right=(1, 3, 4, 5))
    bars = [result["met"] for result in data["results"] if "met" in result]
    click.echo(f"\n{sum(bars)} of {len(bars)} bars are met")
    for path in data.get("written", ()):
        click.echo(f"written: {path}")
    if "compared" in data:
        compared = data["compared"]
        click.echo(f"\n{len(compared['changes'])} compared with {compared['with']}, "
                   f"{len(slower)} slower by more than {compared['threshold']:g} x")
        for change in slower:
            unit = "of the reference" if change.relative else "ns"
            click.echo(f"  {change.name}: {change.before:,.4g} -> {change.now:,.4g} {unit} ({change.factor:.2f} x)")


def _row(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    met = {True: "yes", False: "no", None: ""}[result.get("met")]
    bar = f"{result['bar']} = {_time(result['bar_ns'])}" if "x" in result.get("bar", "") else (
        _time(result["bar_ns"]) if "bar" in result else "")
    speed = f" ({result['bytes_per_second'] / 1e9:.2f} GB/s)" if result.get("bytes", 0) >= 1 << 20 else ""
    reference = [result["reference"], _time(result["reference_ns"]), f"{result['ratio']:.3g}"] if (
        "reference" in result) else ["", "", ""]
    return [result["name"] + speed, _time(result["median_ns"]), *reference, bar, met]


def _time(nanoseconds: float) -> str:
    if nanoseconds < 1e4:
        return f"{nanoseconds:,.0f} ns"
    return f"{nanoseconds / 1e3:,.1f} us" if nanoseconds < 1e7 else f"{nanoseconds / 1e6:,.1f} ms"
