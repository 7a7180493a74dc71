"""The wheel and the sdist: what is in them, and that what is installed works away from the source tree."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(600)


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of a clean copy of the tree, and the wheel that is built from that sdist alone."""
    work = tmp_path_factory.mktemp("dist")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout
    source = work / "source"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    env = os.environ | {"PYTHONPATH": "", "MAIA_CFLAGS": "-O0"}  # what is in them is looked at, not how fast it is
    # Both are built with what the virtual environment has, so that no network is needed.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "out", cwd=source, env=env)
    (sdist,) = (work / "out").glob("*.tar.gz")
    (wheel,) = (work / "out").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A fresh virtual environment with the wheel, and the dependencies (not us) of the one that runs the tests."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home / "venv", with_pip=False, symlinks=True)
    python = home / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", built[1])
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    # A line of a .pth file is a place to import from; the .pth files in there, an editable install's too, do not run.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def test_the_sdist_has_the_sources_and_nothing_generated_by_cython(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for wanted in ("LICENSE", "README.md", "CHANGELOG.md", "Makefile", "setup.py", "maia_rt/_fast/ring.pyx",
                   "maia_rt/_fast/commands.pxd", "maia_rt/contract/registers.rdl", "tools/generate.py",
                   "docs/contract.md", "tests/conftest.py"):
        assert wanted in names
    csrc = {f"emulator/maia_emulator/csrc/{p.name}" for p in (ROOT / "emulator/maia_emulator/csrc").glob("*.[ch]")}
    assert csrc <= names
    assert [n for n in names if re.search(r"\.(so|pyc)$|^(maia_rt/_fast|emulator/maia_emulator)/[^/]*\.c$", n)] == []


def test_the_wheel_has_extensions_stubs_and_the_register_description_and_no_c(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    tag = sysconfig.get_config_var("EXT_SUFFIX")
    for folder, package in (("maia_rt/_fast", "maia_rt/_fast"), ("emulator/maia_emulator", "maia_emulator")):
        for source in (ROOT / folder).glob("*.pyx"):
            assert f"{package}/{source.stem}{tag}" in names
            assert f"{package}/{source.stem}.pyi" in names
    folders = ("maia_rt", "emulator/maia_emulator", "tools/maia_tools")
    modules = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    missing = {str(p.relative_to(ROOT)).removeprefix("emulator/").removeprefix("tools/") for p in modules} - names
    assert not missing, "is every package listed in pyproject.toml?"
    assert {"maia_rt/py.typed", "maia_rt/contract/registers.rdl", "maia_rt/_fast/commands.pxd"} <= names
    assert [n for n in names if n.endswith((".c", ".h", ".pyx"))] == []
    tops = {n.split("/")[0] for n in names}
    assert {n for n in tops if not n.endswith(".dist-info")} == {"maia_rt", "maia_emulator", "maia_tools"}


def test_the_installed_wheel_opens_a_device_and_copies_away_from_the_source_tree(installed):
    env = {"PATH": f"{installed}/venv/bin:/usr/bin:/bin", "HOME": str(installed)}
    code = """
import maia_rt, maia_emulator, maia_tools, sys
assert all(m.__file__.startswith(sys.prefix) for m in (maia_rt, maia_emulator, maia_tools))
with maia_rt.open("emulated") as device, device.create_stream() as stream:
    buffer = device.allocate(4096)
    stream.copy(buffer, bytes(range(256)) * 16)
    back = bytearray(4096)
    stream.copy(back, buffer)
    stream.synchronize()
assert bytes(back) == bytes(range(256)) * 16
print("copied")
"""
    done = run(installed / "venv/bin/python", "-W", "error", "-c", code, cwd=installed, env=env)
    assert done.stdout == "copied\n"
    done = run(installed / "venv/bin/maia", "--version", cwd=installed, env=env)
    assert re.fullmatch(r"maia \d+\.\d+\.\d+\S*\n", done.stdout)
