"""Linters, types and layering, as tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CODE = ["maia_rt", "emulator", "tools", "tests", "examples", "benchmarks", "setup.py"]
CYTHON = sorted(p for folder in ("maia_rt", "emulator") for p in (ROOT / folder).rglob("*.p[yx][xd]"))


def run(*command: str) -> None:
    """Run one of the virtual environment's tools; its output is the failure."""
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1",
                        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "emulator", ROOT / "tools")))}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff():
    run("ruff", "check", "--output-format", "concise", *(name for name in CODE if (ROOT / name).exists()))


@pytest.mark.timeout(300)
def test_mypy_strict():
    run("mypy")


def test_cython_lint():
    run("cython-lint", *map(str, CYTHON))


def test_imports_point_down_only():
    run("lint-imports", "--no-cache")


ALLOWED_IN_CYTHON = {
    "maia_rt/_fast": r"maia_rt\._fast(\.|\s|$)|maia_rt\.errors",
    "emulator/maia_emulator": r"maia_rt\._fast\.(commands|registers)|maia_rt\._fast\s+cimport\s+(commands|registers)"
                              r"|maia_rt\.(contract|errors)|maia_emulator|\.",
}


@pytest.mark.parametrize("folder", sorted(ALLOWED_IN_CYTHON))
def test_cython_imports_keep_the_layers_too(folder):
    wrong = []
    for path in (ROOT / folder).glob("*.p[yx][xd]"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = re.match(r"\s*(?:from|import|cimport)\s+((?:maia_|\.).*)", line)
            if found and not re.match(ALLOWED_IN_CYTHON[folder], found.group(1)):
                wrong.append(f"{path.name}:{number}: {line.strip()}")
    assert not wrong


def test_every_extension_has_type_stubs():
    assert [p.name for p in CYTHON if p.suffix == ".pyx" and not p.with_suffix(".pyi").exists()] == []


def test_files_stay_one_noun_long():
    longest = 450
    generated = {"registers.py"}
    files = [p for folder in ("maia_rt", "emulator", "tools") for p in (ROOT / folder).rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in files if p.name not in generated
            and (n := len(p.read_text().splitlines())) > longest}
    assert set(long) <= LOOKED_AT_AND_KEPT, long


LOOKED_AT_AND_KEPT = {
    "maia_rt/firmware.py",  # boot, events and every admin command by name; half are docstrings
    "maia_rt/kernels/builder.py",  # half of it is one short method for each macro-operation
    "maia_rt/runtime/device.py",  # what a device makes it also closes: in one place; half are docstrings
    "maia_rt/runtime/graph_operation.py",  # one short class for each kind of node
    "maia_rt/runtime/stream.py",  # every command of a stream in one place; more than half are docstrings
    "maia_rt/queue.py",  # waits, repair and aborts share all of a queue's state
    "maia_rt/transport/wire.py",  # the protocol's every structure, in the specification's order
}
