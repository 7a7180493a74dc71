"""Commands as lines of text: what faults and hang reports show."""

import pytest

from maia_rt._fast.command import Command
from maia_rt.contract.commands import BranchSource, Condition, Opcode, PostOp, WaitOp, decode


@pytest.mark.parametrize(("command", "text"), [
    (Command.copy(0x2000, 0x1000, 64).pre(0, 70, WaitOp.GE, 3).post(1, 71, PostOp.ADD, 1),
     "COPY src=0x1000 dst=0x2000 size=64 pre=[#70>=3] post=[#71+=1]"),
    (Command.wait_value(0x10040, 3), "WAIT_VALUE until u32[0x10040] >= 3"),
    (Command.wait_value(0x10040, 0x80, Condition.EQ, 0xFF), "WAIT_VALUE until u32[0x10040]&0xff == 128"),
    (Command.wait_value(0x10040, 0x80, Condition.AND), "WAIT_VALUE until u32[0x10040] & 0x80 != 0"),
    (Command.branch(4, 70, 10, Condition.NE, source=BranchSource.SEMAPHORE), "BRANCH to 4 if #70 != 10"),
    (Command.branch(0, 0x40, 1, Condition.GE, flags=1), "BRANCH to 0 if u32[0x40] >= 1 BARRIER"),
    (Command.branch(0, 0x40, 1, 9), "BRANCH to 0 if u32[0x40] condition 9? 1"),
    (Command.indirect(0x4000, 7), "INDIRECT list=0x4000 count=7"),
    (Command.indirect(0x4000, 7, times=0x80, concurrent=True), "INDIRECT list=0x4000 count=7 CONCURRENT times=0x80"),
    (Command(Opcode.INDIRECT, 0, 0, 0x4000, 1 | 6 << 32), "INDIRECT list=0x4000 count=1 options=0x6"),
    (Command.crc(0x10, 8, 0x20), "CRC src=0x10 size=8 result=0x20"),
    (Command.crc(0x10, 8, 0x20, expected=True), "CRC src=0x10 size=8 expected=0x20"),
])
def test_a_command_reads_as_what_it_does(command, text):
    assert decode(bytes(command)) == text


def test_noise_decodes_to_something():
    for opcode in range(256):
        assert decode(bytes([opcode]) + bytes(range(63)))
