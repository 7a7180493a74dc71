"""``maia reg`` on the emulated device over a socket: what is read, written, refused and recorded."""

import json
import re
import signal
import time

import pytest
from helpers.emulator import running

from maia_rt.contract.commands import CONTRACT_MINOR
from maia_rt.contract.registers import BAR0


@pytest.fixture(scope="module")
def path():
    with running() as (_, paths):
        yield paths[0]


@pytest.fixture
def reg(run_maia, path, tmp_path):
    """Run ``maia reg`` on the device; writes are recorded in ``tmp_path``."""

    def run(verb, *arguments, **options):
        audit = ["--audit", tmp_path / "audit.log"] if verb in ("write", "shell", "script") else []
        device = ["-d", path] if verb != "diff" else []
        return run_maia("reg", verb, *arguments, *device, *audit, **options)

    return run


def recorded(tmp_path):
    file = tmp_path / "audit.log"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# Reading.


def test_every_readable_register_is_read_without_booting(reg):
    data = json.loads(reg("read", "--json").stdout)
    by_name = {r["name"]: r for r in data["registers"]}
    assert {r.name for r in BAR0.values() if r.readable} <= set(by_name)
    assert not [n for n in by_name if n in BAR0 and not BAR0[n].readable]
    assert by_name["ID"]["value"] == "0x4149414d"
    assert {f["name"]: f.get("value_name") for f in by_name["STATUS"]["fields"]}["BOOT"] == "RESET"
    assert len(by_name["CAPS"]["value"]) == 2 + 16, "padded to the register's width"


def test_values_are_shown_by_field_with_names_access_kinds_and_what_differs_from_reset(reg):
    done = reg("read", "status", "config.command", "q3.needs_wake", "bar4:0x0")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\.BOOT +3:0 +ro +0 RESET +0 RESET", done.stdout)
    assert re.search(r"\.memory_space +1 +rw +1 +0 \*", done.stdout), "enabled to look at the BARs"
    assert "queue[3].NEEDS_WAKE" in done.stdout
    assert "differs from reset" in done.stderr


def test_arrays_are_as_long_as_the_device_says(reg):
    assert reg("read", "queue[63].tail").returncode == 0
    done = reg("read", "queue[64].tail")
    assert done.returncode == 2
    assert "queue[0] to queue[63]" in done.stderr
    assert len(json.loads(reg("read", "--json", "semaphore[*]").stdout)["registers"]) == 1024


def test_what_is_not_described_or_write_only_is_left_out_of_a_range_and_refused_alone(reg):
    done = reg("read", "bar0:0xc0..0xd8")
    assert done.returncode == 0
    assert "left out: SEMAPHORE_OP, WAKE: write-only" in done.stderr
    assert "no register is described there" in done.stderr
    for name in ("wake", "0x98"):
        done = reg("read", name)
        assert done.returncode == 2
        assert "--unsafe" in done.stderr
        assert reg("read", name, "--unsafe").returncode == 0


def test_widths_reach_parts_of_registers(reg):
    values = {w: json.loads(reg("read", "--json", "--width", w, "0x40").stdout)["registers"][0] for w in "48"}
    assert values["8"]["name"] == "HBM_BASE"
    assert (values["4"]["size_bytes"], values["4"]["value"]) == (4, "0x00000000")
    assert json.loads(reg("read", "--json", "-w", "4", "hbm_base").stdout)["registers"][0]["value"] == (
        "0x0001000000000000")


def test_walk_says_of_every_register_whether_it_answers_and_how_fast(reg):
    done = reg("walk", "--json")
    rows = json.loads(done.stdout)["registers"]
    assert done.returncode == 0
    assert {"STATUS", "queue[63].ARM", "config.msix.control", "msix_table[64].control"} <= {r["name"] for r in rows}
    assert all(r["state"] == "ok" and r["time_us"] > 0 for r in rows)
    assert re.search(r"\d+ read, 0 failed, 0 all ones, \d+ differ from reset", done.stderr)


# Dumps and what they are for.


def test_a_dump_and_the_device_are_alike_until_something_changes(reg, path, tmp_path):
    file = tmp_path / "dump.json"
    assert reg("dump", "-o", file).returncode == 0
    data = json.loads(file.read_text())
    assert (data["schema"], data["kind"], data["device"]) == (1, "reg dump", path)
    done = reg("diff", file, path, "--ignore", "clock")
    assert done.returncode == 0, done.stdout
    data["registers"] = [{**r, "value": "0x00000009", "fields": [{**r["fields"][0], "value": 9}]}
                         if r["name"] == "SCRATCH" else r for r in data["registers"] if r["name"] != "ID"]
    file.write_text(json.dumps(data))
    done = reg("diff", "--json", file, path, "--ignore", "clock.*", "--ignore", "CLOCK")
    assert done.returncode == 1
    assert json.loads(done.stdout)["differences"] == [{"name": "SCRATCH", "a": "0x00000009", "b": "0x00000000"}]


def test_two_dumps_differ_by_field(reg, tmp_path):
    files = []
    for number, boot in enumerate((0, 2)):
        register = {"name": "STATUS", "space": "bar0", "offset": "0x84", "size_bytes": 4, "value": f"{boot:#010x}",
                    "fields": [{"name": "BOOT", "value": boot, **({"value_name": "READY"} if boot else {})},
                               {"name": "ERROR", "value": 0}]}
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps({"schema": 1, "kind": "reg dump", "registers": [register]}))
    done = reg("diff", *files)
    assert done.returncode == 1
    assert re.search(r"STATUS\.BOOT +0 +2 READY", done.stdout)
    assert reg("diff", files[0], files[0]).returncode == 0


@pytest.mark.parametrize("content", ["", "{}", "[1]", "\0\xff", '{"schema": 2, "kind": "reg dump", "registers": []}',
                                     '{"schema": 1, "kind": "reg dump", "registers": [{}]}'])
def test_what_is_no_dump_is_refused(reg, tmp_path, content):
    file = tmp_path / "x.json"
    file.write_text(content)
    done = reg("diff", file, file)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 3
    assert reg("diff", tmp_path / "none.json", file).returncode == 2


def test_a_hexdump_shows_bytes_in_the_order_of_their_addresses(reg):
    done = reg("dump", "--hex", "bar0:0x0..0xc")
    assert done.stdout.startswith(f"bar0:0000  4d 41 49 41 {CONTRACT_MINOR:02x} 00 01 00 ")
    assert done.stdout.endswith("MAIA........\n")


def test_a_prefetchable_bar_can_be_dumped_in_parts_and_is_too_large_as_a_whole(reg):
    assert len(reg("dump", "--hex", "bar4:0x1000+256").stdout.splitlines()) == 16
    done = reg("dump", "--space", "bar4")
    assert done.returncode == 2
    assert "bar4:0x0+4096" in done.stderr


# Watching.


def test_watch_prints_changes_only(reg):
    done = reg("watch", "clock", "id", "-n", "3", "-i", "0.01")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert re.match(r"\d\d:\d\d:\d\d\.\d{3}  CLOCK  0x[0-9a-f]{16} -> 0x[0-9a-f]{16}$", lines[2])
    assert sum("ID" in line for line in lines) == 1
    assert "3 reads, 2 changes" in done.stderr
    events = [json.loads(line) for line in reg("watch", "--json", "clock", "-n", "2").stdout.splitlines()]
    assert [e["event"] for e in events] == ["start", "change"]


@pytest.mark.parametrize(("more", "code"), [([], 0), (["-n", "1000"], 130)])
def test_ctrl_c_ends_a_watch(start_maia, path, more, code):
    process = start_maia("reg", "watch", "clock", "-i", "0.01", "-d", path, *more)
    process.stdout.readline()
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert re.search(r"\d+ reads, \d+ changes", err)


# Writing.


def test_a_write_shows_what_changes_reads_back_and_is_recorded(reg, path, tmp_path):
    done = reg("write", "scratch", "0xdeadbeef", "--yes", "--verify")
    assert done.stdout == "SCRATCH 0x00000000 -> 0xdeadbeef, reads back\n", done.stderr
    assert ".VALUE (rw)  0x0 -> 0xdeadbeef" in done.stderr
    (line,) = recorded(tmp_path)
    assert (line["device"], line["name"], line["old"], line["new"], line["source"]) == (
        path, "SCRATCH", "0x00000000", "0xdeadbeef", "write")
    assert line["user"]
    assert line["time"].endswith("+00:00")


def test_a_dry_run_writes_and_records_nothing(reg, tmp_path):
    done = reg("write", "scratch", "1", "--dry-run", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["written"] is False
    assert recorded(tmp_path) == []


def test_a_write_whose_record_cannot_be_made_is_not_made(run_maia, path, tmp_path):
    (tmp_path / "file").write_text("")
    done = run_maia("reg", "write", "scratch", "1", "-y", "-d", path, "--audit", tmp_path / "file" / "log")
    assert done.returncode == 4
    assert "not made" in done.stderr


def test_fields_masks_and_several_fields_at_once(reg, tmp_path):
    data = json.loads(reg("write", "control.reset", "1", "--dry-run", "--json").stdout)
    assert data["new"] == "0x00000002"
    data = json.loads(reg("write", "scratch", "0x1200", "--mask", "0xff00", "-y", "--json").stdout)
    assert (data["old"], data["new"]) == ("0x00000000", "0x00001200")
    data = json.loads(reg("write", "semaphore_op", "index=70,op=ADD,value=3", "-y", "--json").stdout)
    assert (data["old"], data["new"]) == (None, "0x0000000300020046")


@pytest.mark.parametrize(("arguments", "said"), [
    (["status", "1"], "STATUS is read-only"), (["status.boot", "READY"], "read-only"),
    (["0x98", "1"], "no register is described"), (["bar4:0x0", "1"], "no register is described"),
    (["clock", "1"], "read-only"), (["0x90", "1", "-w", "4"], "CLOCK lies there"),
    (["scratch", "0x100000000"], "does not fit the 32 bits"), (["scratch", "-1"], None),
    (["scratch", "many"], "is no number"), (["semaphore_op.op", "MUL"], "is no value"),
    (["scratch", "0x100", "--mask", "0xff"], "outside of the mask"),
    (["control.enable", "1", "--mask", "1"], "own mask"),
    (["queue[*].tail", "1"], "means 64 places"), (["errors.nope", "1"], "has no field"),
    (["semaphore_op", "index=1,nope=2"], "has no field nope"), (["admin_size.entries_log2", "256"], "does not fit"),
])
def test_what_may_not_be_written_is_refused_in_three_lines(reg, tmp_path, arguments, said):
    done = reg("write", *arguments, "-y")
    assert done.returncode == 2
    assert said is None or said in done.stderr
    assert done.stderr.count("\n") == 3
    assert recorded(tmp_path) == []


def test_unsafe_writes_what_is_not_described(reg):
    done = reg("write", "bar4:0x0", "0x5a", "-w", "1", "-y", "--unsafe", "--verify")
    assert done.stdout == "bar4:0x00000000 0x00 -> 0x5a, reads back\n", done.stderr
    done = reg("write", "id", "1", "-y", "--unsafe", "--verify")
    assert done.returncode == 0, "ro bits are the device's"


def test_without_anybody_to_ask_a_write_needs_yes(reg, tmp_path):
    done = reg("write", "scratch", "1")
    assert done.returncode == 2
    assert "--yes" in done.stderr
    assert recorded(tmp_path) == []


# The shell and scripts.


def test_a_shell_takes_commands_names_and_assignments_from_a_pipe(reg):
    done = reg("shell", typed="# a comment\n\nstatus.boot\nls heartbeat\nhelp\nhelp read\nquit\nnonsense\n")
    assert done.returncode == 0, done.stderr
    assert "0 RESET" in done.stdout
    assert "HEARTBEAT" in done.stdout
    assert "maia>" not in done.stdout


def test_a_piped_shell_ends_at_the_first_failure_with_its_code(reg):
    done = reg("shell", typed="read nope\nls scratch\n")
    assert done.returncode == 2
    assert "no register nope" in done.stderr
    assert "SCRATCH" not in done.stdout
    assert reg("shell", typed="read 'open\n").returncode == 2
    assert reg("shell", typed="shell\n").returncode == 2


def test_a_shell_writes_only_if_it_was_started_to(reg, tmp_path):
    done = reg("shell", typed="write scratch 5 -y\n")
    assert done.returncode == 2
    assert "--write" in done.stderr
    done = reg("shell", "--write", typed="write scratch 5 -y --verify\nscratch\n")
    assert done.returncode == 0, done.stderr
    assert "0x00000005" in done.stdout
    assert [line["source"] for line in recorded(tmp_path)] == ["shell"]


def test_a_shell_compares_its_own_device_with_a_dump(reg, tmp_path):
    file = tmp_path / "a.json"
    done = reg("shell", "--write",
               typed=f"dump -o {file} --space bar0\nwrite scratch 3 -y\ndiff {file} device --ignore clock\n")
    assert done.returncode == 1
    assert re.search(r"SCRATCH +0x00000000 +0x00000003", done.stdout)


SCRIPT = """
import sys
assert read("status.boot") == "RESET" and reg.status.boot == 0
assert reg.queue[3].tail.read() == 0 and int(reg.id) == 0x4149414d
caps = read("caps")
print(sys.argv[1], caps, caps.fp32, device.name == sys.argv[2], "BOOT" in dir(reg.status))
write("scratch", 0x77, verify=True)
assert reg.scratch == 0x77
reg.semaphore_op.write("index=70,op=SET,value=9")
print(wait("semaphore[70]", 9, timeout=5))
"""


def test_a_script_reads_registers_as_objects_and_writes_only_if_allowed(reg, path, tmp_path):
    file = tmp_path / "s.py"
    file.write_text(SCRIPT)
    done = reg("script", file, "hello", path, "--write")
    assert done.returncode == 0, done.stderr
    assert re.match(r"hello 0x0000[0-9a-f]{12} 1 True True\n0x00000009\n", done.stdout)
    assert {line["source"] for line in recorded(tmp_path)} == {f"script {file}"}
    done = reg("script", file, "hello", path)
    assert done.returncode == 2
    assert "--write" in done.stderr


@pytest.mark.parametrize(("code", "returned", "said"), [
    ("raise SystemExit(7)", 7, ""), ("import sys; sys.exit('no')", 1, "no"), ("1 / 0", 1, "ZeroDivisionError"),
    ("def", 2, "no Python file"), ("reg.stauts", 2, "STATUS"), ("wait('scratch', 1, timeout=0.01)", 6, "not 1"),
    ("assert reg.status.boot == 'READY'", 1, "AssertionError"), ("reg.queue[-1]", 2, "index"),
])
def test_how_a_script_fails(reg, tmp_path, code, returned, said):
    file = tmp_path / "s.py"
    file.write_text(code)
    done = reg("script", file)
    assert done.returncode == returned, done.stderr
    assert said in done.stderr
    assert "objects.py" not in done.stderr
