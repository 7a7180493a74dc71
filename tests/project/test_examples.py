"""Every example in the README, the docs and examples/ runs as it stands."""

import ast
import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ON_A_DEVICE = ["collectives.md", "cuda.md", "emulator.md", "graphs.md", "hangs.md", "injection.md", "memory.md",
               "peers.md", "sharing.md", "streams.md", "streams-and-failures.md", "training.md", "types.md"]
"""Pages whose pieces of code are one program that is given an open `device`, `maia_rt` and numpy as `np`."""
STORIES = {"any-pci-device.md", *ON_A_DEVICE}
"""Pages whose pieces of code are one program."""
BLOCKS = [(page, number, code) for page in PAGES if page.exists()
          if page.name not in STORIES for number, code in enumerate(FENCE.findall(page.read_text()), 1)]
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "train_digits.py")
"""But for the one that test_train_digits.py is about."""
FOR_OTHER_DEVICES = [path for path in SCRIPTS if path.name in ("edu.py", "nvme_identify.py")]
"""They drive devices of QEMU, so they run in a guest: tests/guest/test_examples.py."""
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "emulator", "tools"))}


def run(source, cwd):
    done = subprocess.run([sys.executable, "-W", "error", *source], cwd=cwd, env=ENV, capture_output=True, text=True,
                          timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize(("page", "code"), [pytest.param(p, c, id=f"{p.name}-{n}") for p, n, c in BLOCKS])
def test_python_in_the_documentation_runs(page, code, tmp_path):
    run(["-c", code], tmp_path)


@pytest.mark.parametrize("page", ON_A_DEVICE)
def test_a_page_about_the_runtime_runs_from_top_to_bottom(page, tmp_path):
    story = "\n".join(FENCE.findall((ROOT / "docs" / page).read_text()))
    given = "import maia_rt\nimport numpy as np\nwith maia_rt.open('emulated') as device:\n    exec(story)"
    run(["-c", f"story = {story!r}\n{given}"], tmp_path)


def test_the_page_about_any_pci_device_runs_on_a_socket(emulator, tmp_path):
    story = "\n".join(FENCE.findall((ROOT / "docs/any-pci-device.md").read_text()))
    assert story.count('"0000:3b:00.0"') == 1
    done = run(["-c", story.replace("0000:3b:00.0", emulator[1])], tmp_path)
    assert "1af4:10f0, class 120000" in done.stdout
    assert "MSIX vector 1 fired 1 time(s)" in done.stdout
    assert "there is no PCI function 0000:7f:1f.7" in done.stdout


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path not in FOR_OTHER_DEVICES], ids=lambda p: p.name)
def test_example_runs(script, tmp_path):
    run([script], tmp_path)


# --- examples for devices of others: what can be said of them without such a device ----------------------------------

BASE = {"maia_rt.errors", "maia_rt.memory", "maia_rt.pci", "maia_rt.transport"}


@pytest.mark.parametrize("script", FOR_OTHER_DEVICES, ids=lambda p: p.name)
def test_a_driver_of_any_device_needs_the_lower_layers_and_the_standard_library_only(script):
    imported = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            imported.add(node.module)
    assert imported & BASE
    assert {name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names} <= BASE


def test_a_whole_driver_can_be_read_at_one_sitting():
    assert len((ROOT / "examples/edu.py").read_text().splitlines()) < 200


@pytest.mark.parametrize("script", FOR_OTHER_DEVICES, ids=lambda p: p.name)
def test_a_driver_of_any_device_explains_itself_and_its_errors(script, tmp_path, emulator):
    assert "a PCI address" in run([script, "--help"], tmp_path).stdout
    for device, what in (("0000:7f:1f.7", "there is no PCI function 0000:7f:1f.7"),
                         (f"{tmp_path}/none", f"there is no socket {tmp_path}/none"),
                         (emulator[1], f"{emulator[1]}: ")):
        done = subprocess.run([sys.executable, "-W", "error", script, device], env=ENV, capture_output=True, text=True,
                              timeout=100, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        said, cause, hint = done.stderr.splitlines()
        assert said.startswith(what)
        assert cause.startswith("  likely cause: ")
        assert hint.startswith("  try: ")


@pytest.mark.timeout(300)
def test_drivers_of_any_device_fit_the_librarys_types():
    done = subprocess.run(["mypy", "--allow-untyped-defs", "--allow-untyped-calls", "--check-untyped-defs",
                           *map(str, FOR_OTHER_DEVICES)], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_has_an_example_a_newcomer_can_take_in():
    blocks = [code for page, _, code in BLOCKS if page.name == "README.md"]
    assert blocks
    assert all(len(code.splitlines()) <= 24 for code in blocks)


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", page.read_text()):
            if not target.startswith("http") and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


MODULES = sorted(p for folder in ("maia_rt", "emulator/maia_emulator", "tools/maia_tools")
                 for p in (ROOT / folder).rglob("*.py") if ">>> " in p.read_text())


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_in_docstrings_run(path):
    name = str(path.relative_to(ROOT)).removeprefix("emulator/").removeprefix("tools/").removesuffix(".py")
    module = __import__(name.replace("/", "."), fromlist=["_"])
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
