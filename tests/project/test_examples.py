"""Every example in the README, the docs and examples/ runs as it stands."""

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
BLOCKS = [(page, number, code) for page in PAGES if page.exists()
          for number, code in enumerate(FENCE.findall(page.read_text()), 1)]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "emulator", "tools"))}


def run(source, cwd):
    done = subprocess.run([sys.executable, "-W", "error", *source], cwd=cwd, env=ENV, capture_output=True, text=True,
                          timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize(("page", "code"), [pytest.param(p, c, id=f"{p.name}-{n}") for p, n, c in BLOCKS])
def test_python_in_the_documentation_runs(page, code, tmp_path):
    run(["-c", code], tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_example_runs(script, tmp_path):
    run([script], tmp_path)


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
