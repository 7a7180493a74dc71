"""Whether this machine can have the guest lab."""

from guest.lab import debian
from helpers import lacking


def require():
    """Skip where there can be no lab; but CI can have one, so there it fails."""
    lacking.require(debian.missing())
