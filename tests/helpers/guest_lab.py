"""Whether this machine can have the guest lab."""

import os

import pytest
from guest.lab import debian


def require():
    """Skip where there can be no lab; but CI can have one, so there it fails."""
    reason = debian.missing()
    if reason is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
