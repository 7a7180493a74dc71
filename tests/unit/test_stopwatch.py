"""Promises about time: one that is kept in another round is kept, one that never is fails, as does anything else."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers.stopwatch import TooSlow, promptly

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_quick_passes_and_says_how_long_it_took():
    assert promptly(time.monotonic() - 1, 5) >= 1
    assert promptly(1.0, 0.5, 1.25) == 0.25
    with pytest.raises(TooSlow, match=r"took 0\.500 s, less than 0\.5 s are promised"):
        promptly(1.0, 0.5, 1.5)


@pytest.mark.parametrize(("body", "rounds", "outcome"), [
    ("pass", 1, "1 passed"),
    ("promptly(0, 1, 2 if len(rounds) < 3 else 0)", 3, "1 passed"),
    ("promptly(0, 1, 2)", 4, "1 failed"),
    ("assert len(rounds) > 1", 1, "1 failed"),
])
def test_only_a_test_that_was_too_slow_is_run_again(tmp_path, body, rounds, outcome):
    (tmp_path / "conftest.py").write_text(
        "from tests.conftest import pytest_runtest_makereport, pytest_runtest_protocol\n")
    (tmp_path / "test_it.py").write_text(textwrap.dedent(f"""
        from tests.helpers.stopwatch import promptly

        def test_it():
            with open("rounds", "a+") as file:
                file.write(".")
                file.seek(0)
                rounds = file.read()
            {body}
    """))
    folders = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)}, capture_output=True, text=True)
    assert outcome in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "rounds").read_text() == "." * rounds
