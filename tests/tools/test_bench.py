"""``maia bench``: what it measures, compares and draws."""

import json
import subprocess
import sys

import pytest
from maia_tools.bench.measurement import Bar, Measurement, each
from maia_tools.bench.run import GROUPS

QUICK = ("--rounds", "1", "--only", "submit", "--only", "wait")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A quick run, written to a file as --json prints it: (path, its data)."""
    done = subprocess.run([sys.executable, "-m", "maia_tools.cli", "bench", "--json", *QUICK], text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("bench") / "base.json"
    path.write_text(done.stdout)
    return path, json.loads(done.stdout)


@pytest.mark.timeout(240)
def test_everything_is_measured_and_compared_with_its_reference(maia):
    done = maia("bench", "--json", "--rounds", "1", *(word for group in GROUPS for word in ("--only", group)))
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["schema"], data["kind"], data["device"]["emulated"]) == (1, "bench", True)
    rows = {row["name"]: row for row in data["results"]}
    assert len(rows) == len(data["results"])
    for wanted in ("submit, encoded on the way", "submit, pre-encoded", "submit, numpy batch of 1024",
                   "submit and wait, NOP", "launch, 16 arguments", "graph of 10,000 nodes, launch",
                   "record an event", "submit by turns to 16 queues and wait, a command", "register read",
                   "copy 8 B host to device, plain (inline)", "copy 64 MiB device to host, plain (staged)",
                   "copy 1 MiB device to device (direct)", "copy 1 MiB host to device in 1,024 rows (direct)",
                   "submit and wait, a copy of 256 KiB, by interrupt", "launch, 0 arguments, and wait",
                   "copy 16 MiB to a peer (direct)", "wait for a peer that waits for this device",
                   "all_reduce 1 MiB, 2 devices, and wait", "64 sentences embedded"):
        assert rows[wanted]["median_ns"] > 0
        assert rows[wanted].get("reference", "shared word, round trip") in rows
    for row in data["results"]:
        if "ratio" in row:
            assert row["ratio"] == pytest.approx(row["median_ns"] / rows[row["reference"]]["median_ns"], rel=0.01)
        if "met" in row:
            assert row["met"] == (row["median_ns"] <= row["bar_ns"])
    waits = rows["submit and wait, NOP"]
    assert waits["p10_ns"] <= waits["median_ns"] <= waits["p90_ns"] <= waits["p99_ns"]
    assert "p99_9_ns" not in waits, "300 samples say nothing of one in a thousand"
    assert rows["copy 256 MiB device to device (direct)"]["bytes"] == 256 << 20
    assert "copies of 1 GiB are left out" in done.stderr, "the device has 1 GiB"
    # The kernel may have no io_uring; nothing else that is measured needs to be installed.
    assert any(name.startswith("io_uring: 32 NOPs") for name in rows) or "io_uring is left out" in done.stderr
    if "pyopencl is left out" not in done.stderr:
        assert rows["PyOpenCL on PoCL: empty kernel and wait"]["reference"] == "launch, 0 arguments, and wait"


def test_only_what_is_asked_for_is_measured(run):
    names = [row["name"] for row in run[1]["results"]]
    assert "submit, pre-encoded" in names
    assert not any(name.startswith(("copy", "graph", "launch")) for name in names)


def test_what_became_slower_than_the_threshold_is_named_and_exits_with_1(maia, run, tmp_path):
    path, data = run
    for row in data["results"]:
        if row["name"] == "submit and wait, NOP":
            row["ratio"] /= 1e9  # one round of a machine that others use may be a thousand times slower than the next
    base = tmp_path / "faster.json"
    base.write_text(json.dumps(data))
    done = maia("bench", *QUICK, "--compare", base, "--threshold", "1e6")
    assert done.returncode == 1, done.stdout + done.stderr
    told = done.stdout[done.stdout.index("compared with"):]
    assert "1 slower by more than 1e+06 x" in told
    assert "submit and wait, NOP: " in told
    done = maia("bench", "--json", *QUICK, "--compare", path, "--threshold", "1e6")
    assert done.returncode == 0, done.stdout + done.stderr
    changes = json.loads(done.stdout)["compared"]["changes"]
    assert {change["name"] for change in changes} == {row["name"] for row in data["results"]}


@pytest.mark.parametrize(("text", "said"), [
    (None, "cannot be compared with"), ("{", "cannot be compared with"), ("[]", "no output of maia bench"),
    ('{"kind": "bench", "schema": 2}', "no output of maia bench"),
    ('{"kind": "bench", "schema": 1, "results": [{"name": "x", "median_ns": 0}]}', "damaged"),
])
def test_a_base_that_is_none_is_refused_before_anything_is_measured(maia, tmp_path, text, said):
    base = tmp_path / "base.json"
    if text is not None:
        base.write_text(text)
    done = maia("bench", *QUICK, "--compare", base)
    assert done.returncode not in (0, 3)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_pictures_and_a_report_are_written(maia, tmp_path):
    done = maia("bench", "--rounds", "1", "--only", "submit", "--only", "wait", "--only", "registers", "--plot",
                tmp_path / "new/folder")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "new/folder"
    assert sorted(path.name for path in folder.iterdir()) == ["latency.png", "report.md", "scaling.png"]
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text()
    assert "emulated" in report
    assert "| submit, pre-encoded | " in report
    assert "![latency.png](latency.png)" in report


def test_a_sample_is_a_mean_or_as_many_as_the_run_returns():
    mean = Measurement("mean", 4, lambda: None)
    mean.sample()
    assert [len(taken) for taken in mean.rounds] == [1]
    single = Measurement("each", 4, lambda: each(4, lambda: None), reference="mean", bar=Bar(2, 5))
    single.sample()
    assert [len(taken) for taken in single.rounds] == [4]
    mean.rounds, single.rounds = [[10.0]], [[10.0, 20.0, 30.0]]
    data = single.data({"mean": mean})
    assert (data["median_ns"], data["ratio"], data["bar_ns"], data["met"]) == (20.0, 2.0, 25.0, True)
    assert data["bar"] == "2 x + 5 ns"
    assert "bar" not in single.data({}), "there is no bar without the reference"


def test_a_ratio_is_taken_round_by_round():
    reference, ours = (Measurement(name, 1, lambda: None) for name in ("reference", "ours"))
    reference.rounds, ours.rounds = [[10.0], [30.0], [90.0]], [[20.0, 10.0, 30.0], [90.0], [180.0]]
    assert ours.ratio(reference) == 2
