"""Nodes of graphs: what each does, what it comes after, and who made it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from maia_rt.runtime.graph_operation import Operation

if TYPE_CHECKING:
    from maia_rt.runtime.graph_builder import GraphBuilder


class GraphNode:
    """A node of a graph; made by the methods of :class:`maia_rt.GraphBuilder`, or by a capture.

    Attributes
    ----------
    after : tuple of GraphNode
        It starts when these are done.
    where : str
        ``file:line`` that made it.
    """

    def __init__(self, builder: GraphBuilder, operation: Operation | None, after: tuple[GraphNode, ...], where: str,
                 body: GraphBuilder | None = None) -> None:
        self._builder = builder
        self._operation = operation
        self._body = body
        self.after = after
        self.where = where

    @property
    def name(self) -> str:
        """Such as ``launch of axpy`` or ``copy of 4096 bytes``, as it was made."""
        return self._operation._text if self._operation is not None else "child" if self._body is not None else "join"

    def __repr__(self) -> str:
        return f"<GraphNode {self.name}, {self.where}>"


def caller() -> str:
    """The line outside of this package that is calling."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("maia_rt.", "contextlib")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
