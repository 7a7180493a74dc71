"""``maia`` as a process of its own, as users run it, or in the tests' own."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from maia_tools import cli

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "emulator", "tools"))}


@pytest.fixture
def maia():
    """Run ``maia`` with these arguments; the finished process, its output as text."""

    def run(*arguments, **options):
        options = {"capture_output": True, "stdin": subprocess.DEVNULL} | options
        return subprocess.run([sys.executable, "-m", "maia_tools.cli", *map(str, arguments)], text=True, timeout=100,
                              env=ENVIRONMENT, check=False, **options)

    return run


@pytest.fixture
def run_maia(capsys, monkeypatch):
    """As `maia`, in this very process, which is faster; `typed` is its standard input, no terminal."""

    def run(*arguments, typed=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = cli.main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run


@pytest.fixture
def start_maia():
    """Start ``maia`` with these arguments; the running process, its output piped as text."""
    started = []

    def run(*arguments):
        process = subprocess.Popen([sys.executable, "-m", "maia_tools.cli", *map(str, arguments)], text=True,
                                   env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()
