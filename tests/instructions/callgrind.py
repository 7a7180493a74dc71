"""What the project's own code cost in one of callgrind's files (valgrind's manual: Callgrind Format Specification)."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DRIVER, DEVICE = f"{ROOT}/maia_rt/_fast/", f"{ROOT}/emulator/maia_emulator/"
"""Where the code lies that is counted. What it calls of Python and of the C library is not: others' versions differ."""
ROUND = "__pyx_f_13maia_emulator_6queues_serve"
"""The function that has one round of a device's queues."""


@dataclass
class Part:
    """What was counted between two marks, of one folder.

    Attributes
    ----------
    instructions : int
        Executed in the extension modules of one folder.
    calls : int
        From there into Python and the C library.
    rounds : int
        Calls of `ROUND`.
    """

    instructions: int = 0
    calls: int = 0
    rounds: int = 0


def read(text, folder):
    """Add up what the code in `folder` cost; names and numbers are written in full, not compressed."""
    part = Part()
    ours = False
    callee = name = ""
    lines = iter(text.splitlines())
    for line in lines:
        key, _, value = line.partition("=")
        if key == "ob":
            ours = value.startswith(folder)
        elif key == "cob":      # only where it is another than the caller's
            callee = value
        elif key == "cfn":
            name = value
        elif key == "calls":
            times = int(value.split()[0])
            next(lines)         # what the callee cost: counted where it is
            if ours and callee and not callee.startswith((DRIVER, DEVICE)):
                part.calls += times
            if name.startswith(ROUND):
                part.rounds += times
            callee = ""
        elif ours and line[:1].isdigit():
            part.instructions += int(line.split()[1])
    return part
