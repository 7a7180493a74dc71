"""Copies to our device and back until it is lost or wanted back; prints how it was told.

Run in a guest: python3 tests/guest/inside/keep_working.py ADDRESS
"""

import sys
import time

import numpy as np

import maia_rt
from maia_rt.errors import DeviceLost

SECONDS = 200


def main(address):
    deadline = time.monotonic() + SECONDS
    data = np.arange(10_000, dtype=np.int32)
    done = 0
    with maia_rt.open(address) as device:
        print("opened", flush=True)
        try:
            while time.monotonic() < deadline:
                with device.upload(data + done) as buffer:
                    assert (buffer.copy_to_host() == data + done).all()
                done += 1
                if done == 1:
                    print("working", flush=True)
                device.transport.service()
                if device.transport.release_requested:
                    print(f"wanted back after {done} rounds", flush=True)
                    break
                time.sleep(0.02)
        except DeviceLost as error:
            # Said before the device is closed: the kernel waits a minute and more for one that does not come back.
            print(f"DeviceLost after {done} rounds: {error}", flush=True)
    print("closed", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
