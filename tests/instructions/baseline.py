"""What everything cost when it was last accepted, and whether it costs more now."""

import json
from pathlib import Path

FILE = Path(__file__).with_name("baseline.json")
SAME, OTHER = 0.03, 0.25
"""How much more is let through: of the build that the baseline is of, and of another one."""
LEAST = {"bytecodes": 1.0, "instructions": 1.0, "calls": 0.3}
"""What is let through at any rate, of a number that is small."""
ADVICE = "If that is what it should cost: make instructions writes the baseline anew; look at it with git diff."


def load():
    """The baseline: ``{build: {path: {unit: number}}}``."""
    return json.loads(FILE.read_text())


def save(kept):
    """Write the baseline, a path a line."""
    builds = []
    for build in sorted(kept):
        paths = [f"    {json.dumps(path)}: {json.dumps(units)}" for path, units in kept[build].items()]
        builds.append(f"  {json.dumps(build)}: {{\n" + ",\n".join(paths) + "\n  }")
    FILE.write_text("{\n" + ",\n".join(builds) + "\n}\n")


def kin(build, other):
    """Whether counts of two builds compare at all: bytecodes do, instructions do of the same kind of processor."""
    return build.split(", ")[0].split("-")[0] == other.split(", ")[0].split("-")[0]


def reference(kept, build, path):
    """The build whose count of a path is the one to compare with, and how much more is let through.

    Where this very build has none, it is the one that has most in common with it; None where no other has one either.
    """
    if path in kept.get(build, {}):
        return build, SAME
    fields = set(build.split(", "))
    others = [other for other, paths in kept.items() if kin(build, other) and path in paths]
    return max(others, key=lambda other: len(fields & set(other.split(", ")))) if others else None, OTHER


def compare(counts, kept):
    """Yield (build, path, unit, before, now, share that is let through, whose the baseline is) of everything counted.

    What has no baseline comes with a before of None. Nothing comes of a kind of processor that none of them is of, and
    no calls of another build: what is inline in one version of Python is a call in the next.
    """
    for build, paths in counts.items():
        if not any(kin(build, other) for other in kept):
            continue
        for path, units in paths.items():
            whose, allowed = reference(kept, build, path)
            for unit, now in units.items():
                if unit != "calls" or whose == build:
                    yield build, path, unit, kept[whose][path].get(unit) if whose else None, now, allowed, whose


def more(before, now):
    """How much more it is, in words."""
    return f"{now / before - 1:+.1%}" if before else f"{now - before:+g}"


def regressions(counts, kept):
    """A sentence for everything that costs more than is let through, or that has no baseline at all."""
    found = []
    for build, path, unit, before, now, allowed, whose in compare(counts, kept):
        if before is None:
            found.append(f"{path}: {now:g} {unit} an operation, and no baseline")
        elif now > before + max(before * allowed, LEAST[unit]):
            of = "" if whose == build else f"; the baseline is of another build, {whose}"
            found.append(f"{path}: {before:g} {unit} an operation before, {now:g} now, {more(before, now)} "
                         f"({allowed:.0%} is let through{of})")
    return found


def accept(counts, kept):
    """The baseline with these counts in it.

    Where they changed, the other builds' counts of the same paths are not true any more either: they go, and are
    compared with those of this build until somebody counts them there.
    """
    stale = {build: set() for build in counts}
    for build, path, unit, before, now, allowed, whose in compare(counts, kept):
        if whose == build and abs(now - before) > max(before * allowed, LEAST[unit]):
            stale[build].add(path)
    accepted = {}
    for other, paths in kept.items():
        near = [build for build in counts if kin(build, other)]
        accepted[other] = {path: units for path, units in paths.items()
                           if all(path in counts[build] and path not in stale[build] for build in near)}
    return accepted | counts
