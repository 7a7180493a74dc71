"""The register tool in a guest, on edu, nvme and our device; and the sessions in its documentation, once more."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(900)
def test_the_register_tool_works_on_edu_nvme_and_our_device_and_prints_what_the_documentation_shows(boot):
    guest = boot(kernel="own", edu=1, nvme=True)
    run = guest.pytest("tests/guest/inside/test_reg.py", timeout=400)
    assert run.failed == [], run.output
    assert run.skipped == [], run.output
    assert len(run.passed) >= 16
    spec = importlib.util.spec_from_file_location("capture_sessions", ROOT / "tools/capture_sessions.py")
    sessions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sessions)
    assert shape(sessions.capture(guest)) == shape(sessions.PAGE.read_text())


def shape(text):
    """Lines without their numbers: a value, or a counter, may be another one on another machine."""
    return [re.sub(r"\s+", " ", re.sub(r"0x[0-9a-f]+|\b\d+\b", "N", line)) for line in text.splitlines()]
