"""DMA by messages, where a reply and the end of its request meet."""

import errno

import pytest
from maia_emulator.message_dma import MessageDma

from maia_rt.transport import wire


class Client:
    """A connection whose client answers each request just after a bar has ended it."""

    def __init__(self, dma):
        self._dma = dma
        self.taken = []

    def send(self, header, body):
        message_id = wire.HEADER.unpack(header)[0]
        with self._dma.barred(0x1000, 0x1000):
            for _ in range(2):
                self.taken.append(self._dma.complete(message_id, wire.Command.DMA_READ, 0, body + bytes(16)))


def test_a_reply_that_meets_a_bar_is_in_order_and_a_second_one_is_not():
    """Refused, it would be answered with an error reply, which QEMU has no request for."""
    dma = MessageDma()
    client = Client(dma)
    dma.attach(client, 1 << 20)
    for _ in range(2):
        with pytest.raises(OSError) as refusal:
            dma.read(0x1000, 16)
        assert refusal.value.errno == errno.EFAULT
    assert client.taken == [True, False] * 2
