"""``maia reg --rdl``: a stranger's registers by a SystemRDL file: arrays, widths, access kinds, side effects of reads.

The file describes a piece of the emulated device's memory, which takes any access.
"""

import builtins
import json
from pathlib import Path

import pytest
from helpers.emulator import running
from maia_tools.reg import rdl
from maia_tools.reg.model import Register

from maia_rt.contract.registers import BAR0
from maia_rt.errors import InvalidArgument, Unsupported

ROOT = Path(__file__).resolve().parents[2]
STRANGER = """
enum mode { OFF = 0 { desc = "Nothing runs."; }; ON = 1; };
addrmap other { reg { field {} A[7:0] = 3; } R @ 0; };
addrmap stranger {
    regfile {
        reg { field { sw = rw; encode = mode; } EN[0:0] = 0; field { sw = rw; onwrite = wzc; } Z[1:1];
              field { sw = rw; onwrite = woclr; } C[2:2] = 0; field { sw = r; } S[8:4]; } CTRL @ 0;
        reg { regwidth = 64; accesswidth = 32; field { sw = rw; } X[63:0]; } WIDE @ 8;
    } ch[2][3] @ 0x100 += 0x10;
    reg { regwidth = 128; accesswidth = 32; field { sw = rw; } LO[63:0]; field { sw = rw; } HI[127:64]; } HUGE @ 0x200;
    reg { regwidth = 8; field { sw = rw; } V[7:0]; } BYTE[4] @ 0x220 += 1;
    external mem { mementries = 4; memwidth = 128; } M @ 0x240;
    reg { field { sw = r; onread = rclr; } CNT[15:0]; field { sw = rw; } LIMIT[31:16]; } COUNT @ 0x310;
    reg { field { sw = rw; singlepulse; } GO[0:0] = 0; } START @ 0x314;
};
"""


@pytest.fixture(scope="module")
def path():
    with running() as (_, paths):
        yield paths[0]


@pytest.fixture
def reg(run_maia, path, tmp_path):
    file = tmp_path / "stranger.rdl"
    file.write_text(STRANGER)

    def run(verb, *arguments, typed=""):
        audit = ["--audit", tmp_path / "audit.log"] if verb in ("write", "shell") else []
        return run_maia("reg", verb, *arguments, "-d", path, "--rdl", file, "--bar", "4", "--base", "0x1000", *audit,
                        typed=typed)

    return run


def by_name(registers: list[Register]):
    return {r.name: r for r in registers}


def test_arrays_wide_registers_memories_and_access_kinds_are_understood(tmp_path):
    file = tmp_path / "s.rdl"
    file.write_text(STRANGER)
    found = by_name(rdl.load(str(file)))
    control = found["ch[n][m].CTRL"]
    assert control.dimensions == ((2, 0x30), (3, 0x10))
    assert control.offset_at((1, 2)) == 0x150
    assert [(f.name, f.access, f.reset) for f in control.fields] == [
        ("EN", "rw", 0), ("Z", "w0c", None), ("C", "w1c", 0), ("S", "ro", None)]
    assert control.fields[0].names == {0: ("OFF", "Nothing runs."), 1: ("ON", "")}
    assert (found["ch[n][m].WIDE"].size, found["ch[n][m].WIDE"].access_size) == (8, 4)
    assert (found["HUGE"].size, found["HUGE"].access_size) == (16, 4)
    assert found["M[n][m]"].dimensions == ((4, 16), (2, 8)), "entries wider than a word are words"
    assert found["COUNT"].changed_by_reading
    assert found["START"].fields[0].access == "pulse"
    assert list(by_name(rdl.load(str(file), "other"))) == ["R"]


def test_our_own_description_reads_the_same_as_the_generated_table():
    found = by_name(rdl.load(str(ROOT / "maia_rt/contract/registers.rdl"), "bar0"))
    for name, register in BAR0.items():
        assert [(f.name, f.access, f.lsb, f.width) for f in found[name].fields] == [
            (f.name, f.access, f.lsb, f.width) for f in register.fields]


def test_the_examples_describe_edu_and_nvme():
    edu = by_name(rdl.load(str(ROOT / "examples/rdl/edu.rdl")))
    assert {name: r.offset for name, r in edu.items()}.items() >= {
        "ID": 0, "FACTORIAL": 8, "STATUS": 0x20, "DMA_COMMAND": 0x98}.items()
    nvme = by_name(rdl.load(str(ROOT / "examples/rdl/nvme.rdl")))
    offsets = {"CAP": 0, "VS": 8, "CC": 0x14, "CSTS": 0x1C, "AQA": 0x24, "ASQ": 0x28, "ACQ": 0x30}
    assert {name: nvme[name].offset for name in offsets} == offsets
    assert nvme["DOORBELL[n].CQ_HEAD"].offset_at((2,)) == 0x1014


def test_names_of_the_file_reach_the_device(reg):
    done = reg("shell", "--write", typed="write ch[1][2].ctrl.en on -y --verify\nread ch[1][*].ctrl.en --json\n")
    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.partition("\n")
    assert first == "ch[1][2].CTRL 0x00000000 -> 0x00000003, reads back", "w0c is left alone by a 1"
    assert [(r["name"], r["fields"][0]["value"]) for r in json.loads(rest)["registers"]] == [
        ("ch[1][0].CTRL.EN", 0), ("ch[1][1].CTRL.EN", 0), ("ch[1][2].CTRL.EN", 1)]
    done = reg("shell", "--write", typed="write huge hi=5,lo=0x1122334455667788 -y --verify\nbar4:0x1208 -w 8")
    assert done.returncode == 0, done.stderr
    assert "0x00000000000000051122334455667788, reads back" in done.stdout
    assert "0x0000000000000005" in done.stdout


def test_a_pending_w1c_bit_is_not_cleared_by_a_neighbours_write(reg):
    done = reg("shell", "--write", typed="write bar4:0x1110 0x4 -y --unsafe\nwrite ch[0][1].ctrl.en 1 --dry-run\n")
    assert done.returncode == 0, done.stderr
    assert "ch[0][1].CTRL 0x00000004 -> 0x00000003" in done.stdout
    assert "  .C " not in done.stderr.partition("-> 0x00000003")[2]


def test_what_reading_changes_is_read_only_when_told_to(reg):
    assert "reading it clears CNT" in reg("read", "count").stderr
    assert reg("read", "count").returncode == 2
    assert reg("read", "bar4:0x1311", "-w", "1").returncode == 2, "nor by its offset"
    assert reg("read", "count", "--unsafe").returncode == 0
    done = reg("dump", "--space", "bar4")
    assert done.returncode == 0
    assert "COUNT" not in done.stdout
    assert "left out: COUNT: reading it clears CNT" in done.stderr
    assert reg("watch", "count", "-n", "1").returncode == 2
    done = reg("write", "count.limit", "5", "-y")
    assert done.returncode == 2
    assert "write the whole register" in done.stderr
    assert "COUNT - -> 0x00050000" in reg("write", "count", "0x50000", "-y").stdout


def test_a_foreign_file_for_the_wrong_place_is_refused(run_maia, path, tmp_path):
    file = tmp_path / "stranger.rdl"
    file.write_text(STRANGER)
    for more, said in ((["--bar", "1"], "has no BAR 1"), (["--base", "0xff00"], "is beyond bar0")):
        done = run_maia("reg", "read", "huge", "-d", path, "--rdl", file, *more)
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 3
    assert run_maia("reg", "ls", "--bar", "1").returncode == 2


@pytest.mark.parametrize(("text", "top", "said"), [
    ("addrmap {", None, "is not an RDL file that compiles"), (STRANGER, "nope", "not an RDL file that compiles"),
    ("addrmap empty { reg { field {} A; } R[0]; };", None, "not an RDL file"),
])
def test_files_that_do_not_compile_say_where(tmp_path, capfd, text, top, said):
    file = tmp_path / "x.rdl"
    file.write_text(text)
    with pytest.raises(InvalidArgument, match=said) as caught:
        rdl.load(str(file), top)
    assert "x.rdl" in caught.value.cause
    assert capfd.readouterr() == ("", ""), "the compiler itself prints nothing"


def test_big_endian_maps_are_refused(tmp_path):
    file = tmp_path / "x.rdl"
    file.write_text("addrmap x { bigendian; reg { field {} A; } R; };")
    with pytest.raises(Unsupported, match="big-endian"):
        rdl.load(str(file))


def test_without_the_compiler_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *more):
        if name.startswith("systemrdl"):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Unsupported, match="systemrdl-compiler") as caught:
        rdl.load("x.rdl")
    assert "maia-rt[rdl]" in caught.value.hint
