"""What every test gets: after it, descriptors, threads, child processes and shared maps are back where they were."""

import gc
import os
import time
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol
from helpers.emulator import emulator, start_emulator  # noqa: F401 (fixtures for every test)

SETTLE_SECONDS = 3.0
"""How long a test's leftovers may take to end by themselves: a process being reaped, a thread being joined."""
ROUNDS = 4
"""How often a test may measure what is promised to be quick (helpers/stopwatch.py): one round must keep the promise."""

# Before numpy is imported. OpenBLAS ends its threads at a fork and starts them again at the next large product: without
# any, threads can be counted, and the processors are left to what is tested.
os.environ["OPENBLAS_NUM_THREADS"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Note whether a test failed only because something was slower than promised."""
    report = yield
    report.too_slow = call.excinfo is not None and hasattr(call.excinfo.value, "allowed_seconds")
    return report


def pytest_runtest_protocol(item, nextitem):
    """Run a test, once more where it was too slow: others use the processors too, but hardly in every round."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for left in reversed(range(ROUNDS)):
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        if not left or not any(report.too_slow for report in reports):
            break
        item._initrequest()
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


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
