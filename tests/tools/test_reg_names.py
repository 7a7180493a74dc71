"""``maia reg``: what names and addresses mean, and what is said of those that mean nothing."""

import json

import pytest
from click.testing import CliRunner
from maia_tools.cli import maia
from maia_tools.reg.address import resolve
from maia_tools.reg.space import Space, offline

from maia_rt.contract.registers import BAR0
from maia_rt.errors import InvalidArgument


@pytest.fixture(scope="module")
def known():
    return offline(None)


def invoke(*arguments):
    done = CliRunner().invoke(maia, ["reg", *arguments])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done


def test_a_listing_into_a_pipe_has_no_more_than_it_is_asked_for():
    data = json.loads(invoke("ls", "--json", "heartbeat").stdout)
    assert data["schema"] == 1
    assert [r["name"] for r in data["registers"]] == ["HEARTBEAT"]


@pytest.mark.parametrize(("text", "address", "name"), [
    ("STATUS", "bar0:0x084", "STATUS"),
    ("status.boot", "bar0:0x084", "STATUS.BOOT"),
    ("0x84", "bar0:0x084", "STATUS"),
    ("132", "bar0:0x084", "STATUS"),
    ("bar0:status", "bar0:0x084", "STATUS"),
    ("q3.tail", "bar2:0x3000", "queue[3].TAIL"),
    ("queue[3].tail.count", "bar2:0x3000", "queue[3].TAIL.COUNT"),
    ("Queue[0x3].Tail", "bar2:0x3000", "queue[3].TAIL"),
    ("BAR2:0x3010", "bar2:0x3010", "queue[3].ARM"),
    ("bar2+0x3010", "bar2:0x3010", "queue[3].ARM"),
    ("0xffc", "bar0:0xffc", "bar0:0xffc"),
    ("config:0x04", "config:0x004", "config.command"),
    ("config.command.bus_master", "config:0x004", "config.command.bus_master"),
])
def test_a_name_or_an_offset_means_one_place(known, text, address, name):
    (place,) = resolve(text, known)
    assert (place.address, place.full_name) == (address, name)


@pytest.mark.parametrize(("text", "names"), [
    ("queue[0..3].tail", ["queue[0].TAIL", "queue[1].TAIL", "queue[2].TAIL"]),
    ("queue[1].*", ["queue[1].TAIL", "queue[1].REPORT_HEAD", "queue[1].ARM", "queue[1].NEEDS_WAKE"]),
    ("status.*", ["STATUS.BOOT", "STATUS.ERROR"]),
    ("semaphore_*", ["SEMAPHORE_CAPS", "SEMAPHORE_WINDOW", "SEMAPHORE_OP"]),
    ("0x80..0x90", ["CONTROL", "STATUS", "HEARTBEAT", "ERRORS"]),
    ("bar0:0x80+16", ["CONTROL", "STATUS", "HEARTBEAT", "ERRORS"]),
    ("0x88+16", ["HEARTBEAT", "ERRORS", "CLOCK"]),
    ("config:0..8", ["config.vendor_id", "config.device_id", "config.command", "config.status"]),
    ("config.*.enable", ["config.rom.enable", "config.msi.control.enable", "config.msix.control.enable",
                         "config.ats.control.enable", "config.pri.control.enable", "config.pasid.control.enable",
                         "config.ptm.control.enable"]),
])
def test_wildcards_ranges_and_indexes_mean_several(known, text, names):
    assert [p.full_name for p in resolve(text, known)] == names


def test_a_star_takes_in_arrays_as_a_whole_and_configuration_space_only_if_asked():
    registers = [s for s in offline(None) if s.name != "bar2"]
    names = [p.full_name for p in resolve("*", registers)]
    assert len(names) == len(BAR0)
    assert all(n.startswith("config.") for n in (p.full_name for p in resolve("config*", registers)))


@pytest.mark.parametrize(("text", "said"), [
    ("stauts", "no register stauts.*STATUS"),
    ("status.bot", "STATUS has no field BOT.*BOOT"),
    ("status.nonsense", "has no field NONSENSE.*BOOT, ERROR"),
    ("tail", "no register tail.*queue.0..TAIL"),
    ("boot", "no register boot.*STATUS.BOOT"),
    ("queue.tail", "takes 1 index, not 0.*queue.0..TAIL"),
    ("scratch[0]", "takes no indexes, not 1"),
    ("queue[65536].tail", r"not among queue\[0\] to queue\[65535\]"),
    ("queue[4..4].tail", "not among"),
    ("queue[x].tail", "is no index"),
    ("0x85", "not a multiple of an access's 4 bytes.*--width 1"),
    ("0x90..0x90", "is empty"),
    ("a b", "is no register"),
    ("", "is no register"),
    ("nope*", "no register or field fits"),
    ("queue*", "more|names"),
    ("bar3:0x0", "has no bar3.*bar0, bar2, config"),
    ("xyzzy", "of another device"),
])
def test_what_does_not_exist_is_refused_with_what_is_near(known, text, said):
    with pytest.raises(InvalidArgument, match=said) as caught:
        resolve(text, known)
    assert caught.value.cause
    assert caught.value.hint


@pytest.mark.parametrize(("text", "width", "said"), [
    ("bar0:0xff4", 8, "not a multiple"), ("bar0:0x1000", None, "not within"), ("bar0:0xffe", 2, None),
    ("bar0:0xff8..0x1008", None, "ends beyond"), ("bar0:0xfff", 1, None), ("status", 8, "has 4 bytes"),
])
def test_misaligned_and_out_of_range_accesses_are_refused(text, width, said):
    known = [Space("bar0", 0, 0x1000, offline(None)[0].registers)]
    if said is None:
        assert resolve(text, known, width=width)[0].size == width
        return
    with pytest.raises(InvalidArgument, match=said):
        resolve(text, known, width=width)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_widths_split_a_register_into_accesses_or_name_raw_bytes(known, width):
    (clock,) = resolve("clock", known, width=width)
    assert (clock.size, clock.access_size) == (8, width)
    (raw,) = resolve("bar0:0x400", known, width=width)
    assert (raw.size, raw.access_size, raw.register) == (width, width, None)


def test_every_name_in_the_listing_resolves_to_its_register():
    known = offline(None)
    for space in known:
        for register in space.registers:
            name = register.name_at(tuple(0 for _ in register.dimensions))
            assert register in [p.register for p in resolve(name, known)]
            for field in register.fields:
                assert field in [p.field for p in resolve(f"{name}.{field.name}", known)]


def test_the_list_needs_no_device_and_has_every_register():
    everything = json.loads(invoke("ls", "--json").stdout)["registers"]
    assert {r["name"] for r in everything if r["space"] == "bar0"} == set(BAR0)
    assert "config.command" not in {r["name"] for r in everything}
    assert "config.msix.control" in invoke("ls", "config.*").stdout


def test_a_search_finds_names_descriptions_and_named_values():
    assert "CLOCK" in invoke("search", "latches").stdout
    assert "STATUS.BOOT=FAILED" in invoke("search", "failed").stdout
    assert "config.pcie.device_control.max_payload" in invoke("search", "max_payload").stdout


def test_info_shows_bits_fields_named_values_and_arrays():
    text = invoke("info", "status").stdout
    for wanted in ("bar0:0x084", "32 bits", "| ERROR |", "3:0", "READY", "State of the firmware"):
        assert wanted in text
    assert "n is 0 to 65535" in invoke("info", "queue[n].tail").stdout
    (register,) = json.loads(invoke("info", "--json", "errors.fault").stdout)["registers"]
    assert register["fields"][0]["access"] == "w1c"


def test_no_line_of_a_bit_diagram_is_wider_than_a_terminal():
    text = invoke("info", "config.*", "*caps").stdout
    assert max(len(line) for line in text.splitlines() if line.startswith(("+", "|"))) <= 101
