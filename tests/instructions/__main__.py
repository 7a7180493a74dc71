"""``python -m instructions``: count, print a table, and write the baseline anew; with ``--check`` only look."""

import argparse
import sys

from . import baseline, counting


def main():
    """Return the exit code: 1 where something costs more than is let through."""
    parser = argparse.ArgumentParser(prog="instructions", description=__doc__.partition(": ")[2])
    parser.add_argument("--check", action="store_true", help="leave the baseline as it is; exit code 1 at a regression")
    options = parser.parse_args()
    kept = baseline.load()
    try:
        counts = counting.count()
    except counting.CannotCount as error:
        print(error, file=sys.stderr)
        return 2
    table(counts, kept)
    if not options.check:
        baseline.save(baseline.accept(counts, kept))
        return 0
    found = baseline.regressions(counts, kept)
    if found:
        print(*found, baseline.ADVICE, sep="\n", file=sys.stderr)
    return 1 if found else 0


def table(counts, kept):
    """Print what everything costs, and how that compares."""
    before = {(build, path, unit): (was, whose)
              for build, path, unit, was, _, _, whose in baseline.compare(counts, kept)}
    for build, paths in counts.items():
        print(build)
        for path, units in paths.items():
            cells = []
            for unit, now in units.items():
                was, whose = before.get((build, path, unit), (None, None))
                change = "" if was is None or was == now else f" ({baseline.more(was, now)})"
                cells.append(f"{now:9g} {unit}{change}{'' if whose in (None, build) else ' *'}")
            print(f"  {path:40}" + " ".join(f"{cell:32}" for cell in cells).rstrip())
    if any(whose not in (None, build) for (build, _, _), (_, whose) in before.items()):
        print("* compared with another build's")


if __name__ == "__main__":
    sys.exit(main())
