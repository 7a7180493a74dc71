"""Pictures of a run (latencies, bandwidth by size beside memcpy's, cost by queues, arguments, nodes), and a report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LATENCIES = ("submit and wait, NOP", "register read", "register write")
PERCENTILES = (
    ("p10_ns", "10 %"), ("median_ns", "50 %"), ("p90_ns", "90 %"), ("p99_ns", "99 %"), ("p99_9_ns", "99.9 %"),
)
MEMCPY = "memcpy"


def draw(data: dict[str, Any], folder: Path, table: Sequence[Sequence[str]]) -> list[Path]:
    """Write the pictures and ``report.md`` of a run to a folder; returns what was written."""
    try:
        from matplotlib import figure
    except ImportError:
        raise click.ClickException("--plot needs matplotlib: pip install 'maia-rt[bench]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    about = f"{data['device']['model']}, Python {data['host']['python']}, {data['host']['cores']} cores"
    written = []
    for name, title, fill in (
        ("latency.png", "Latency", _latency), ("bandwidth.png", "Copies and their waits", _bandwidth),
        ("scaling.png", "Cost as work grows", _scaling),
    ):
        picture: Figure = figure.Figure(figsize=(8, 5), layout="constrained")
        axes = picture.add_subplot()
        if fill(axes, data["results"]):
            axes.set_title(f"{title}: {about}", fontsize=10)
            axes.grid(visible=True, which="both", alpha=0.3)
            axes.legend(fontsize=8)
            picture.savefig(folder / name, dpi=120)
            written.append(folder / name)
    report = folder / "report.md"
    report.write_text(_report(data, about, table, [path.name for path in written]), encoding="utf-8")
    return [*written, report]


def _lines(results: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    found: dict[str, list[tuple[float, dict[str, Any]]]] = defaultdict(list)
    for row in results:
        if row.get("series", {}).get("line"):
            found[row["series"]["line"]].append((row["series"]["at"], row))
    return {line: sorted(points, key=lambda point: point[0]) for line, points in found.items()}


def _latency(axes: Axes, results: Sequence[dict[str, Any]]) -> bool:
    rows = [row for row in results if row["name"].startswith(LATENCIES)]
    for row in rows:
        known = [(label, row[key] / 1e3) for key, label in PERCENTILES if key in row]
        axes.plot([label for label, _ in known], [value for _, value in known], marker="o", label=row["name"])
    axes.set_yscale("log")
    axes.set_ylabel("microseconds")
    axes.set_xlabel("of all are at least as fast")
    return bool(rows)


def _bandwidth(axes: Axes, results: Sequence[dict[str, Any]]) -> bool:
    lines = {line: points for line, points in _lines(results).items() if "bytes" in points[0][1]}
    for line, points in lines.items():
        axes.plot([at for at, _ in points], [row["bytes_per_second"] / 1e9 for _, row in points], marker=".",
                  label=line, linewidth=3 if line == MEMCPY else 1, color="black" if line == MEMCPY else None)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("bytes")
    axes.set_ylabel("GB/s")
    return bool(lines)


def _scaling(axes: Axes, results: Sequence[dict[str, Any]]) -> bool:
    lines = {line: points for line, points in _lines(results).items() if "bytes" not in points[0][1]}
    for line, points in lines.items():
        axes.plot([max(at, 0.5) for at, _ in points], [row["median_ns"] for _, row in points], marker="o", label=line)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arguments, nodes, queues or commands of a batch")
    axes.set_ylabel("nanoseconds")
    return bool(lines)


def _report(data: dict[str, Any], about: str, table: Sequence[Sequence[str]], pictures: Sequence[str]) -> str:
    header, *rows = table
    host = data["host"]
    kind = "an emulated device: software stands in for the hardware" if data["device"]["emulated"] else "hardware"
    lines = [
        "# maia bench", "", f"{about}; {kind}.",
        f"Processor: {host['processor'] or host['machine']}, kernel {host['kernel']}; "
        f"{data['rounds']} rounds, medians.", "",
        "| " + " | ".join(header) + " |", "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows), "", *(f"![{name}]({name})" for name in pictures), "",
    ]
    return "\n".join(lines)
