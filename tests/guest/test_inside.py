"""What runs in guests, on both kernels at once: the runtime's tests over the kernel's VFIO, inside/, the demo.

Debian's kernel has VFIO's groups, the small one groups and character devices: there, the runtime takes the latter. One
guest has all the devices, since starting guests and pytest in them takes longer than most tests.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import capture_sessions
import pytest
from guest.lab import qemu
from guest.lab.guest import Guest

from tests.guest.conftest import COUNTED, GUEST_SECONDS, past_qemus_abort
from tests.helpers.emulator import environment, listening, spawn

KERNELS = {"stock": "vfio-group", "own": "vfio-cdev"}
FIRST_INDICES = {"stock": 0, "own": 2**32 - 3}
"""Of the runtime's queues: in one of the guests their sequence numbers roll over."""
INSIDE = sorted(path.stem for path in Path(__file__).with_name("inside").glob("test_*.py"))
SENTENCES = ("The cat sleeps on the warm windowsill.", "Doorbells ring.")
DEMO = [*SENTENCES, "--repeat", "1", "--json"]
SHOWN, REASON_CHARACTERS = 5, 1500
"""Of the guest's tests that did not pass: how many are explained, and how much of each."""


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
    """A guest and what is run in it, step by step, by a thread of its own; tests ask for the results."""

    def __init__(self, *steps):
        self._steps = steps
        self._results = {}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        for step in self._steps:
            try:
                self._results[step.__name__] = step()
            except Exception as error:  # whatever it is, the test that asks for this result raises it
                self._results[step.__name__] = error

    def result(self, name):
        """Wait for a step and return what came of it, or raise."""
        while name not in self._results and self._thread.is_alive():
            self._thread.join(0.2)
        result = self._results[name]
        if isinstance(result, Exception):
            raise result
        return result

    def end(self):
        """Wait for the thread."""
        self._thread.join()


class Steps:
    """What can be run in a guest, a method each."""

    def __init__(self, guest):
        self._guest = guest

    def boot(self):
        self._guest.boot()

    def _ours(self):
        return re.findall(r"^\S+", self._guest.run("lspci -D -d 1af4:10f0").output, re.MULTILINE)

    def runtime(self):
        first, second = self._ours()
        self._guest.run(f"maia bind {first} {second}")
        run = self._guest.pytest("tests/runtime", "-o", "timeout=900", timeout=GUEST_SECONDS, environment={
            "MAIA_TEST_DEVICE": first, "MAIA_TEST_OTHER_DEVICE": second,
            "MAIA_FIRST_INDEX": str(FIRST_INDICES[self._guest.machine.kernel]),
            "MAIA_TEST_TRANSPORT": KERNELS[self._guest.machine.kernel]})
        self._guest.run(f"maia release {first} {second}")
        return run

    def inside(self):
        # The register tool first: edu cannot be reset, and other tests leave numbers in its registers.
        files = sorted(INSIDE, key=lambda name: name != "test_reg")
        return self._guest.pytest(*(f"tests/guest/inside/{name}.py" for name in files), "-o", "timeout=900",
                                  timeout=GUEST_SECONDS)

    def demo(self):
        device = self._ours()[0]
        self._guest.run(f"maia bind {device}")
        words = " ".join(f"'{word}'" for word in DEMO)
        done = self._guest.run(f"maia demo --device {device} {words} 2>/tmp/errors || cat /tmp/errors",
                               timeout=GUEST_SECONDS)
        return json.loads(done.output)

    def sessions(self):
        return capture_sessions.capture(self._guest)


def lost_device():
    """Kill the server of two devices under programs that drive them; what these say, by interface."""
    return past_qemus_abort(lose_devices)


def lose_devices():
    # Most of it is the guest's kernel waiting for the devices to come back.
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="maia-"))
        process = stack.enter_context(spawn("--socket", f"{folder}/s", "--devices", "2"))
        stack.callback(process.kill)
        guest = Guest(qemu.Machine(sockets=listening(process, 2))).boot()
        stack.callback(guest.kill)  # without its server's devices a guest is slow to end
        guest.run("cd /maia; for one in 'group 0' 'cdev 1'; do PYTHONPATH=$PYTHONPATH:tests python3 "
                  "tests/guest/inside/lose_device.py $one >/tmp/lost-${one% *} 2>&1 & done")

        def await_both(word):
            deadline = time.monotonic() + GUEST_SECONDS
            while (said := guest.run("cat /tmp/lost-*", check=False).output).count(word) < 2:
                assert time.monotonic() < deadline, said
                time.sleep(1)

        await_both("opened")
        process.kill()
        await_both("closed")
        return {interface: guest.run(f"cat /tmp/lost-{interface}").output for interface in ("group", "cdev")}


@pytest.fixture(scope="module")
def courses(boot, tmp_path_factory):
    """All guests at work, name -> Course: much of it is waiting for resets, so they are more than the processors."""

    def steps(kernel, **more):
        disks = tmp_path_factory.mktemp("disks")
        return Steps(boot.prepare(kernel=kernel, maia=2, edu=1, nvme=True, arguments=devices(disks), **more))

    stock, own, inside = steps("stock"), steps("own", weights=True, memory=1536), steps("own")
    # The kernel's no-IOMMU mode, where a device names memory by its physical address: so edu drives 32 bits.
    no_iommu = Steps(boot.prepare(kernel="own", iommu="none", nvme=True, arguments=[
        "-device", "edu,dma_mask=0xffffffff", "-device", "nec-usb-xhci,msi=on,msix=off,intrs=16"]))
    started = {"stock": Course(stock.boot, stock.runtime, stock.inside),
               "own": Course(own.boot, own.sessions, own.runtime, own.demo),
               "own, inside": Course(inside.boot, inside.inside),
               "no IOMMU": Course(lost_device, no_iommu.boot, no_iommu.inside)}
    yield started
    for course in started.values():
        course.end()


def check(run, pattern=""):
    """Every test ran whose name fits, and all passed."""
    outcomes = {kind: [name for name in getattr(run, kind) if re.search(pattern, name)]
                for kind in ("passed", "failed", "skipped")}
    bad = outcomes["failed"] + outcomes["skipped"]
    if bad or not outcomes["passed"]:
        # Names first: all of it is long, and a log may be cut.
        whys = [f"--- {name}\n{run.reasons[name][-REASON_CHARACTERS:]}" for name in bad[:SHOWN]]
        pytest.fail("\n".join([f"{len(bad)} of the guest's tests did not pass:", *bad, *whys, run.output[-2000:]]),
                    pytrace=False)
    return outcomes["passed"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_runtimes_tests_pass_over_the_kernels_vfio(courses, kernel, record_property):
    run = courses[kernel].result("runtime")
    check(run)
    assert run.transports[KERNELS[kernel]] >= 70
    record_property(COUNTED, dict(run.transports))


@pytest.mark.parametrize(("file", "kernel"), [
    (file, kernel) for file in INSIDE for kernel in KERNELS
    if file != "test_kernel_noiommu" and (file, kernel) != ("test_reg", "stock")])
def test_inside(courses, file, kernel):
    course = courses["own, inside" if kernel == "own" else kernel]
    passed = check(course.result("inside"), rf"\b{file}\b")
    if file.startswith("test_kernel_vfio"):
        assert any("[group" in name for name in passed)
        assert any("[cdev" in name for name in passed) == (kernel == "own")


def test_the_demo_embeds_in_a_guest_as_on_the_host(courses):
    done = subprocess.run([sys.executable, "-m", "maia_tools.cli", "demo", "--device", "emulated", *DEMO],
                          env=environment(), capture_output=True, text=True, check=True)
    there, here = courses["own"].result("demo")["sentences"], json.loads(done.stdout)["sentences"]
    assert [s["text"] for s in there] == list(SENTENCES)
    assert there == here, "bit for bit"


def test_the_register_tool_prints_what_its_documentation_shows(courses):
    def shape(text):
        # A value, or a counter, may be another one on another machine.
        return [re.sub(r"\s+", " ", re.sub(r"0x[0-9a-f]+|\b\d+\b", "N", line)) for line in text.splitlines()]

    assert shape(courses["own"].result("sessions")) == shape(capture_sessions.PAGE.read_text())


def test_without_an_iommu_functions_are_bound_and_opened_by_explicit_wish_only(courses):
    passed = check(courses["no IOMMU"].result("inside"))
    assert {name.split("::")[0].rpartition("/")[2] for name in passed} == {"test_kernel_noiommu.py", "test_binding.py"}


@pytest.mark.parametrize("interface", ["group", "cdev"])
def test_a_device_whose_server_dies_is_reported_lost(courses, interface):
    said = courses["no IOMMU"].result("lost_device")[interface]
    assert "reads as all ones" in said, said
    assert "open it anew" in said, said
