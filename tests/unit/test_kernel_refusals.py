"""What the kernel's VFIO refuses is said in three parts; its pure parts, the others are shown in a guest."""

import errno
import os
import resource

import pytest

from maia_rt.errors import DeviceLost, InvalidArgument, MemlockLimit, ResourceExhausted, TransportError, Unsupported
from maia_rt.transport import uapi
from maia_rt.transport.dma_table import DmaTable
from maia_rt.transport.kernel_interrupts import KernelInterrupts
from maia_rt.transport.kernel_iommu import mapping_refusal
from maia_rt.transport.protocol import Access, IrqInfo, RegionInfo, check_access
from maia_rt.transport.uapi import PciIrq

WHAT = "0000:3b:00.0: mapping 0x1000 bytes at iova 0x100000"


def refused(error):
    return mapping_refusal(error, WHAT, limit="dma_entry_limit of vfio_iommu_type1, 65535", account="this process")


def test_the_kernels_reasons_not_to_map_have_types_and_hints():
    overlap = refused(TransportError("x", errno=errno.EEXIST))
    assert isinstance(overlap, InvalidArgument)
    assert "mapped already" in str(overlap)
    full = refused(TransportError("x", errno=errno.ENOSPC))
    assert isinstance(full, MemlockLimit)
    assert "dma_entry_limit of vfio_iommu_type1, 65535" in full.cause
    other = TransportError("x", errno=errno.EINVAL)
    assert refused(other) is other


def test_a_memlock_limit_is_named_with_its_figure():
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, before[1]))
            error = refused(MemlockLimit("x"))
            code = 0 if "RLIMIT_MEMLOCK is 65536 bytes" in error.cause and "ulimit -l" in error.hint else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class Memory:
    fd, offset, size, address = -1, 0, 4096, 4096

    def view(self):
        return memoryview(bytearray(self.size))


def test_the_limit_on_mappings_says_who_sets_it():
    table = DmaTable("0000:3b:00.0", 1, 4096, limit="dma_entry_limit")
    table.add(0, Memory(), Access.READ)
    with pytest.raises(MemlockLimit, match="all 1 DMA mappings") as caught:
        table.check(8192, Memory())
    assert "dma_entry_limit" in caught.value.cause


@pytest.mark.parametrize(("offset", "size"), [(1, 2), (2, 4), (4, 8), (7, 4)])
def test_registers_are_accessed_aligned_and_blocks_are_not(offset, size):
    regions = (RegionInfo(0, 64, uapi.REGION_FLAG_READ),)
    with pytest.raises(InvalidArgument, match="not aligned"):
        check_access("x", regions, 0, offset=offset, size=size, flag=uapi.REGION_FLAG_READ, sizes=(1, 2, 4, 8))
    check_access("x", regions, 0, offset=offset, size=size, flag=uapi.REGION_FLAG_READ)


# --- interrupts: what other kernels than those of the guests answer --------------------------------------------------


@pytest.fixture
def eventfd():
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


IRQS = (IrqInfo(0, 1, uapi.IRQ_FLAG_EVENTFD | uapi.IRQ_FLAG_MASKABLE), IrqInfo(1, 0, 0),
        IrqInfo(2, 8, uapi.IRQ_FLAG_EVENTFD | uapi.IRQ_FLAG_NORESIZE))


def interrupts(*answers):
    """Interrupts under a kernel that answers so, one request after the other, then always 0; and the requests."""
    left, seen = list(answers), []

    def call(_request, argument, _what):
        flags, index, start, count = (int.from_bytes(argument[at:at + 4], "little") for at in (4, 8, 12, 16))
        seen.append((flags, index, start, count))
        answer = left.pop(0) if left else 0
        if isinstance(answer, Exception):
            raise answer
        return answer

    return KernelInterrupts("0000:3b:00.0", IRQS, call), seen


SET = uapi.IRQ_SET_DATA_EVENTFD | uapi.IRQ_SET_ACTION_TRIGGER
NONE = uapi.IRQ_SET_DATA_NONE | uapi.IRQ_SET_ACTION_TRIGGER


def test_msix_of_an_old_kernel_is_enabled_anew_and_everybody_told_to_look(eventfd):
    vectors, seen = interrupts()
    vectors.enable(PciIrq.MSIX, 0, [eventfd, eventfd])
    vectors.enable(PciIrq.MSIX, 2, [eventfd])
    assert seen == [(SET, 2, 0, 2), (NONE, 2, 0, 0), (SET, 2, 0, 3), (NONE, 2, 0, 2)]
    vectors.enable(PciIrq.MSIX, 1, [eventfd])
    assert seen[4:] == [(SET, 2, 1, 1)], "within the set nothing is enabled anew"
    vectors.close()


def test_a_set_that_cannot_be_enabled_anew_is_put_back(eventfd):
    vectors, seen = interrupts(0, 0, 3, 0, 0)
    vectors.enable(PciIrq.MSIX, 0, [eventfd])
    with pytest.raises(ResourceExhausted, match="the host can give it 3"):
        vectors.enable(PciIrq.MSIX, 1, [eventfd] * 7)
    assert seen[3:] == [(SET, 2, 0, 1), (NONE, 2, 0, 1)]
    assert vectors.enabled == [PciIrq.MSIX]
    vectors.disable(PciIrq.MSIX)
    vectors.disable(PciIrq.MSIX)
    assert seen[5:] == [(NONE, 2, 0, 0)]
    vectors.close()


def test_descriptors_are_kept_as_long_as_their_vectors(eventfd):
    before = sorted(os.listdir("/proc/self/fd"))
    vectors, _ = interrupts(0, 0, TransportError("x", errno=errno.EINVAL))
    vectors.enable(PciIrq.MSIX, 0, [eventfd] * 3)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 3
    vectors.enable(PciIrq.MSIX, 0, [-1, eventfd])
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2
    with pytest.raises(TransportError):
        vectors.enable(PciIrq.MSIX, 0, [eventfd])
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2
    vectors.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_line_that_leads_nowhere_or_is_shared_is_no_lost_device(eventfd):
    vectors, _ = interrupts(DeviceLost("x"))
    with pytest.raises(Unsupported, match="no interrupt line"):
        vectors.enable(PciIrq.INTX, 0, [eventfd])
    vectors, _ = interrupts(DeviceLost("gone"))
    with pytest.raises(DeviceLost):
        vectors.enable(PciIrq.MSIX, 0, [eventfd])
