"""What a machine may lack for a test."""

import os

import pytest


def require(reason):
    """Skip where there is a reason, as `None` is none; CI can install what it lacks, so there it fails."""
    if reason is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
