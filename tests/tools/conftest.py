"""``maia`` as a process of its own, as users run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
