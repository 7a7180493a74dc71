"""maia ls, bind and release on whatever machine this is: they look, explain and change nothing here."""

import json

import pytest

from maia_rt.pci import functions
from maia_rt.pci.class_code import is_endpoint


def test_ls_shows_every_function_and_by_default_those_for_programs(maia):
    found = functions()
    listed = json.loads(maia("ls", "--all", "--json").stdout)
    assert (listed["schema"], listed["kind"]) == (1, "ls")
    assert [row["address"] for row in listed["functions"]] == [str(one.address) for one in found]
    shown = maia("ls")
    assert shown.returncode == 0
    assert [line.split()[0] for line in shown.stdout.splitlines()] == [
        "address", *(str(one.address) for one in found if is_endpoint(one.class_code))]


def test_what_keeps_a_function_from_being_bound_is_what_bind_says(maia):
    rows = json.loads(maia("ls", "--all", "--json").stdout)["functions"]
    for row in [row for row in rows if not row["bindable"] and not row["bound"]][:3]:
        done = maia("bind", row["address"], "--dry-run")
        assert done.returncode in (1, 2, 3), row
        assert [line.split(":")[0].strip() for line in done.stderr.splitlines()] == ["maia", "cause", "try"]


@pytest.mark.parametrize("verb", ["bind", "release"])
def test_a_function_that_is_not_there_is_no_device(maia, verb):
    done = maia(verb, "fffe:ff:1f.7", "--dry-run")
    assert done.returncode == 3
    assert "fffe:ff:1f.7" in done.stderr
