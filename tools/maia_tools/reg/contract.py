"""The contract's registers as this tool's: BAR 0, and in BAR 2 a doorbell page a queue and the semaphore window."""

from __future__ import annotations

from maia_rt.contract import register as contract
from maia_rt.contract.function import DOORBELL_STRIDE
from maia_rt.contract.registers import BAR0, DOORBELL
from maia_tools.reg.model import Field, Register, Segment

MOST_QUEUES = 1 << 16
MOST_SEMAPHORES = 1 << 16
WORD = 4


def _field(item: contract.Field, by_profile: bool) -> Field:
    names = {int(m): (m.name, "") for m in item.enum} if item.enum is not None else {}
    reset = None if by_profile and not item.reset else item.reset
    return Field(item.name, item.lsb, item.width, item.access, reset, item.description, names=names)


def _register(item: contract.Register, *outer: Segment) -> Register:
    # "(by profile)": a constant that is another one on another device, so the zero in the description says nothing.
    by_profile = "by profile" in item.description
    return Register((*outer, Segment(item.name)), item.offset, item.width_bytes,
                    tuple(_field(f, by_profile) for f in item.fields), item.description)


def bar0() -> list[Register]:
    """The registers of BAR 0."""
    return [_register(r) for r in BAR0.values()]


def bar2(queues: int = MOST_QUEUES, window: int | None = None, semaphores: int = MOST_SEMAPHORES) -> list[Register]:
    """The doorbell pages and, where `window` (bytes from the start of BAR 2) is known, the semaphores."""
    page = Segment("queue", ((queues, DOORBELL_STRIDE),))
    found = [_register(r, page) for r in DOORBELL.values()]
    if window is not None:
        field = Field("VALUE", 0, 32, "rw", 0, "Count, modulo 2^32.")
        found.append(Register((Segment("semaphore", ((semaphores, WORD),)),), window, WORD, (field,),
                              "A semaphore. The first ones mirror the progress of the queues of the same ids and are "
                              "read-only."))
    return found
