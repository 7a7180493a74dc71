"""The API reference is made from the docstrings, leaves nothing out and has nothing to complain about."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import maia_rt

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Where the reference has been built."""
    folder = tmp_path_factory.mktemp("reference")
    done = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", f"{folder}/trees",
                           ROOT / "docs/api", f"{folder}/html"], capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "html"


@pytest.mark.timeout(300)
def test_the_reference_builds_without_warnings(built):
    assert (built / "runtime.html").exists()


@pytest.mark.timeout(300)
def test_every_public_name_is_in_the_reference(built):
    found = set(re.findall(r'id="maia_rt\.([\w.]+)"', (built / "runtime.html").read_text()))
    wanted = set(maia_rt.__all__) - {"__version__"}
    for name in list(wanted):
        value = getattr(maia_rt, name)
        if inspect.isclass(value):
            wanted |= {f"{name}.{member}" for member, what in inspect.getmembers(value)
                       if not member.startswith("_") and (inspect.isfunction(what) or isinstance(what, property))
                       and (getattr(what, "__module__", None) or "maia_rt").startswith("maia_rt")}
    assert not wanted - found
