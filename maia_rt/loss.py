"""What a fault cost: the commands that failed or never ran."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType
from typing import Any

from maia_rt._fast.ring import Account
from maia_rt.contract.commands import decode
from maia_rt.observe.sites import describe


@dataclass(frozen=True, repr=False)
class LostCommand:
    """A command that failed, or that never ran because one before it on its stream failed.

    Attributes
    ----------
    sequence : int
        Its number on its queue.
    raw : bytes
        The 64 bytes.
    """

    sequence: int
    raw: bytes
    _site: tuple[CodeType, int] | None = None

    @property
    def command(self) -> str:
        """The command, decoded."""
        return decode(self.raw)

    @property
    def where(self) -> str:
        """``file:line`` that submitted it, empty where that is not known."""
        return describe(self._site)

    def __repr__(self) -> str:
        return f"<LostCommand {self.sequence}: {self.command}{', ' + self.where if self.where else ''}>"


class Loss:
    """What one fault cost on one queue.

    Parameters
    ----------
    sequences : iterable of int
    facts : dict
        About the fault, as `DeviceFault` takes them.
    at_close : bool
        Whether they never ran because their queue was closed.
    """

    def __init__(self, sequences: Iterable[int], facts: dict[str, Any], *, at_close: bool = False) -> None:
        found = sorted(sequences)
        self.facts = facts
        self.at_close = at_close
        # Without gaps, as on a queue that one stream has for itself, a range says it all.
        whole = bool(found) and found[-1] - found[0] + 1 == len(found)
        self._sequences = range(found[0], found[-1] + 1) if whole else frozenset(found)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences


def charge(account: Account, facts: dict[str, Any], lost: list[LostCommand], failed: int | None) -> dict[str, Any]:
    """Note on a stream's account what it lost; return the facts of the fault that it stands still for.

    That is an earlier one where the stream has failed before and nobody has recovered it since.

    Parameters
    ----------
    account : Account
    facts : dict
    lost : list of LostCommand
    failed : int or None
        The sequence number of the one that failed; the others were aborted.
    """
    account.lost.extend(lost)
    failures = sum(command.sequence == failed for command in lost)
    account.failed += failures
    account.aborted += len(lost) - failures
    if account.failure is None:
        account.failure = facts | {"stream": account.name, "lost": account.lost}
    return account.failure
