"""``maia reg``: what names mean and what a write would do."""

import json

import pytest
from click.testing import CliRunner
from maia_tools.cli import maia
from maia_tools.registers import find, new_value

from maia_rt.contract.registers import BAR0
from maia_rt.errors import InvalidArgument


@pytest.mark.parametrize(("text", "bar", "offset", "name"), [
    ("STATUS", 0, 0x84, "STATUS"),
    ("status.boot", 0, 0x84, "STATUS"),
    ("0x84", 0, 0x84, "STATUS"),
    ("132", 0, 0x84, "STATUS"),
    ("q3.tail", 2, 3 * 4096, "Q3.TAIL"),
    ("BAR2:0x3010", 2, 0x3010, "BAR2:0x3010"),
    ("0xffc", 0, 0xFFC, "BAR0:0x0ffc"),
])
def test_a_name_or_offset_means_one_place(text, bar, offset, name):
    place = find(text)
    assert (place.bar, place.offset, place.name) == (bar, offset, name)


@pytest.mark.parametrize(("text", "said"), [
    ("STATE", "no register STATE"), ("STATUS.STATE", "no field STATE"), ("TAIL", "Q0.TAIL"), ("0x85", "multiple of 4"),
    ("a b", "is no register"), ("Q1.STATUS", "no register STATUS"),
])
def test_what_does_not_exist_is_refused_with_a_hint(text, said):
    with pytest.raises(InvalidArgument, match=said):
        find(text)


def test_a_field_write_keeps_rw_neighbours_and_leaves_w1c_neighbours_alone():
    assert new_value(find("ERRORS.LINK"), "1", 0x1F) == 0b100
    assert new_value(find("CONTROL.RESET"), "1", 0x1) == 0b11


def test_values_are_numbers_or_the_fields_names():
    assert new_value(find("SEMAPHORE_OP.OP"), "add", 0) == 2 << 16
    assert new_value(find("SCRATCH"), "0xdead_beef", 0) == 0xDEADBEEF
    with pytest.raises(InvalidArgument, match="does not fit the 32 bits"):
        new_value(find("SCRATCH"), "0x100000000", 0)
    with pytest.raises(InvalidArgument, match="is no number"):
        new_value(find("SCRATCH"), "many", 0)


def test_the_list_needs_no_device_and_can_be_searched():
    done = CliRunner().invoke(maia, ["reg", "ls", "--json", "heartbeat"])
    assert done.exit_code == 0
    data = json.loads(done.stdout)
    assert data["schema"] == 1
    assert [r["name"] for r in data["registers"]] == ["HEARTBEAT"]
    everything = json.loads(CliRunner().invoke(maia, ["reg", "ls", "--json"]).stdout)["registers"]
    assert {r["name"] for r in everything if r["bar"] == 0} == set(BAR0)


def test_a_write_to_a_read_only_register_is_refused_before_any_device_is_opened():
    done = CliRunner().invoke(maia, ["reg", "write", "STATUS", "1", "--yes", "--device", "/nonexistent"])
    assert isinstance(done.exception, InvalidArgument)
    assert "read-only" in str(done.exception)


def test_a_write_asks_and_without_anybody_to_ask_needs_yes():
    done = CliRunner().invoke(maia, ["reg", "write", "SCRATCH", "1", "--device", "/nonexistent"])
    assert done.exit_code == 2
    assert "--yes" in done.stderr
