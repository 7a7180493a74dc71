"""``maia info``, ``reg`` and ``bench`` on the emulated device, as a process and over a socket."""

import json

import pytest

from maia_rt.contract.registers import BAR0


def test_info_shows_the_embedded_device(maia):
    done = maia("info")
    assert done.returncode == 0, done.stderr
    for word in ("emulated", "MAIA small", "1af4:10f0", "vfio-user", "1 GiB of HBM", "BAR 2", "64 of 4 to 65536"):
        assert word in done.stdout


def test_info_as_json_has_a_schema_and_every_part(maia):
    data = json.loads(maia("info", "--json").stdout)
    assert (data["schema"], data["kind"]) == (1, "info")
    (device,) = data["devices"]
    assert device["identity"]["contract"] == "1.0"
    assert device["capabilities"]["tiles"] == 4
    assert [bar["bar"] for bar in device["bars"]] == [0, 2, 4]
    assert device["queues"]["vectors"] == 65


def test_info_of_a_device_that_is_not_there_says_so_with_code_3(maia, tmp_path):
    done = maia("info", "--device", tmp_path / "nobody")
    assert done.returncode == 3
    assert "nobody" in done.stderr
    assert done.stderr.count("\n") == 1
    assert maia("info", "--device", "7").returncode == 3


def test_a_socket_of_somebody_elses_device_can_be_named(maia, start_emulator):
    _, (path,) = start_emulator()
    done = maia("info", "--json", "--device", path)
    assert json.loads(done.stdout)["devices"][0]["name"] == path, done.stderr


def test_every_readable_register_is_read_without_booting(maia, start_emulator):
    _, (path,) = start_emulator()
    data = json.loads(maia("reg", "read", "--json", "-d", path).stdout)
    by_name = {r["name"]: r for r in data["registers"]}
    assert set(by_name) == {r.name for r in BAR0.values() if r.readable}
    assert by_name["ID"]["value"] == "0x4149414d"
    assert by_name["STATUS"]["names"] == {"BOOT": "RESET"}
    assert len(by_name["CAPS"]["value"]) == 2 + 16, "padded to the register's width"


def test_one_field_a_doorbell_and_a_bare_offset_can_be_read(maia, start_emulator):
    _, (path,) = start_emulator()
    done = maia("reg", "read", "STATUS.BOOT", "Q3.NEEDS_WAKE", "BAR2:0x0", "-d", path)
    assert done.returncode == 0, done.stderr
    assert "STATUS.BOOT" in done.stdout
    assert "0 (RESET)" in done.stdout


def test_a_write_shows_what_changes_and_what_came_of_it(maia, start_emulator):
    _, (path,) = start_emulator()
    done = maia("reg", "write", "SCRATCH", "0xdeadbeef", "--yes", "-d", path)
    assert done.stdout == "SCRATCH 0x00000000 -> 0xdeadbeef\n", done.stderr
    assert ".VALUE (rw)  0x0 -> 0xdeadbeef" in done.stderr
    done = maia("reg", "write", "CONTROL.RESET", "1", "--yes", "--json", "-d", path)
    assert json.loads(done.stdout)["written"] == "0x00000002"


@pytest.mark.timeout(180)
def test_bench_measures_everything_and_compares_with_its_references(maia):
    done = maia("bench", "--json", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["schema"] == 1
    assert data["device"]["emulated"] is True
    names = [r["name"] for r in data["results"]]
    for wanted in ("submit, encoded on the way", "submit, pre-encoded", "submit, numpy batch of 32",
                   "submit and wait, NOP", "shared word, round trip", "register read", "socket, round trip"):
        assert wanted in names
    for size in ("64 B", "1 MiB", "64 MiB"):
        assert f"memcpy {size}" in names
        assert f"copy {size} host to device, pinned (direct)" in names
        assert f"copy {size} device to host, plain (staged)" in names
    assert all(r["median_ns"] > 0 for r in data["results"])
    assert {b["unit"] for b in data["bars"]} == {"ns", "x"}
