"""Running the programs, and what an operation costs: twice as many operations less once as many, the rest drops out."""

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from . import callgrind
from .callgrind import DEVICE, DRIVER, ROOT
from .paths import IDLE, MARK

SECONDS = 280
HERE = Path(__file__).parent


class CannotCount(Exception):
    """What went wrong, or what is missing and how to get it."""


def missing():
    """Why nothing can be counted here; None where it can."""
    if shutil.which("valgrind") is None:
        return "there is no valgrind to count instructions with\n  try: apt install valgrind"
    if b"__asan_init" in _ring():
        return "the extensions are built with sanitizers, which would be counted too\n  try: make clean build"
    return None


def python():
    """What the bytecodes of a function depend on."""
    return f"{sys.implementation.name}-{sys.version_info.major}.{sys.version_info.minor}"


def build():
    """What the instructions of an extension depend on, but for its source, in the order of what matters most."""
    ring = _ring()
    found = [platform.machine(), python()]
    for what, pattern in (("Cython {}.{}", rb"__Pyx_ImportType_(\d+)_(\d+)"), ("GCC {}", rb"GCC: \([^)]*\) (\d+)"),
                          ("clang {}", rb"clang version (\d+)"), ("stack protector", rb"__stack_chk_fail")):
        match = re.search(pattern, ring)
        if match:
            found.append(what.format(*(group.decode() for group in match.groups())))
    return ", ".join(found)


def _ring():
    return Path(DRIVER, "ring" + sysconfig.get_config_var("EXT_SUFFIX")).read_bytes()


def count():
    """Count everything.

    Returns
    -------
    dict
        ``{python or build: {path: {unit: number}}}`` with the units bytecodes, instructions and calls.
    """
    reason = missing()
    if reason is not None:
        raise CannotCount(reason)
    with tempfile.TemporaryDirectory(prefix="maia-instructions-") as folder:
        environment = _environment(folder)
        bytecodes = json.loads(_run(_program("bytecodes.py"), environment))
        # Once without callgrind looking on: then Python has compiled all modules.
        paths = _program("paths.py", f"{folder}/parts")
        _run(paths, environment)
        _run(["valgrind", "--tool=callgrind", f"--dump-before={MARK}", f"--dump-before=__{MARK}", "--compress-pos=no",
              "--compress-strings=no", f"--callgrind-out-file={folder}/counted", *paths], environment)
        parts = json.loads(Path(folder, "parts").read_text())
        # Callgrind numbers what lies before each mark from 1, so the parts are the even ones.
        files = [Path(folder, f"counted.{2 * number + 2}") for number in range(len(parts))]
        if not files[-1].exists():
            raise CannotCount(f"callgrind did not see {MARK} called {2 * len(parts)} times")
        return {python(): {name: {"bytecodes": number} for name, number in bytecodes.items()},
                build(): _operations(parts, files)}


def _environment(folder):
    """The caller's, without what changes how Python or the driver work."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MAIA_", "COVERAGE"))}
    return env | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "emulator"))), "PYTHONHASHSEED": "0",
                  "PYTHONPYCACHEPREFIX": f"{folder}/modules", "OPENBLAS_NUM_THREADS": "1", "LD_BIND_NOW": "1"}


def _program(name, *args):
    return [sys.executable, "-W", "error", str(HERE / name), *args]


def _run(command, env):
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise CannotCount(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr[-3000:]}")
    return done.stdout


def _operations(parts, files):
    samples = {}
    for i in range(0, len(parts), 2):
        once, twice = (_read(part, file) for part, file in zip(parts[i : i + 2], files[i : i + 2], strict=True))
        operations = parts[i + 1]["operations"] - parts[i]["operations"]
        if parts[i]["name"].startswith(IDLE):
            operations = twice.rounds - once.rounds
        samples.setdefault(parts[i]["name"], []).append(
            {"instructions": (twice.instructions - once.instructions) / operations,
             "calls": (twice.calls - once.calls) / operations})
    return {name: {unit: round(statistics.median(sample[unit] for sample in of), 1) for unit in of[0]}
            for name, of in samples.items()}


def _read(part, file):
    return callgrind.read(file.read_text(), DEVICE if part["name"].startswith("device") else DRIVER)
