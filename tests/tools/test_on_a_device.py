"""``maia info`` and ``bench`` on the emulated device, as a process and over a socket."""

import json


def test_info_shows_the_embedded_device(maia):
    done = maia("info")
    assert done.returncode == 0, done.stderr
    for word in ("emulated", "MAIA small", "1af4:10f0", "vfio-user", "1 GiB of HBM", "BAR 2", "64 of 4 to 65536"):
        assert word in done.stdout


def test_info_as_json_has_a_schema_and_every_part(maia):
    data = json.loads(maia("info", "--json").stdout)
    assert (data["schema"], data["kind"]) == (1, "info")
    (device,) = data["devices"]
    assert device["identity"]["contract"] == "1.2"
    assert device["capabilities"]["tiles"] == 4
    assert [bar["bar"] for bar in device["bars"]] == [0, 2, 4]
    assert device["queues"]["vectors"] == 65


def test_info_of_a_device_that_is_not_there_says_so_with_code_3(maia, tmp_path):
    done = maia("info", "--device", tmp_path / "nobody")
    assert done.returncode == 3
    assert "nobody" in done.stderr
    assert done.stderr.count("\n") == 3
    assert maia("info", "--device", "7").returncode == 3


def test_a_socket_of_somebody_elses_device_can_be_named(maia, start_emulator):
    _, (path,) = start_emulator()
    done = maia("info", "--json", "--device", path)
    assert json.loads(done.stdout)["devices"][0]["name"] == path, done.stderr
