"""What every test gets: after it, descriptors, threads, child processes and shared maps are back where they were."""

import gc
import os
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.emulator import emulator, start_emulator  # noqa: F401 (fixtures for every test)

SETTLE_SECONDS = 3.0
"""How long a test's leftovers may take to end by themselves: a process being reaped, a thread being joined."""

_SQUARE = np.ones((256, 256), np.float32)


def _descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[f"fd {name}"] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the directory's own descriptor
            continue
    return found


def _threads() -> dict[str, str]:
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            found[f"thread {task.name}"] = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return found


def _children() -> dict[str, str]:
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            pids = (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for pid in pids:
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                command = ""
            found[f"process {pid}"] = command.strip() or "(zombie)"
    return found


def _shared_maps() -> dict[str, str]:
    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(("/memfd:", "/dev/vfio", "/dev/shm")):
            found[f"map {fields[0]}"] = fields[5]
    return found


def held() -> dict[str, str]:
    """Everything this process holds that a test could leave behind: name -> what it is."""
    return _descriptors() | _threads() | _children() | _shared_maps()


def _leaks(before: dict[str, str]) -> dict[str, str]:
    after = held()
    return {name: what for name, what in after.items() if before.get(name) != what}


@pytest.fixture(scope="session", autouse=True)
def modules_are_not_garbage():
    """Spare the collector what there is before the first test, most of what it would look at after each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    """Fails a test that passed but left something behind. Mark a test ``leaks`` with the reason where it must."""
    gc.collect()
    # OpenBLAS ends its threads at a fork and starts them again at the next large product: count them in the baseline.
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        _SQUARE @ _SQUARE
    before = held()
    yield
    if request.node.get_closest_marker("leaks"):
        return
    gc.collect()
    deadline = time.monotonic() + SETTLE_SECONDS
    left = _leaks(before)
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        gc.collect()
        left = _leaks(before)
    if left:
        lines = "\n".join(f"  {name}: {what}" for name, what in sorted(left.items()))
        pytest.fail(f"left behind:\n{lines}", pytrace=False)
