"""Programs that these tests start find the emulator, installed or not."""

import os

import pytest

from tests.helpers.emulator import environment


@pytest.fixture(autouse=True)
def paths_for_the_embedded_emulator(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.delenv("MAIA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("MAIA_FIRST_INDEX", os.environ.get("MAIA_FIRST_INDEX", str(2**32 - 3)))
