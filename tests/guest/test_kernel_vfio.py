"""The kernel's VFIO drives devices that nobody here wrote, and ours, in guests: by group on both kernels, by cdev too
on the one that has it."""

import contextlib
import tempfile
import time

import pytest
from guest.lab import qemu
from guest.lab.guest import Guest

from tests.helpers.emulator import listening, spawn

SLOW = 900
"""Seconds that a whole run may take on a busy machine."""


def machine(folder):
    """QEMU's words for the devices of these tests; edu, one nvme and ours come with the guest."""
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
    return words


def passed(run, at_least):
    assert not run.failed, run.output
    assert len(run.passed) >= at_least, run.output


PARTS = ("open", "dma", "regions", "interrupts")


@pytest.mark.timeout(SLOW)
@pytest.mark.parametrize(("kernel", "tests"), [("own", 100), ("stock", 55)])
def test_the_kernels_vfio_drives_devices(boot, tmp_path, kernel, tests):
    """Over the interfaces that the kernel has: group on both, cdev on its own one. Starting pytest takes longest."""
    guest = boot(kernel=kernel, edu=1, nvme=True, arguments=machine(tmp_path))
    run = guest.pytest(*(f"tests/guest/inside/test_kernel_vfio_{part}.py" for part in PARTS), timeout=SLOW)
    passed(run, tests)
    assert not run.skipped, run.output
    assert any("[group" in name for name in run.passed)
    assert any("[cdev" in name for name in run.passed) == (kernel == "own")


@pytest.mark.timeout(SLOW)
def test_without_an_iommu_functions_open_by_explicit_wish_only(boot):
    """The kernel's no-IOMMU mode, where a device names memory by its physical address: so edu drives 32 bits."""
    guest = boot(kernel="own", iommu="none", maia=0, nvme=True, arguments=[
        "-device", "edu,dma_mask=0xffffffff", "-device", "nec-usb-xhci,msi=on,msix=off,intrs=16"])
    passed(guest.pytest("tests/guest/inside/test_kernel_noiommu.py", timeout=SLOW), 6)


@pytest.mark.timeout(SLOW)
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
