"""Kernels run in the interpreter, which finds missing waits, under three devices' capabilities."""

from __future__ import annotations

import pytest

from tests.helpers.launching import LONE, SMALL, TIGHT, InterpreterLauncher, Launcher


@pytest.fixture(params=["interpreter-small", "interpreter-tight", "interpreter-lone"])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    """Somewhere to run kernels."""
    capabilities = {"small": SMALL, "tight": TIGHT, "lone": LONE}[request.param.split("-")[1]]
    return InterpreterLauncher(capabilities)
