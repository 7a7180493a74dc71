"""Chooses, of the tests that run in guests, those that are for this guest."""

from pathlib import Path

IOMMU = any(Path("/sys/kernel/iommu_groups").glob("*"))
OWN_KERNEL = Path("/dev/iommu").exists()


def _is_for_this_guest(item):
    if item.get_closest_marker("no_iommu"):
        return not IOMMU
    return IOMMU and (OWN_KERNEL or not item.get_closest_marker("own_kernel"))


def pytest_collection_modifyitems(config, items):
    """Leave out what another guest runs."""
    left_out = [item for item in items if not _is_for_this_guest(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
