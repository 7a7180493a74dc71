"""Guests for tests: booted when the first test needs them, ended with the tests, QEMU's complaints read at the end."""

import os

import pytest
from guest.lab import debian, qemu
from guest.lab.guest import Guest

from tests.helpers.emulator import running

collect_ignore = ["inside"]
"""These run in a guest: see `Guest.pytest`."""


@pytest.fixture(scope="session")
def lab():
    """Skips where there can be no lab; but CI can have one, so there it fails."""
    reason = debian.missing()
    if reason is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


class Booting:
    """Guests with their emulators; all end together."""

    def __init__(self, folder, stack):
        self._folder = folder
        self._stack = stack

    def __call__(self, *, maia=1, nvme=False, environment=None, weights=False, emulator=(), files=None, **machine):
        """Boot a guest; `machine` as in ``qemu.Machine``. Its emulator's process is ``guest.emulator``."""
        process, sockets = self._stack.enter_context(running(*emulator, devices=maia)) if maia else (None, [])
        disk = qemu.nvme_image(self._folder / f"nvme-{id(machine)}") if nvme else None
        guest = Guest(qemu.Machine(sockets=sockets, nvme=disk, **machine), environment=environment, weights=weights,
                      files=files)
        guest.emulator = process
        guest.boot()
        self._stack.callback(self._end, guest)
        return guest

    @staticmethod
    def _end(guest):
        complaints = [line for line in guest.close().splitlines() if not guest_may_say(line)]
        assert not complaints, "QEMU complained:\n" + "\n".join(complaints)


def guest_may_say(line):
    """Lines of QEMU's that tell nothing of us."""
    return "warning: TCG doesn't support requested feature" in line
