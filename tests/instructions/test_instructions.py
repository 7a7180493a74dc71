"""What the hot paths cost, against the committed baseline; and that the comparison would notice."""

import copy

import pytest
from helpers import lacking

from instructions import baseline, callgrind, counting


@pytest.fixture(scope="module")
def counts():
    """What everything costs now."""
    lacking.require(counting.missing())
    return counting.count()


def scaled(counts, factor):
    """A baseline of these counts times a factor."""
    return {build: {path: {unit: number * factor for unit, number in units.items()} for path, units in paths.items()}
            for build, paths in counts.items()}


def test_no_hot_path_executes_more_instructions_than_were_accepted(counts):
    found = baseline.regressions(counts, baseline.load())
    assert not found, "\n".join([*found, baseline.ADVICE])


def test_every_path_of_the_baseline_is_counted(counts):
    kept = baseline.load()
    for build, paths in counts.items():
        assert all(number > 0 for units in paths.values() for unit, number in units.items() if unit != "calls")
        assert set(kept.get(build, {})) <= set(paths), baseline.ADVICE


@pytest.mark.parametrize("part", [0.1, 0.2])
def test_a_tenth_more_of_anything_is_noticed_and_a_fifth_of_what_costs_next_to_nothing(counts, part):
    found = baseline.regressions(counts, scaled(counts, 1 / (1 + part)))
    for paths in counts.values():
        for path, units in paths.items():
            unit = next(iter(units))
            told = [sentence for sentence in found if sentence.startswith(f"{path}: ") and f" {unit} " in sentence]
            if units[unit] * part > 1.2 * baseline.LEAST[unit]:
                assert f"{units[unit]:g} now, +{100 * part:g}" in told[0]
            else:
                assert part == 0.1, path


def test_a_hundredth_more_or_any_less_is_not(counts):
    assert baseline.regressions(counts, scaled(counts, 1 / 1.01)) == []
    assert baseline.regressions(counts, scaled(counts, 2)) == []


BUILD = "x86_64, cpython-3.11, GCC 12"
NEIGHBOUR, STRANGER = "x86_64, cpython-3.12, GCC 12", "aarch64, cpython-3.11, GCC 12"


def of(number):
    return {"submit": {"instructions": number, "calls": 1.0}}


def test_another_build_is_compared_with_less_rigour_and_another_processor_not_at_all():
    kept = {NEIGHBOUR: of(100)}
    assert baseline.regressions({BUILD: of(120)}, kept) == []
    (told,) = baseline.regressions({BUILD: of(130)}, kept)
    assert told == ("submit: 100 instructions an operation before, 130 now, +30.0% "
                    f"(25% is let through; the baseline is of another build, {NEIGHBOUR})")
    assert baseline.regressions({STRANGER: of(1000)}, kept) == []


def test_a_path_without_a_baseline_is_told():
    (told,) = baseline.regressions({BUILD: {"new": of(7)["submit"]}}, {BUILD: of(100)})
    assert told == "new: 7 instructions an operation, and no baseline"


def test_what_is_accepted_takes_the_place_of_what_other_builds_had():
    kept = {BUILD: of(100) | {"poll": {"instructions": 40.0, "calls": 1.0}}}
    kept[NEIGHBOUR], kept[STRANGER] = copy.deepcopy(kept[BUILD]), copy.deepcopy(kept[BUILD])
    kept[NEIGHBOUR]["renamed since"] = {"instructions": 7.0, "calls": 1.0}
    new = {BUILD: of(90) | {"poll": {"instructions": 40.0, "calls": 1.0}}}
    accepted = baseline.accept(new, kept)
    assert accepted == {**new, NEIGHBOUR: {"poll": kept[NEIGHBOUR]["poll"]}, STRANGER: kept[STRANGER]}


def test_callgrinds_file_is_read_by_whose_the_code_is():
    text = "\n".join([
        "version: 1", "positions: line", "events: Ir", "",
        f"ob={callgrind.DRIVER}ring.so", "fn=submit", "10 7", "11 5",
        "cob=/usr/lib/libpython.so", "cfn=PyLong_New", "calls=3 0", "12 999",
        f"cob={callgrind.DRIVER}lane.so", "cfn=launch", "calls=4 0", "12 999",
        "cfn=inlined", "calls=5 0", "13 999", "14 1", "",
        "ob=/usr/lib/libpython.so", "fn=PyLong_New", "1 5000",
        f"cob={callgrind.DEVICE}queues.so", f"cfn={callgrind.ROUND}", "calls=6 0", "2 100", "",
        f"ob={callgrind.DEVICE}queues.so", f"fn={callgrind.ROUND}", "1 60", "",
    ])
    assert callgrind.read(text, callgrind.DRIVER) == callgrind.Part(13, 3, 6)
    assert callgrind.read(text, callgrind.DEVICE) == callgrind.Part(60, 0, 6)
