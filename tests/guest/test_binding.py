"""maia bind, release and ls in a guest: edu, nvme and our device, on Debian's kernel and on the small one."""

INSIDE = "tests/guest/inside/test_binding.py"

# A conventional bridge hides from the IOMMU which of the functions behind it does a DMA: they share a group.
SHARED_GROUP = [
    "-device", "pci-bridge,id=shared,chassis_nr=9,shpc=off", "-device", "virtio-rng-pci,bus=shared,addr=1",
    "-device", "edu,bus=shared,addr=2", "-device", "edu,bus=shared,addr=3"]


def all_pass(run, at_least):
    """Every test that was chosen ran, and there were about as many as there should be."""
    assert run.failed == [], run.output
    assert run.skipped == [], run.output
    assert len(run.passed) >= at_least


def test_functions_change_hands_on_the_small_kernel(boot):
    guest = boot(kernel="own", edu=1, nvme=True, arguments=SHARED_GROUP)
    all_pass(guest.pytest(INSIDE, "-k", "not TestNoIommu", timeout=800), 34)


def test_functions_change_hands_on_debians_kernel(boot):
    guest = boot(kernel="stock", edu=1, nvme=True)
    # As long as no disk driver is loaded, and with VFIO groups only.
    chosen = "a_dry_run or opens_and_released or lines_of or program_drives or cut_off or given_it or does_not_exist"
    all_pass(guest.pytest(INSIDE, "-k", chosen, timeout=800), 12)


def test_without_an_iommu_only_the_flag_and_the_kernels_switch_together_bind(boot):
    guest = boot(kernel="own", iommu="none")
    all_pass(guest.pytest(INSIDE, "-k", "TestNoIommu", timeout=500), 2)
