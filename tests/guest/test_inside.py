"""What runs in guests, on both kernels at once: the runtime's tests over the kernel's VFIO, inside/, the demo.

Debian's kernel has VFIO's groups, the small one groups and character devices: there, the runtime takes the latter. One
guest has all the devices, since starting guests and pytest in them takes longer than most tests.
"""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import capture_sessions
import pytest

from tests.guest.conftest import COUNTED, GUEST_SECONDS
from tests.helpers.emulator import environment

KERNELS = {"stock": "vfio-group", "own": "vfio-cdev"}
COURSES = {"stock": ("stock", ("runtime", "inside", "demo")),
           # The sessions first: edu cannot be reset, and other tests leave numbers in its registers.
           "own": ("own", ("sessions", "runtime", "demo")),
           "own, inside": ("own", ("inside",))}
"""Guests, the kernel of each, and what it does one after the other. Much of it is waiting for resets."""
INSIDE = sorted(path.stem for path in Path(__file__).with_name("inside").glob("test_*.py"))
SENTENCES = ("The cat sleeps on the warm windowsill.", "Doorbells ring.")
DEMO = [*SENTENCES, "--repeat", "1", "--json"]


def devices(folder):
    """QEMU's words for the devices that the tests in the guest want, beside edu, nvme and ours."""
    words = ["-device", "edu,id=second-edu",
             "-device", "nec-usb-xhci,msi=on,msix=off,intrs=16,id=xhci",
             # Ports of 5 GT/s: QEMU's faster links do not come up after a reset.
             "-device", "pcie-root-port,id=alone,chassis=90,bus=pcie.0,x-speed=5",
             "-object", "memory-backend-memfd,id=peer,size=1M,share=on",
             "-device", "ivshmem-plain,memdev=peer,bus=alone",
             "-device", "pcie-root-port,id=shared,chassis=91,bus=pcie.0,x-speed=5"]
    for function in range(2):
        disk = folder / f"shared-{function}"
        disk.write_bytes(bytes(1 << 20))
        words += ["-drive", f"if=none,id=shared{function},file={disk},format=raw", "-device",
                  f"nvme,serial=SHARED{function},drive=shared{function},bus=shared,addr=0.{function},multifunction=on"]
    # A conventional bridge hides from the IOMMU which of the functions behind it does a DMA: they share a group.
    return [*words, "-device", "pci-bridge,id=group,chassis_nr=92,shpc=off",
            "-device", "virtio-rng-pci,bus=group,addr=1", "-device", "edu,bus=group,addr=2",
            "-device", "edu,bus=group,addr=3"]


class Course:
    """A guest and all that is run in it, by a thread of its own; tests ask for the results."""

    def __init__(self, guest, steps):
        self._guest = guest
        self._steps = steps
        self._results = {}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        for name in ("boot", *self._steps):
            try:
                self._results[name] = getattr(self, f"_{name}")()
            except Exception as error:  # whatever it is, the test that asks for this result raises it
                self._results[name] = error

    def _ours(self):
        return re.findall(r"^\S+", self._guest.run("lspci -D -d 1af4:10f0").output, re.MULTILINE)

    def _boot(self):
        self._guest.boot()

    def _runtime(self):
        first, second = self._ours()
        self._guest.run(f"maia bind {first} {second}")
        run = self._guest.pytest("tests/runtime", "-o", "timeout=300", timeout=GUEST_SECONDS, environment={
            "MAIA_TEST_DEVICE": first, "MAIA_TEST_OTHER_DEVICE": second,
            "MAIA_TEST_TRANSPORT": KERNELS[self._guest.machine.kernel]})
        self._guest.run(f"maia release {first} {second}")
        return run

    def _inside(self):
        return self._guest.pytest("tests/guest/inside", "-o", "timeout=300", timeout=GUEST_SECONDS)

    def _demo(self):
        device = self._ours()[0]
        self._guest.run(f"maia bind {device}")
        words = " ".join(f"'{word}'" for word in DEMO)
        done = self._guest.run(f"maia demo --device {device} {words} 2>/tmp/errors || cat /tmp/errors",
                               timeout=GUEST_SECONDS)
        self._guest.run(f"maia release {device}")
        return json.loads(done.output)

    def _sessions(self):
        return capture_sessions.capture(self._guest)

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
def courses(boot, tmp_path_factory):
    """All guests at work: name -> Course."""
    guests = [boot.prepare(kernel=kernel, maia=2, edu=1, nvme=True, weights="demo" in steps, memory=1536,
                           arguments=devices(tmp_path_factory.mktemp("disks"))) for kernel, steps in COURSES.values()]
    started = {name: Course(guest, steps) for guest, (name, (_, steps)) in zip(guests, COURSES.items(), strict=True)}
    yield started
    for course in started.values():
        course.end()


def check(run, pattern=""):
    """Every test ran whose name fits, and all passed."""
    outcomes = {kind: [name for name in getattr(run, kind) if re.search(pattern, name)]
                for kind in ("passed", "failed", "skipped")}
    assert not outcomes["failed"], run.output
    assert not outcomes["skipped"], run.output
    assert outcomes["passed"], run.output
    return outcomes["passed"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_runtimes_tests_pass_over_the_kernels_vfio(courses, kernel, request):
    run = courses[kernel].result("runtime")
    check(run)
    assert run.transports[KERNELS[kernel]] >= 70
    request.config.stash[COUNTED] += run.transports


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("file", [name for name in INSIDE if name != "test_kernel_noiommu"])
def test_inside(courses, file, kernel):
    course = courses["own, inside" if kernel == "own" else kernel]
    passed = check(course.result("inside"), rf"\b{file}\b")
    if file.startswith("test_kernel_vfio"):
        assert any("[group" in name for name in passed)
        assert any("[cdev" in name for name in passed) == (kernel == "own")


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_demo_embeds_in_a_guest_as_on_the_host(courses, kernel):
    done = subprocess.run([sys.executable, "-m", "maia_tools.cli", "demo", "--device", "emulated", *DEMO],
                          env=environment(), capture_output=True, text=True, check=True)
    there, here = courses[kernel].result("demo")["sentences"], json.loads(done.stdout)["sentences"]
    assert [s["text"] for s in there] == list(SENTENCES)
    assert there == here, "bit for bit"


def test_the_register_tool_prints_what_its_documentation_shows(courses):
    def shape(text):
        # A value, or a counter, may be another one on another machine.
        return [re.sub(r"\s+", " ", re.sub(r"0x[0-9a-f]+|\b\d+\b", "N", line)) for line in text.splitlines()]

    assert shape(courses["own"].result("sessions")) == shape(capture_sessions.PAGE.read_text())


def test_without_an_iommu_functions_are_bound_and_opened_by_explicit_wish_only(boot):
    """The kernel's no-IOMMU mode, where a device names memory by its physical address: so edu drives 32 bits."""
    guest = boot(kernel="own", iommu="none", nvme=True, arguments=[
        "-device", "edu,dma_mask=0xffffffff", "-device", "nec-usb-xhci,msi=on,msix=off,intrs=16"])
    passed = check(guest.pytest("tests/guest/inside/test_kernel_noiommu.py", "tests/guest/inside/test_binding.py",
                                timeout=GUEST_SECONDS))
    assert {name.split("::")[0].rpartition("/")[2] for name in passed} == {"test_kernel_noiommu.py", "test_binding.py"}
