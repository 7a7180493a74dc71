"""In a guest: ``maia reg`` on edu, on nvme and on our device through the kernel's VFIO."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from maia_tools import cli

from maia_rt.pci import bind, functions, release

pytestmark = pytest.mark.own_kernel  # it makes no difference to the tool which kernel there is
ROOT = Path(__file__).resolve().parents[3]
EDU, NVME, MAIA = (0x1234, 0x11E8), (0x1B36, 0x0010), (0x1AF4, 0x10F0)
RDL = {EDU: ["--rdl", ROOT / "examples/rdl/edu.rdl"], NVME: ["--rdl", ROOT / "examples/rdl/nvme.rdl"], MAIA: []}


@pytest.fixture(scope="module")
def bound():
    """The three devices, bound to vfio-pci; their addresses by ids."""
    found = {ids: str(functions(vendor=ids[0], device=ids[1])[0].address) for ids in RDL}
    bind(list(found.values()))
    yield found
    release(list(found.values()))


@pytest.fixture
def reg(bound, tmp_path, monkeypatch):
    def run(ids, verb, *arguments, typed="", named=True):
        audit = ["--audit", tmp_path / "audit.log"] if verb in ("write", "shell", "script") else []
        words = ["reg", verb, *arguments, "-d", bound[ids], *(RDL[ids] if named else []), *audit]
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([str(w) for w in words])
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    return run


@pytest.mark.parametrize("ids", list(RDL))
def test_every_register_of_every_device_answers(reg, ids):
    done = reg(ids, "walk", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["registers"]
    assert len(rows) > 30
    assert {r["state"] for r in rows} == {"ok"}


def test_edu_computes_and_interrupts_by_the_names_of_its_file(reg):
    assert "0x010000ed" in reg(EDU, "read", "bar0:0x0", named=False).stdout
    done = reg(EDU, "shell", "--write", typed="write liveness 0x12345678 -y\nread liveness\nwrite factorial 10 -y\n")
    assert done.returncode == 0, done.stderr
    assert "0xedcba987" in done.stdout, "the device inverts it"
    script = "write('factorial', 10); wait('status.computing', 0); print(int(read('factorial')));"
    script += "write('interrupt_raise', 0x100); print(read('interrupt_status').dma); write('interrupt_ack', 0x100)"
    file = Path("/tmp/edu_script.py")
    file.write_text(script)
    done = reg(EDU, "script", "--write", file)
    assert done.stdout.split() == ["3628800", "1"], done.stderr


def test_nvme_says_what_it_is_and_takes_no_write_in_a_dry_run(reg):
    done = reg(NVME, "read", "vs.mjr", "cap.mqes", "csts.rdy", "--json")
    values = {r["name"]: r["fields"][0]["value"] for r in json.loads(done.stdout)["registers"]}
    assert values == {"VS.MJR": 1, "CAP.MQES": 0x7FF, "CSTS.RDY": 0}
    assert reg(NVME, "write", "cc.en", "1", "--dry-run").returncode == 0
    assert reg(NVME, "read", "doorbell[0].sq_tail").returncode == 2
    assert reg(NVME, "read", "doorbell[2000].sq_tail").returncode == 2


def test_our_device_is_written_and_read_back(reg):
    done = reg(MAIA, "write", "scratch", "0xdeadbeef", "-y", "--verify")
    assert done.stdout.endswith("-> 0xdeadbeef, reads back\n"), done.stderr
    done = reg(MAIA, "read", "queue[*].tail", "--json")
    assert len(json.loads(done.stdout)["registers"]) == 64
    assert "msix_table" not in reg(MAIA, "ls").stdout, "the kernel keeps it to itself"


@pytest.mark.parametrize("ids", list(RDL))
def test_configuration_space_is_what_lspci_says(reg, bound, ids):
    said = subprocess.run(["lspci", "-vv", "-D", "-s", bound[ids]], capture_output=True, text=True, check=True).stdout
    ours = {int(r["offset"], 16): r["name"] for r in json.loads(
        reg(ids, "ls", "config.*", "--json", named=False).stdout)["registers"]}
    names = {"MSI": "msi", "MSI-X": "msix", "Power": "pm", "Express": "pcie", "Device": "serial"}
    theirs = re.findall(r"Capabilities: \[([0-9a-f]+)(?: v\d)?\] (\S+)", said)
    assert theirs
    for offset, kind in theirs:
        first = "header" if len(offset) > 2 else "id"
        assert ours[int(offset, 16)] == f"config.{names[kind.rstrip(':')]}.{first}", said
    assert ("BusMaster+" in said) is False
    assert reg(ids, "read", "config.command.bus_master", "--json", named=False).stdout.count('"value": 0') == 1


@pytest.mark.parametrize(("arguments", "said"), [
    (["read", "bar0:0x2"], "not a multiple"), (["read", "bar0:0x100000"], "not within"),
    (["read", "bar5:0x0"], "has no bar5"), (["write", "bar0:0x40", "1", "-y"], "no register is described"),
    (["read", "factoral"], "FACTORIAL"),
])
def test_what_cannot_be_is_refused_in_three_lines(reg, arguments, said):
    done = reg(EDU, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 3


def test_a_place_where_nothing_answers_is_said_to_be_so(reg):
    done = reg(EDU, "read", "bar0:0x1000", named=False)
    assert done.returncode == 5
    assert "0xffffffff" in done.stdout
    assert "every read gave all ones" in done.stderr


def test_a_function_that_is_not_bound_is_no_device(monkeypatch, capsys):
    assert cli.main(["reg", "read", "0x0", "-d", "0000:00:1f.3"]) == 3
    assert "maia bind" in capsys.readouterr().err
