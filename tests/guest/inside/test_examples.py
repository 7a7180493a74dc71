"""In a guest: the examples for QEMU's edu and nvme, and what docs/any-pci-device.md promises to drivers of any device.

Each of the kernel's interfaces that the guest has is a parameter of its own.
"""

import contextlib
import faulthandler
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from maia_rt.errors import DeviceTimeout, InvalidArgument, TransportError
from maia_rt.memory import PinnedPool
from maia_rt.pci import bind, functions, read_function, release
from maia_rt.transport import Bar, ConfigSpace, Interrupts, PciIrq, open_device

ROOT = Path(__file__).resolve().parents[3]
INTERFACES = ["group", "cdev"] if Path("/dev/iommu").exists() else ["group"]
EDU = functions(vendor=0x1234, device=0x11E8)
NVME = functions(vendor=0x1B36, device=0x0010)
OURS = functions(vendor=0x1AF4, device=0x10F0)
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROCESS_SECONDS = 120

# What edu.py needs of the device, to see it without the example.
LIVENESS, INTERRUPT_STATUS, INTERRUPT_RAISE, INTERRUPT_ACKNOWLEDGE = 0x04, 0x24, 0x60, 0x64
CAP, VS = 0x00, 0x08


def nvme_block(number):
    """What the lab filled the disk with (tests/guest/lab/README.md)."""
    return (b"block %d\n" % number * 64)[:512]


@pytest.fixture
def example(monkeypatch, capsys):
    """A function that runs an example in this process; it returns what was printed, or said where it has to fail.

    A process of its own takes seconds in a guest, most of them for imports: one test has them.
    """

    def run(name, *arguments, code=0):
        path = str(ROOT / "examples" / name)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        capsys.readouterr()
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            assert code, end.code
            assert isinstance(end.code, str)  # Python prints it to the error output and ends with 1
            return end.code
        assert not code
        output = capsys.readouterr()
        assert not output.err
        return output.out

    return run


def lines(output):
    """Lines of the form ``name: value``, by name."""
    return dict(line.split(": ", 1) for line in output.splitlines() if ": " in line)


@contextlib.contextmanager
def bound(address):
    """Whoever has the function, it is on vfio-pci for a while."""
    changed = bind(address)[0].changed
    yield address
    if changed:
        release(address)


@pytest.fixture(scope="module")
def edu():
    with bound(EDU[0].address) as address:
        yield address


@pytest.fixture(scope="module")
def nvme():
    with bound(NVME[0].address) as address:
        yield address


@pytest.fixture(scope="module")
def ours():
    with bound(OURS[0].address) as address:
        yield address


@pytest.fixture(params=[(EDU, "edu.py"), (NVME, "nvme_identify.py")], ids=["edu", "nvme"])
def unbound(request):
    """A function that is not on vfio-pci, and the example that wants it: (address, name)."""
    address = request.param[0][0].address
    if read_function(address).driver == "vfio-pci":
        release(address)
    return address, request.param[1]


@pytest.fixture(params=INTERFACES)
def interface(request):
    return request.param


# --- errors, before anything is bound --------------------------------------------------------------------------------


def test_every_interface_of_the_kernel_is_used():
    assert ("cdev" in INTERFACES) != ("cloud" in os.uname().release), "Debian's cloud kernel has groups only"


def test_a_function_that_is_not_bound_is_refused_with_what_to_do(example, unbound, interface):
    address, name = unbound
    what, cause, hint = example(name, address, "--interface", interface, code=1).splitlines()
    assert what.startswith(f"{address}: ")
    assert "no driver holds" in what or "the kernel drives" in what
    assert "not known" not in cause
    assert "bind" in hint


@pytest.mark.parametrize("name", ["edu.py", "nvme_identify.py"])
def test_an_address_that_does_not_exist_is_refused(example, name):
    what, cause, hint = example(name, "0000:7f:1e.0", code=1).splitlines()
    assert "0000:7f:1e.0" in what
    assert cause.startswith("  likely cause: ")
    assert "not known" not in cause
    assert "lspci" in hint or "maia ls" in hint


@pytest.mark.parametrize("name", ["edu.py", "nvme_identify.py"])
def test_what_is_no_address_is_refused(example, name):
    what, *_ = example(name, "3b.00:0", code=1).splitlines()
    assert "'3b.00:0' is not a PCI address" in what


def test_an_example_as_a_process_prints_its_error_and_ends_with_1():
    done = subprocess.run([sys.executable, "-W", "error", ROOT / "examples/edu.py", str(NVME[0].address)],
                          capture_output=True, text=True, timeout=PROCESS_SECONDS)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"{NVME[0].address}: .*\n  likely cause: .*\n  try: .*\n", done.stderr)


# --- the examples ----------------------------------------------------------------------------------------------------


def kernel_log():
    return subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout


def test_edu_computes_copies_and_interrupts_and_its_stray_dma_is_blocked(example, edu, interface):
    faults_before = kernel_log().count("fault addr")
    output = example("edu.py", edu, "--interface", interface, "--prove-iommu")
    found = lines(output)
    assert output.startswith(f"{edu} by vfio-{interface}\n")
    assert found["identification"] == "0x010000ed, revision 1.0"
    assert found["liveness"] == "ok"
    assert found["factorial, polled"] == "10! = 3628800"
    assert found["factorial, by interrupt"] == "12! = 479001600"
    assert found["DMA of 4096 bytes to the device and back"] == "equal"
    assert found["interrupts"] == "3 by MSI"
    assert found["DMA write to mapped memory"] == "arrived"
    assert found["DMA write after the unmap"] == "blocked"
    assert found["DMA read after the unmap"] == "blocked"
    # The IOMMU's own word, where its driver logs it (Intel's does; of faults that follow each other it drops some).
    log = kernel_log()
    if "DMAR" in log:
        assert log.count("fault addr") > faults_before
        assert re.search(rf"DMA (Write|Read).*Request device \[{str(edu)[5:]}\]", log)


def test_edu_works_by_its_interrupt_pin_too(example, edu, interface):
    found = lines(example("edu.py", edu, "--interface", interface, "--intx"))
    assert found["interrupts"] == "3 by INTX"
    assert found["factorial, by interrupt"] == "12! = 479001600"


@pytest.mark.parametrize("block", [7, 4095])
def test_nvme_identifies_itself_and_its_blocks_are_the_disks(example, nvme, interface, block):
    found = lines(example("nvme_identify.py", nvme, "--interface", interface, "--read", block))
    truth = nvme_block(block)
    assert found["controller"].endswith(f"at {nvme} by vfio-{interface}")
    assert found["model"] == "QEMU NVMe Ctrl"
    assert found["serial"] == "MAIA-GUEST-LAB"
    assert re.fullmatch(r"\d+\.\d+.*", found["firmware"])
    assert found["namespace 1"].startswith("4096 blocks of 512 bytes, 2 MiB; LBA format ")
    assert found[f"block {block}"] == f"CRC-32 {zlib.crc32(truth):#010x}, begins {truth[:16].hex(' ')}"


def test_the_queues_of_nvme_go_round_and_every_block_is_the_disks(nvme, interface):
    names = runpy.run_path(str(ROOT / "examples/nvme_identify.py"))
    with (open_device(nvme, interface=interface) as device, Bar(device, 0) as registers,
          Interrupts(device, 2) as interrupts, PinnedPool(device) as memory,
          contextlib.closing(names["Controller"](registers, memory, interrupts)) as controller):
        ConfigSpace(device).enable()
        controller.enable()
        queue = controller.create_io_queue(1, vector=1)
        for block in range(0, 4096, 100):
            assert names["read_block"](controller, queue, 1, block, 512) == nvme_block(block)
        for _ in range(3 * controller.entries):
            assert controller.identify(names["IDENTIFY_CONTROLLER"])[4:18] == b"MAIA-GUEST-LAB"
        controller.delete_io_queue(queue)


def test_every_vector_of_nvme_fires(example, nvme, interface):
    assert lines(example("nvme_identify.py", nvme, "--interface", interface, "--vectors"))["MSI-X"] == \
        "65 of 65 vectors fired"


def test_a_status_of_nvme_is_named_and_the_controller_can_be_used_again(example, nvme, interface):
    error = example("nvme_identify.py", nvme, "--interface", interface, "--read", 4096, code=1)
    assert "command 0x02 failed with status 0/0x80, LBA Out of Range" in error.splitlines()[0]
    assert "block 0" in lines(example("nvme_identify.py", nvme, "--interface", interface, "--read", 0))


def test_each_example_refuses_the_others_device(example, edu, nvme):
    what, cause, hint = example("edu.py", nvme, code=1).splitlines()
    assert what == f"{nvme}: this is 1b36:0010, not QEMU's edu"
    assert "another device" in cause
    assert hint.endswith("lspci -D -d 1234:11e8")
    what, cause, hint = example("nvme_identify.py", edu, code=1).splitlines()
    assert what == f"{edu}: the class is 00ff00, not 010802 (NVMe)"
    assert "another device" in cause
    assert "lspci" in hint


def test_a_second_user_is_told_that_the_device_is_in_use(example, edu, interface):
    with open_device(edu, interface=interface):
        what, cause, hint = example("edu.py", edu, "--interface", interface, code=1).splitlines()
    assert str(edu) in what
    assert "not known" not in cause
    assert "nothing" not in hint


# --- what docs/any-pci-device.md promises ----------------------------------------------------------------------------


def test_the_pages_program_runs_on_our_device(ours, interface, capsys):
    story = "\n".join(FENCE.findall((ROOT / "docs/any-pci-device.md").read_text()))
    story = story.replace('"0000:3b:00.0"', f'"{ours}", interface="{interface}"')
    exec(compile(story, "any-pci-device.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.startswith(f"{ours} vfio-{interface} can reset\n")
    assert "1af4:10f0, class 120000" in said
    assert "MSIX vector 1 fired 1 time(s)" in said


def test_mapped_and_trapped_registers_are_the_same_registers(edu, interface):
    with open_device(edu, interface=interface) as device:
        ConfigSpace(device).enable(bus_master=False)
        with Bar(device, 0) as mapped, Bar(device, 0, mapped=False) as trapped:
            assert "0x100000 mapped" in repr(mapped)
            assert "0x0 mapped" in repr(trapped)
            mapped.write32(LIVENESS, 0x12345678)
            assert trapped.read32(LIVENESS) == mapped.read32(LIVENESS) == 0xEDCBA987
            trapped.write32(LIVENESS, 1)
            assert mapped.read32(LIVENESS) == 0xFFFFFFFE
            # edu takes no accesses of 2 bytes, and QEMU then answers 0: an access has the width asked for.
            assert mapped.read16(LIVENESS) == trapped.read16(LIVENESS) == 0
            with pytest.raises(InvalidArgument, match="not aligned"):
                mapped.read32(LIVENESS + 2)


def test_wide_registers_are_read_at_once(nvme):
    with open_device(nvme) as device:
        ConfigSpace(device).enable(bus_master=False)
        with Bar(device, 0) as mapped, Bar(device, 0, mapped=False) as trapped:
            halves = mapped.read32(CAP) | mapped.read32(CAP + 4) << 32
            assert mapped.read64(CAP) == trapped.read64(CAP) == halves
            assert mapped.read32(VS) >= 0x10000


@pytest.mark.parametrize("kind", [PciIrq.MSI, PciIrq.INTX])
def test_interrupts_are_counted_and_end_with_their_owner(edu, interface, kind):
    with open_device(edu, interface=interface) as device:
        ConfigSpace(device).enable()
        with Bar(device, 0) as registers:
            with Interrupts(device, kind=kind) as interrupts:
                for reason in (1, 2, 4):
                    registers.write32(INTERRUPT_RAISE, reason)
                    assert interrupts.wait(timeout=5) == 1
                    assert registers.read32(INTERRUPT_STATUS) == reason
                    registers.write32(INTERRUPT_ACKNOWLEDGE, reason)
                    interrupts.rearm()
                with pytest.raises(DeviceTimeout):
                    interrupts.wait(timeout=0.05)
            with Interrupts(device, kind=kind) as again:
                registers.write32(INTERRUPT_RAISE, 1)
                assert again.wait(timeout=5) == 1
                registers.write32(INTERRUPT_ACKNOWLEDGE, 1)


def test_the_pin_stays_quiet_until_it_is_rearmed(edu, interface):
    with open_device(edu, interface=interface) as device:
        ConfigSpace(device).enable()
        with Bar(device, 0) as registers, Interrupts(device, kind=PciIrq.INTX) as interrupts:
            registers.write32(INTERRUPT_RAISE, 1)
            assert interrupts.wait(timeout=5) == 1
            registers.write32(INTERRUPT_RAISE, 2)
            with pytest.raises(DeviceTimeout):
                interrupts.wait(timeout=0.2)
            interrupts.rearm()  # the device still asks, so it fires at once
            assert interrupts.wait(timeout=5) == 1
            registers.write32(INTERRUPT_ACKNOWLEDGE, 3)
            interrupts.rearm()


def test_vectors_grow_while_the_first_are_in_use(nvme, interface):
    with open_device(nvme, interface=interface) as device:
        ConfigSpace(device).enable()
        with Interrupts(device, 2) as interrupts:
            assert interrupts.kind is PciIrq.MSIX
            interrupts.trigger(1)
            assert interrupts.add(3) == 2
            interrupts.trigger(4)
            assert interrupts.wait(1, timeout=5) == 1
            assert interrupts.wait(4, timeout=5) == 1
            assert interrupts.take(0) == interrupts.take(2) == 0


def test_closing_turns_bus_mastering_off(edu, interface):
    with open_device(edu, interface=interface) as device:
        ConfigSpace(device).enable()
        assert ConfigSpace(device).read(4, 2) & 4
    with open_device(edu, interface=interface) as device:
        assert not ConfigSpace(device).read(4, 2) & 4


def test_a_narrow_dma_engine_gets_addresses_it_can_drive(edu, interface):
    with (open_device(edu, interface=interface) as device, PinnedPool(device, address_bits=28) as memory,
          memory.allocate(1 << 20, 4096) as block):
        assert block.iova + block.size <= 1 << 28
        assert block.iova % 4096 == 0


def read_while_memory_space_is_off(address, *, mapped):
    with open_device(address) as device, Bar(device, 0, mapped=mapped) as registers:
        space = ConfigSpace(device)
        try:
            space.enable(memory=False, bus_master=False)
            return registers.read32(LIVENESS)
        finally:
            space.enable(bus_master=False)


def test_a_trapped_register_of_a_function_that_is_switched_off_is_an_error(edu):
    with pytest.raises(TransportError, match="memory space is off"):
        read_while_memory_space_is_off(edu, mapped=False)


def test_a_mapped_register_of_a_function_that_is_switched_off_kills_the_process(edu):
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        with contextlib.suppress(Exception):
            read_while_memory_space_is_off(edu, mapped=True)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS


def test_the_kernels_driver_takes_nvme_back_and_finds_the_disk(example, nvme):
    example("nvme_identify.py", nvme, "--read", 1)
    release(nvme)
    try:
        deadline = time.monotonic() + 20
        disk = None
        while disk is None and time.monotonic() < deadline:
            disk = next(Path("/dev").glob("nvme[0-9]*n1"), None)
            time.sleep(0.1)
        fd = os.open(disk, os.O_RDONLY)
        try:
            assert os.pread(fd, 512, 7 * 512) == nvme_block(7)
        finally:
            os.close(fd)
    finally:
        bind(nvme)
