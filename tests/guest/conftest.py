"""Guests for tests: booted when a test needs them, QEMU's complaints read when they end.

These tests keep guests and emulators across several tests on purpose, so the check for what a test leaves behind counts
at the end of a module, when all have ended.
"""

import contextlib
import itertools
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from guest.lab import kernel, qemu, root
from guest.lab.debian import LabError
from guest.lab.guest import Guest
from helpers import guest_lab

from tests.conftest import held
from tests.helpers.emulator import eventually, running

collect_ignore = ["inside"]
"""These run in a guest: see test_inside.py."""

BUILD_SECONDS = 3600
GUEST_SECONDS = 2700
"""For a whole course of tests in one of several guests, beside other tests."""
COUNTED = "transports in guests"
"""A test's property: how many tests of the runtime passed in guests, by transport."""


SERVER_GONE_ABORTS = "error_setv: Assertion `*errp == NULL' failed"
"""QEMU 11.1.3 ends so now and then when the server of a vfio-user device ends: it reports one error twice."""


def past_qemus_abort(run):
    """Call `run`, in which a server ends under a guest, again while QEMU aborts of it; the third abort is raised."""
    for left in (2, 1, 0):
        try:
            return run()
        except LabError as error:
            if SERVER_GONE_ABORTS not in str(error) or not left:
                raise
    return None


def pytest_collection_modifyitems(items):
    """What takes longest comes first, all else runs beside it. The first guest waits for the lab to be built."""
    items.sort(key=lambda item: item.path.name != "test_inside.py")
    for item in items:
        if item.path.is_relative_to(os.path.dirname(__file__)) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(BUILD_SECONDS))


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """See :func:`nothing_is_left_running`."""


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_running():
    """Guests, emulators and what else a module had open are gone at its end."""
    before = held()
    yield
    eventually(lambda: not set(held().items()) - set(before.items()))
    left = dict(set(held().items()) - set(before.items()))
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="session")
def lab(request):
    """Build what guests need."""
    guest_lab.require()
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(flush=True, file=sys.stderr)
        qemu.installed()
        for make in kernel.KERNELS.values():
            root.parts(make(), weights=True)
    # pytest writes what it compiles beside the tests, and guests bring that along: compiling there is slow. Tests of
    # tests/guest/inside that cannot be imported outside a guest are compiled all the same.
    here = os.path.dirname(__file__)
    subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", f"{here}/inside", f"{here}/../runtime"],
                   capture_output=True, cwd=root.PROJECT, check=False)


class Booting:
    """Boots guests with their emulators; all end together."""

    def __init__(self, folder, stack):
        self._folder = folder
        self._stack = stack
        self._numbers = itertools.count()

    def __call__(self, *, maia=1, nvme=False, environment=None, weights=False, emulator=(), files=None, **machine):
        """Boot a guest; `machine` as in ``qemu.Machine``. Its emulator's process is ``guest.emulator``."""
        guest = self.prepare(maia=maia, nvme=nvme, environment=environment, weights=weights, emulator=emulator,
                             files=files, **machine)
        guest.boot()
        return guest

    def prepare(self, *, maia=1, nvme=False, environment=None, weights=False, emulator=(), files=None, **machine):
        """Make a guest that is yet to be booted."""
        process, sockets = self._stack.enter_context(running(*emulator, devices=maia)) if maia else (None, [])
        disk = qemu.nvme_image(self._folder / f"nvme{next(self._numbers)}") if nvme else None
        guest = Guest(qemu.Machine(sockets=sockets, nvme=disk, **machine), environment=environment, weights=weights,
                      files=files)
        guest.emulator = process
        self._stack.callback(self._end, guest)
        return guest

    @staticmethod
    def _end(guest):
        complaints = [line for line in guest.close().splitlines() if not may_be_said(line)]
        # It can be very many, which no log needs.
        assert not complaints[:20], f"QEMU complained, in {len(complaints)} lines:\n" + "\n".join(complaints[:20])


# The guest's IOMMU blocks what edu's driver provokes.
_BLOCKED = re.compile("vtd_iova_to_sspte|vtd_iommu_translate|New fault is not recorded")


def may_be_said(line):
    """Whether a line of QEMU's tells nothing of us."""
    return _BLOCKED.search(line)


@pytest.fixture(scope="module")
def boot(lab, tmp_path_factory):
    """Boots guests for the tests of a module: see :class:`Booting`."""
    with contextlib.ExitStack() as stack:
        yield Booting(tmp_path_factory.mktemp("guest"), stack)


def pytest_terminal_summary(terminalreporter):
    """Say on which transports the runtime's tests ran."""
    counted = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "transport" and "tests/runtime/" in report.nodeid:
                counted[value] += 1
            elif name == COUNTED:
                counted.update(value)
    if counted:
        terminalreporter.section("runtime tests by transport")
        for name, count in sorted(counted.items()):
            terminalreporter.line(f"{name:24} {count:4} passed")
