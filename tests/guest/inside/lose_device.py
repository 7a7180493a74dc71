"""Opens our device, says so, and reads a register until the device is gone; prints how it was told.

Run in a guest: python3 tests/guest/inside/lose_device.py INTERFACE NUMBER; the host ends the emulator meanwhile.
"""

import sys
import time

from guest.inside.kernel_devices import MAIA, find, give

from maia_rt.errors import DeviceLost
from maia_rt.transport import open_device


def main(interface, number):
    deadline = time.monotonic() + 60
    with open_device(give(find(MAIA, int(number))), interface=interface) as device:
        print("opened", flush=True)
        while time.monotonic() < deadline:
            try:
                device.read(0, 0, 4)
            except DeviceLost as error:
                print(f"lost: {error}", flush=True)
                break
            time.sleep(0.05)
        else:
            print("still there", flush=True)
    print("closed", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
