"""Programs that open a share, use it without end, and are killed, while another one must not notice.

As a process, python nursery.py PATH BYTES: each line of its input starts a program, by fork, so that none waits for
imports. It prints the program's pid once it is busy, and ``ended STATUS`` when it is gone.
"""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np

import maia_rt


def live(path, size):
    """Find the share clean, leave traces, tell, and copy for ever."""
    device = maia_rt.open(f"share:{path}")
    assert not device.allocate(1 << 20).copy_to_host().any(), "somebody else's memory"
    assert not device.allocate(4096, space=maia_rt.Space.tile(0)).copy_to_host().any(), "somebody else's SRAM"
    data = np.full(size, 0xA5, np.uint8)
    stream, there, back = device.create_stream(), device.allocate(size), np.empty_like(data)
    sram = device.allocate(4096, space=maia_rt.Space.tile(0))
    stream.fill(sram, 0xA5)
    stream.copy(there, data)
    stream.synchronize()
    os.write(1, b"%d\n" % os.getpid())
    while True:
        stream.copy(there, data)
        stream.copy(back, there)


def nurse(path, size):
    """Start programs, one at a time, until the input ends."""
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            live(path, size)
        _, status = os.waitpid(pid, 0)
        os.write(1, b"ended %d\n" % status)


def outlive(path, stream, *, size, rounds):
    """Kill as many programs in the middle of a copy, and lose nothing of what a stream of this program copies."""
    process = subprocess.Popen([sys.executable, __file__, path, str(size)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, bufsize=0)
    rng = random.Random(1)
    kept = np.frombuffer(rng.randbytes(size // 2), np.uint8)
    back = np.zeros_like(kept)
    try:
        with stream.device.upload(kept) as memory:
            for number in range(rounds):
                process.stdin.write(b"go\n")
                word = process.stdout.readline()
                assert word.strip().isdigit(), f"round {number}: {word}"
                stream.copy(back, memory)
                time.sleep(rng.uniform(0, 0.01))
                os.kill(int(word), signal.SIGKILL)
                assert process.stdout.readline() == b"ended 9\n"
                stream.synchronize()
                assert (back == kept).all(), f"round {number}"
                back[:] = 0
        assert not stream.device.faults().size
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    nurse(sys.argv[1], int(sys.argv[2]))
