"""What runs in guests, on both kernels at once: the runtime over the kernel's VFIO, tests/guest/inside, the demo.

Debian's kernel has VFIO's groups, the small one groups and character devices: there, the runtime takes the latter.
"""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.guest.conftest import COUNTED, GUEST_SECONDS
from tests.helpers.emulator import environment

KERNELS = {"stock": "vfio-group", "own": "vfio-cdev"}
INSIDE = sorted(path.name for path in Path(__file__).with_name("inside").glob("test_*.py"))
SENTENCES = ("The cat sleeps on the warm windowsill.", "Doorbells ring.")
DEMO = [*SENTENCES, "--repeat", "1", "--json"]


class Course:
    """A guest and all that is run in it, by a thread of its own; tests ask for the results."""

    def __init__(self, guest, transport):
        self._guest = guest
        self._transport = transport
        self._results = {}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        for name in ("runtime", "inside", "demo"):
            try:
                self._results[name] = getattr(self, f"_{name}")()
            except Exception as error:  # whatever it is, the test that asks for this result raises it
                self._results[name] = error

    def _runtime(self):
        self._guest.boot()
        ours = self._guest.run("lspci -D -d 1af4:10f0").output.split("\n")
        addresses = [line.split()[0] for line in ours if line]
        self._guest.run(f"maia bind {' '.join(addresses)}")
        return self._guest.pytest("tests/runtime", "-o", "timeout=300", timeout=GUEST_SECONDS, environment={
            "MAIA_TEST_DEVICE": addresses[0], "MAIA_TEST_OTHER_DEVICE": addresses[1],
            "MAIA_TEST_TRANSPORT": self._transport})

    def _inside(self):
        return self._guest.pytest("tests/guest/inside", "-o", "timeout=300", timeout=GUEST_SECONDS)

    def _demo(self):
        device = self._guest.run("lspci -D -d 1af4:10f0").output.split()[0]
        self._guest.run(f"maia bind {device}")
        words = " ".join(f"'{word}'" for word in DEMO)
        done = self._guest.run(f"maia demo --device {device} {words} 2>/tmp/errors || cat /tmp/errors",
                               timeout=GUEST_SECONDS)
        return json.loads(done.output)

    def result(self, name):
        """Wait for a part and return what came of it, or raise."""
        while name not in self._results and self._thread.is_alive():
            self._thread.join(0.2)
        result = self._results[name]
        if isinstance(result, Exception):
            raise result
        return result

    def end(self):
        """Wait for the thread."""
        self._thread.join()


@pytest.fixture(scope="module")
def courses(boot):
    """Both guests at work: kernel -> Course."""
    guests = {name: boot.prepare(kernel=name, maia=2, edu=2, nvme=True, weights=True, memory=1536) for name in KERNELS}
    started = {name: Course(guest, KERNELS[name]) for name, guest in guests.items()}
    yield started
    for course in started.values():
        course.end()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_runtimes_tests_pass_over_the_kernels_vfio(courses, kernel, request):
    run = courses[kernel].result("runtime")
    assert not run.failed, run.output
    assert not run.skipped, run.skipped
    assert run.transports[KERNELS[kernel]] >= 70
    request.config.stash[COUNTED] += run.transports


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("file", INSIDE)
def test_inside(courses, file, kernel):
    run = courses[kernel].result("inside")
    outcomes = {kind: [name for name in getattr(run, kind) if re.search(rf"\b{file[:-3]}\b", name)]
                for kind in ("passed", "failed", "skipped")}
    assert not outcomes["failed"], run.output
    assert not outcomes["skipped"]
    assert outcomes["passed"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_demo_embeds_in_a_guest_as_on_the_host(courses, kernel):
    done = subprocess.run([sys.executable, "-m", "maia_tools.cli", "demo", "--device", "emulated", *DEMO],
                          env=environment(), capture_output=True, text=True, check=True)
    there, here = courses[kernel].result("demo")["sentences"], json.loads(done.stdout)["sentences"]
    assert [s["text"] for s in there] == list(SENTENCES)
    assert there == here, "bit for bit"
