"""A rank's command of a collective as a node of a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from maia_rt.errors import ClosedError, InvalidArgument
from maia_rt.runtime.graph_operation import CommandOperation, Listed

if TYPE_CHECKING:
    from maia_rt.collectives.member import Member


@dataclass(frozen=True, eq=False)
class RankOperation(CommandOperation):
    """A signal to a peer, or a copy or launch that reaches into peers' memory; it stays as it was captured."""

    member: Member
    listed: Listed
    text: str
    _is_asked = True

    @property
    def noun(self) -> str:
        """For texts."""
        return "part of a collective"

    def changed(self, **changes: Any) -> RankOperation:
        """Refused."""
        raise InvalidArgument(f"a {self.noun} cannot be changed", hint="capture the collective anew")

    def _listed(self) -> Listed:
        return self.listed

    def _require_open(self) -> None:
        if self.member.closed:
            raise ClosedError(f"the communicator of a {self.text} has been closed",
                              hint="keep it open as long as the graph is launched")

    @property
    def _text(self) -> str:
        return self.text
