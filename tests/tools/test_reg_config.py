"""Configuration space by name: every known capability, chains that are broken, and layouts that fit together."""

import pytest
from maia_tools.reg import config_space, layout, pci_capabilities, pci_extended, pci_header

from maia_rt.errors import DeviceLost


class Config:
    """Configuration space as bytes, built capability by capability."""

    def __init__(self, size=4096, bridge=False):
        self.bytes = bytearray(size)
        self.put(0x00, 4, 0x12345678)
        self.put(0x0E, 1, 1 if bridge else 0)
        self._last, self._last_extended = 0x34, None

    def put(self, offset, size, value):
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")

    def read(self, offset, size):
        return int.from_bytes(self.bytes[offset : offset + size], "little")

    def add(self, at, cap_id, *words):
        self.put(0x06, 2, 1 << 4)
        self.put(self._last, 1, at)
        self.put(at, 1, cap_id)
        self._last = at + 1
        for offset, size, value in words:
            self.put(at + offset, size, value)

    def extend(self, at, cap_id):
        if self._last_extended is not None:
            word = self.read(self._last_extended, 4)
            self.put(self._last_extended, 4, word | at << 20)
        self.put(at, 4, cap_id | 1 << 16)
        self._last_extended = at

    def names(self):
        return {r.name.removeprefix("config."): r for r in config_space.registers(self.read, len(self.bytes))}


@pytest.mark.parametrize("text", [
    pci_header.ENDPOINT, pci_header.BRIDGE, pci_capabilities.HEADER, pci_extended.HEADER,
    *(t for _, t in pci_capabilities.LAYOUTS.values()), *(t for _, t in pci_extended.LAYOUTS.values()),
    pci_capabilities.PCIE_LINK, pci_capabilities.PCIE_SLOT, pci_capabilities.PCIE_2,
])
def test_fields_of_a_layout_fit_their_register_and_do_not_overlap(text):
    end = 0
    for register in layout.parse(text, "x"):
        assert register.offset % register.access_size == 0
        assert register.offset >= end or end == 0, register.name
        end = register.offset + register.size
        taken = 0
        for field in register.fields:
            assert not taken & field.mask, f"{register.name}.{field.name}"
            taken |= field.mask
            assert field.access in ("ro", "rw", "w1c", "pulse")
        assert taken <= register.mask


@pytest.mark.parametrize(("control", "data", "has_mask", "upper"), [
    (0x0000, 0x08, False, False), (0x0080, 0x0C, False, True), (0x0100, 0x08, True, False), (0x0180, 0x0C, True, True)])
def test_the_four_shapes_of_msi(control, data, has_mask, upper):
    config = Config()
    config.add(0x50, 0x05, (2, 2, control))
    names = config.names()
    assert names["msi.data"].offset == 0x50 + data
    assert ("msi.mask" in names, "msi.address_upper" in names) == (has_mask, upper)


def test_pci_express_has_what_its_kind_has():
    for flags, link, slot, second in ((0x0002, True, False, True), (0x0001, True, False, False),
                                      (0x0092, False, False, True), (0x0142, True, True, True)):
        config = Config()
        config.add(0x40, 0x10, (2, 2, flags))
        names = config.names()
        assert ("pcie.link_status" in names, "pcie.slot_status" in names, "pcie.device_control2" in names) == (
            link, slot, second)


def test_capabilities_of_one_kind_are_numbered_and_unknown_ones_have_their_ids():
    config = Config()
    config.add(0x40, 0x09, (2, 1, 5))
    config.add(0x48, 0x09, (2, 1, 4))
    config.add(0x50, 0x7E)
    config.extend(0x100, 0x0001)
    config.extend(0x140, 0x000B)
    config.extend(0x150, 0x0777)
    names = config.names()
    assert {"vendor.byte4", "vendor2.byte3", "cap_7e.id", "aer.uncorrectable_status", "vendor_ext.vendor_header",
            "ext_0777.header"} <= set(names)
    assert "vendor2.byte4" not in names
    assert names["aer.correctable_mask"].offset == 0x114


def test_bars_are_named_by_what_they_are():
    config = Config()
    for index, value in enumerate((0xFEA0000C, 0x1, 0xC001, 0xFE000000, 0x4, 0x0)):
        config.put(0x10 + 4 * index, 4, value)
    names = config.names()
    assert "Upper half" in names["bar1"].description
    assert [f.name for f in names["bar2"].fields] == ["io", "address"]
    assert names["bar0"].find("address").text(0xFEA0000) == "0xfea0000 (address 0xfea00000)"
    assert "Upper half" in names["bar5"].description
    assert "bar2" not in Config(bridge=True).names()
    assert "secondary_bus" in Config(bridge=True).names()


def test_a_capability_that_runs_over_the_end_is_cut_and_a_loop_ends():
    config = Config(size=256)
    config.add(0xFC, 0x11)
    names = config.names()
    assert "msix.control" in names
    assert "msix.table" not in names
    config.put(0xFD, 1, 0xFC)
    assert config.names().keys() == names.keys()


def test_a_function_that_is_gone_is_lost():
    config = Config()
    config.bytes[:] = b"\xff" * 4096
    with pytest.raises(DeviceLost):
        config.names()
