"""A stream that stands still until the test lets it go on."""

import contextlib

from maia_rt.contract.commands import Opcode, PostOp, WaitOp

SEMAPHORE = 900


@contextlib.contextmanager
def blocked(stream, semaphore=SEMAPHORE):
    """Hold up what is submitted to `stream` inside of the block; all of it is done after it."""
    stream._submit(Opcode.NOP, pre=((semaphore, WaitOp.ACQUIRE, 1),), unbounded=True)
    try:
        yield
    finally:
        with stream.device.create_stream() as other:
            other._submit(Opcode.NOP, post=((semaphore, PostOp.ADD, 1),))
        stream.synchronize()
