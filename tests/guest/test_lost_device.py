"""A device whose server dies under the programs that drive it, through both of the kernel's interfaces."""

import contextlib
import tempfile
import time

from guest.lab import qemu
from guest.lab.guest import Guest

from tests.helpers.emulator import listening, spawn


def test_a_device_whose_server_dies_is_reported_lost_on_both_interfaces(lab):
    """Not by `boot`: QEMU has every reason to complain."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="maia-"))
        process = stack.enter_context(spawn("--socket", f"{folder}/s", "--devices", "2"))
        stack.callback(process.kill)
        guest = Guest(qemu.Machine(sockets=listening(process, 2))).boot()
        stack.callback(guest.kill)  # without its server's devices a guest is slow to end
        guest.run("cd /maia; for one in 'group 0' 'cdev 1'; do PYTHONPATH=$PYTHONPATH:tests python3 "
                  "tests/guest/inside/lose_device.py $one >/tmp/lost-${one% *} 2>&1 & done")
        await_lines(guest, "opened")
        process.kill()
        await_lines(guest, "closed")
        for interface in ("group", "cdev"):
            said = guest.run(f"cat /tmp/lost-{interface}").output
            assert "reads as all ones" in said, said
            assert "open it anew" in said, said


def await_lines(guest, word):
    """Wait until both scripts have printed it."""
    deadline = time.monotonic() + 200
    while guest.run("cat /tmp/lost-*", check=False).output.count(word) < 2:
        assert time.monotonic() < deadline, guest.run("cat /tmp/lost-*", check=False).output
        time.sleep(1)
