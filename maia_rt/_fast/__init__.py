"""The hot path in Cython: ring, polling, barriers, command encoding; and the shared layouts as pxds."""
