"""Generated files are what the contract's sources say, and the register tables behave."""

import re
import subprocess
import sys
from pathlib import Path

import memory_layouts
import pytest

from maia_rt.contract import commands, program, registers
from maia_rt.contract.registers import BAR0, DOORBELL, Bar0, BootState, Doorbell

ROOT = Path(__file__).resolve().parents[2]
FILES = ("maia_rt/contract/registers.py", "maia_rt/_fast/registers.pxd", "maia_rt/_fast/commands.pxd",
         "maia_rt/_fast/layout.pyx", "docs/registers.md", "docs/contract.md")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    target = tmp_path_factory.mktemp("generated")
    subprocess.run([sys.executable, ROOT / "tools/generate.py", target], check=True, capture_output=True)
    return target


def test_the_generator_writes_the_files_this_test_compares(written):
    assert {str(p.relative_to(written)) for p in written.rglob("*") if p.is_file()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_committed_file_is_what_the_generator_writes(written, name):
    assert (ROOT / name).read_text() == (written / name).read_text(), "run `make generate`"


@pytest.mark.parametrize("table", [BAR0, DOORBELL], ids=["BAR0", "DOORBELL"])
def test_registers_and_fields_do_not_overlap(table):
    used = set()
    for register in table.values():
        span = set(range(register.offset, register.offset + register.width_bytes))
        assert not span & used
        assert register.offset % register.width_bytes == 0
        used |= span
        bits = 0
        for field in register.fields:
            assert not bits & field.mask
            assert field.lsb + field.width <= register.width_bits
            bits |= field.mask


def test_offsets_match_the_tables():
    for constants, table in ((Bar0, BAR0), (Doorbell, DOORBELL)):
        names = {n: v for n, v in vars(constants).items() if n.isupper()}
        assert names == {r.name: r.offset for r in table.values()}


def test_fields_are_taken_out_of_and_put_into_values():
    version = BAR0["VERSION"]
    assert version.reset == 0x0001_0001
    assert version.get(0x0003_0007, "MAJOR") == 3
    assert version.set(0x0003_0007, "MINOR", 9) == 0x0003_0009
    with pytest.raises(ValueError, match=r"VERSION\.MINOR has 16 bits"):
        version.set(0, "MINOR", 1 << 16)
    with pytest.raises(KeyError):
        version.field("PATCH")


def test_values_are_decoded_by_field_and_name():
    assert BAR0["STATUS"].decode(0x0202) == {"BOOT": BootState.READY, "ERROR": 2}
    assert BAR0["STATUS"].decode(0xF)["BOOT"] == 15, "a value without a name stays a number"


def test_access_kinds_come_from_the_description():
    kinds = {(r.name, f.name): f.access for r in BAR0.values() for f in r.fields}
    assert kinds["CONTROL", "RESET"] == "pulse"
    assert kinds["ERRORS", "FAULT"] == "w1c"
    assert kinds["SEMAPHORE_OP", "VALUE"] == "wo"
    assert kinds["ADMIN_SQ", "ADDRESS"] == "rw"
    assert kinds["CLOCK", "NANOSECONDS"] == "ro"
    assert BAR0["ERRORS"].mask("w1c") == 0x1F
    assert not BAR0["WAKE"].readable
    assert not BAR0["CLOCK"].writable


def test_the_msix_structures_lie_in_bar0_behind_the_registers():
    last = max(r.offset + r.width_bytes for r in BAR0.values())
    assert last <= registers.MSIX_TABLE_OFFSET
    assert registers.MSIX_TABLE_OFFSET + registers.MSIX_TABLE_BYTES <= registers.MSIX_PBA_OFFSET
    assert registers.MSIX_PBA_OFFSET + registers.MSIX_PBA_BYTES <= registers.BAR0_BYTES


def test_every_row_of_the_contract_page_has_a_meaning():
    rows = [line for line in (ROOT / "docs/contract.md").read_text().splitlines() if line.endswith("| ? |")]
    assert rows == []


def test_the_contract_page_shows_every_structure_and_enumeration():
    page = (ROOT / "docs/contract.md").read_text()
    shown = set(re.findall(r"<!-- (?:layout|payload|enum) (\w+) -->", page))
    classes = {kind.__name__ for kind in memory_layouts.PREFIXES} - {"FaultCode"}
    structures = {n for m in (commands, program) for n in memory_layouts.every_dtype(m)}
    assert shown == classes | structures
